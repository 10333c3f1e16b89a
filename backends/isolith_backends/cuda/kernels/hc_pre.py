"""Collapse of the residual streams: the projection in pieces, then one launch that sums columns and mixes coefficients.

Of the second launch most programs sum columns of streams; the first few make post and comb, whose
Sinkhorn iterations are a chain of some microseconds that the others hide.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.kernels.sinkhorn import normalised
from isolith_backends.cuda.kernels.stream_mix import Projection, collapse_streams, projected
from isolith_backends.cuda.launch import ceil_div, launch

ENTRIES = 4096  # pieces of matrices that a program adds up at once


@triton.jit
def coefficients(
    Partial,
    Scale,
    Base,
    Post,
    Comb,
    place,
    tokens,
    hidden,
    n,
    splits,
    iters,
    norm_eps,
    hc_eps,
    OUTPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    STREAMS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """post and comb of some tokens."""
    token = place.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    known = token < tokens
    outputs = (2 + n) * n
    stream = tl.arange(0, STREAMS)
    real = stream < n
    z = projected(Partial, token, known, outputs, n + stream, real, splits, n * hidden, norm_eps, OUTPUTS, SPLITS)
    base = tl.load(Base + n + stream, mask=real, other=0.0).to(tl.float32)
    post = 2.0 * tl.sigmoid(tl.load(Scale + 1).to(tl.float32) * z + base[None, :])
    tl.store(Post + token[:, None] * n + stream[None, :], post, mask=known[:, None] & real[None, :])

    entry = tl.arange(0, STREAMS * STREAMS)
    row, column = entry // STREAMS, entry % STREAMS
    real = (row < n) & (column < n)
    at = row * n + column
    z = projected(Partial, token, known, outputs, 2 * n + at, real, splits, n * hidden, norm_eps, OUTPUTS, SPLITS)
    base = tl.load(Base + 2 * n + at, mask=real, other=0.0).to(tl.float32)
    logits = tl.load(Scale + 2).to(tl.float32) * z + base[None, :]
    comb = normalised(tl.reshape(logits, (TOKENS, STREAMS, STREAMS)), n, iters, hc_eps, STREAMS)
    comb = tl.reshape(comb, (TOKENS, STREAMS * STREAMS))
    tl.store(Comb + token[:, None] * n * n + at[None, :], comb, mask=known[:, None] & real[None, :])


@triton.jit
def finish_hc_pre(
    X,
    Partial,
    Scale,
    Base,
    Y,
    Post,
    Comb,
    tokens,
    x_stride,
    hidden,
    n,
    splits,
    iters,
    norm_eps,
    hc_eps,
    mixing,
    OUTPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    STREAMS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MIXED: tl.constexpr,
):
    """The first `mixing` programs make the coefficients of MIXED tokens each."""
    place = tl.program_id(0)
    if place < mixing:
        coefficients(
            Partial,
            Scale,
            Base,
            Post,
            Comb,
            place,
            tokens,
            hidden,
            n,
            splits,
            iters,
            norm_eps,
            hc_eps,
            OUTPUTS,
            SPLITS,
            STREAMS,
            MIXED,
        )
    else:
        collapse_streams(
            X,
            Partial,
            Scale,
            Base,
            Y,
            place - mixing,
            tokens,
            x_stride,
            hidden,
            n,
            (2 + n) * n,
            splits,
            norm_eps,
            hc_eps,
            OUTPUTS,
            SPLITS,
            STREAMS,
            TOKENS,
            COLUMNS,
        )


def hc_pre(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, iters: int, norm_eps: float, hc_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x [tokens hidden], post [tokens n], comb [tokens n n])."""
    tokens, n, hidden = streams.shape
    x = torch.empty((tokens, hidden), dtype=streams.dtype, device=streams.device)
    post = torch.empty((tokens, n), dtype=torch.float32, device=streams.device)
    comb = torch.empty((tokens, n, n), dtype=torch.float32, device=streams.device)
    scale, base = scale.contiguous(), base.contiguous()
    made = Projection(streams, fn)
    sums = made.sums
    mixed = max(1, ENTRIES // (sums["SPLITS"] * sums["STREAMS"] ** 2))
    for part in made.slices():
        rows = made.flat[part]
        made.project(rows)
        mixing = ceil_div(rows.shape[0], mixed)
        launch(
            finish_hc_pre,
            (mixing + made.programs(rows.shape[0]),),
            rows,
            made.partial,
            scale,
            base,
            x[part],
            post[part],
            comb[part],
            rows.shape[0],
            rows.stride(0),
            hidden,
            n,
            made.splits,
            iters,
            norm_eps,
            hc_eps,
            mixing,
            warps=8,
            stages=1,
            MIXED=mixed,
            **sums,
        )
    return x, post, comb
