"""Huawei Ascend: operators through torch_npu, and through vllm-ascend's and cann-recipes' extensions where loaded.

Nothing here has run on an NPU; `isolith_backends.ascend.twin` stands for one. BRINGUP.md says what to try first.
"""

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch

from isolith import Backend, WhyNot, hookimpl

COLLECTIVES = "hccl"
"""torch.distributed's backend for tensors of this device."""

CONFORMANCE_ENVIRONMENT = {"TORCH_NPU_FALLBACK_CPU_DISABLE": "1"}
"""Set before the first import of torch_npu: an operator without a kernel fails instead of running on the host."""

FAMILIES = (
    # SoC numbers, first and last, of one family; its version; its name. 240 to 243 are Ascend310B, none of these.
    # Source: Ascend/pytorch 9e73e708 NpuVariables.cpp, vllm-ascend 182b75ea vllm_ascend/device/hardware.py.
    (200, 205, "1", "310P"),
    (220, 225, "2", "A2"),
    (250, 256, "3", "A3"),
    (260, 260, "5", "A5"),
)


def why_unavailable() -> WhyNot:
    """Import torch_npu only where it is installed and no other accelerator is in use: it raises beside CUDA."""
    if "torch_npu" not in sys.modules:
        if importlib.util.find_spec("torch_npu") is None:
            return "torch_npu is not installed; install it with the CANN that it was built for"
        if torch.version.cuda is not None and torch._C._cuda_getDeviceCount():
            return "torch_npu cannot be used beside CUDA, which this torch has a GPU for"
        if torch.version.hip is not None:
            return "torch_npu cannot be used beside ROCm, which this torch is built for"
    module = vendor_module()
    if isinstance(module, str):
        return module
    device = getattr(torch, "npu", None)
    if device is None or not device.is_available():
        return f"torch_npu finds no NPU{visible_devices()}"
    number = soc_number(module)
    if family(number) is None:
        return f"the SoC number is {number}; known: 200-205 (310P), 220-225 (A2), 250-256 (A3), 260 (A5)"
    return None


def visible_devices() -> str:
    """What to look at where no device is found; the environment itself is not read here."""
    return "; see npu-smi info and ASCEND_RT_VISIBLE_DEVICES, which counts from the first call of the runtime on"


def vendor_module() -> ModuleType | str:
    """torch_npu, or why it does not import; a CANN that is absent or broken shows here."""
    if "torch_npu" in sys.modules:
        return sys.modules["torch_npu"]
    try:
        return importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"torch_npu does not import: {error}; is CANN's set_env.sh sourced?"


def soc_number(module: Any) -> int:  # Any: torch_npu, which has no types
    """The number of the chip, by the call that does not start the device."""
    return int(module._C._npu_get_soc_version())


def family(number: int) -> tuple[str, str] | None:
    """(version, name) of a chip's family."""
    return next(((arch, name) for first, last, arch, name in FAMILIES if first <= number <= last), None)


def arch() -> str:
    """The family as a version: 310P 1, A2 2, A3 3, A5 5; 0 where it is not known."""
    module = vendor_module()
    found = None if isinstance(module, str) else family(soc_number(module))
    return found[0] if found else "0"


def versions() -> Mapping[str, str]:
    """Versions of torch_npu and CANN, as far as they are known, and the chip; nothing is imported for it."""
    module = sys.modules.get("torch_npu")
    if module is None:
        with suppress(PackageNotFoundError):
            return {"torch_npu": version("torch_npu")}
        return {}
    found = {"torch_npu": str(vars(module)["__version__"])}
    cann = module.utils.get_cann_version()
    if cann:
        found["cann"] = str(cann)
    chip = family(soc_number(module))
    if chip:
        found["soc"] = chip[1]
    return found


def exact_products() -> None:
    """Switch HF32 off for matrix products and convolutions, for conformance: float32 operands lose mantissa bits in it.

    It does not reach the projection inside hc_pre.
    """
    device: Any = vars(torch)["npu"]
    device.matmul.allow_hf32 = False
    device.conv.allow_hf32 = False


@hookimpl
def isolith_backend() -> Backend:
    """Describe the backend."""
    modules = (
        *("norm", "rotary", "residual", "routing", "moe", "quant", "microscaling", "experts", "cache", "attention"),
        "projection",
    )
    return Backend(
        name="ascend",
        device_type="npu",
        api_version=1,
        why_unavailable=why_unavailable,
        kernels=tuple(f"{__name__}.{module}" for module in modules),
        arch=arch,
        versions=versions,
        twin=f"{__name__}.twin",
    )
