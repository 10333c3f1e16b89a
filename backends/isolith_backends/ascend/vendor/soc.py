"""Which chip the functions stand for.

Source: Ascend/pytorch 9e73e708 NpuVariables.cpp (numbers); vllm-ascend 182b75ea csrc/build_aclnn.sh (what is built).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from isolith.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Soc:
    """A family of chips: its name, one chip of it, and that chip's number."""

    name: str
    chip: str
    number: int

    @property
    def has_bfloat16_experts(self) -> bool:
        """Whether grouped products take bfloat16."""
        return self.name != "310P"


FAMILIES = {
    "310p": Soc(name="310P", chip="Ascend310P3", number=202),
    "a2": Soc(name="A2", chip="Ascend910B3", number=223),
    "a3": Soc(name="A3", chip="Ascend910_9391", number=250),
    "a5": Soc(name="A5", chip="Ascend950PR", number=260),
}
EXTENSIONS = {
    "": ("npu", "_C_ascend", "custom"),
    "vllm": ("npu", "_C_ascend"),
    "recipes": ("npu", "custom"),
    "wheel": ("npu",),
}
"""What is installed beside the chip: torch_npu alone, with vllm-ascend's or cann-recipes' extension, or with both."""

WHEELS = ("2.13.0", "2.10.0.post4", "2.8.0")
"""The versions of torch_npu whose schemas are known, newest first."""

CURRENT: ContextVar[Soc] = ContextVar("ascend_soc")


def current() -> Soc:
    """The chip in force: an A3 unless something else was chosen."""
    return CURRENT.get(FAMILIES["a3"])


@contextmanager
def chip(name: str) -> Iterator[Soc]:
    """Stand for another chip within a block."""
    token = CURRENT.set(FAMILIES[name])
    try:
        yield FAMILIES[name]
    finally:
        CURRENT.reset(token)


@dataclass(frozen=True, kw_only=True)
class Installation:
    """A chip and what is installed: the namespaces of operators, and the version of torch_npu."""

    soc: Soc
    namespaces: tuple[str, ...]
    wheel: str


def chosen(setting: str) -> Installation:
    """The installation of a setting such as "a2", "a3-recipes" or "a3-wheel-2.10.0.post4"; "" means "a3"."""
    family, *parts = (setting or "a3").lower().split("-")
    extensions = [part for part in parts if part in EXTENSIONS]
    wheels = [part for part in parts if part in WHEELS]
    if family not in FAMILIES or len(extensions) > 1 or len(wheels) > 1 or len(extensions) + len(wheels) < len(parts):
        behind = ", ".join(f"-{part}" for part in (*filter(None, EXTENSIONS), *WHEELS))
        raise ConfigError(
            f"ISOLITH_TWIN must be one of {', '.join(FAMILIES)}, alone or with some of {behind} behind; "
            f"got {setting!r}."
        )
    return Installation(soc=FAMILIES[family], namespaces=EXTENSIONS["".join(extensions)], wheel=(wheels or WHEELS)[0])
