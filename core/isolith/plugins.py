"""Finding backends: entry points of the group `isolith`, read as metadata, loaded one by one.

- Listing imports nothing.
- A plugin that is broken, of another API version or in conflict with another is a row with its whole reason;
  it is an error only for the user who asked for it by name.
- No plugin can stop another from loading.
"""

import importlib
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from isolith import hooks
from isolith.backend import API_VERSION, Backend
from isolith.kernel import Kernel, WhyNot

AnyKernel = Kernel[..., Any]  # Any: kernels of every signature


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """One entry point, and what came of it."""

    name: str
    distribution: str
    version: str
    target: str
    backend: Backend | None = None
    reason: WhyNot = None

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
        row = Plugin(name=entry.name, distribution=distribution, version=version, target=entry.value)
        # A distribution seen through two folders of sys.path is still one.
        found[(row.name, row.distribution, row.version)] = row
    rows = sorted(found.values(), key=lambda row: (row.name, row.distribution))
    return tuple(replace(row, reason=conflict(row, rows)) for row in rows)


def conflict(row: Plugin, rows: Iterable[Plugin]) -> WhyNot:
    """The sentence that refuses a name claimed twice."""
    claimants = [other.origin for other in rows if other.name == row.name]
    if len(claimants) < 2:
        return None
    return f"{' and '.join(claimants)} both offer the backend {row.name!r}; uninstall all but one"


def load(plugin: Plugin) -> Plugin:
    """Import a plugin and ask it for its backend; whatever goes wrong becomes the row's reason."""
    if plugin.reason is not None:
        return plugin
    try:
        backend = ask(plugin)
    except (Exception, SystemExit) as error:  # a plugin may raise anything while it loads
        return replace(plugin, reason=whole_reason(error))
    if backend.api_version != API_VERSION:
        reason = f"written for plugin API {backend.api_version}; this isolith has API {API_VERSION}"
        return replace(plugin, reason=reason)
    if backend.name != plugin.name:
        return replace(plugin, reason=f"its entry point is {plugin.name!r} but its backend is {backend.name!r}")
    return replace(plugin, backend=backend)


def ask(plugin: Plugin) -> Backend:
    """Import the plugin's module under a hook manager of its own, and call its hook."""
    manager = pluggy.PluginManager("isolith")
    manager.add_hookspecs(hooks)
    manager.register(importlib.import_module(plugin.target), name=plugin.name)
    manager.check_pending()
    answers = manager.hook.isolith_backend()
    if len(answers) != 1 or not isinstance(answers[0], Backend):
        raise TypeError(f"{plugin.target} must have one isolith_backend hook that returns a Backend; it gave {answers}")
    return answers[0]


def whole_reason(error: BaseException) -> str:
    """The error and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


@cache
def probe(backend: Backend) -> WhyNot:
    """Ask a backend, once a process, whether its device is here; a probe that raises is a no."""
    try:
        return backend.why_unavailable()
    except (Exception, SystemExit) as error:  # a vendor's runtime may raise anything
        return f"its probe failed: {whole_reason(error)}"


@cache
def kernels_of(backend: Backend) -> tuple[Mapping[str, tuple[AnyKernel, ...]], WhyNot]:
    """Import a backend's kernels: (kernels by operator name in order of preference, why none could be)."""
    found: dict[str, tuple[AnyKernel, ...]] = {}
    for name in backend.kernels:
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit) as error:  # a plugin may raise anything while it loads
            return {}, f"importing {name} failed: {whole_reason(error)}"
        for value in vars(module).values():
            if isinstance(value, Kernel) and value.fn.__module__ == name:
                known = found.get(value.operator.name, ())
                found[value.operator.name] = (*known, value)
    return found, None
