"""Every setting: its name, its environment variable, its legal values and where its value came from.

The environment is read in this file alone.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from dataclasses import field as dataclass_field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from isolith.errors import ConfigError, nearest

Fallback = Literal["warn", "allow", "error"]
Require = Literal["", "certified"]


def parse_name(variable: str, text: str) -> str:
    """Any single word."""
    return text.strip()


def parse_fallback(variable: str, text: str) -> str:
    """One of three words."""
    if text not in ("warn", "allow", "error"):
        raise ConfigError(f"{variable} must be warn, allow or error; got {text!r}.")
    return text


def parse_require(variable: str, text: str) -> str:
    """One word."""
    if text not in ("", "certified"):
        raise ConfigError(f"{variable} must be certified, or unset; got {text!r}.")
    return text


def parse_switch(variable: str, text: str) -> bool:
    """0 or 1."""
    if text not in ("0", "1"):
        raise ConfigError(f"{variable} must be 0 or 1; got {text!r}.")
    return text == "1"


def parse_share(variable: str, text: str) -> float:
    """A part of the whole, from 0 to 1."""
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        hint = f" {text} percent is {share / 100:g}." if 1 < share <= 100 else ""
        raise ConfigError(f"{variable} must be a share from 0 to 1, such as 0.01; got {text!r}.{hint}")
    return share


def parse_names(variable: str, text: str) -> tuple[str, ...]:
    """Words separated by commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def parse_pins(variable: str, text: str) -> tuple[tuple[str, str], ...]:
    """operator=kernel pairs separated by commas."""
    pins: dict[str, str] = {}
    for word in parse_names(variable, text):
        operator, equals, kernel = (part.strip() for part in word.partition("="))
        if not equals or not operator or not kernel:
            raise ConfigError(f"{variable} is a list of operator=kernel; got {word!r}.")
        if operator in pins:
            raise ConfigError(f"{variable} names {operator} twice: {pins[operator]} and {kernel}.")
        pins[operator] = kernel
    return tuple(pins.items())


def setting(parse: Callable[[str, str], Any], default: Any, meaning: str) -> Any:
    """A field of Settings, with how its variable is read and what it means."""
    return dataclass_field(default=default, metadata={"parse": parse, "meaning": meaning})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user chooses. The variable of a field is its name in capitals behind ISOLITH_."""

    backend: str = setting(
        parse_name,
        "",
        "Use this backend alone: cpu, or a plugin's name. Unset: the one that serves the tensors' device.",
    )
    kernels: tuple[tuple[str, str], ...] = setting(
        parse_pins, (), "Pin kernels: sparse_attn=cpu.sparse_attn,rms_norm=reference. Also: composition."
    )
    fallback: Fallback = setting(
        parse_fallback, "warn", "When a backend has no kernel for a call: warn and step down, allow silently, or error."
    )
    require: Require = setting(
        parse_require, "", "certified: take only kernels that a conformance run has shown to be right on this machine."
    )
    plugins: tuple[str, ...] | None = setting(parse_names, None, "Load only the plugins named here. Unset: all.")
    debug: bool = setting(parse_switch, False, "1: check values on every device, and check calls of bound handles.")
    twin: str = setting(
        parse_name, "", "Which chip a backend's twin stands for in conformance runs; the backend's page lists them."
    )
    shadow: float = setting(
        parse_share,
        0.0,
        "Compare this share of the kernels' calls, such as 0.01, with the reference: isolith.shadows() tells. 0: none.",
    )
    sources: tuple[tuple[str, str], ...] = dataclass_field(default=(), compare=False, repr=False)

    @property
    def pins(self) -> dict[str, str]:
        """The pinned kernel of each operator that has one."""
        return dict(self.kernels)


@dataclass(frozen=True, kw_only=True)
class Effective:
    """One setting as it is in force."""

    name: str
    variable: str
    value: Any  # Any: settings are of several types
    source: str
    meaning: str


def variable_of(name: str) -> str:
    """The environment variable of a setting."""
    return f"ISOLITH_{name.upper()}"


def user_fields() -> tuple[Field[Any], ...]:  # Any: settings are of several types
    """The fields that a user sets."""
    return tuple(field for field in fields(Settings) if "parse" in field.metadata)


def from_environment(environment: Mapping[str, str] | None = None) -> Settings:
    """Read every ISOLITH_ variable; ConfigError names the nearest legal one for a typo."""
    given = os.environ if environment is None else environment
    known = {variable_of(field.name): field for field in user_fields()}
    values: dict[str, Any] = {}
    sources = []
    for variable, text in sorted(given.items()):
        if not variable.startswith("ISOLITH_"):
            continue
        if variable not in known:
            raise ConfigError(f"{variable} is not a setting; {nearest(variable, known)}")
        if text.strip():
            field = known[variable]
            values[field.name] = field.metadata["parse"](variable, text.strip())
            sources.append((field.name, f"environment variable {variable}"))
    return Settings(**values, sources=tuple(sources))


def environment_of_child(patterns: Sequence[str], **more: str) -> dict[str, str]:
    """The variables whose names match one of the patterns ("PATH", "LC_*"), and some more, for another process."""
    allowed = {name: text for name, text in os.environ.items() if any(fnmatchcase(name, p) for p in patterns)}
    return {**allowed, **more}


def tool(variable: str) -> str | None:
    """What the user has set for a tool of the machine, by the usual variable such as CXX; None where it is not set."""
    return os.environ.get(variable)


def cache_folder() -> Path:
    """The folder of this user where what can be found out again is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isolith"


def state_folder() -> Path:
    """The folder of this user where what cannot be found out again is kept."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "isolith"


def overridden(settings: Settings, **changes: Any) -> Settings:  # Any: settings are of several types
    """The settings with some changed; ConfigError names the nearest legal one for a typo.

    Values are what the environment would say ("rms_norm=reference", "warn", "1") or already parsed; pins may also be
    a mapping.
    """
    known = {field.name: field for field in user_fields()}
    values: dict[str, Any] = {}
    for name, value in changes.items():
        if name not in known:
            raise ConfigError(f"{name} is not a setting; {nearest(name, known)}")
        if isinstance(value, Mapping):
            value = ",".join(f"{operator}={kernel}" for operator, kernel in value.items())
        if isinstance(value, (str, int, float)):
            value = known[name].metadata["parse"](name, str(int(value) if isinstance(value, bool) else value))
        values[name] = value
    kept = tuple(row for row in settings.sources if row[0] not in values)
    return replace(settings, **values, sources=(*kept, *((name, "isolith.override") for name in values)))


def effective(settings: Settings) -> tuple[Effective, ...]:
    """Every setting in force, with where its value came from."""
    sources = dict(settings.sources)
    return tuple(
        Effective(
            name=field.name,
            variable=variable_of(field.name),
            value=getattr(settings, field.name),
            source=sources.get(field.name, "default"),
            meaning=field.metadata["meaning"],
        )
        for field in user_fields()
    )
