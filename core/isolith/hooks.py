"""The hook that a plugin implements."""

import pluggy

from isolith.backend import Backend

hookspec = pluggy.HookspecMarker("isolith")
hookimpl = pluggy.HookimplMarker("isolith")


@hookspec
def isolith_backend() -> Backend:  # type: ignore[empty-body]  # a hook specification has no body
    """Describe the backend; called once, in the process that uses it, before any of its kernels is imported."""
