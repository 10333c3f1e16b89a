"""The hooks of plugins; a plugin implements one of them."""

import pluggy

from isolith.backend import Backend, KernelPack

hookspec = pluggy.HookspecMarker("isolith")
hookimpl = pluggy.HookimplMarker("isolith")


@hookspec
def isolith_backend() -> Backend:  # type: ignore[empty-body]  # a hook specification has no body
    """Describe the backend; called once, in the process that uses it, before any of its kernels is imported."""


@hookspec
def isolith_kernels() -> KernelPack:  # type: ignore[empty-body]  # a hook specification has no body
    """Describe kernels for another plugin's backend; called as `isolith_backend` is."""
