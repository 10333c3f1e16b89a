"""Hyper-connections: the coefficients by hc_split_sinkhorn, the way back by fused_mhc_post.

The projection and the mean of squares are torch's, in float32: their precision follows
torch.backends.mlu.matmul.fp32_precision.

Source: domesticated_torch_mlu_ops 9fbf7df6 _ops.py (hidden up to 7168 and 4 streams in fused_mhc_post, up to 4096 and 8
in fused_mul_reduce_sum); vllm-mlu b9925203 (hidden 4096 in the day-0 release); the sum over comb's first index: the
reference in the tests of xllm 3906f5a9.
"""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import dtype_name
from isolith_backends.cambricon.calls import HALF, is_day0, tmo, why_not

SPLIT_SINKHORN = tmo(
    "hc_split_sinkhorn",
    by_name=("mixes", "hc_scale", "hc_base", "pre_scale", "hc_mult", "sinkhorn_iter", "eps"),
)
MUL_REDUCE_SUM = tmo("fused_mul_reduce_sum", by_name=("x", "w"))
MHC_POST = tmo("fused_mhc_post", ("x", "residual", "post", "comb", "compute_rms", "eps", "output", "output_rms"))
FLOAT32 = (torch.float32,)
STREAMS, MOST_HIDDEN, HIDDEN_OF_DAY0 = 4, 7168, 4096
MOST_SUMMED, MOST_HIDDEN_SUMMED = 8, 4096


def coefficients(
    mixes: Tensor, scale: Tensor, base: Tensor, pre_scale: Tensor | None, n: int, iters: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(pre, post, comb) of mixes [tokens, (2+n)*n]."""
    pre, post, comb = SPLIT_SINKHORN(
        mixes=mixes.contiguous()[None],
        hc_scale=scale.contiguous(),
        hc_base=base.contiguous(),
        pre_scale=None if pre_scale is None else pre_scale.contiguous()[None],
        hc_mult=n,
        sinkhorn_iter=iters,
        eps=eps,
    )
    return pre[0], post[0], comb[0]


def collapsed(streams: Tensor, pre: Tensor) -> Tensor:
    """The streams' weighted sum, by the call where its limits allow."""
    n, hidden = streams.shape[1:]
    fits = streams.dtype in HALF and n <= MOST_SUMMED and hidden <= MOST_HIDDEN_SUMMED
    if fits and MUL_REDUCE_SUM.missing() is None:
        return MUL_REDUCE_SUM(x=streams.contiguous(), w=pre.contiguous())  # type: ignore[no-any-return]  # the vendor's
    return (pre[:, :, None] * streams.float()).sum(dim=1).to(streams.dtype)


@implements(
    ops.residual.hc_pre,
    requires=Requires(
        dtypes={"streams": (*HALF, torch.float32), **dict.fromkeys(("fn", "scale", "base"), FLOAT32)},
        missing=SPLIT_SINKHORN.missing,
    ),
    why_not=why_not(),
)
def hc_pre(
    streams: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    sinkhorn_iters: int = 20,
    norm_eps: float = 1e-6,
    hc_eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, n, hidden = streams.shape
    if tokens == 0:
        wide = [streams.new_empty(shape, dtype=torch.float32) for shape in ((0, n), (0, n, n))]
        return streams.new_empty((0, hidden)), wide[0], wide[1]
    flat = streams.flatten(1).float()
    mixes = torch.nn.functional.linear(flat, fn)
    inverse_root = (flat.square().mean(-1) + norm_eps).rsqrt()
    pre, post, comb = coefficients(mixes, scale, base, inverse_root, n, sinkhorn_iters, hc_eps)
    return collapsed(streams, pre), post.contiguous(), comb.contiguous()


def why_not_post(x: Tensor, streams: Tensor, **_: object) -> WhyNot:
    n, hidden = streams.shape[1:]
    if x.dtype != streams.dtype:
        return f"x is {dtype_name(x.dtype)} and streams {dtype_name(streams.dtype)}; fused_mhc_post takes one dtype"
    if n != STREAMS:
        return f"n={n}; fused_mhc_post takes {STREAMS} streams"
    if is_day0() and hidden != HIDDEN_OF_DAY0:
        return f"hidden={hidden}; fused_mhc_post of this release takes {HIDDEN_OF_DAY0}"
    return f"hidden={hidden}; fused_mhc_post takes at most {MOST_HIDDEN}" if hidden > MOST_HIDDEN else None


@implements(
    ops.residual.hc_post,
    requires=Requires(
        dtypes={**dict.fromkeys(("x", "streams"), HALF), **dict.fromkeys(("post", "comb"), FLOAT32)},
        missing=MHC_POST.missing,
    ),
    why_not=why_not(why_not_post),
)
def hc_post(x: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    if streams.numel() == 0:
        return torch.empty_like(streams, memory_format=torch.contiguous_format)
    y: Tensor = MHC_POST(
        x=x.contiguous(),
        residual=streams.contiguous(),
        post=post.contiguous(),
        comb=comb.contiguous(),  # as it is: the call sums over the first index, too
        compute_rms=False,
        eps=0.0,
        output=None,
        output_rms=None,
    )
    return y


@implements(
    ops.residual.sinkhorn,
    requires=Requires(dtypes=FLOAT32, missing=SPLIT_SINKHORN.missing),
)
def sinkhorn(logits: Tensor, iters: int = 20, eps: float = 1e-6) -> Tensor:
    n = logits.shape[-1]
    if logits.numel() == 0:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    matrices = logits.reshape(-1, n * n)
    # The lanes of pre and post are nobody's.
    mixes = torch.nn.functional.pad(matrices, (2 * n, 0))
    nothing = torch.zeros((2 + n) * n, dtype=torch.float32, device=logits.device)
    comb = coefficients(mixes, torch.ones_like(nothing[:3]), nothing, None, n, iters, eps)[2]
    return comb.reshape(logits.shape)
