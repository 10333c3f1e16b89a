"""Freezing: fix every choice before graph capture or compilation, and say what was fixed."""

import hashlib
import inspect
import json
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

from isolith import dispatch
from isolith.plugins import AnyKernel


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a frozen process runs: settings, software, and the kernels of every operator in order of preference."""

    settings: dict[str, Any]  # Any: settings are of several types
    software: dict[str, str]
    plugins: dict[str, str]
    kernels: dict[str, dict[str, str]]
    """Operator -> kernel -> hash of the source of the module that the kernel stands in."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the manifest: equal on two machines only if they choose from the same kernels alike."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:  # Any: JSON
        """For JSON, with the fingerprint."""
        return {**asdict(self), "fingerprint": self.fingerprint}


def freeze() -> Manifest:
    """Fix all choices of this process and return what they are.

    Every available backend's kernels are imported and its probes have run, so that a call made later does neither;
    `isolith.override` raises from now on. A call with new shapes still selects, from the kernels fixed here.
    """
    active = dispatch.dispatcher()
    manifest = describe(active)
    dispatch.Process.frozen = True
    return manifest


def describe(active: dispatch.Dispatcher) -> Manifest:
    """The manifest of a dispatcher."""
    registry = active.registry
    available = [backend for backend in registry.backends if registry.why_unavailable(backend) is None]
    software = {"python": platform.python_version(), "torch": torch.__version__}
    for backend in available:
        software.update(backend.versions() if backend.versions else {})
    return Manifest(
        settings={
            "backend": active.settings.backend,
            "kernels": active.settings.pins,
            "fallback": active.settings.fallback,
        },
        software=software,
        plugins={plugin.name: plugin.origin for plugin in registry.plugins if plugin.backend in available},
        kernels={
            name: {
                kernel.full_name: source_hash(kernel)
                for backend in available
                for kernel in registry.kernels(backend, name)
            }
            for name in registry.operators
        },
    )


def source_hash(kernel: AnyKernel) -> str:
    """A hash of the file that the kernel's function is in."""
    path = inspect.getsourcefile(kernel.fn)
    if path is None:
        return "no source"
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
