"""`isolith status`: what this machine has."""

import argparse
import platform
from typing import Any

import torch

from isolith import dispatch, plugins
from isolith.backend import Backend
from isolith.commands.command import Command, entries
from isolith.commands.config import setting_rows
from isolith.plugins import Plugin
from isolith.registry import Registry


def answer(options: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """Backends and plugins with their reasons, versions, and the settings in force."""
    from isolith import OPERATORS, __version__

    active = dispatch.dispatcher()
    return {
        "isolith": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "operators": len(OPERATORS),
        "devices": devices(),
        "backends": [backend_row(active.registry, plugin) for plugin in active.registry.plugins],
        "not_loaded": not_loaded(active.registry),
        "settings": setting_rows(active.settings),
    }


def devices() -> list[dict[str, Any]]:  # Any: JSON
    """What torch sees; which vendor's chip an accelerator is, its backend says."""
    capability = torch.backends.cpu.get_cpu_capability()
    rows: list[dict[str, Any]] = [
        {"type": "cpu", "count": 1, "details": f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads"}
    ]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        count = torch.accelerator.device_count()
        rows.append(
            {"type": accelerator.type, "count": count, "details": f"{count} devices" if count > 1 else "1 device"}
        )
    return rows


def backend_row(registry: Registry, plugin: Plugin) -> dict[str, Any]:  # Any: JSON
    """One plugin and its backend."""
    backend = plugin.backend
    reason = plugin.reason or (registry.why_unavailable(backend) if backend else None)
    row = {"name": plugin.name, "distribution": plugin.distribution, "version": plugin.version}
    available = backend is not None and reason is None
    details: dict[str, Any] = facts(registry, backend) if backend is not None and available else {}
    return {**row, "available": available, "reason": reason, **details}


def facts(registry: Registry, backend: Backend) -> dict[str, Any]:  # Any: JSON
    """What an available backend says of itself."""
    return {
        "device_type": backend.device_type,
        "arch": backend.arch() if backend.arch else None,
        "versions": dict(backend.versions()) if backend.versions else {},
        "kernels": sum(len(registry.kernels(backend, name)) for name in registry.operators),
        "reference_is_native": backend.reference_is_native,
    }


def not_loaded(registry: Registry) -> list[dict[str, str]]:
    """Plugins that the settings leave out."""
    loaded = {plugin.name for plugin in registry.plugins}
    return [
        {"name": row.name, "distribution": row.distribution, "version": row.version}
        for row in plugins.discover()
        if row.name not in loaded
    ]


def text(status: dict[str, Any]) -> str:  # Any: JSON
    """For people."""
    lines = [
        f"isolith {status['isolith']}, torch {status['torch']}, Python {status['python']}; "
        f"{status['operators']} operators",
        "",
        "Devices",
        entries([(row["type"], row["details"]) for row in status["devices"]]),
        "",
        "Backends",
        entries([(row["name"], describe(row)) for row in status["backends"]]) or "  none",
    ]
    if status["not_loaded"]:
        rows = [(row["name"], f"{row['distribution']} {row['version']}") for row in status["not_loaded"]]
        lines += ["", "Left out by ISOLITH_BACKEND or ISOLITH_PLUGINS", entries(rows)]
    rows = [(row["variable"], f"{row['shown']} ({row['source']})") for row in status["settings"]]
    lines += ["", "Settings", entries(rows)]
    return "\n".join(lines)


def describe(row: dict[str, Any]) -> str:  # Any: JSON
    """One backend in one sentence."""
    origin = f"{row['distribution']} {row['version']}"
    if not row["available"]:
        return f"not available: {row['reason']} [{origin}]"
    parts = [f"{row['device_type']!r} tensors", f"{row['kernels']} kernels"]
    if row["reference_is_native"]:
        parts[-1] += ", else the reference"
    if row["arch"]:
        parts.append(f"arch {row['arch']}")
    parts += [f"{name} {version}" for name, version in row["versions"].items()]
    return f"available: {'; '.join(parts)} [{origin}]"


COMMAND = Command(
    name="status",
    summary="what this machine has: backends, plugins, versions, settings (the default command)",
    add_arguments=lambda _: None,
    answer=answer,
    text=text,
)
