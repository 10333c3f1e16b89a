"""Values of quantised codes: a program takes some columns of a few rows, and a scale for each run of columns.

Memory is the floor: of e4m3 to bfloat16, 3 bytes an element. A run is a power of two of columns that lie in one block,
so that a scale is read once for it and not for each element.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.kernels.codes import decoded_e4m3, value_of_e2m1, value_of_e8m0
from isolith_backends.cuda.kernels.tensors import rows_of, start_of_rows, stored
from isolith_backends.cuda.launch import capability, ceil_div, launch, power_of_two

E4M3, INT8, E2M1 = 0, 1, 2
KINDS = {torch.float8_e4m3fn: E4M3, torch.int8: INT8, torch.uint8: E2M1}
ELEMENTS = 4096  # of a program


@triton.jit
def dequantise(
    Q,
    Scale,
    Y,
    rows,
    columns,
    stride,
    inner,
    inner_stride,
    matrix_rows,
    block_n,
    block_k,
    scale_rows,
    scale_columns,
    CODES: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
):
    """RUNS runs of RUN columns each; CODES says what the codes are: 0 e4m3, 1 int8, 2 two e2m1 in a byte."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = row < rows
    run = tl.program_id(1) * RUNS + tl.arange(0, RUNS)
    matrix = row // matrix_rows
    scale_row = matrix * scale_rows + (row - matrix * matrix_rows) // block_n
    scale_at = scale_row[:, None] * scale_columns + (run * RUN // block_k)[None, :]
    scale = tl.load(Scale + scale_at, mask=known[:, None] & (run * RUN < columns)[None, :], other=0)
    if Scale.dtype.element_ty == tl.uint8:
        scale = value_of_e8m0(scale)

    start = start_of_rows(row, stride, inner, inner_stride)[:, None, None]
    within = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    inside = known[:, None, None] & (within < columns)[None, :, :]
    if CODES == 2:
        pair = run[:, None] * (RUN // 2) + tl.arange(0, RUN // 2)[None, :]
        real = known[:, None, None] & (2 * pair < columns)[None, :, :]
        byte = tl.load(Q + start + pair[None, :, :], mask=real, other=0)
        both = tl.join(value_of_e2m1(byte & 15), value_of_e2m1(byte >> 4))
        value = tl.reshape(both, (ROWS, RUNS, RUN))
    else:
        code = tl.load(Q + start + within[None, :, :], mask=inside, other=0)
        if CODES == 1:
            value = code.to(tl.float32)
        else:
            value = decoded_e4m3(code, tl.float32, NATIVE)
    y = value * scale[:, :, None]
    tl.store(Y + row[:, None, None] * columns + within[None, :, :], y.to(Y.dtype.element_ty), mask=inside)


def block_dequant(q: Tensor, scale: Tensor, block_n: int, block_k: int, out_dtype: torch.dtype) -> Tensor:
    """[... rows columns] in a float dtype."""
    kind = KINDS[q.dtype]
    columns = q.shape[-1] * (2 if kind == E2M1 else 1)
    y = torch.empty((*q.shape[:-1], columns), dtype=out_dtype, device=q.device)
    if y.numel() == 0:
        return y
    scale = scale.contiguous()
    flat = rows_of(stored(q))
    width = power_of_two(columns, most=512)
    # The largest power of two that divides a block's columns; a block of all columns is one run as long as a tile.
    run = min(block_k & -block_k if block_k < columns else width, width)
    together = min(power_of_two(y.numel() // columns), ELEMENTS // width)
    launch(
        dequantise,
        (ceil_div(y.numel() // columns, together), ceil_div(columns, width)),
        flat,
        stored(scale),
        y,
        y.numel() // columns,
        columns,
        flat.stride(0),
        flat.shape[1],
        flat.stride(1),
        q.shape[-2],
        block_n,
        block_k,
        scale.shape[-2],
        scale.shape[-1],
        warps=min(max(together * width // 512, 1), 8),
        stages=1,
        CODES=kind,
        NATIVE=capability(q.device) >= 90,
        ROWS=together,
        RUNS=width // run,
        RUN=run,
    )
    return y
