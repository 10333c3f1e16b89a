"""Dispatch on one rank: token rows sorted by expert, each expert's segment padded to an alignment A.

    pair t*k + slot goes to expert topk_idx[t, slot]; -1 drops it
    expert_counts[e]  = number of pairs of expert e
    start_e           = sum over j < e of A*ceil(expert_counts[j]/A)
    expert_offsets[e] = start_e + expert_counts[e]                        the end of the real rows
    pos_to_pair       = the pairs of expert e at start_e, start_e + 1, ... in their own order; -1 elsewhere
    rows[p, :]        = x[pos_to_pair[p] // k, :], row_scale likewise
    pair_to_pos, pos_to_expert: the inverse, and the expert of each row; -1 = dropped, -1 = padding

There are P = A*floor((T*k + min(E, T*k)*(A-1)) / A) rows whatever the routing: room for the worst one. Rows without a
pair (behind a segment, and behind the last one) are zero here, unspecified in a kernel, and nothing reads them. An
expert may have no token, all tokens, or one token several times. Without x_scale, row_scale has 0 elements.

Source: DeepSeek-V4 inference/model.py, MoE.forward; TileKernels 36d9e45 expand_to_fused, expand_to_fused_with_sf;
DeepEP dd758ca (psum_num_recv_tokens_per_expert, expert_alignment).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isolith.dtypes import E4M3, FLOAT, INT8, INTEGER, PACKED, SCALE
from isolith.numerics.codes import check_at_least_one
from isolith.numerics.routing import check_topk_idx
from isolith.operator import Cost, Operator
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(
    x: Tensor, topk_idx: Tensor, experts: int, alignment: int = 1, x_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, k = topk_idx.shape
    device, pairs = x.device, tokens * k
    expert = topk_idx.flatten().long()
    legal = (expert >= 0) & (expert < experts)
    expert = torch.where(legal, expert, experts)  # dropped pairs sort behind all others

    counted = torch.zeros(experts + 1, dtype=torch.int64, device=device)
    counts = counted.scatter_add(0, expert, torch.ones_like(expert))[:experts]
    padded = (counts + alignment - 1) // alignment * alignment
    start = padded.cumsum(0) - padded
    first = counts.cumsum(0) - counts  # where an expert's pairs start among the sorted ones

    order = expert.argsort(stable=True)
    sorted_expert = expert[order]
    shift = torch.cat((start - first, torch.zeros_like(counted[:1])))
    total = row_count(pairs, experts, alignment)
    position = torch.arange(pairs, device=device) + shift[sorted_expert]
    position = torch.where(sorted_expert < experts, position, total)

    # One entry more than there are rows: dropped pairs are written there.
    nothing = torch.full((total + 1,), -1, dtype=torch.int64, device=device)
    pos_to_pair = nothing.scatter(0, position, order)[:total]
    pos_to_expert = nothing.scatter(0, position, sorted_expert)[:total]
    position = torch.where(position < total, position, -1)
    pair_to_pos = torch.empty_like(position).scatter(0, order, position).view(tokens, k)

    rows = rows_of(x, pos_to_pair, k)
    row_scale = x.new_empty(0) if x_scale is None else rows_of(x_scale, pos_to_pair, k)
    maps = (counts, start + counts, pos_to_pair, pair_to_pos, pos_to_expert)
    return rows, row_scale, *(each.to(torch.int32) for each in maps)  # type: ignore[return-value]  # five maps


def row_count(pairs: int, experts: int, alignment: int) -> int:
    """P: rows enough for the routing that pads the most."""
    most: int = torch.sym_min(experts, pairs)
    return (pairs + most * (alignment - 1)) // alignment * alignment


def rows_of(x: Tensor, pos_to_pair: Tensor, k: int) -> Tensor:
    """The token rows of the pairs, zero where there is no pair."""
    token = pos_to_pair.clamp(min=0) // k
    return torch.where((pos_to_pair >= 0)[:, None], x[token], torch.zeros((), dtype=x.dtype, device=x.device))


def defined(
    x: Tensor, topk_idx: Tensor, experts: int, alignment: int = 1, x_scale: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    live = reference(x[:, :0], topk_idx, experts, alignment)[4] >= 0
    return live, None if x_scale is None else live, None, None, None, None, None


def fake(
    x: Tensor, topk_idx: Tensor, experts: int, alignment: int = 1, x_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, k = topk_idx.shape
    total = row_count(tokens * k, experts, alignment)

    def int32(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.int32)

    row_scale = x.new_empty(0) if x_scale is None else x_scale.new_empty((total, x_scale.shape[1]))
    rows = x.new_empty((total, x.shape[1]))
    return rows, row_scale, int32(experts), int32(experts), int32(total), int32(tokens, k), int32(total)


def check(topk_idx: Tensor, experts: int, alignment: int, **_: object) -> None:
    check_at_least_one("moe_permute", experts=experts, alignment=alignment, k=topk_idx.shape[1])


def check_values(topk_idx: Tensor, experts: int, **_: object) -> None:
    check_topk_idx("moe_permute", topk_idx, experts)


def cost(x: Tensor, topk_idx: Tensor, experts: int, alignment: int = 1, x_scale: Tensor | None = None) -> Cost:
    tokens, k = topk_idx.shape
    total = row_count(tokens * k, experts, alignment)
    scale = 0 if x_scale is None else x_scale.nbytes
    return Cost(
        flops=0,
        bytes_read=x.nbytes + scale + topk_idx.nbytes,
        # Each pair's row once; padding need not be written.
        bytes_written=k * (x.nbytes + scale) + 4 * (2 * experts + 2 * total + tokens * k),
    )


def samples(make: Make) -> Iterator[Sample]:
    yield from routing_samples(make)
    yield from payload_samples(make)
    yield from many_samples(make)


def routing_samples(make: Make) -> Iterator[Sample]:
    """Where the tokens go: every expert, few, one, none."""

    def routed(name: str, topk_idx: Tensor, experts: int, *tags: str, alignment: int = 1) -> Sample:
        x = make.normal(topk_idx.shape[0], 8)
        return Sample(name, *tags, x=x, topk_idx=topk_idx, experts=experts, alignment=alignment)

    chosen = make.uniform(16, 64).argsort(dim=1)[:, :6].int()
    flash = {"topk_idx": chosen, "experts": 64, "alignment": 16}
    yield Sample("hidden_4096", "model", x=make.normal(16, 4096), **flash)
    for alignment in (1, 4, 16, 128):
        idx = make.integers(-1, 7, 33, 3)
        yield routed(f"random_alignment_{alignment}", idx, 7, alignment=alignment)
    worked = make.tensor([[2, 0], [-1, 2], [0, 0]], torch.int32)
    yield routed("worked_example", worked, 3, alignment=4)
    # Experts without a token in front, in the middle and behind; every pattern of them.
    for alignment in (1, 4):
        for pattern in (0b0110, 0b1001, 0b0101, 0b1010, 0b1000, 0b0001):
            present = torch.tensor([e for e in range(4) if pattern >> e & 1])
            idx = make.place(present[torch.arange(18) % len(present)].view(9, 2), torch.int32)
            yield routed(f"experts_{pattern:04b}_alignment_{alignment}", idx, 4, alignment=alignment)
    yield routed("all_to_one_expert", make.full(5, 300, 2, dtype=torch.int32), 9, alignment=16)
    # More pairs than an 8-bit and than a 16-bit counter holds.
    yield routed("70000_pairs_to_one", make.full(1, 35000, 2, dtype=torch.int32), 3)
    yield routed("same_expert_in_every_slot", make.integers(0, 5, 7, 1).expand(7, 4).contiguous(), 5, alignment=2)
    yield routed("all_dropped", make.full(-1, 5, 2, dtype=torch.int32), 4, alignment=8)
    yield routed("counts_are_multiples", make.tensor([[0, 1]] * 16, torch.int32), 2, alignment=16)
    yield routed("one_over_a_multiple", make.tensor([[0, 1]] * 17, torch.int32), 2, alignment=16)
    ends = make.tensor([[383, 128], [256, 0], [255, 383]], torch.int32)
    yield routed("more_experts_than_pairs", ends, 384, alignment=4)
    yield routed("int64", make.integers(-1, 6, 9, 3, dtype=torch.int64), 6)
    yield routed("one_token", make.tensor([[3, 1]], torch.int32), 4)
    yield routed("one_expert", make.tensor([[0], [-1], [0]], torch.int32), 1, alignment=4)
    yield routed("no_tokens", make.zeros(0, 2, dtype=torch.int32), 4, alignment=8)


def many_samples(make: Make) -> Iterator[Sample]:
    """Judged by the invariants alone: every pattern of empty experts, and counts and pairs beyond 16 bits."""
    # Each pattern has eight experts of its own, of which it leaves some without a token.
    for low in range(0, 256, 64):
        patterns = torch.arange(low, low + 64)
        present = [[e if pattern >> e & 1 else -1 for e in range(8)] for pattern in patterns.tolist()]
        idx = torch.tensor(present)
        idx = torch.where(idx < 0, -1, idx + 8 * torch.arange(64)[:, None]).repeat(3, 1)
        given = {"x": make.normal(192, 8), "topk_idx": make.place(idx, torch.int32), "experts": 512}
        for alignment in (1, 8):
            name = f"patterns_{low}_to_{low + 63}_alignment_{alignment}"
            yield Sample(name, "invariants", **given, alignment=alignment)
    many = {"x": make.normal(100_000, 2), "topk_idx": make.integers(-1, 384, 100_000, 8), "experts": 384}
    yield Sample("tokens_100000", "invariants", **many, alignment=128)
    heavy = make.integers(0, 3, 100_000, 1)
    heavy[:70_000] = 1
    yield Sample("tokens_70000_to_one", "invariants", x=make.normal(100_000, 2), topk_idx=heavy, experts=3, alignment=4)


def payload_samples(make: Make) -> Iterator[Sample]:
    """What is carried: codes with their scales, values of every kind, NaN in dropped tokens, no columns."""
    idx = make.integers(-1, 6, 9, 3)
    given = {"topk_idx": idx, "experts": 6, "alignment": 4}
    codes = make.normal(9, 256, dtype=torch.float8_e4m3fn)
    powers = make.tensor([[2.0**-t, 2.0**t] for t in range(9)], torch.float8_e8m0fnu)
    yield Sample("e4m3", x=codes, x_scale=powers, **given)
    yield Sample("e4m3_float32_scale", x=codes, x_scale=make.normal(9, 2, dtype=torch.float32), **given)
    rows = make.integers(-127, 128, 9, 16, dtype=torch.int8)
    yield Sample("int8", x=rows, x_scale=make.uniform(9, 1, dtype=torch.float32), **given)
    yield Sample("packed_e2m1", x=make.integers(0, 256, 9, 13, dtype=torch.uint8), x_scale=powers, **given)
    # Nothing is computed with: every value arrives as it was, in a width that no vector divides.
    values = make.normal(9, 13)
    limits = torch.finfo(make.dtype)
    kinds = (-0.0, limits.tiny / 4, -limits.tiny / 4, float("inf"), float("-inf"), float("nan"), limits.max)
    values[:, : len(kinds)] = make.tensor(kinds)
    yield Sample("values_of_every_kind", x=values, **given)
    dropped = make.normal(9, 8)
    dropped[4] = float("nan")
    idx = idx.clone()
    idx[4] = -1
    yield Sample("nan_in_a_dropped_token", x=dropped, topk_idx=idx, experts=6, alignment=4)
    yield Sample("no_columns", x=make.normal(9, 0), topk_idx=idx, experts=6)


def errors(make: Make) -> Iterator[ErrorSample]:
    idx = make.tensor([[0, 1], [-1, 3], [2, 2]], torch.int32)
    x = make.normal(3, 8)
    given = {"x": x, "topk_idx": idx, "experts": 4}

    def wrong(name: str, says: str, **changed: object) -> ErrorSample:
        return ErrorSample(name, says=f"moe_permute: {says}", **{**given, **changed})

    yield wrong("expert_too_high", "topk_idx must be in 0..experts-1 = 2, or -1; got 3.", experts=3)
    yield wrong("expert_below_none", "topk_idx must be in 0..experts-1 = 3, or -1; got -2.", topk_idx=idx - 1)
    yield wrong("no_experts", "experts must be at least 1; got 0.", experts=0)
    yield wrong("alignment_zero", "alignment must be at least 1; got 0.", alignment=0)
    yield wrong("no_slots", "k must be at least 1; got 0.", topk_idx=idx[:, :0])
    yield wrong("idx_rows", "tokens is 3 in x but 2 in topk_idx.", topk_idx=idx[:2])
    yield wrong("idx_dtype", "topk_idx must be int32 or int64; got float32.", topk_idx=make.normal(3, 2))
    yield wrong("scale_rows", "tokens is 3 in x but 2 in x_scale.", x_scale=make.normal(2, 1))
    yield wrong("x_rank", "x must be [tokens hidden], 2 axes; got shape (8,).", x=x[0])


def relations(make: Make) -> Iterator[Relation]:
    idx = make.integers(-1, 7, 33, 3)
    call: dict[str, Any] = {"x": make.normal(33, 24), "topk_idx": idx, "experts": 7}  # Any: arguments
    spread = {"x": call["x"].repeat_interleave(3, 0), "topk_idx": idx.reshape(-1, 1)}

    def per_token(parts: list[list[Tensor]]) -> list[Tensor]:
        return [*parts[0][:5], parts[0][5].view(33, 3), parts[0][6]]

    yield Relation(name="slots_are_tokens", whole=call, parts=(call | spread,), assemble=per_token, exact=True)

    def without_the_last(parts: list[list[Tensor]]) -> list[Tensor]:
        return [result[:7] if place in (2, 3) else result for place, result in enumerate(parts[0])]

    wider = call | {"experts": 300}
    yield Relation(name="experts_without_tokens", whole=call, parts=(wider,), assemble=without_the_last, exact=True)
    routed = {"topk_idx": make.integers(-1, 256, 300, 6), "experts": 256, "alignment": 16}
    flash: dict[str, Any] = {"x": make.normal(300, 4096), **routed}

    def side_by_side(parts: list[list[Tensor]]) -> list[Tensor]:
        return [torch.cat((parts[0][0], parts[1][0]), dim=1), *parts[1][1:]]

    halves = tuple(flash | {"x": half.contiguous()} for half in flash["x"].split((1001, 3095), dim=1))
    yield Relation(name="columns_of_a_model_apart", whole=flash, parts=halves, assemble=side_by_side, exact=True)


def invariants(
    results: list[Tensor],
    x: Tensor,
    topk_idx: Tensor,
    experts: int,
    alignment: int,
    x_scale: Tensor | None,
    **_: object,
) -> str | None:
    rows, row_scale, counts, offsets, *maps = results
    pos_to_pair, pair_to_pos, pos_to_expert = (each.flatten().long() for each in maps)
    expert = topk_idx.flatten().long()
    live = (expert >= 0).nonzero()[:, 0]
    expert = expert[live]
    histogram = torch.bincount(expert, minlength=experts)
    padded = (histogram + alignment - 1) // alignment * alignment
    start, held = padded.cumsum(0) - padded, pos_to_pair >= 0
    if not torch.equal(counts.long(), histogram):
        return "expert_counts is not the histogram of topk_idx"
    if not torch.equal(offsets.long(), start + histogram):
        return "expert_offsets is not where the rows of each expert end"
    if not torch.equal((pair_to_pos >= 0).nonzero()[:, 0], live):
        return "pair_to_pos is -1 for other pairs than those dropped"
    position = pair_to_pos[live]
    if bool((position < start[expert]).any()) or bool((position >= (start + histogram)[expert]).any()):
        return "pair_to_pos names a row outside the expert's segment"
    if int(held.sum()) != len(live) or not torch.equal(pos_to_pair[position], live):
        return "pos_to_pair and pair_to_pos are not inverse to each other"
    if not torch.equal(pos_to_expert[position], expert) or not torch.equal(pos_to_expert >= 0, held):
        return "pos_to_expert is not the expert of each row, or -1"
    if bool((pos_to_pair[pos_to_pair < 0] != -1).any()) or bool((pos_to_expert[~held] != -1).any()):
        return "a row without a pair is marked by another number than -1"
    in_order = torch.where(held, pos_to_pair + pos_to_expert * topk_idx.numel(), -1)[held].diff() > 0
    if not bool(in_order.all()):
        return "the pairs of an expert are not in their own order"
    for name, carried, given in (("rows", rows, x), ("row_scale", row_scale, x_scale)):
        if given is not None and not torch.equal(
            as_bytes(carried[held]), as_bytes(given[pos_to_pair[held] // topk_idx.shape[1]])
        ):
            return f"{name} differ from those of their tokens"
    return None


def as_bytes(values: Tensor) -> Tensor:
    """The bytes of rows, since NaN differs from itself."""
    return values.contiguous().view(torch.uint8) if values.numel() else values.new_empty(0, dtype=torch.uint8)


moe_permute = Operator(
    name="moe_permute",
    shapes="x[tokens hidden] topk_idx[tokens k] x_scale?[tokens groups] -> rows[total hidden] row_scale[*]"
    " expert_counts[experts] expert_offsets[experts] pos_to_pair[total] pair_to_pos[tokens k] pos_to_expert[total]",
    dtypes={
        "x": FLOAT + E4M3 + INT8 + PACKED,
        "topk_idx": INTEGER,
        "x_scale": (*SCALE, torch.float64),
    },
    reference=reference,
    variants=(),
    fake=fake,
    check=check,
    check_values=check_values,
    cost=cost,
    samples=samples,
    errors=errors,
    bitwise=True,
    defined=defined,
    relations=relations,
    invariants=invariants,
)
