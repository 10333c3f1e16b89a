"""Quantisation of rows to int8: a program holds a row, read once, and writes a byte for every element.

Memory is the floor: of bfloat16, 3 bytes an element. An element is multiplied by 127/amax, not divided by the scale.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.kernels.tensors import dense, rows_of, start_of_rows
from isolith_backends.cuda.launch import ceil_div, launch, power_of_two


@triton.jit
def int8_of(value):
    """To nearest, ties to even: from 1.5*2^23 on the last place of a float32 is 1, and its low byte the integer."""
    shifted = tl.minimum(tl.maximum(value, -127.0), 127.0) + 12582912.0
    return (shifted.to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)


@triton.jit
def codes_and_scales(value, amax):
    """Codes of rows, and the scale of each, of its largest magnitude."""
    return int8_of(value * tl.div_rn(127.0, amax)[:, None]), tl.div_rn(amax, 127.0)


@triton.jit
def act_quant_int8_rows(
    X,
    Smooth,
    Q,
    S,
    rows,
    columns,
    stride,
    inner,
    inner_stride,
    floor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    start = start_of_rows(row, stride, inner, inner_stride)
    x = tl.load(X + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if Smooth is not None:
        x *= tl.load(Smooth + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    amax = tl.maximum(tl.max(tl.abs(x), axis=1), floor)
    code, scale = codes_and_scales(x, amax)
    tl.store(Q + row[:, None] * columns + column[None, :], code, mask=inside)
    tl.store(S + row, scale, mask=row < rows)


def act_quant_int8(x: Tensor, smooth: Tensor | None, amax_floor: float) -> tuple[Tensor, Tensor]:
    """int8 codes in the shape of x, and a scale for each row."""
    columns = x.shape[-1]
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    rows = scale.numel()
    if rows == 0:
        return q, scale
    # A row of no columns still has the scale of the floor.
    flat = rows_of(x) if columns else x.new_empty((rows, 1, 1))
    padded = power_of_two(columns)
    together = min(power_of_two(rows), max(1, 2048 // padded))
    launch(
        act_quant_int8_rows,
        (ceil_div(rows, together),),
        flat,
        None if smooth is None else dense(smooth),
        q,
        scale,
        rows,
        columns,
        flat.stride(0),
        flat.shape[1],
        flat.stride(1),
        amax_floor,
        warps=min(max(padded * together // 1024, 1), 16),
        stages=1,
        ROWS=together,
        COLUMNS=padded,
    )
    return q, scale
