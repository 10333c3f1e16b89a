"""Relations that several operators have: a call scaled, reordered, cut into pieces, or taken step by step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from isolith.sample import Relation

Call = Mapping[str, Any]  # Any: an operator's arguments
Assemble = Callable[[list[list[Tensor]]], list[Tensor]]


def times(value: Any, power: int) -> Any:  # Any: a tensor or a number
    """A tensor or a number times 2^power."""
    if isinstance(value, Tensor):
        return (value.double() * 2.0**power).to(value.dtype)
    return value * 2.0**power


def rounds_alike_at_any_size(call: Call) -> bool:
    """Whether no tensor is in float16, whose small values lose bits that their multiples keep."""
    return all(value.dtype != torch.float16 for value in call.values() if isinstance(value, Tensor))


def scaled(name: str, call: Call, powers: Mapping[str, int], results: Sequence[int]) -> Relation:
    """Arguments times powers of two: the results are those of the call times powers of two, to the bit.

    Args:
        name: Says what holds.
        call: The call before scaling.
        powers: The power of two of each argument that is scaled.
        results: The power of two of each result.
    """

    def assemble(parts: list[list[Tensor]]) -> list[Tensor]:
        return [times(result, power) if power else result for result, power in zip(parts[0], results, strict=True)]

    whole = {**call, **{key: times(call[key], power) for key, power in powers.items()}}
    return Relation(name=name, whole=whole, parts=(call,), assemble=assemble, exact=rounds_alike_at_any_size(call))


def take(values: Tensor, order: Tensor, axis: int = 0) -> Tensor:
    """The rows of `order` along an axis, in any dtype."""
    place = order.to(values.device)
    return values[(slice(None),) * axis + (place,)].contiguous()


def inverse(order: Tensor) -> Tensor:
    """The order that undoes this one."""
    return order.argsort()


def reordered(
    name: str,
    call: Call,
    order: Tensor,
    axes: Mapping[str, int],
    results: Mapping[int, int],
    *,
    changes: Call | None = None,
    exact: bool = False,
) -> Relation:
    """Rows in another order: the results are those of the call, their rows in another order.

    Args:
        name: Says what holds.
        call: The call in its own order.
        order: Which row comes where in the other call.
        axes: The axis of each argument that is reordered.
        results: The axis of each result that is, by its place.
        changes: Arguments of the other call that change otherwise.
        exact: Whether the operator moves bytes alone.
    """

    def assemble(parts: list[list[Tensor]]) -> list[Tensor]:
        back = inverse(order)
        return [
            take(result, back, results[place]) if place in results else result for place, result in enumerate(parts[0])
        ]

    part = {**call, **{key: take(call[key], order, axis) for key, axis in axes.items()}, **(changes or {})}
    return Relation(name=name, whole=call, parts=(part,), assemble=assemble, exact=exact)


def same(name: str, call: Call, changes: Call, *, exact: bool = False) -> Relation:
    """What changes in the arguments does not change the results."""
    return Relation(name=name, whole=call, parts=({**call, **changes},), assemble=first, exact=exact)


def first(parts: list[list[Tensor]]) -> list[Tensor]:
    """The results of the first part."""
    return parts[0]


def joined(
    name: str, call: Call, cuts: Iterable[int], arguments: Sequence[str], *, axis: int = 0, exact: bool = False
) -> Relation:
    """A call cut into pieces along an axis that all the arguments named and all results have."""
    length = call[arguments[0]].shape[axis]
    ends = [*cuts, length]
    spans = [torch.arange(low, high) for low, high in zip([0, *ends[:-1]], ends, strict=True)]
    parts = tuple({**call, **{key: take(call[key], span, axis) for key in arguments}} for span in spans)

    def assemble(results: list[list[Tensor]]) -> list[Tensor]:
        return [torch.cat(pieces, dim=axis) for pieces in zip(*results, strict=True)]

    return Relation(name=name, whole=call, parts=parts, assemble=assemble, exact=exact)


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """Which arguments of an operator on ragged batches have a row per token, and which one per sequence.

    cu_seqlens and start_pos are not named.
    """

    tokens: tuple[str, ...]
    sequences: tuple[str, ...]


def tokens_of_steps(call: Call, steps: Sequence[Sequence[int]]) -> list[Tensor]:
    """The tokens of a call that each step takes, when step j takes steps[j][b] more tokens of sequence b."""
    place: list[int] = call["cu_seqlens"][:-1].tolist()
    taken = []
    for step in steps:
        spans = [torch.arange(low, low + count) for low, count in zip(place, step, strict=True)]
        taken.append(torch.cat(spans))
        place = [low + count for low, count in zip(place, step, strict=True)]
    return taken


def in_steps(
    name: str,
    call: Call,
    steps: Sequence[Sequence[int]],
    ragged: Ragged,
    *,
    carry: tuple[str, ...] = (),
    assemble: Assemble | None = None,
) -> Relation:
    """The same tokens in several calls, one after the other: decode, chunks, and batches of both.

    Args:
        name: Says what holds.
        call: All tokens at once.
        steps: How many tokens of each sequence each of the calls takes; together all of them.
        ragged: The arguments that have a row per token.
        carry: Mutated arguments, taken from call to call.
        assemble: Makes the results; by default those are rows of tokens, and then mutated arguments.
    """
    taken = tokens_of_steps(call, steps)
    start, parts = call["start_pos"], []
    for step, tokens in zip(steps, taken, strict=True):
        counts = torch.tensor(step, dtype=start.dtype, device=start.device)
        ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(call["cu_seqlens"].dtype)
        rows = {key: take(call[key], tokens) for key in ragged.tokens if call.get(key) is not None}
        parts.append({**call, **rows, "cu_seqlens": ends, "start_pos": start})
        start = start + counts
    rows_of_tokens = in_order_of_tokens(taken, len(carry))
    return Relation(name=name, whole=call, parts=tuple(parts), assemble=assemble or rows_of_tokens, carry=carry)


def in_order_of_tokens(taken: list[Tensor], mutated: int) -> Assemble:
    """Results of steps, a row per token, as those of one call; the last `mutated` ones as the last step leaves them."""

    def assemble(parts: list[list[Tensor]]) -> list[Tensor]:
        outputs = len(parts[0]) - mutated
        back = inverse(torch.cat(taken))
        rows = [take(torch.cat([part[place] for part in parts]), back) for place in range(outputs)]
        return rows + parts[-1][outputs:]

    return assemble


def sequences_apart(name: str, call: Call, ragged: Ragged) -> Relation:
    """Every sequence of a batch in a call of its own; for operators whose results have a row per token."""
    cu_seqlens, start_pos = call["cu_seqlens"], call["start_pos"]
    ends = cu_seqlens.tolist()
    parts, taken = [], []
    for row, (low, high) in enumerate(pairwise(ends)):
        tokens, alone = torch.arange(low, high), torch.tensor([row])
        rows = {key: take(call[key], tokens) for key in ragged.tokens if call.get(key) is not None}
        tables = {key: take(call[key], alone) for key in ragged.sequences if call.get(key) is not None}
        end = torch.tensor([0, high - low], dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        parts.append({**call, **rows, **tables, "cu_seqlens": end, "start_pos": take(start_pos, alone)})
        taken.append(tokens)
    return Relation(name=name, whole=call, parts=tuple(parts), assemble=in_order_of_tokens(taken, 0))


def sequences_reordered(name: str, call: Call, order: Tensor, ragged: Ragged) -> Relation:
    """The sequences of a batch in another order; for operators whose results have a row per token."""
    ends = call["cu_seqlens"].tolist()
    tokens = torch.cat([torch.arange(ends[row], ends[row + 1]) for row in order.tolist()])
    counts = take(call["cu_seqlens"].diff(), order)
    axes = dict.fromkeys((key for key in (*ragged.tokens, *ragged.sequences) if call.get(key) is not None), 0)
    rows = {key: take(call[key], tokens if key in ragged.tokens else order) for key in axes}
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(call["cu_seqlens"].dtype)
    part = {**call, **rows, "cu_seqlens": cu_seqlens, "start_pos": take(call["start_pos"], order)}
    return Relation(name=name, whole=call, parts=(part,), assemble=in_order_of_tokens([tokens], 0))


def pages_renumbered(name: str, call: Call, order: Tensor, pool: str, table: str) -> Relation:
    """The blocks of a pool in another order, and the block table with them."""
    blocks = call[table].long()
    moved = torch.where(blocks < 0, -1, inverse(order).to(blocks.device)[blocks.clamp(min=0)]).to(call[table].dtype)
    return same(name, call, {pool: take(call[pool], order), table: moved})
