"""A sublayer's output put back into the residual streams, which are mixed: a program makes columns of all streams.

Memory is the floor: streams and output are read once, streams written once; the mix is n*(n+1) multiply-adds a column.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.kernels.tensors import dense
from isolith_backends.cuda.launch import ceil_div, launch, power_of_two

COLUMNS = 1024  # of a program of 4 warps: 32 elements of each thread with four streams
STREAMS = 16


@triton.jit
def hc_post_columns(
    F,
    X,
    Post,
    Comb,
    Y,
    tokens,
    hidden,
    f_stride,
    token_stride,
    stream_stride,
    post_stride,
    post_column,
    comb_stride,
    comb_row,
    comb_column,
    N: tl.constexpr,
    STREAMS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    stream = tl.arange(0, STREAMS)
    known, real, inside = token < tokens, stream < N, column < hidden
    rows = X + token[:, None, None] * token_stride + stream.to(tl.int64)[None, :, None] * stream_stride
    mask = known[:, None, None] & real[None, :, None] & inside[None, None, :]
    x = tl.load(rows + column[None, None, :], mask=mask, other=0.0).to(tl.float32)
    mask = known[:, None] & inside[None, :]
    f = tl.load(F + token[:, None] * f_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    for k in tl.static_range(N):
        weights = Comb + token[:, None] * comb_stride + stream[None, :] * comb_row + k * comb_column
        weight = tl.load(weights, mask=known[:, None] & real[None, :], other=0.0).to(tl.float32)
        post = tl.load(Post + token * post_stride + k * post_column, mask=known, other=0.0).to(tl.float32)
        y = post[:, None] * f + tl.sum(weight[:, :, None] * x, axis=1)
        place = (token * N + k)[:, None] * hidden + column[None, :]
        tl.store(Y + place, y.to(Y.dtype.element_ty), mask=mask)


def hc_post(x: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """[tokens n hidden], in the dtype of streams."""
    tokens, n, hidden = streams.shape
    y = torch.empty_like(streams, memory_format=torch.contiguous_format)
    x, streams = dense(x), dense(streams)
    columns = power_of_two(hidden, most=COLUMNS)
    launch(
        hc_post_columns,
        (ceil_div(tokens, COLUMNS // columns), ceil_div(hidden, columns)),
        x,
        streams,
        post,
        comb,
        y,
        tokens,
        hidden,
        x.stride(0),
        streams.stride(0),
        streams.stride(1),
        *post.stride(),
        *comb.stride(),
        warps=4 if n <= 4 else 8,
        stages=1,
        N=n,
        STREAMS=power_of_two(n),
        TOKENS=COLUMNS // columns,
        COLUMNS=columns,
    )
    return y
