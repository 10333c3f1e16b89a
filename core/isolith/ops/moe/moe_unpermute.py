"""Combine on one rank: every token's expert outputs, weighted and added up.

    y[t, :] = sum over slots of topk_weights[t, slot] * rows[pair_to_pos[t, slot], :] + residual[t, :]

in float32, slots in order 0..k-1, then the residual (a shared expert's output), rounded once to the dtype of rows.
Slots with -1 are skipped: neither their weight nor any row is read. Without weights they are 1, without a residual it
is 0; a token with no live slot gets its residual, or zeros. The order of the sum is free in a kernel, its precision is
not.

Source: DeepSeek-V4 inference/model.py, MoE.forward (float32 sum, shared expert added before the rounding);
TileKernels 36d9e45 reduce_fused (slot order).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isolith.dtypes import FLOAT, INTEGER, WIDE, widen
from isolith.errors import ArgumentError
from isolith.materials.relations import inverse, joined, reordered, same, scaled, take
from isolith.operator import Cost, Operator
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(
    rows: Tensor, pair_to_pos: Tensor, topk_weights: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    live = terms(rows, pair_to_pos, topk_weights)
    y = torch.zeros((pair_to_pos.shape[0], rows.shape[1]), dtype=live.dtype, device=rows.device)
    for slot in range(pair_to_pos.shape[1]):
        y = y + live[:, slot]
    if residual is not None:
        y = y + residual.to(y.dtype)
    return y.to(rows.dtype)


def terms(rows: Tensor, pair_to_pos: Tensor, topk_weights: Tensor | None) -> Tensor:
    """[T,k,H]: what each slot adds, wide; zero for a slot without a row, whatever its weight."""
    if rows.shape[0] == 0:
        rows = rows.new_zeros((1, rows.shape[1]))
    values = rows[pair_to_pos.clamp(min=0).long()].to(widen(rows.dtype))
    if topk_weights is not None:
        values = values * topk_weights.to(values.dtype)[..., None]
    return values.masked_fill((pair_to_pos < 0)[..., None], 0.0)


def all_slots_at_once(
    rows: Tensor, pair_to_pos: Tensor, topk_weights: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Add the slots up in whatever order a reduction has."""
    y = terms(rows, pair_to_pos, topk_weights).sum(1)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return y.to(rows.dtype)


def residual_first(
    rows: Tensor, pair_to_pos: Tensor, topk_weights: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Start from the residual and add the slots from the last to the first."""
    live = terms(rows, pair_to_pos, topk_weights)
    y = torch.zeros_like(live[:, 0]) if residual is None else residual.to(live.dtype)
    for slot in reversed(range(pair_to_pos.shape[1])):
        y = y + live[:, slot]
    return y.to(rows.dtype)


def fake(
    rows: Tensor, pair_to_pos: Tensor, topk_weights: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    return rows.new_empty((pair_to_pos.shape[0], rows.shape[1]))


def check(
    rows: Tensor, pair_to_pos: Tensor, topk_weights: Tensor | None = None, residual: Tensor | None = None
) -> None:
    if pair_to_pos.shape[1] < 1:
        raise ArgumentError(f"moe_unpermute: k must be at least 1; got {pair_to_pos.shape[1]}.")


def check_values(
    rows: Tensor, pair_to_pos: Tensor, topk_weights: Tensor | None = None, residual: Tensor | None = None
) -> None:
    if pair_to_pos.numel() == 0:
        return
    low, high = (int(bound) for bound in pair_to_pos.aminmax())
    last = rows.shape[0] - 1
    if low < -1 or high > last:
        got = low if low < -1 else high
        raise ArgumentError(f"moe_unpermute: pair_to_pos must be in 0..rows-1 = {last}, or -1; got {got}.")


def cost(rows: Tensor, pair_to_pos: Tensor, topk_weights: Tensor | None = None, residual: Tensor | None = None) -> Cost:
    tokens, k = pair_to_pos.shape
    y = tokens * rows.shape[1]
    given = sum(tensor.nbytes for tensor in (topk_weights, residual) if tensor is not None)
    return Cost(
        flops=2 * y * k + (0 if residual is None else y),
        bytes_read=y * k * rows.element_size() + pair_to_pos.nbytes + given,
        bytes_written=y * rows.element_size(),
    )


def samples(make: Make) -> Iterator[Sample]:
    wide = torch.float32

    def mapping(tokens: int, k: int, spare: int, dropped: float = 0.0) -> Tensor:
        """Pairs to rows in random order, `spare` rows that no pair has, some pairs dropped."""
        where = make.permutation(tokens * k + spare)[: tokens * k].view(tokens, k)
        keep = make.uniform(tokens, k, dtype=torch.float64).cpu() >= dropped
        return make.place(torch.where(keep, where, -1), torch.int32)

    weights = make.uniform(16, 6, dtype=wide)
    shared = make.normal(16, 4096)
    rows = make.normal(128, 4096)
    model = {"rows": rows, "pair_to_pos": mapping(16, 6, 32), "topk_weights": weights, "residual": shared}
    yield Sample("hidden_4096", "model", **model)
    yield Sample("no_weights", rows=make.normal(56, 40), pair_to_pos=mapping(6, 9, 2))
    some = mapping(9, 4, 5, dropped=0.4)
    yield Sample(
        "dropped_slots", rows=make.normal(41, 24), pair_to_pos=some, topk_weights=make.normal(9, 4, dtype=wide)
    )
    # Rows that no pair has, and weights of dropped slots, are NaN: nothing may read them.
    stale = make.full(float("nan"), 41, 24)
    live = some[some >= 0].long()
    stale[live] = make.normal(len(live), 24)
    poison = make.normal(9, 4, dtype=wide).masked_fill(some < 0, float("nan"))
    yield Sample("nan_in_stale_rows", rows=stale, pair_to_pos=some, topk_weights=poison, residual=make.normal(9, 24))
    nowhere = make.full(-1, 4, 3, dtype=torch.int32)
    yield Sample("all_dropped", "exact", rows=make.normal(12, 16), pair_to_pos=nowhere, residual=make.normal(4, 16))
    yield Sample("all_dropped_no_residual", "exact", rows=make.full(float("nan"), 12, 16), pair_to_pos=nowhere)
    yield Sample("no_rows", "exact", rows=make.normal(0, 16), pair_to_pos=nowhere, residual=make.normal(4, 16))
    whole = make.tensor([[1.0, 2.0, -1.0, 0.5]] * 7, wide)
    small = {"rows": make.small_integers(30, 33), "pair_to_pos": mapping(7, 4, 2), "topk_weights": whole}
    yield Sample("integers", "exact", **small, residual=make.small_integers(7, 33))
    yield Sample(
        "zero_weights", rows=make.normal(12, 8), pair_to_pos=mapping(4, 3, 0), topk_weights=make.zeros(4, 3, dtype=wide)
    )
    yield Sample(
        "one_slot", rows=make.normal(5, 17), pair_to_pos=mapping(5, 1, 0), topk_weights=make.normal(5, 1, dtype=wide)
    )
    wide_rest = make.normal(5, 16, dtype=wide)
    yield Sample("float32_residual", rows=make.normal(10, 16), pair_to_pos=mapping(5, 2, 0), residual=wide_rest)
    # Rows beyond 15 and 16 bits.
    far = make.tensor([[69_999, 65_536], [32_768, 65_535], [32_767, 0]], torch.int32)
    yield Sample("70000_rows", rows=make.normal(70_000, 2), pair_to_pos=far)
    order = make.tensor([[0, 1], [2, -1]], torch.int32)
    yield Sample("sum_beyond_float16", rows=make.full(40_000.0, 3, 8), pair_to_pos=order)
    yield Sample("no_tokens", rows=make.normal(8, 16), pair_to_pos=make.zeros(0, 3, dtype=torch.int32))
    yield from samples_of_sums(make)


def samples_of_sums(make: Make) -> Iterator[Sample]:
    wide = torch.float32
    # Slots that nearly cancel: a sum in bf16 loses the rest.
    pair = make.normal(8, 64, std=8.0)
    near = torch.stack((pair, -pair, make.normal(8, 64, std=0.05)), dim=1).flatten(0, 1)
    order = make.tensor([[3 * t, 3 * t + 1, 3 * t + 2] for t in range(8)], torch.int32)
    yield Sample("cancelling", rows=near, pair_to_pos=order)
    # Weights that nearly cancel, of one row: narrower weights or products lose the rest.
    first = make.uniform(8, 1, low=0.3, high=0.9, dtype=wide)
    opposed = torch.cat((first, make.uniform(8, 1, high=0.01, dtype=wide) - first), dim=1)
    twice = make.tensor([[t, t] for t in range(8)], torch.int32)
    yield Sample("cancelling_weights", rows=make.normal(8, 64), pair_to_pos=twice, topk_weights=opposed)
    # A residual that cancels the sum: rounding either of them first loses the rest.
    slots = make.normal(8, 2, 64, std=8.0)
    rest = make.normal(8, 64, std=0.01, dtype=wide) - slots.to(wide).sum(1)
    order = make.tensor([[2 * t, 2 * t + 1] for t in range(8)], torch.int32)
    yield Sample("cancelling_residual", rows=slots.flatten(0, 1), pair_to_pos=order, residual=rest)
    # Many equal terms: a sum rounded after every slot drifts.
    ones = make.tensor([[t * 8 + s for s in range(8)] for t in range(4)], torch.int32)
    yield Sample("same_sign", rows=make.uniform(32, 64, low=1.0, high=1.1), pair_to_pos=ones)
    yield Sample("one_row_many_times", rows=make.normal(1, 16), pair_to_pos=make.zeros(3, 5, dtype=torch.int64))


def errors(make: Make) -> Iterator[ErrorSample]:
    positions = make.tensor([[0, 1], [-1, 3]], torch.int32)
    given = {"rows": make.normal(4, 8), "pair_to_pos": positions}

    def wrong(name: str, says: str, **changed: object) -> ErrorSample:
        return ErrorSample(name, says=f"moe_unpermute: {says}", **{**given, **changed})

    says = "pair_to_pos must be in 0..rows-1 = 3, or -1; got 4."
    yield wrong("row_too_high", says, pair_to_pos=positions + 1)
    yield wrong("row_below_none", "pair_to_pos must be in 0..rows-1 = 3, or -1; got -2.", pair_to_pos=positions - 1)
    yield wrong("no_slots", "k must be at least 1; got 0.", pair_to_pos=positions[:, :0])
    yield wrong("weights_shape", "k is 2 in pair_to_pos but 3 in topk_weights.", topk_weights=make.normal(2, 3))
    yield wrong("residual_rows", "tokens is 2 in pair_to_pos but 3 in residual.", residual=make.normal(3, 8))
    yield wrong("residual_width", "hidden is 8 in rows but 7 in residual.", residual=make.normal(2, 7))
    says = "rows must be bfloat16, float16, float32 or float64; got int8."
    yield wrong("integer_rows", says, rows=make.zeros(4, 8, dtype=torch.int8))


def relations(make: Make) -> Iterator[Relation]:
    idx = make.place(make.permutation(44)[:33].view(11, 3), torch.int32)
    idx[::4, 1] = -1
    call: dict[str, Any] = {
        "rows": make.normal(44, 40),
        "pair_to_pos": idx,
        "topk_weights": make.uniform(11, 3, dtype=torch.float32),
        "residual": make.normal(11, 40),
    }
    yield scaled("everything_times_8", call, {"rows": 3, "residual": 3}, [3])
    yield joined("tokens_apart", call, [1, 5], ["pair_to_pos", "topk_weights", "residual"])
    yield reordered("slots_reordered", call, make.permutation(3), {"pair_to_pos": 1, "topk_weights": 1}, {})
    order = make.permutation(44)
    number = torch.where(idx < 0, -1, inverse(order).to(make.device)[idx.clamp(min=0).long()]).int()
    yield same("rows_reordered", call, {"rows": take(call["rows"], order), "pair_to_pos": number})
    # Sums of few small integers are exact: one slot after the other, each adding to what was before.
    exact = {**call, "rows": make.small_integers(44, 40), "residual": make.small_integers(11, 40), "topk_weights": None}
    slots = [exact["pair_to_pos"][:, slot : slot + 1].contiguous() for slot in range(3)]
    parts = tuple({**exact, "pair_to_pos": slot, "residual": None} for slot in slots)

    def added(results: list[list[Tensor]]) -> list[Tensor]:
        return [exact["residual"].cpu() + sum((part[0] for part in results), torch.zeros(()).to(make.dtype))]

    yield Relation(name="slots_apart", whole=exact, parts=parts, assemble=added, exact=True)


moe_unpermute = Operator(
    name="moe_unpermute",
    shapes="rows[total hidden] pair_to_pos[tokens k] topk_weights?[tokens k] residual?[tokens hidden]"
    " -> y[tokens hidden]",
    dtypes={"rows": FLOAT, "pair_to_pos": INTEGER, "topk_weights": WIDE, "residual": FLOAT},
    reference=reference,
    variants=(all_slots_at_once, residual_first),
    fake=fake,
    check=check,
    check_values=check_values,
    cost=cost,
    samples=samples,
    errors=errors,
    relations=relations,
)
