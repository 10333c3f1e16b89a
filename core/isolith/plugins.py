"""Finding backends: entry points of the group `isolith`, read as metadata, loaded one by one.

- Listing imports nothing.
- A plugin that is broken, of another API version or in conflict with another is a row with its whole reason;
  it is an error only for the user who asked for it by name.
- No plugin can stop another from loading.
"""

import importlib
import inspect
import re
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy
import torch

from isolith import hooks
from isolith.backend import API_VERSION, Backend, KernelPack
from isolith.kernel import Kernel, WhyNot, in_range

if TYPE_CHECKING:
    from isolith.quirks import Quirk

AnyKernel = Kernel[..., Any]  # Any: kernels of every signature


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """One entry point, and what came of it."""

    name: str
    distribution: str
    version: str
    target: str
    backend: Backend | None = None
    pack: KernelPack | None = None
    named: bool = False
    """Whether the user has named it, so that a pack's kernels come before the backend's own."""
    reason: WhyNot = None
    seconds: float = 0.0
    """How long it took to import, in a rehearsal."""
    quirks: "tuple[Quirk, ...]" = ()

    @property
    def origin(self) -> str:
        """Distribution and version, as one would install it."""
        return f"{self.distribution} {self.version}"


def discover(entries: Iterable[EntryPoint] | None = None) -> tuple[Plugin, ...]:
    """List the plugins installed, from metadata alone; names that two distributions claim are refused."""
    found = {}
    for entry in entry_points(group="isolith") if entries is None else entries:
        distribution = entry.dist.name if entry.dist else "unknown"
        version = entry.dist.version if entry.dist else "unknown"
        reason = wrong_versions(entry.dist.requires or ()) if entry.dist else None
        row = Plugin(name=entry.name, distribution=distribution, version=version, target=entry.value, reason=reason)
        # A distribution seen through two folders of sys.path is still one.
        found[(row.name, row.distribution, row.version)] = row
    rows = sorted(found.values(), key=lambda row: (row.name, row.distribution))
    return tuple(replace(row, reason=conflict(row, rows) or row.reason) for row in rows)


def wrong_versions(requirements: Iterable[str]) -> WhyNot:
    """The sentence that refuses a distribution whose metadata asks for another torch than this."""
    for requirement in requirements:
        match = re.fullmatch(r"torch\s*\(?((?:[<>=!]=?[\w.+*]+\s*,?\s*)+)\)?", requirement.partition(";")[0].strip())
        if match is None or ";" in requirement:  # under a condition, such as an extra that nobody asked for
            continue
        wanted = re.sub(r"\s", "", match[1]).replace(".*", ".x")
        if not in_range(torch.__version__, wanted):
            return f"it needs torch{wanted}; this is torch {torch.__version__}"
    return None


def conflict(row: Plugin, rows: Iterable[Plugin]) -> WhyNot:
    """The sentence that refuses a name claimed twice."""
    claimants = [other.origin for other in rows if other.name == row.name]
    if len(claimants) < 2:
        return None
    return f"{' and '.join(claimants)} both offer the backend {row.name!r}; uninstall all but one"


def load(plugin: Plugin) -> Plugin:
    """Import a plugin and ask it for what it brings; whatever goes wrong becomes the row's reason."""
    if plugin.reason is not None:
        return plugin
    try:
        brought = ask(plugin)
    except (Exception, SystemExit) as error:  # a plugin may raise anything while it loads
        return replace(plugin, reason=whole_reason(error))
    if brought.api_version != API_VERSION:
        reason = f"written for plugin API {brought.api_version}; this isolith has API {API_VERSION}"
        return replace(plugin, reason=reason)
    kind = "backend" if isinstance(brought, Backend) else "kernel pack"
    if brought.name != plugin.name:
        return replace(plugin, reason=f"its entry point is {plugin.name!r} but its {kind} is {brought.name!r}")
    if ("." in brought.name) != isinstance(brought, KernelPack):
        reason = f"it has the name of a {'backend' if kind == 'kernel pack' else 'kernel pack'} and brings a {kind}"
        return replace(plugin, reason=f"{reason}; a pack for the backend 'acme' is called 'acme.NAME'")
    return replace(plugin, backend=brought) if isinstance(brought, Backend) else replace(plugin, pack=brought)


def ask(plugin: Plugin) -> Backend | KernelPack:
    """Import the plugin's module under a hook manager of its own, and call its hook."""
    manager = pluggy.PluginManager("isolith")
    manager.add_hookspecs(hooks)
    manager.register(importlib.import_module(plugin.target), name=plugin.name)
    manager.check_pending()
    answers = [*manager.hook.isolith_backend(), *manager.hook.isolith_kernels()]
    if len(answers) != 1 or not isinstance(answers[0], (Backend, KernelPack)):
        raise TypeError(
            f"{plugin.target} must have one isolith_backend hook that returns a Backend, or one isolith_kernels hook"
            f" that returns a KernelPack; it gave {answers}"
        )
    return answers[0]


def whole_reason(error: BaseException) -> str:
    """The error and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


@cache
def probe(owner: Backend | KernelPack) -> WhyNot:
    """Ask, once a process, whether what the kernels need is here; a probe that raises is a no."""
    try:
        return owner.why_unavailable()
    except (Exception, SystemExit) as error:  # a vendor's runtime may raise anything
        return f"its probe failed: {whole_reason(error)}"


@cache
def kernels_of(owner: Backend | KernelPack) -> tuple[Mapping[str, tuple[AnyKernel, ...]], WhyNot]:
    """Import kernels: (kernels by operator name in order of preference, why none could be)."""
    found: dict[str, tuple[AnyKernel, ...]] = {}
    for name in owner.kernels:
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit) as error:  # a plugin may raise anything while it loads
            return {}, f"importing {name} failed: {whole_reason(error)}"
        for value in vars(module).values():
            if isinstance(value, Kernel) and value.fn.__module__ == name:
                known = found.get(value.operator.name, ())
                found[value.operator.name] = (*known, replace(held_to_its_operator(value), owner=owner.name))
    return found, None


def held_to_its_operator(kernel: AnyKernel) -> AnyKernel:
    """The kernel, never chosen where its signature is not the operator's: a call would not reach it as it was meant."""
    ours, its = kernel.operator.signature.parameters, inspect.signature(kernel.fn).parameters
    named = [p for p in its.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_any = len(named) < len(its)
    due = [p for p in ours.values() if p.name in its or not takes_any]
    if [(p.name, p.default) for p in named] == [(p.name, p.default) for p in due]:
        return kernel
    reason = f"its signature is {inspect.signature(kernel.fn)}; {kernel.operator.name} has {kernel.operator.signature}"
    return replace(kernel, requires=replace(kernel.requires, missing=lambda: reason))
