"""NVIDIA GPUs: Triton kernels, torch's own fused calls, and faster libraries where they are installed."""

from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from isolith import Backend, WhyNot, hookimpl
from isolith_backends.cuda.launch import capability


def why_unavailable() -> WhyNot:
    """Ask torch's own binding, which stays itself where another vendor's package stands in for torch.cuda."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if torch._C._cuda_getDeviceCount() == 0:
        return "the CUDA driver finds no NVIDIA GPU"
    if "triton" not in versions():
        return "triton is not installed; pip install 'isolith[cuda]'"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"the GPU has compute capability {major}.{minor}; needs 8.0"


def arch() -> str:
    """The compute capability of the current device; without one, that which Triton's interpreter stands for."""
    found = capability(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return f"{found // 10}.{found % 10}"


def versions() -> Mapping[str, str]:
    """What kernels may depend on, as far as it is installed; nothing is imported for it."""
    found = {"cuda": torch.version.cuda} if torch.version.cuda else {}
    with suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    return found


@hookimpl
def isolith_backend() -> Backend:
    """Describe the backend."""
    # Libraries come before the kernels that they are faster than, and behind them where nothing says that they are.
    faster = ("libraries.flash_mla", "libraries.deep_gemm", "libraries.deep_gemm_sm100", "libraries.grouped_mm")
    families = ("norm", "moe", "quant", "rotary", "residual", "attention")
    pinned = ("libraries.flashinfer", "libraries.tile_kernels")
    return Backend(
        name="cuda",
        device_type="cuda",
        api_version=1,
        why_unavailable=why_unavailable,
        kernels=tuple(f"{__name__}.{module}" for module in (*faster, *families, *pinned)),
        arch=arch,
        versions=versions,
    )
