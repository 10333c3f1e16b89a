"""Cambricon MLU: operators through torch_mlu and torch_mlu_ops, which its documents call tmo.

Nothing here has run on an MLU; `isolith_backends.cambricon.twin` stands for one. BRINGUP.md says what to try first.
"""

import functools
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

COLLECTIVES = "cncl"
"""torch.distributed's backend for tensors of this device."""

MIGRATION = "torch_mlu.utils.gpu_migration"
"""Rewrites "cuda" to "mlu" in a whole process: a device that says cuda is then none."""


def why_unavailable() -> WhyNot:
    """Import torch_mlu only where it is installed: torch has one place for a device of this kind."""
    if "torch_mlu" not in sys.modules:
        if importlib.util.find_spec("torch_mlu") is None:
            return "torch_mlu is not installed; it comes with Cambricon's SDK"
        taken = torch._C._get_privateuse1_backend_name()
        if taken not in ("privateuseone", "mlu"):
            return f"torch_mlu cannot be used beside {taken!r}; torch has one place for such a device"
    module = vendor_module()
    if isinstance(module, str):
        return module
    if MIGRATION in sys.modules:
        return f"{MIGRATION} is loaded; it renames devices in the whole process"
    runtime = getattr(torch, "mlu", None)
    if runtime is None or not runtime.is_available():
        return "torch_mlu finds no MLU; see cnmon and MLU_VISIBLE_DEVICES"
    return None


def vendor_module() -> ModuleType | str:
    """torch_mlu, or why it does not import; an SDK that is absent or broken shows here."""
    if "torch_mlu" in sys.modules:
        return sys.modules["torch_mlu"]
    try:
        return importlib.import_module("torch_mlu")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"torch_mlu does not import: {error}; is the SDK's NEUWARE_HOME set?"


def runtime_of_the_device() -> Any:  # Any: torch.mlu, which has no types
    """torch.mlu, never torch.cuda, which may stand for it."""
    return vars(torch)["mlu"]


def arch() -> str:
    """The compute capability: 3.x MLU370, 5.x MLU590, newer cards 6 and up; 0 where there is none."""
    if "mlu" not in vars(torch):
        return "0"
    major, minor = runtime_of_the_device().get_device_capability()
    return f"{major}.{minor}"


@functools.cache
def library_versions(library: ModuleType) -> Mapping[str, str]:
    """What torch_mlu_ops says of the libraries below it; asked once, since it asks the device."""
    found = {}
    for name in ("cnnl", "cnnl_extra"):
        ask = getattr(library, f"get_{name}_version", None)
        if ask is not None:
            try:
                found[name] = str(ask())
            except Exception as error:  # without a device the vendor's call may raise anything
                found[name] = f"unknown: {error}"
    return found


def versions() -> Mapping[str, str]:
    """Versions of torch_mlu, torch_mlu_ops and their libraries, as far as they are known, and the card; nothing is
    imported for it.
    """
    found = {}
    for name in ("torch_mlu", "torch_mlu_ops"):
        module = sys.modules.get(name)
        if module is not None:
            found[name] = str(vars(module)["__version__"])
            continue
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    if "torch_mlu_ops" in sys.modules and sys.modules["torch_mlu_ops"] is not None:
        found.update(library_versions(sys.modules["torch_mlu_ops"]))
    if "torch_mlu" in sys.modules and "mlu" in vars(torch):
        found["card"] = str(runtime_of_the_device().get_device_name())
    return found


@hookimpl
def isolith_backend() -> Backend:
    """Describe the backend."""
    modules = (
        "norm",
        "rotary",
        "residual",
        "routing",
        "moe",
        "quant",
        "experts",
        "cache",
        "compressor",
        "attention",
        "indexer",
        "projection",
        "portable",
    )
    return Backend(
        name="cambricon",
        device_type="mlu",
        api_version=1,
        why_unavailable=why_unavailable,
        kernels=tuple(f"{__name__}.{module}" for module in modules),
        arch=arch,
        versions=versions,
        twin=f"{__name__}.twin",
    )
