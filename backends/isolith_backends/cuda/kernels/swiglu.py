"""SiLU of the gate times up, clamped and weighted: each half of a row read once, one rounding.

The floor is memory: 3 elements moved for each result. Tiles of 1,024 results, so that a decoding step of 6 rows still
has a dozen programs; rows lie in tiles together only where they are short.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.kernels.exponentials import exp_of
from isolith_backends.cuda.kernels.tensors import rows_of, start_of_rows
from isolith_backends.cuda.launch import ceil_div, launch, power_of_two

TILE = 1024  # results of a program


@triton.jit
def gated(gate, up, limit, CLAMP: tl.constexpr):
    """silu(gate) * up, both clamped where CLAMP says so."""
    if CLAMP:  # comparisons with NaN are false: it stays
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    # Of the negative magnitude, so that no exponential overflows.
    power = exp_of(-tl.abs(gate))
    return gate * (tl.where(gate < 0.0, power, 1.0) / (1.0 + power)) * up


@triton.jit
def gate_rows(
    X,
    WEIGHT,
    Y,
    rows,
    columns,
    stride,
    inner,
    inner_stride,
    limit,
    CLAMP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = start_of_rows(row, stride, inner, inner_stride)[:, None] + column[None, :]
    gate = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(X + at + columns, mask=inside, other=0.0).to(tl.float32)
    y = gated(gate, up, limit, CLAMP)
    if WEIGHT is not None:
        y *= tl.load(WEIGHT + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    tl.store(Y + row[:, None] * columns + column[None, :], y.to(Y.dtype.element_ty), mask=inside)


def swiglu(x: Tensor, limit: float, row_weight: Tensor | None) -> Tensor:
    """x [... 2*columns] -> [... columns]."""
    columns = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    if columns == 0:
        return y
    rows = y.numel() // columns
    flat = rows_of(x)
    wide = power_of_two(columns, most=TILE)
    together = min(power_of_two(rows), TILE // wide)
    launch(
        gate_rows,
        (ceil_div(rows, together), ceil_div(columns, wide)),
        flat,
        None if row_weight is None else row_weight.contiguous(),
        y,
        rows,
        columns,
        flat.stride(0),
        flat.shape[1],
        flat.stride(1),
        float(limit),
        stages=1,
        CLAMP=limit > 0,
        ROWS=together,
        COLUMNS=wide,
    )
    return y
