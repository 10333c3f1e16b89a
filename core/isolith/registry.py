"""What there is: operators and backends, as one immutable value that can be passed around."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from isolith import plugins
from isolith.backend import Backend
from isolith.config import Settings
from isolith.errors import ConfigError, PluginError, nearest
from isolith.kernel import WhyNot
from isolith.plugins import AnyKernel, Plugin

if TYPE_CHECKING:
    from isolith.operator import AnyOperator


@dataclass(frozen=True, kw_only=True, eq=False)
class Registry:
    """The operators, and every plugin with its backend or the reason why it has none."""

    operators: "Mapping[str, AnyOperator]"
    plugins: tuple[Plugin, ...]

    @property
    def backends(self) -> tuple[Backend, ...]:
        """Backends that loaded, available or not, in order of precedence."""
        return tuple(plugin.backend for plugin in self.plugins if plugin.backend is not None)

    def why_unavailable(self, backend: Backend) -> WhyNot:
        """None where the backend can run here: its device is present and its kernels import."""
        return plugins.probe(backend) or plugins.kernels_of(backend)[1]

    def kernels(self, backend: Backend, operator: str) -> tuple[AnyKernel, ...]:
        """The backend's kernels for an operator, in its order of preference."""
        return plugins.kernels_of(backend)[0].get(operator, ())

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
                    legal |= {f"{backend.name}.{kernel.name}" for kernel in self.kernels(backend, operator)}
            if pin not in legal:
                raise ConfigError(f"kernels: {operator} has no kernel {pin!r} here; known: {', '.join(sorted(legal))}.")


def build(operators: "Mapping[str, AnyOperator]", settings: Settings) -> Registry:
    """Discover and load the plugins that the settings allow.

    Precedence is the order of ISOLITH_PLUGINS, else the order of names. `cpu` is always among them: it is the last
    step of the ladder.
    """
    rows = plugins.discover()
    names = {row.name for row in rows}
    wanted = settings.plugins
    for name in wanted or ():
        if name not in names:
            raise ConfigError(f"plugins: there is no plugin {name!r}; {nearest(name, names)}")
    if wanted is None:
        wanted = (settings.backend,) if settings.backend else tuple(sorted(names))
    order = {name: place for place, name in enumerate(dict.fromkeys((*wanted, "cpu")))}
    chosen = sorted((row for row in rows if row.name in order), key=lambda row: order[row.name])
    return Registry(operators=MappingProxyType(dict(operators)), plugins=tuple(map(plugins.load, chosen)))
