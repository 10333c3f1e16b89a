"""The `shapes` line of an operator: parsed once, then checked against the tensors of a call.

    x[... hidden] weight[hidden] bias?[experts] -> y[... hidden]

An axis is a name (equal wherever it stands), a number, an expression over names and integer arguments
(`2*inter`, `(2+n)*n`; no spaces inside), or `_` for any size. `...` is any number of leading axes, equal wherever it
stands; `*` is any number of axes, unconstrained. `?` marks an argument that may be None.
"""

import ast
import operator as arithmetic
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from isolith.errors import ArgumentError

ARITHMETIC: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: arithmetic.add,
    ast.Sub: arithmetic.sub,
    ast.Mult: arithmetic.mul,
    ast.FloorDiv: arithmetic.floordiv,
}


@dataclass(frozen=True, kw_only=True)
class TensorShape:
    """One tensor of a `shapes` line."""

    name: str
    axes: tuple[str, ...]
    optional: bool

    @property
    def open_rank(self) -> bool:
        """Whether any number of axes may lead."""
        return bool(self.axes) and self.axes[0] in ("...", "*")

    def __str__(self) -> str:
        return f"[{' '.join(self.axes)}]"


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """A parsed `shapes` line."""

    inputs: tuple[TensorShape, ...]
    outputs: tuple[TensorShape, ...]

    def bind(self, operator: str, arguments: Mapping[str, Any]) -> dict[str, Any]:  # Any: a call's own values
        """Give every axis name its size, or raise ArgumentError on the first disagreement.

        Returns sizes by axis name; "..." maps to the tuple of leading sizes.
        """
        sizes: dict[str, Any] = {n: v for n, v in arguments.items() if isinstance(v, int) and not isinstance(v, bool)}
        found_in: dict[str, str] = dict.fromkeys(sizes, "the arguments")
        present = [shape for shape in self.inputs if isinstance(arguments.get(shape.name), Tensor)]
        for shape in present:
            bind_names(operator, shape, tuple(arguments[shape.name].shape), sizes, found_in)
        for shape in present:
            check_expressions(operator, shape, tuple(arguments[shape.name].shape), sizes)
        return sizes


def parse(line: str) -> Shapes:
    """Parse a `shapes` line; ValueError says what is wrong with it."""
    left, arrow, right = line.partition("->")
    if not arrow:
        raise ValueError(f"a shapes line needs '->'; got {line!r}")
    return Shapes(inputs=parse_side(left), outputs=parse_side(right))


def parse_side(text: str) -> tuple[TensorShape, ...]:
    """Parse the tensors on one side of the arrow."""
    pattern = r"\s*(\w+)(\??)\[([^\]]*)\]\s*"
    if re.fullmatch(f"(?:{pattern})*", text) is None:
        raise ValueError(f"tensors are written name[axes]; got {text.strip()!r}")
    return tuple(
        TensorShape(name=name, axes=tuple(axes.split()), optional=bool(optional))
        for name, optional, axes in re.findall(pattern, text)
    )


def bind_names(
    operator: str, shape: TensorShape, actual: tuple[int, ...], sizes: dict[str, Any], found_in: dict[str, str]
) -> None:
    """Bind the plain names among the axes of one tensor."""
    fixed = shape.axes[1:] if shape.open_rank else shape.axes
    if len(actual) < len(fixed) or (len(actual) > len(fixed) and not shape.open_rank):
        least = "at least " if shape.open_rank else ""
        plural = "axis" if len(fixed) == 1 else "axes"
        raise ArgumentError(
            f"{operator}: {shape.name} must be {shape}, {least}{len(fixed)} {plural}; got shape {actual}."
        )
    leading = actual[: len(actual) - len(fixed)]
    if shape.open_rank and shape.axes[0] == "...":
        known = sizes.setdefault("...", leading)
        first = found_in.setdefault("...", shape.name)
        if known != leading:
            raise ArgumentError(f"{operator}: leading axes are {known} in {first} but {leading} in {shape.name}.")
    for axis, size in zip(fixed, actual[len(leading) :], strict=True):
        if not axis.isidentifier() or axis == "_":
            continue
        known = sizes.setdefault(axis, size)
        first = found_in.setdefault(axis, shape.name)
        if known != size and first == shape.name:
            raise ArgumentError(f"{operator}: {axis} is both {known} and {size} in {shape.name}.")
        if known != size:
            raise ArgumentError(f"{operator}: {axis} is {known} in {first} but {size} in {shape.name}.")


def check_expressions(operator: str, shape: TensorShape, actual: tuple[int, ...], sizes: Mapping[str, Any]) -> None:
    """Check the numbers and expressions among the axes of one tensor, where all their names are bound."""
    fixed = shape.axes[1:] if shape.open_rank else shape.axes
    for index, axis in enumerate(fixed, start=len(actual) - len(fixed)):
        if axis.isidentifier():
            continue
        wanted = evaluate(axis, sizes)
        if wanted is not None and actual[index] != wanted:
            said = axis if axis.isdigit() else f"{axis} = {wanted}"
            raise ArgumentError(
                f"{operator}: axis {index} of {shape.name} {shape} must be {said}; got {actual[index]}."
            )


def evaluate(expression: str, sizes: Mapping[str, Any]) -> int | None:
    """The value of an axis expression, or None when a name in it is unbound."""

    def value(node: ast.expr) -> int | None:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name):
                return sizes.get(name)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
                a, b = value(left), value(right)
                return None if a is None or b is None else ARITHMETIC[type(op)](a, b)
        raise ValueError(f"an axis is a name, a number or + - * // of them; got {expression!r}")

    return value(ast.parse(expression, mode="eval").body)
