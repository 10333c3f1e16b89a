"""Rotary embedding: a program takes a few rows, copies what is not turned as it is, and turns the pairs.

Memory is the floor: each row is read once and written once, in whole runs of columns; a pair is taken apart in
registers. Angles come from the tables, 8 bytes a pair and token, which all heads of a token find in cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.kernels.tensors import dense
from isolith_backends.cuda.launch import ceil_div, launch, power_of_two


@triton.jit
def turned(a, b, cos, sin, INVERSE: tl.constexpr):
    """A pair turned by the angle, or back by it."""
    if INVERSE:
        sin = -sin
    return a * cos - b * sin, a * sin + b * cos


@triton.jit
def rope_rows(
    X,
    Positions,
    Cos,
    Sin,
    Y,
    rows,
    columns,
    pairs,
    length,
    heads,
    token_stride,
    head_stride,
    position_stride,
    cos_stride,
    cos_column,
    sin_stride,
    sin_column,
    INVERSE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr,
    INDEX: tl.constexpr,
):
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    token = (row // heads).to(tl.int64)
    source = X + (token * token_stride + (row % heads).to(tl.int64) * head_stride)[:, None]
    target = Y + (row.to(tl.int64) * columns)[:, None]
    begin = 0 if FIRST else columns - 2 * pairs

    if COLUMNS > 0:  # as many columns as stay
        column = tl.arange(0, COLUMNS)[None, :]
        copied = real[:, None] & (column < columns - 2 * pairs)
        if FIRST:
            column += 2 * pairs
        # Neither widened nor rounded, so that a NaN keeps its bits.
        tl.store(target + column, tl.load(source + column, mask=copied), mask=copied)

    position = tl.load(Positions + token * position_stride, mask=real, other=0).to(tl.int64)
    known = real & (position >= 0) & (position < length)
    pair = tl.arange(0, PAIRS)[None, :]
    at = known[:, None] & (pair < pairs)
    cos = tl.load(Cos + position[:, None] * cos_stride + pair * cos_column, mask=at, other=0.0).to(tl.float32)
    sin = tl.load(Sin + position[:, None] * sin_stride + pair * sin_column, mask=at, other=0.0).to(tl.float32)
    if INTERLEAVED:
        column = tl.arange(0, 2 * PAIRS)[None, :]
        inside = real[:, None] & (column < 2 * pairs)
        x = tl.load(source + begin + column, mask=inside, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (ROWS, PAIRS, 2)))
        a, b = turned(a, b, cos, sin, INVERSE)
        y = tl.reshape(tl.join(a, b), (ROWS, 2 * PAIRS))
        tl.store(target + begin + column, y.to(Y.dtype.element_ty), mask=inside)
    else:
        inside = real[:, None] & (pair < pairs)
        a = tl.load(source + begin + pair, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(source + begin + pairs + pair, mask=inside, other=0.0).to(tl.float32)
        a, b = turned(a, b, cos, sin, INVERSE)
        tl.store(target + begin + pair, a.to(Y.dtype.element_ty), mask=inside)
        tl.store(target + begin + pairs + pair, b.to(Y.dtype.element_ty), mask=inside)


def rope(
    x: Tensor,
    positions: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    inverse: bool,
    interleaved: bool,
    rope_first: bool,
) -> Tensor:
    """x with its pairs turned by the angles of their positions; a position outside the tables gives zeros."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return y
    columns, pairs = x.shape[-1], cos_table.shape[1]
    flat = dense(x) if x.dim() == 3 else dense(x).unsqueeze(1)
    rows = flat.shape[0] * flat.shape[1]
    stays = columns - 2 * pairs
    copied = power_of_two(stays) if stays else 0
    turns = power_of_two(pairs)
    # 1,024 elements for a token or so, 4,096 for many: what a row gets does not depend on it.
    most = 1024 if rows * columns <= 1 << 18 else 4096
    together = min(power_of_two(rows), max(1, most // power_of_two(copied + 2 * turns)))
    launch(
        rope_rows,
        (ceil_div(rows, together),),
        flat,
        positions,
        cos_table,
        sin_table,
        y,
        rows,
        columns,
        pairs,
        cos_table.shape[0],
        flat.shape[1],
        flat.stride(0),
        flat.stride(1),
        positions.stride(0),
        *cos_table.stride(),
        *sin_table.stride(),
        warps=min(max(together * (copied + 2 * turns) // 512, 1), 16),
        stages=1,
        INVERSE=inverse,
        INTERLEAVED=interleaved,
        FIRST=rope_first,
        ROWS=together,
        COLUMNS=copied,
        PAIRS=turns,
        INDEX=tl.int32 if rows + together < 1 << 31 else tl.int64,
    )
    return y
