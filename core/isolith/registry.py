"""What there is: operators and backends, as one immutable value that can be passed around.

What only loading takes is imported when it begins, with the first call: importing isolith stays cheap.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from isolith import plugins
from isolith.backend import Backend, KernelPack
from isolith.config import Settings
from isolith.errors import ConfigError, PluginError, nearest
from isolith.kernel import WhyNot
from isolith.plugins import AnyKernel, Plugin

if TYPE_CHECKING:
    from isolith.operator import AnyOperator
    from isolith.quirks import Quirk


@dataclass(frozen=True, kw_only=True, eq=False)
class Registry:
    """The operators, and every plugin with its backend or the reason why it has none."""

    operators: "Mapping[str, AnyOperator]"
    plugins: tuple[Plugin, ...]

    @property
    def backends(self) -> tuple[Backend, ...]:
        """Backends that loaded, available or not, in order of precedence."""
        return tuple(plugin.backend for plugin in self.plugins if plugin.backend is not None)

    def why_unavailable(self, owner: Backend | KernelPack) -> WhyNot:
        """None where it can run here: what it needs is present and its kernels import."""
        return plugins.probe(owner) or plugins.kernels_of(owner)[1]

    def kernels(self, backend: Backend, operator: str) -> tuple[AnyKernel, ...]:
        """The kernels for an operator, best first: of packs that the user has named, the backend's own, of others."""
        packs = [plugin for plugin in self.plugins if plugin.pack and plugin.pack.backend == backend.name]
        before = [plugin.pack for plugin in packs if plugin.named]
        behind = [plugin.pack for plugin in packs if not plugin.named]
        return tuple(
            kernel
            for owner in (*before, backend, *behind)
            if owner is not None and (owner is backend or self.why_unavailable(owner) is None)
            for kernel in plugins.kernels_of(owner)[0].get(operator, ())
        )

    def quirks(
        self,
        kernel: AnyKernel,
        backend: Backend,
        arguments: "Mapping[str, Any]",  # Any: a call's own values
    ) -> "tuple[Quirk, ...]":
        """What is known of a kernel that a call on this backend meets."""
        beside = (plugin.quirks for plugin in self.plugins if plugin.name == kernel.owner)
        known = (one for quirks in beside for one in quirks if one.concerns(kernel.operator.name, kernel.name))
        return tuple(one for one in known if one.is_here(backend) and one.holds(arguments))

    def serving(self, device_type: str) -> tuple[Backend, ...]:
        """Available backends for tensors of a device type, in order of precedence."""
        return tuple(b for b in self.backends if b.device_type == device_type and self.why_unavailable(b) is None)

    def backend(self, name: str) -> Backend:
        """The available backend of that name; PluginError says why there is none."""
        for plugin in self.plugins:
            if plugin.name == name:
                reason = plugin.reason or (plugin.backend and self.why_unavailable(plugin.backend))
                if reason or plugin.backend is None:
                    raise PluginError(f"backend {name} ({plugin.origin}) is not available: {reason}.")
                return plugin.backend
        raise PluginError(f"there is no backend {name!r}; {nearest(name, {p.name for p in self.plugins})}")

    def check_pins(self, settings: Settings) -> None:
        """Raise ConfigError when a pin names an operator or a kernel that there is not."""
        for operator, pin in settings.kernels:
            if operator not in self.operators:
                raise ConfigError(f"kernels: there is no operator {operator!r}; {nearest(operator, self.operators)}")
            legal = {"reference"} | ({"composition"} if self.operators[operator].composed_of else set())
            for backend in self.backends:
                if self.why_unavailable(backend) is None:
                    legal |= {kernel.full_name for kernel in self.kernels(backend, operator)}
            if pin not in legal:
                raise ConfigError(f"kernels: {operator} has no kernel {pin!r} here; known: {', '.join(sorted(legal))}.")


def build(operators: "Mapping[str, AnyOperator]", settings: Settings) -> Registry:
    """Discover and load the plugins that the settings allow.

    Precedence is the order of ISOLITH_PLUGINS, else the order of names. `cpu` is always among them: it is the last
    step of the ladder. Kernel packs come with their backend, and it with them.
    """
    from isolith.rehearsal import rehearsed

    named = (*(settings.plugins or ()), settings.backend)
    rows = rehearsed(wanted_of(settings), named)
    return Registry(operators=MappingProxyType(dict(operators)), plugins=tuple(load(row, operators) for row in rows))


def load(row: Plugin, operators: "Mapping[str, AnyOperator]") -> Plugin:
    """Import a plugin, with the quirks that it keeps beside its entry module."""
    from isolith import quirks

    loaded = plugins.load(row)
    if loaded.backend is None and loaded.pack is None:
        return loaded
    try:
        module = sys.modules.get(row.target)
        return replace(loaded, quirks=quirks.beside(getattr(module, "__file__", None), operators))
    except PluginError as error:
        return replace(loaded, backend=None, pack=None, reason=str(error))


def wanted_of(settings: Settings) -> tuple[Plugin, ...]:
    """The plugins that the settings allow, as discovered, in order of precedence."""
    rows = plugins.discover()
    names = {row.name for row in rows}
    wanted = settings.plugins
    for name in wanted or ():
        if name not in names:
            raise ConfigError(f"plugins: there is no plugin {name!r}; {nearest(name, names)}")
    if wanted is None:
        own = {name for name in names if name.partition(".")[0] == settings.backend}
        wanted = tuple(sorted(own or {settings.backend} if settings.backend else names))
    bases = (name.partition(".")[0] for name in wanted)
    order = {name: place for place, name in enumerate(dict.fromkeys((*wanted, *bases, "cpu")))}
    chosen = sorted((row for row in rows if row.name in order), key=lambda row: order[row.name])
    return tuple(replace(row, named=row.name in (settings.plugins or ())) for row in chosen)
