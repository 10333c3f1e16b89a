"""A backend: what one vendor's runtime is called, whether it is here, and where its kernels are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from isolith.kernel import WhyNot

API_VERSION = 1
"""The version of the plugin interface: `Backend`, `KernelPack`, `Requires`, `implements` and the hooks."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What a plugin's `isolith_backend` hook returns.

    Args:
        name: As written in ISOLITH_BACKEND and in the entry point.
        device_type: The torch device type whose tensors it takes.
        api_version: The plugin interface it was written for, as a literal number.
        why_unavailable: None where the device and its software are present, else a sentence.
        kernels: Modules that hold `implements`-marked functions, imported on first use and only when available.
        arch: The device's architecture as a version, such as "9.0"; None when there is no such thing.
        versions: Versions of the vendor's software by distribution name.
        reference_is_native: The reference is this backend's own implementation where it has no kernel of its own, so
            running it is no step down. True for `cpu` alone.
        twin: A module that sets up a simulated device of this backend's type, for conformance runs without hardware.
    """

    name: str
    device_type: str
    api_version: int
    why_unavailable: Callable[[], WhyNot]
    kernels: tuple[str, ...]
    arch: Callable[[], str] | None = None
    versions: Callable[[], Mapping[str, str]] | None = None
    reference_is_native: bool = False
    twin: str | None = None


@dataclass(frozen=True, kw_only=True)
class KernelPack:
    """What a plugin's `isolith_kernels` hook returns: kernels for a backend that another plugin brings.

    Args:
        name: As in the entry point: the backend's name, a dot, its own: "acme.fast".
        api_version: The plugin interface it was written for, as a literal number.
        kernels: Modules that hold `implements`-marked functions, imported on first use and only when available.
        why_unavailable: None where what the kernels need is present, else a sentence.
    """

    name: str
    api_version: int
    kernels: tuple[str, ...]
    why_unavailable: Callable[[], WhyNot] = lambda: None

    @property
    def backend(self) -> str:
        """The name of the backend that it adds to."""
        return self.name.partition(".")[0]
