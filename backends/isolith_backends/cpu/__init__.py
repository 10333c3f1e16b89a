"""The host: what is faster than the reference on a CPU, and nothing else.

Always available. Where it has no kernel, the reference is its implementation.
"""

from isolith import Backend, WhyNot, hookimpl


def why_unavailable() -> WhyNot:
    """Never."""
    return None


@hookimpl
def isolith_backend() -> Backend:
    """Describe the backend."""
    return Backend(
        name="cpu",
        device_type="cpu",
        api_version=1,
        why_unavailable=why_unavailable,
        kernels=(
            "isolith_backends.cpu.native.norm",
            "isolith_backends.cpu.native.products",
            "isolith_backends.cpu.native.routing",
            "isolith_backends.cpu.native.residual",
            "isolith_backends.cpu.native.rotary",
            "isolith_backends.cpu.native.attention",
            "isolith_backends.cpu.native.indexer",
            "isolith_backends.cpu.native.mla",
            "isolith_backends.cpu.native.quant",
            "isolith_backends.cpu.native.cache",
            "isolith_backends.cpu.native.compress",
            "isolith_backends.cpu.attention",
            "isolith_backends.cpu.moe",
        ),
        reference_is_native=True,
    )
