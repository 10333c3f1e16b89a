"""Hyper-connections."""

from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT
from isolith_backends.cuda.kernels import hc_head as head
from isolith_backends.cuda.kernels import hc_post as post_kernel
from isolith_backends.cuda.kernels import hc_pre as pre_kernel
from isolith_backends.cuda.kernels import sinkhorn as sinkhorn_kernel
from isolith_backends.cuda.kernels.stream_mix import STREAMS

FLOATS = Requires(dtypes=DEVICE_FLOAT)


def too_many_streams(streams: Tensor, **_: object) -> WhyNot:
    n = streams.shape[1]
    return None if n <= STREAMS else f"n={n}; a program holds the coefficients of at most {STREAMS} streams"


def too_many_to_mix(streams: Tensor, **_: object) -> WhyNot:
    n, most = streams.shape[1], post_kernel.STREAMS
    return None if n <= most else f"n={n}; a program holds columns of at most {most} streams"


def matrix_too_large(logits: Tensor, **_: object) -> WhyNot:
    n, most = logits.shape[-1], sinkhorn_kernel.SIDE
    return None if n <= most else f"n={n}; a program holds a matrix of at most {most} x {most}"


@implements(ops.residual.hc_pre, requires=FLOATS, why_not=too_many_streams, batch_invariant=True)
def hc_pre(
    streams: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    sinkhorn_iters: int = 20,
    norm_eps: float = 1e-6,
    hc_eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    return pre_kernel.hc_pre(streams, fn, scale, base, sinkhorn_iters, norm_eps, hc_eps)


@implements(ops.residual.hc_head, requires=FLOATS, why_not=too_many_streams, batch_invariant=True)
def hc_head(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float = 1e-6, hc_eps: float = 1e-6
) -> Tensor:
    return head.hc_head(streams, fn, scale, base, norm_eps, hc_eps)


@implements(
    ops.residual.hc_post,
    requires=Requires(dtypes={"x": DEVICE_FLOAT, "streams": DEVICE_FLOAT}),
    why_not=too_many_to_mix,
    batch_invariant=True,
)
def hc_post(x: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return post_kernel.hc_post(x, streams, post, comb)


@implements(ops.residual.sinkhorn, requires=FLOATS, why_not=matrix_too_large, batch_invariant=True)
def sinkhorn(logits: Tensor, iters: int = 20, eps: float = 1e-6) -> Tensor:
    return sinkhorn_kernel.sinkhorn(logits, iters, eps)
