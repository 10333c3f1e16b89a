"""What a call does not read: rows of its arguments that may hold anything, found by trying on the reference."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from isolith.errors import IsolithError
from isolith.operator import AnyOperator
from isolith_conformance import bits
from isolith_conformance.execute import Values
from isolith_conformance.family import evaluate

MOST_TRIES = 24
"""Runs of the reference for each argument; what has not been found unused by then counts as used."""


def with_garbage(operator: AnyOperator, arguments: Values) -> tuple[Values, tuple[str, ...]]:
    """The call with garbage in every row found unused: (its arguments, which of them have such rows)."""
    expected = evaluate(operator, operator.reference, arguments)

    def has_no_effect(changed: Values) -> bool:
        try:
            operator.validate(changed, values=True)
            results = evaluate(operator, operator.reference, changed)
        except (IsolithError, RuntimeError, IndexError):
            return False
        return bits.differing(operator, arguments, expected, results) is None

    given, where = dict(arguments), []

    def spoiled_has_no_effect(name: str, rows: list[int]) -> bool:
        return has_no_effect(given | {name: spoiled(arguments[name], rows)})

    for name, value in arguments.items():
        if not isinstance(value, Tensor) or not value.numel() or name in operator.mutates or counts(value):
            continue
        found = unused_rows(value, partial(spoiled_has_no_effect, name))
        if found:
            given[name] = spoiled(value, found)
            where.append(name)
    return given, tuple(where)


def counts(value: Tensor) -> bool:
    """Whether the argument is a list of lengths or positions, which garbage would make a call of another size."""
    return value.dim() < 2 and not value.is_floating_point() and value.itemsize > 1


def unused_rows(value: Tensor, has_no_effect: Callable[[list[int]], bool]) -> list[int]:
    """Rows in which garbage has no effect, halving the sets in which it has one."""
    tries, found, waiting = 0, list[int](), [list(range(rows_of(value)))]
    while waiting and tries < MOST_TRIES:
        rows, tries = waiting.pop(), tries + 1
        if has_no_effect(found + rows):
            found += rows
        elif len(rows) > 1:
            waiting += [rows[len(rows) // 2 :], rows[: len(rows) // 2]]
    return found


def rows_of(value: Tensor) -> int:
    """How many rows an argument has: slices of its first axis, or of the first two where it has three and more."""
    return value.shape[0] * (value.shape[1] if value.dim() > 2 else 1) if value.dim() else 1


def spoiled(value: Tensor, rows: list[int]) -> Tensor:
    """The argument with garbage in these rows, and its strides."""
    whole = torch.empty_strided(value.shape, dense(value), dtype=value.dtype)
    whole.copy_(value)
    if value.dim() == 0:
        return whole.fill_(garbage(value))
    for row in rows:
        part = whole[row // value.shape[1], row % value.shape[1]] if value.dim() > 2 else whole[row]
        part.view(torch.uint8).fill_(0xFF) if value.itemsize == 1 else part.fill_(garbage(value))
    return whole


def dense(value: Tensor) -> tuple[int, ...]:
    """The strides of a contiguous tensor of this shape."""
    return torch.empty(value.shape, device="meta").stride()


def garbage(value: Tensor) -> float | int:
    """NaN, or an integer that is out of range everywhere."""
    return torch.nan if value.is_floating_point() else torch.iinfo(value.dtype).max
