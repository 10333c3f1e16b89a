"""Root-mean-square normalisation of rows: one program normalises a few whole rows, each read once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.kernels.tensors import dense, rows_of, start_of_rows
from isolith_backends.cuda.launch import ceil_div, launch, power_of_two


@triton.jit
def rms_norm_rows(
    X,
    W,
    Y,
    rows,
    columns,
    stride,
    inner,
    inner_stride,
    eps,
    ROUND_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = start_of_rows(row, stride, inner, inner_stride)
    x = tl.load(X + at[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x * x, axis=1) / columns
    y = x * tl.rsqrt(mean + eps)[:, None]
    if ROUND_FIRST:
        y = y.to(Y.dtype.element_ty).to(tl.float32)
    if W is not None:
        y *= tl.load(W + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + row[:, None] * columns + column[None, :], y.to(Y.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, round_first: bool) -> Tensor:
    """Rows of the last axis, normalised and multiplied by the weight where there is one."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    columns = x.shape[-1]
    if columns == 0:
        return y
    rows = x.numel() // columns
    flat = rows_of(x)
    padded = power_of_two(columns)
    together = max(1, 2048 // padded)  # of the width alone: a row's sum has one order in every batch
    launch(
        rms_norm_rows,
        (ceil_div(rows, together),),
        flat,
        None if weight is None else dense(weight),
        y,
        rows,
        columns,
        flat.stride(0),
        flat.shape[1],
        flat.stride(1),
        eps,
        warps=min(max(padded * together // 1024, 1), 16),
        stages=1,
        ROUND_FIRST=round_first,
        ROWS=together,
        COLUMNS=padded,
    )
    return y
