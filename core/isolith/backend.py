"""A backend: what one vendor's runtime is called, whether it is here, and where its kernels are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from isolith.kernel import WhyNot

API_VERSION = 1
"""The version of the plugin interface: `Backend`, `Requires`, `implements` and the hook."""


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
