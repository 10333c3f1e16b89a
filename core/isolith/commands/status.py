"""`isolith status`: what this machine has."""

import argparse
import datetime
import platform
from typing import Any

import torch

from isolith import dispatch, plugins
from isolith.backend import Backend, KernelPack
from isolith.commands.command import Command, entries
from isolith.commands.config import setting_rows
from isolith.config import from_environment
from isolith.plugins import AnyKernel, Plugin
from isolith.quirks import Quirk
from isolith.registry import Registry, wanted_of
from isolith.rehearsal import rehearsed

SLOW_S = 1.0


def answer(options: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """Backends and plugins with their reasons, versions, and the settings in force."""
    from isolith import OPERATORS, __version__

    # Anew, and before anything is loaded here: a plugin that was broken may have been mended, and the other way round.
    rehearsed(wanted_of(from_environment()), again=True)
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
    backend = plugin.backend or base_of(registry, plugin)
    owner = plugin.backend or plugin.pack
    reason = plugin.reason or (registry.why_unavailable(owner) if owner else None)
    if reason is None and backend is None and plugin.pack:
        reason = f"it adds to the backend {plugin.pack.backend!r}, which is not available"
    row: dict[str, Any] = {"name": plugin.name, "distribution": plugin.distribution, "version": plugin.version}
    row["import_seconds"] = plugin.seconds
    available = backend is not None and reason is None
    details: dict[str, Any] = {}
    if backend is not None and owner is not None and available:
        details = {**(facts(backend) if plugin.backend else {"adds_to": backend.name, "first": plugin.named})}
        details["kernels"] = sum(name in registry.operators for name, _ in kernels_of(owner))
        details["left_out"] = left_out(registry, owner, backend)
        details["quirks"] = [quirk_row(quirk, owner, backend) for quirk in plugin.quirks]
    return {**row, "available": available, "reason": reason, **details}


def base_of(registry: Registry, plugin: Plugin) -> Backend | None:
    """The backend that a kernel pack adds to, where it is available."""
    name = plugin.pack.backend if plugin.pack else None
    return next((b for b in registry.backends if b.name == name and registry.why_unavailable(b) is None), None)


def facts(backend: Backend) -> dict[str, Any]:  # Any: JSON
    """What an available backend says of itself."""
    return {
        "device_type": backend.device_type,
        "arch": backend.arch() if backend.arch else None,
        "versions": dict(backend.versions()) if backend.versions else {},
        "reference_is_native": backend.reference_is_native,
    }


def kernels_of(owner: Backend | KernelPack) -> list[tuple[str, AnyKernel]]:
    """(operator's name, kernel) of all that it brings."""
    return [(name, kernel) for name, kernels in plugins.kernels_of(owner)[0].items() for kernel in kernels]


def quirk_row(quirk: Quirk, owner: Backend | KernelPack, backend: Backend) -> dict[str, Any]:  # Any: JSON
    """A quirk, whether this device and its software have it, and whether it should have been looked at again."""
    return {
        "id": quirk.id,
        "about": f"{owner.name}.{quirk.kernel or quirk.operator}",
        "effect": quirk.effect,
        "says": quirk.says,
        "link": quirk.link,
        "review": quirk.review.isoformat(),
        "here": quirk.is_here(backend),
        "stale": quirk.is_stale(datetime.date.today()),
    }


def left_out(registry: Registry, owner: Backend | KernelPack, backend: Backend) -> list[dict[str, str]]:
    """Kernels that cannot run on this machine, or for operators that there are not, with the reason."""
    return [
        {"name": kernel.full_name, "reason": reason}
        for operator, kernel in kernels_of(owner)
        if (reason := kernel.requires.why_not_here(backend) or unknown(registry, operator))
    ]


def unknown(registry: Registry, operator: str) -> str | None:
    """The sentence on an operator that there is not."""
    return None if operator in registry.operators else f"there is no operator {operator!r}"


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
    rows = [(row["id"], quirk_text(row)) for backend in status["backends"] for row in backend.get("quirks", ())]
    if rows:
        lines += ["", "Quirks", entries(rows)]
    if status["not_loaded"]:
        rows = [(row["name"], f"{row['distribution']} {row['version']}") for row in status["not_loaded"]]
        lines += ["", "Left out by ISOLITH_BACKEND or ISOLITH_PLUGINS", entries(rows)]
    rows = [(row["variable"], f"{row['shown']} ({row['source']})") for row in status["settings"]]
    lines += ["", "Settings", entries(rows)]
    return "\n".join(lines)


def quirk_text(row: dict[str, Any]) -> str:  # Any: JSON
    """One quirk in one sentence."""
    effect = {"refuse": "is not taken", "tell": "is taken all the same"}[row["effect"]]
    where = "" if row["here"] else "not here: "
    stale = f"; STALE, its review was due on {row['review']}" if row["stale"] else ""
    return f"{where}{row['about']} {effect}: {row['says']} [{row['link']}]{stale}"


def describe(row: dict[str, Any]) -> str:  # Any: JSON
    """One backend in one sentence."""
    origin = f"{row['distribution']} {row['version']}"
    if not row["available"]:
        return f"not available: {row['reason']} [{origin}]"
    if "adds_to" in row:
        place = "before" if row["first"] else "behind"
        parts = [f"{row['kernels']} kernels for the backend {row['adds_to']}, {place} its own"]
    else:
        parts = [f"{row['device_type']!r} tensors", f"{row['kernels']} kernels"]
        if row["reference_is_native"]:
            parts[-1] += ", else the reference"
        if row["arch"]:
            parts.append(f"arch {row['arch']}")
        parts += [f"{name} {version}" for name, version in row["versions"].items()]
    if row["import_seconds"] >= SLOW_S:
        parts.append(f"takes {row['import_seconds']} s to import")
    parts += [f"without {kernel['name']}: {kernel['reason']}" for kernel in row["left_out"]]
    return f"available: {'; '.join(parts)} [{origin}]"


COMMAND = Command(
    name="status",
    summary="what this machine has: backends, plugins, versions, settings (the default command)",
    add_arguments=lambda _: None,
    answer=answer,
    text=text,
)
