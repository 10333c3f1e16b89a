"""One product per expert over ragged segments of rows: every program finds its tiles from the counts on the device.

As many programs as the multiprocessors hold take tiles in turn: all tiles of one expert before those of the next, and
in an expert all rows of a few columns before the next columns, so that a piece of a weight is fetched from memory once
and read by its neighbours from the cache. An expert with few rows is bound by its weight's bytes, which each program
streams in rows of 64 bytes and more; one with hundreds by the tensor cores.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith.numerics.scaled_matmul import blocks_of, inner_of
from isolith_backends.cuda.kernels.formats import (
    MULTIPROCESSORS,
    Tile,
    constants_of,
    format_of,
    reachable,
    stored_scale,
    tile_for,
)
from isolith_backends.cuda.kernels.scaled_matmul import product_of_tile
from isolith_backends.cuda.kernels.tensors import dense, stored
from isolith_backends.cuda.launch import capability, ceil_div, launch, power_of_two

RESIDENT = 2  # programs that a multiprocessor is given: while one ends a tile, the other loads
STREAMING = 4  # where a tile is small, and its bytes in flight too few for the memory's latency


@triton.jit
def segments(COUNTS, stride, experts, rows, across, EXPERTS: tl.constexpr, BM: tl.constexpr):
    """(expert, its rows, how many tiles end with it), for every expert."""
    expert = tl.arange(0, EXPERTS)
    count = tl.load(COUNTS + expert * stride, mask=expert < experts, other=0)
    # A count that no check has seen must not lead out of the rows.
    count = tl.minimum(tl.maximum(count, 0), rows).to(tl.int32)
    return expert, count, tl.cumsum((count + BM - 1) // BM * across, 0)


@triton.jit(do_not_specialize=["rows"])
def grouped_gemm_tiles(
    X,
    XS,
    W,
    WS,
    COUNTS,
    SOURCE,
    Y,
    rows,
    N,
    K,
    experts,
    alignment,
    slots,
    count_stride,
    x_e,
    x_m,
    xs_e,
    xs_m,
    xs_k,
    w_e,
    w_n,
    w_k,
    ws_e,
    ws_n,
    ws_k,
    x_group,
    w_rows,
    w_group,
    EXPERTS: tl.constexpr,
    MASKED: tl.constexpr,
    X_KIND: tl.constexpr,
    W_KIND: tl.constexpr,
    X_SCALE: tl.constexpr,
    W_SCALE: tl.constexpr,
    X_FOLD: tl.constexpr,
    W_FOLD: tl.constexpr,
    DOT: tl.constexpr,
    NATIVE: tl.constexpr,
    EVEN_K: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    across = tl.cdiv(N, BN)
    _, _, end = segments(COUNTS, count_stride, experts, rows, across, EXPERTS, BM)
    for tile in range(tl.program_id(0), tl.max(end, 0), tl.num_programs(0)):
        # Again for each tile, rather than kept in registers beside the sums of the product.
        expert, count, end = segments(COUNTS, count_stride, experts, rows, across, EXPERTS, BM)
        e = tl.sum((end <= tile).to(tl.int32), 0)
        n_rows = tl.sum(tl.where(expert == e, count, 0), 0)
        down = tl.cdiv(n_rows, BM)
        place = tile - tl.max(tl.where(expert < e, end, 0), 0)
        n0 = (place // down) * BN
        local = (place % down) * BM + tl.arange(0, BM)
        if MASKED:
            first = e.to(tl.int64) * rows
        else:
            padded = (count + alignment - 1) // alignment * alignment
            first = tl.sum(tl.where(expert < e, padded, 0).to(tl.int64), 0)
        row = first + local
        inside = local < n_rows
        if not MASKED:
            inside = inside & (row < rows)
        if SOURCE is not None:
            source = tl.load(SOURCE + row, mask=inside, other=-1)
            inside = inside & (source >= 0)
            x_row = (source // slots).to(tl.int64)
        else:
            x_row = local.to(tl.int64) if MASKED else row
        e = e.to(tl.int64)
        made = product_of_tile(
            X + e * x_e if MASKED else X,
            XS + e * xs_e if MASKED and XS is not None else XS,
            W + e * w_e,
            WS + e * ws_e if WS is not None else WS,
            x_row * x_m,
            x_row * xs_m,
            inside,
            n0,
            N,
            K,
            w_n,
            w_k,
            ws_n,
            ws_k,
            xs_k,
            x_group,
            w_rows,
            w_group,
            X_KIND,
            W_KIND,
            X_SCALE,
            W_SCALE,
            X_FOLD,
            W_FOLD,
            DOT,
            NATIVE,
            EVEN_K,
            ONE_SCALE,
            BM,
            BN,
            BK,
        )
        column = n0 + tl.arange(0, BN)
        at = row[:, None] * N + column[None, :]
        tl.store(Y + at, made.to(Y.dtype.element_ty), mask=inside[:, None] & (column < N)[None, :])


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    expert_counts: Tensor,
    alignment: int,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    act_group: int,
    block_n: int,
    block_k: int,
    out_dtype: torch.dtype,
    source: Tensor | None = None,
    slots: int = 1,
) -> Tensor:
    """The products of all segments; rows of none are left as the memory was.

    Args:
        x: [rows, K] or [experts, rows, K] of any kind.
        weight: [experts, N, K] of any kind.
        expert_counts: Rows of each segment.
        alignment: Where a segment of a two-axis x may start.
        x_scale: As the kind of x wants it.
        weight_scale: As the kind of the weight wants it.
        act_group: Columns of x that share a scale.
        block_n: Rows of an e4m3 weight that share one.
        block_k: Columns of it that do.
        out_dtype: Of the result.
        source: [rows of the result]: result row r is of x's row source[r] // slots, and of none where that is
            negative.
        slots: What `source` is divided by.
    """
    arch, x, weight = capability(x.device), dense(x), reachable(weight)
    experts, outputs = weight.shape[:2]
    rows = x.shape[-2] if source is None else source.shape[0]
    y = torch.empty((*x.shape[:-2], rows, outputs), dtype=out_dtype, device=x.device)
    if y.numel() == 0:
        return y
    masked, inputs = x.dim() == 3, inner_of(weight)
    made = format_of(x, weight, x_scale, weight_scale, act_group, block_k, arch)
    expected = ceil_div(rows, 1 if masked else experts)
    tile = tile_for(expected, outputs, inputs, made, min(experts, rows), arch)
    if masked and tile.rows > 64 and "step" in (made.x.place, made.weight.place):
        # The addresses of two axes of rows are what a wider tile, with its two sums, has no registers for.
        tile = replace(tile, columns=min(tile.columns, 64))
    w_rows = blocks_of(weight, block_n, block_k)[0]
    launch(
        grouped_gemm_tiles,
        (programs(rows, outputs, experts, masked, tile, arch),),
        stored(x),
        stored_scale(x_scale),
        stored(weight),
        stored_scale(weight_scale),
        expert_counts,
        source,
        y,
        rows,
        outputs,
        inputs,
        experts,
        alignment,
        slots,
        expert_counts.stride(0),
        x.stride(0) if masked else 0,
        x.stride(-2),
        *(strides_of(x_scale, x.dim())),
        *weight.stride(),
        *strides_of(weight_scale, 3),
        made.x.group,
        w_rows,
        made.weight.group,
        warps=tile.warps,
        stages=tile.stages,
        EXPERTS=power_of_two(experts),
        MASKED=masked,
        **constants_of(x, weight, made, tile, w_rows),
    )
    return y


def programs(rows: int, outputs: int, experts: int, masked: bool, tile: Tile, arch: int) -> int:
    """As many as there can be tiles, whatever the counts, but no more than the multiprocessors are given."""
    down = experts * ceil_div(rows, tile.rows) if masked else rows // tile.rows + min(experts, rows)
    given = STREAMING if tile.rows <= 32 else RESIDENT
    return min(down * ceil_div(outputs, tile.columns), given * MULTIPROCESSORS[arch])


def strides_of(scale: Tensor | None, axes: int) -> tuple[int, ...]:
    """Three strides of a scale of so many axes, the leading one 0 where it has two."""
    if scale is None:
        return (0, 0, 0)
    return (0,) * (3 - axes) + tuple(scale.stride())
