"""The row structure of a call: which parts of it can be taken by themselves, and which of the results are theirs.

Found from the operator's own `shapes` line, and believed only where the reference agrees: a row is a slice of the axis
that all outputs start with, or, in a ragged batch, a sequence with its tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isolith.errors import IsolithError
from isolith.operator import AnyOperator
from isolith_conformance.execute import Values
from isolith_conformance.family import evaluate
from isolith_conformance.judge import judge

ROWS = ("...", "tokens")
EVERY_RANK = "*"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A call that falls into rows.

    Args:
        count: How many there are.
        names: The arguments that have a part for each row.
        take: Row numbers -> the arguments of the call of these rows, in this order.
        pick: Results and row numbers -> the parts of these rows, in this order.
    """

    count: int
    names: tuple[str, ...]
    take: Callable[[Sequence[int]], Values]
    pick: Callable[[list[Tensor], Sequence[int]], list[Tensor]]


def rows_of(operator: AnyOperator, arguments: Values) -> Rows | None:
    """The row structure of a call; None where it has none, or fewer than two rows."""
    shapes = operator.parsed_shapes
    if operator.mutates or not all(shape.axes[:1] and shape.axes[0] in ROWS for shape in shapes.outputs):
        return None
    ragged = isinstance(arguments.get("cu_seqlens"), Tensor)
    found = sequences(operator, arguments) if ragged else slices(operator, arguments)
    return found if found is not None and found.count > 1 and holds(operator, arguments, found) else None


def led_by(operator: AnyOperator, arguments: Values, names: Sequence[str], count: int) -> tuple[str, ...]:
    """The tensors whose first axis has one of these names, and is so long."""
    return tuple(
        shape.name
        for shape in operator.parsed_shapes.inputs
        if shape.axes[:1]
        and shape.axes[0] in names
        and isinstance(value := arguments[shape.name], Tensor)
        and value.dim()
        and value.shape[0] == count
    )


def slices(operator: AnyOperator, arguments: Values) -> Rows | None:
    """Rows as slices of the first axis."""
    sizes = [
        value.shape[0]
        for shape in operator.parsed_shapes.inputs
        if shape.axes[:1]
        and shape.axes[0] in ROWS
        and isinstance(value := arguments[shape.name], Tensor)
        and value.dim() > (1 if shape.open_rank else 0)
    ]
    if not sizes:
        return None
    names = led_by(operator, arguments, (*ROWS, EVERY_RANK), sizes[0])

    def take(chosen: Sequence[int]) -> Values:
        return arguments | {name: arguments[name][list(chosen)] for name in names}

    def pick(results: list[Tensor], chosen: Sequence[int]) -> list[Tensor]:
        return [result[list(chosen)] for result in results]

    return Rows(count=sizes[0], names=names, take=take, pick=pick)


def sequences(operator: AnyOperator, arguments: Values) -> Rows | None:
    """Rows as the sequences of a ragged batch."""
    bounds = arguments["cu_seqlens"].tolist()
    count = len(bounds) - 1
    by_token = led_by(operator, arguments, (*ROWS, EVERY_RANK), bounds[-1])
    by_sequence = led_by(operator, arguments, ("sequences",), count)

    def tokens(chosen: Sequence[int]) -> list[int]:
        return [token for row in chosen for token in range(bounds[row], bounds[row + 1])]

    def take(chosen: Sequence[int]) -> Values:
        lengths = torch.tensor([0, *(bounds[row + 1] - bounds[row] for row in chosen)])
        given = arguments | {"cu_seqlens": lengths.cumsum(0).to(arguments["cu_seqlens"].dtype)}
        given |= {name: arguments[name][tokens(chosen)] for name in by_token}
        return given | {name: arguments[name][list(chosen)] for name in by_sequence}

    def pick(results: list[Tensor], chosen: Sequence[int]) -> list[Tensor]:
        return [result[tokens(chosen)] for result in results]

    return Rows(count=count, names=(*by_token, *by_sequence), take=take, pick=pick)


def holds(operator: AnyOperator, arguments: Values, rows: Rows) -> bool:
    """Whether the reference gives a row the same results by itself as among the others."""
    alone = rows.take([rows.count - 1])
    try:
        operator.validate(alone, values=True)
        whole = evaluate(operator, operator.reference, arguments)
        return judge(operator, alone, rows.pick(whole, [rows.count - 1])).passed
    except (IsolithError, IndexError, RuntimeError):
        return False
