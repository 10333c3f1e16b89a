"""Everything that this project raises or warns, on one screen."""

import difflib
from collections.abc import Iterable


class IsolithError(Exception):
    """The base of every error raised here."""


class ArgumentError(IsolithError, ValueError):
    """A call that no backend could run: raised before anything is written."""


class Unsupported(IsolithError):  # noqa: N818  # the word that kernels raise, and design pages use
    """A kernel declines this call; the next step of the ladder is tried.

    The only exception that moves on. A kernel raises it before it has written anything.
    """


class OutOfMemoryError(IsolithError, MemoryError):
    """A call whose results the host has no room for: raised before anything is allocated."""


class NoKernelError(IsolithError):
    """No step of the ladder that the settings allow takes this call."""


class ConfigError(IsolithError, ValueError):
    """A setting with an unknown name or an illegal value."""


class PluginError(IsolithError):
    """A backend that was asked for by name cannot be used; the message keeps the whole reason."""


class FrozenError(IsolithError):
    """A choice was asked for after `isolith.freeze()`."""


class FallbackWarning(UserWarning):
    """A call ran on a lower step of the ladder than its backend's own kernel."""


class ShadowWarning(UserWarning):
    """A kernel's results are not what the reference beside it gives, or shadow runs cannot be made."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint naming the known word closest to `name`, or the whole list when none is close."""
    words = sorted(known)
    close = difflib.get_close_matches(name, words, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"known: {', '.join(words)}."
