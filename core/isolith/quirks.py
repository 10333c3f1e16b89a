"""Quirks: what is known to be wrong with a kernel under some conditions, as data beside the backend that has it.

A backend or a kernel pack keeps them in `quirks.toml` beside its entry module:

    [[quirk]]
    id = "grouped-mm-host-loop"
    operator = "grouped_gemm"
    kernel = "grouped_gemm_torch"        # left out: every kernel of the operator
    arch = "<9.0"                        # a range over what the backend's `arch` returns; left out: all
    sdk = { torch = ">=2.8,<2.14" }      # ranges over the backend's `versions`, and torch; left out: all
    when = { "x.dtype" = ["float16"], "x.0" = ">=65536", score = ["sigmoid"] }  # left out: every call
    effect = "refuse"                    # or "tell": the kernel runs, and `explain` says it
    says = "loops over experts on the host"
    link = "https://github.com/pytorch/pytorch/issues/186620"
    review = 2027-05-01                  # after which `isolith status` lists it as stale; it is obeyed all the same

A condition names an argument, its dtype ("x.dtype") or the length of one of its axes ("x.0", "x.-1"), and gives a list
of values or a range of numbers; all conditions must hold.
"""

import datetime
import operator
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from isolith.dtypes import dtype_name
from isolith.errors import PluginError
from isolith.kernel import WhyNot, in_range

if TYPE_CHECKING:
    from isolith.backend import Backend

FILE = "quirks.toml"
REQUIRED = {"id": str, "operator": str, "effect": str, "says": str, "link": str, "review": datetime.date}
OPTIONAL = {"kernel": str, "arch": str, "sdk": dict, "when": dict}
BOUND = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*(-?\d+(?:\.\d+)?)\s*")
SIGNS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
NOTHING = object()
"""What a condition on an argument that is None, or has no such axis, compares with: never equal, in no range."""


@dataclass(frozen=True, kw_only=True)
class Quirk:
    """One entry of a quirks.toml; the module says what the fields mean."""

    id: str
    operator: str
    effect: Literal["refuse", "tell"]
    says: str
    link: str
    review: datetime.date
    kernel: str = ""
    arch: str = ""
    sdk: Mapping[str, str] = field(default_factory=dict)
    when: Mapping[str, Any] = field(default_factory=dict)  # Any: lists and ranges

    @property
    def sentence(self) -> str:
        """What `explain` says."""
        return f"quirk {self.id}: {self.says} ({self.link})"

    def concerns(self, operator: str, kernel: str) -> bool:
        """Whether it is about a kernel."""
        return self.operator == operator and self.kernel in ("", kernel)

    def is_stale(self, today: datetime.date) -> bool:
        """Whether it should have been looked at again."""
        return self.review < today

    def is_here(self, backend: "Backend") -> bool:
        """Whether the device and the software are those that have it; a version that is not known counts as such."""
        arch = backend.arch() if self.arch and backend.arch else None
        if arch is not None and not in_range(arch, self.arch):
            return False
        versions = {"torch": torch.__version__, **(backend.versions() if self.sdk and backend.versions else {})}
        return all(name not in versions or in_range(versions[name], wanted) for name, wanted in self.sdk.items())

    def holds(self, arguments: Mapping[str, Any]) -> bool:  # Any: a call's own values
        """Whether a call meets every condition."""
        return all(meets(value_of(arguments, name), wanted) for name, wanted in self.when.items())


def value_of(arguments: Mapping[str, Any], condition: str) -> Any:  # Any: an argument's value, dtype or length
    """What a condition looks at."""
    name, _, part = condition.partition(".")
    value = arguments.get(name)
    if not part:
        return value
    if not isinstance(value, Tensor):
        return NOTHING
    if part == "dtype":
        return dtype_name(value.dtype)
    axis = int(part)
    return value.shape[axis] if -value.dim() <= axis < value.dim() else NOTHING


def meets(value: Any, wanted: Any) -> bool:  # Any: an argument's value; a list or a range
    """Whether a value is in a list or a range."""
    if isinstance(wanted, list):
        return any(type(value) is type(one) and value == one for one in wanted)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return all(keeps(value, bound) for bound in wanted.split(","))


def keeps(value: float, bound: str) -> bool:
    """Whether a number keeps one bound of a range."""
    match = BOUND.fullmatch(bound)
    assert match is not None, "ranges are checked when they are read"
    return bool(SIGNS[match[1]](value, float(match[2])))


def beside(module_file: str | None, operators: Mapping[str, Any]) -> tuple[Quirk, ...]:  # Any: operators
    """The quirks in the file beside a plugin's entry module; none where there is no such file.

    Raises:
        PluginError: for a file that is not as this module describes it.
    """
    path = Path(module_file).parent / FILE if module_file else None
    if path is None or not path.is_file():
        return ()
    return parse(path.read_text(encoding="utf-8"), str(path), operators)


def parse(text: str, origin: str, operators: Mapping[str, Any]) -> tuple[Quirk, ...]:  # Any: operators
    """Read a quirks.toml; PluginError names the file, the entry and what is wrong."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PluginError(f"{origin}: {error}") from error
    if set(table) - {"quirk"} or not isinstance(table.get("quirk", []), list):
        raise PluginError(f"{origin}: a file of [[quirk]] tables; got {', '.join(sorted(table))}")
    found: dict[str, Quirk] = {}
    for number, row in enumerate(table.get("quirk", []), 1):
        problem = wrong(row, operators)
        if problem is None and row["id"] in found:
            problem = f"another entry has the id {row['id']!r}"
        if problem:
            raise PluginError(f"{origin}: quirk {number}: {problem}")
        found[row["id"]] = Quirk(**row)
    return tuple(found.values())


def wrong(row: Mapping[str, Any], operators: Mapping[str, Any]) -> WhyNot:  # Any: TOML; operators
    """What is wrong with an entry."""
    for name, kind in REQUIRED.items():
        if name not in row:
            return f"it lacks {name}"
        if not isinstance(row[name], kind) or row[name] == "":
            return f"{name} must be a {kind.__name__}; got {row[name]!r}"
    for name, value in row.items():
        if name not in REQUIRED and name not in OPTIONAL:
            return f"there is no field {name!r}"
        if name in OPTIONAL and not isinstance(value, OPTIONAL[name]):
            return f"{name} must be a {OPTIONAL[name].__name__}; got {value!r}"
    if row["operator"] not in operators:
        return f"there is no operator {row['operator']!r}"
    if row["effect"] not in ("refuse", "tell"):
        return f"effect must be refuse or tell; got {row['effect']!r}"
    ranges = {"arch": row.get("arch", ""), **{f"sdk.{name}": wanted for name, wanted in row.get("sdk", {}).items()}}
    for name, wanted in ranges.items():
        try:
            in_range("0", wanted) if wanted else None
        except (ValueError, TypeError, AttributeError) as error:
            return f"{name}: {error}"
    for name, wanted in row.get("when", {}).items():
        problem = wrong_condition(name, wanted, operators[row["operator"]].signature.parameters)
        if problem:
            return problem
    return None


def wrong_condition(name: str, wanted: Any, parameters: Mapping[str, Any]) -> WhyNot:  # Any: TOML; inspect's
    """What is wrong with a condition."""
    argument, dot, part = name.partition(".")
    if argument not in parameters:
        return f"when: the operator has no argument {argument!r}"
    if dot and part != "dtype" and not re.fullmatch(r"-?\d+", part):
        return f"when: {name!r} must end with .dtype or the number of an axis"
    if isinstance(wanted, list) and wanted:
        return None
    if isinstance(wanted, str) and all(BOUND.fullmatch(bound) for bound in wanted.split(",")):
        return None
    return f"when: {name} must be a list of values or a range such as '>=2,<8'; got {wanted!r}"
