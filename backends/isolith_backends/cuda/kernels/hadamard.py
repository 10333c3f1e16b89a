"""Walsh-Hadamard rotation: rows of up to 128 elements as a product with the matrix, longer ones step by step.

Memory is the floor: a row is read once and written once. Signs are exact in every type, so that bfloat16 and float16
rows meet them on tensor cores with exact products and float32 sums; the scale multiplies behind. The matrix is made in
registers, once for the tiles of rows that a program takes. The steps work in float32, a pair of halves at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.kernels.tensors import rows_of, start_of_rows
from isolith_backends.cuda.launch import ceil_div, launch

MATRIX = 128  # elements of the longest row that is multiplied by the matrix; 256 take more than 99 KiB of shared memory
ROWS = 32  # of a tile; one size, since how a product is summed depends on it
PROGRAMS = 1056  # eight for each multiprocessor of the largest cards: no more, so that the matrix is made less often


@triton.jit
def rotate_by_matrix(
    X, Y, rows, stride, inner, inner_stride, tiles, scale, N: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr
):
    i = tl.arange(0, N)
    odd = i[:, None] & i[None, :]
    odd ^= odd >> 4
    odd ^= odd >> 2
    odd = (odd ^ (odd >> 1)) & 1
    sign = (1 - 2 * odd).to(tl.float32).to(KIND)
    for tile in range(tiles):
        row = (tl.program_id(0).to(tl.int64) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None]
        start = start_of_rows(row, stride, inner, inner_stride)
        x = tl.load(X + start[:, None] + i[None, :], mask=inside, other=0.0)
        y = tl.dot(x, sign) * scale
        tl.store(Y + row[:, None] * N + i[None, :], y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def in_steps(values, ROWS: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr):
    """Rows times the matrix of signs: sums before differences of neighbours; then all bits are in their places."""
    for _ in tl.static_range(BITS):
        low, high = tl.split(tl.reshape(values, (ROWS, N // 2, 2)))
        values = tl.reshape(tl.permute(tl.join(low + high, low - high), (0, 2, 1)), (ROWS, N))
    return values


@triton.jit
def rotate_by_steps(
    X, Y, rows, stride, inner, inner_stride, scale, N: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, N)
    inside = (row < rows)[:, None]
    start = start_of_rows(row, stride, inner, inner_stride)
    y = tl.load(X + start[:, None] + i[None, :], mask=inside, other=0.0).to(tl.float32)
    y = in_steps(y, ROWS, N, BITS) * scale
    tl.store(Y + row[:, None] * N + i[None, :], y.to(Y.dtype.element_ty), mask=inside)


def hadamard(x: Tensor) -> Tensor:
    """The rows of the last axis, rotated."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return y
    n = x.shape[-1]
    rows = x.numel() // n
    flat = rows_of(x)
    runtime = (flat, y, rows, flat.stride(0), flat.shape[1], flat.stride(1))
    if 16 <= n <= MATRIX and x.dtype != torch.float32:
        tiles = ceil_div(ceil_div(rows, ROWS), PROGRAMS)
        launch(
            rotate_by_matrix,
            (ceil_div(rows, ROWS * tiles),),
            *runtime,
            tiles,
            n**-0.5,
            warps=4,
            stages=2,
            N=n,
            ROWS=ROWS,
            KIND=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16,
        )
        return y
    together = max(1, 2048 // n)
    launch(
        rotate_by_steps,
        (ceil_div(rows, together),),
        *runtime,
        n**-0.5,
        warps=min(max(n * together // 512, 1), 16),
        stages=1,
        N=n,
        BITS=n.bit_length() - 1,
        ROWS=together,
    )
    return y
