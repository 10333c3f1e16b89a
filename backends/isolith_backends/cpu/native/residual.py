"""Hyper-connections in C++: residual.cpp."""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT
from isolith_backends.cpu.native.library import Library, in_large_pages

library = Library("residual")

FP32 = (torch.float32,)
MOST_STREAMS = 16  # as in residual.cpp


def too_many_streams(streams: Tensor, **_: object) -> WhyNot:
    n = streams.shape[1]
    return f"{n} streams; coefficients of at most {MOST_STREAMS} are kept" if n > MOST_STREAMS else None


def large_matrices(logits: Tensor, **_: object) -> WhyNot:
    n = logits.shape[-1]
    return f"matrices of {n} x {n}; the reference takes no longer from {MOST_STREAMS} on" if n > MOST_STREAMS else None


MIXING = Requires(
    dtypes={"streams": DEVICE_FLOAT, **dict.fromkeys(("fn", "scale", "base"), FP32)}, missing=library.missing
)


@implements(ops.residual.hc_pre, requires=MIXING, why_not=too_many_streams, batch_invariant=True)
def hc_pre_native(
    streams: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    sinkhorn_iters: int = 20,
    norm_eps: float = 1e-6,
    hc_eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, n, hidden = streams.shape
    x = in_large_pages(streams.new_empty(tokens, hidden))
    room, post, comb = (torch.empty(shape) for shape in ((tokens, fn.shape[0]), (tokens, n), (tokens, n, n)))
    library.call(
        *("hc_pre", streams.contiguous(), streams.dtype, fn.contiguous(), scale.contiguous(), base.contiguous()),
        *(room, x, post, comb, tokens, n, hidden, sinkhorn_iters, norm_eps, hc_eps),
    )
    return x, post, comb


@implements(ops.residual.hc_head, requires=MIXING, why_not=too_many_streams, batch_invariant=True)
def hc_head_native(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float = 1e-6, hc_eps: float = 1e-6
) -> Tensor:
    tokens, n, hidden = streams.shape
    x, room = in_large_pages(streams.new_empty(tokens, hidden)), torch.empty(tokens, n)
    library.call(
        *("hc_pre", streams.contiguous(), streams.dtype, fn.contiguous(), scale.contiguous(), base.contiguous()),
        *(room, x, None, None, tokens, n, hidden, 0, norm_eps, hc_eps),
    )
    return x


@implements(
    ops.residual.sinkhorn,
    requires=Requires(dtypes=FP32, missing=library.missing),
    why_not=large_matrices,
    batch_invariant=True,
)
def sinkhorn_native(logits: Tensor, iters: int = 20, eps: float = 1e-6) -> Tensor:
    n, logits = logits.shape[-1], logits.contiguous()
    comb = torch.empty_like(logits)
    library.call("sinkhorn", logits, comb, logits.numel() // max(n * n, 1), n, iters, eps)
    return comb


@implements(
    ops.residual.hc_post,
    requires=Requires(
        dtypes={"x": DEVICE_FLOAT, "streams": DEVICE_FLOAT, "post": FP32, "comb": FP32}, missing=library.missing
    ),
    why_not=too_many_streams,
    batch_invariant=True,
)
def hc_post_native(x: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    (tokens, n, hidden), x, streams = streams.shape, x.contiguous(), streams.contiguous()
    y = in_large_pages(torch.empty_like(streams))
    library.call(
        *("hc_post", x, x.dtype, streams, streams.dtype, post.contiguous(), comb.contiguous(), y, tokens, n, hidden),
    )
    return y
