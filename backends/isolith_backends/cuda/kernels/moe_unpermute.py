"""Every token's expert outputs, weighted and added in slot order: k rows gathered, one written.

The floor is the rows' bytes, each read once. The slots are unrolled, so that the loads of all k rows are in flight
together; a program has a few hundred columns of a token, so that decoding few tokens spreads over the multiprocessors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.kernels.tensors import dense
from isolith_backends.cuda.launch import ceil_div, launch, power_of_two

TILE = 1024  # elements of a program
SLOTS = 64  # that are unrolled


@triton.jit
def combine_rows(
    X,
    PAIR_TO_POS,
    WEIGHTS,
    RESIDUAL,
    Y,
    tokens,
    total,
    columns,
    stride,
    residual_stride,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live, inside = token < tokens, (column < columns)[None, :]
    y = tl.zeros((ROWS, COLUMNS), tl.float32)
    for slot in tl.static_range(K):
        place = tl.load(PAIR_TO_POS + token * K + slot, mask=live, other=-1).to(tl.int64)
        held = live & (place >= 0) & (place < total)
        term = tl.load(X + place[:, None] * stride + column[None, :], mask=held[:, None] & inside, other=0.0)
        term = term.to(tl.float32)
        if WEIGHTS is not None:
            term *= tl.load(WEIGHTS + token * K + slot, mask=held, other=0.0).to(tl.float32)[:, None]
        y += term
    at = token[:, None]
    inside = live[:, None] & inside
    if RESIDUAL is not None:
        y += tl.load(RESIDUAL + at * residual_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + at * columns + column[None, :], y.to(Y.dtype.element_ty), mask=inside)


def moe_unpermute(rows: Tensor, pair_to_pos: Tensor, topk_weights: Tensor | None, residual: Tensor | None) -> Tensor:
    """rows [total hidden] -> [tokens hidden] by pair_to_pos [tokens k]; slots without a row are skipped."""
    tokens, k = pair_to_pos.shape
    columns = rows.shape[1]
    y = torch.empty((tokens, columns), dtype=rows.dtype, device=rows.device)
    rows = dense(rows)
    residual = None if residual is None else dense(residual)
    # Half a kilobyte of a row where there are few tokens.
    tile = TILE if tokens >= 128 else TILE // 4
    wide = power_of_two(columns, most=tile)
    together = min(power_of_two(tokens), tile // wide)
    launch(
        combine_rows,
        (ceil_div(tokens, together), ceil_div(columns, wide)),
        rows,
        pair_to_pos.contiguous(),
        None if topk_weights is None else topk_weights.contiguous(),
        residual,
        y,
        tokens,
        rows.shape[0],
        columns,
        rows.stride(0),
        0 if residual is None else residual.stride(0),
        warps=4 if wide * together >= 512 else 1,
        stages=1,
        K=k,
        ROWS=together,
        COLUMNS=wide,
    )
    return y
