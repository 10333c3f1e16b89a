"""Rows sorted by expert: a stable counting sort of the pairs, then each token's row copied to its pairs' places.

A pair's place is where its expert's segment starts, plus how many pairs of the expert come before it: those of earlier
chunks by their counts, those of its own tile by comparing the tile with itself. Nothing depends on the order in which
programs run. Up to `ALONE` pairs (decoding) one program does all of it; beyond, a first launch counts chunks and a
second places them. The floor is the rows' bytes: each row of x is read once and written k times, padding never.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith.ops.moe.moe_permute import row_count
from isolith_backends.cuda.kernels.tensors import dense, stored
from isolith_backends.cuda.launch import ceil_div, launch, power_of_two

EXPERTS = 4096  # counters that a program holds, of all experts
ALONE = 1024  # pairs that one program sorts sooner than a second launch begins
TILE = 128  # pairs that are compared with each other
CHUNKS = 128  # every chunk reads the counts of all, so there are about as many as multiprocessors

Maps = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""expert_counts, expert_offsets, pos_to_pair, pair_to_pos, pos_to_expert."""


@triton.jit
def clear(A, B, first, total, share, TILE: tl.constexpr):
    """-1 in a share of two maps."""
    for low in range(0, share, TILE):
        at = first + low + tl.arange(0, TILE)
        inside = (low + tl.arange(0, TILE) < share) & (at < total)
        nothing = tl.full((TILE,), -1, tl.int32)
        tl.store(A + at, nothing, mask=inside)
        tl.store(B + at, nothing, mask=inside)


@triton.jit
def histogram_of(TOPK_IDX, first, chunk, pairs, experts, TILE: tl.constexpr, BINS: tl.constexpr):
    """How many pairs of a chunk each expert has."""
    counts = tl.zeros((BINS,), tl.int32)
    for low in range(0, chunk, TILE):
        pair = first + low + tl.arange(0, TILE)
        expert = tl.load(TOPK_IDX + pair, mask=pair < pairs, other=-1)
        live = (expert >= 0) & (expert < experts)
        counts += tl.histogram(tl.where(live, expert, 0).to(tl.int32), BINS, mask=live)
    return counts


@triton.jit
def count_pairs(
    TOPK_IDX,
    CHUNK_COUNTS,
    POS_TO_PAIR,
    POS_TO_EXPERT,
    pairs,
    experts,
    chunk,
    total,
    share,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
):
    program = tl.program_id(0)
    clear(POS_TO_PAIR, POS_TO_EXPERT, program * share, total, share, 4 * TILE)
    counts = histogram_of(TOPK_IDX, program * chunk, chunk, pairs, experts, TILE, BINS)
    bin = tl.arange(0, BINS)
    tl.store(CHUNK_COUNTS + program * experts + bin, counts, mask=bin < experts)


@triton.jit
def place_pairs(
    TOPK_IDX,
    CHUNK_COUNTS,
    COUNTS,
    OFFSETS,
    POS_TO_PAIR,
    PAIR_TO_POS,
    POS_TO_EXPERT,
    pairs,
    experts,
    alignment,
    chunk,
    chunks,
    total,
    ALONE: tl.constexpr,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    LINES: tl.constexpr,
):
    program = tl.program_id(0)
    bin = tl.arange(0, BINS)
    earlier = tl.zeros((BINS,), tl.int32)
    if ALONE:
        clear(POS_TO_PAIR, POS_TO_EXPERT, 0, total, total, 4 * TILE)
        counts = histogram_of(TOPK_IDX, 0, chunk, pairs, experts, TILE, BINS)
        tl.debug_barrier()  # places are written over what was cleared
    else:
        counts = tl.zeros((BINS,), tl.int32)
        for low in range(0, chunks, LINES):
            line = low + tl.arange(0, LINES)
            inside = (line < chunks)[:, None] & (bin < experts)[None, :]
            held = tl.load(CHUNK_COUNTS + line[:, None] * experts + bin[None, :], mask=inside, other=0)
            counts += tl.sum(held, axis=0)
            earlier += tl.sum(tl.where((line < program)[:, None], held, 0), axis=0)
    padded = (counts + alignment - 1) // alignment * alignment
    start = tl.cumsum(padded, axis=0) - padded
    if program == 0:
        tl.store(COUNTS + bin, counts, mask=bin < experts)
        tl.store(OFFSETS + bin, start + counts, mask=bin < experts)
    place = start + earlier
    for low in range(0, chunk, TILE):
        number = tl.arange(0, TILE)
        pair = program * chunk + low + number
        expert = tl.load(TOPK_IDX + pair, mask=pair < pairs, other=-1)
        live = (expert >= 0) & (expert < experts)
        expert = tl.where(live, expert, 0).to(tl.int32)
        # Dropped pairs have no place, whatever their rank.
        same = (expert[:, None] == expert[None, :]) & live[None, :] & (number[None, :] < number[:, None])
        at = tl.gather(place, expert, axis=0) + tl.sum(same.to(tl.int32), axis=1)
        tl.store(PAIR_TO_POS + pair, tl.where(live, at, -1), mask=pair < pairs)
        tl.store(POS_TO_PAIR + at, pair, mask=live)
        tl.store(POS_TO_EXPERT + at, expert, mask=live)
        place += tl.histogram(expert, BINS, mask=live)


@triton.jit
def copy_to_places(X, Y, PAIR_TO_POS, token, live, column, columns, stride, k):
    inside = live[:, None] & (column < columns)[None, :]
    values = tl.load(X + token[:, None] * stride + column[None, :], mask=inside, other=0)
    for slot in range(k):
        place = tl.load(PAIR_TO_POS + token * k + slot, mask=live, other=-1).to(tl.int64)
        tl.store(Y + place[:, None] * columns + column[None, :], values, mask=inside & (place >= 0)[:, None])


@triton.jit
def copy_rows(
    X,
    Y,
    SCALE,
    ROW_SCALE,
    PAIR_TO_POS,
    tokens,
    k,
    columns,
    stride,
    groups,
    scale_stride,
    blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = token < tokens
    block = tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    if block < blocks:
        copy_to_places(X, Y, PAIR_TO_POS, token, live, block * COLUMNS + column, columns, stride, k)
    else:
        if SCALE is not None:
            group = (block - blocks) * COLUMNS + column
            copy_to_places(SCALE, ROW_SCALE, PAIR_TO_POS, token, live, group, groups, scale_stride, k)


def map_pairs(topk_idx: Tensor, experts: int, alignment: int) -> Maps:
    """Where the pairs of topk_idx [tokens k] go, as moe_permute says it; at most `EXPERTS` experts."""
    tokens, k = topk_idx.shape
    pairs = tokens * k
    total = row_count(pairs, experts, alignment)

    def int32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=topk_idx.device)

    counts, offsets = int32(experts), int32(experts)
    pos_to_pair, pair_to_pos, pos_to_expert = int32(total), int32(tokens, k), int32(total)
    topk_idx = topk_idx.contiguous()
    bins, tile = power_of_two(experts, least=16), power_of_two(pairs, least=16, most=TILE)
    chunk = ceil_div(max(pairs, 1), 1 if pairs <= ALONE else CHUNKS)
    chunk = ceil_div(chunk, tile) * tile
    chunks = ceil_div(max(pairs, 1), chunk)
    warps = 4 if max(tile, bins) > 64 else 1
    chunk_counts = None
    if chunks > 1:
        chunk_counts = int32(chunks, experts)
        cleared = (pos_to_pair, pos_to_expert)
        sizes = (pairs, experts, chunk, total, ceil_div(total, chunks))
        launch(
            count_pairs,
            (chunks,),
            topk_idx,
            chunk_counts,
            *cleared,
            *sizes,
            warps=warps,
            stages=1,
            TILE=tile,
            BINS=bins,
        )
    maps = (counts, offsets, pos_to_pair, pair_to_pos, pos_to_expert)
    launch(
        place_pairs,
        (chunks,),
        topk_idx,
        chunk_counts,
        *maps,
        pairs,
        experts,
        alignment,
        chunk,
        chunks,
        total,
        warps=warps,
        stages=1,
        ALONE=chunks == 1,
        TILE=tile,
        BINS=bins,
        LINES=max(1, 4096 // bins),
    )
    return maps


def permute_rows(x: Tensor, x_scale: Tensor | None, pair_to_pos: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Rows of tokens, and their scales, at the places of their pairs; no elements of scales where there are none."""
    tokens, k = pair_to_pos.shape
    rows = torch.empty((total, x.shape[1]), dtype=x.dtype, device=x.device)
    groups = 0 if x_scale is None else x_scale.shape[1]
    row_scale = x.new_empty(0) if x_scale is None else x_scale.new_empty((total, groups))
    x, scale = dense(x), None if x_scale is None else dense(x_scale)
    columns = power_of_two(max(x.shape[1], groups), most=1024)
    together = min(power_of_two(tokens), 2048 // columns)
    blocks = ceil_div(x.shape[1], columns)
    launch(
        copy_rows,
        (ceil_div(tokens, together), blocks + ceil_div(groups, columns)),
        stored(x),
        stored(rows),
        None if scale is None else stored(scale),
        None if scale is None else stored(row_scale),
        pair_to_pos,
        tokens,
        k,
        x.shape[1],
        x.stride(0),
        groups,
        0 if scale is None else scale.stride(0),
        blocks,
        stages=1,
        ROWS=together,
        COLUMNS=columns,
    )
    return rows, row_scale
