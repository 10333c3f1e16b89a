"""Hyper-connections: the fused calls of vllm-ascend and cann-recipes, and torch_npu's own on A5.

Source: vllm-ascend 182b75ea csrc (npu_hc_pre_v2, npu_hc_post) and its tests (hidden 4096 and 7168, four streams, 20
iterations, bfloat16); cann-recipes-infer fbc225d2 ops/ascendc (the same operators; HF32 in the projection).
"""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith_backends.vendor_calls import VendorCall

HC_PRE = VendorCall(
    ("_C_ascend::npu_hc_pre_v2", "custom::npu_hc_pre"),
    ("x", "hc_fn", "hc_scale", "hc_base", "hc_mult", "hc_sinkhorn_iters", "norm_eps", "hc_eps"),
)
HC_POST = VendorCall(("_C_ascend::npu_hc_post", "custom::npu_hc_post"), ("x", "residual", "post", "comb"))
STREAMS, ITERATIONS, HIDDEN = 4, 20, (4096, 7168)


def why_not_streams(streams: Tensor, **_: object) -> WhyNot:
    n, hidden = streams.shape[1:]
    if n != STREAMS:
        return f"n={n}; the vendor's call takes {STREAMS} streams"
    return None if hidden in HIDDEN else f"hidden={hidden}; the vendor tests 4096 and 7168"


def why_not_hc_pre(streams: Tensor, sinkhorn_iters: int, **_: object) -> WhyNot:
    if sinkhorn_iters != ITERATIONS:
        return f"sinkhorn_iters={sinkhorn_iters}; the vendor's call does {ITERATIONS}"
    return why_not_streams(streams)


@implements(
    ops.residual.hc_pre,
    requires=Requires(
        dtypes={"streams": (torch.bfloat16,), **dict.fromkeys(("fn", "scale", "base"), (torch.float32,))},
        arch=">=2",
        missing=HC_PRE.missing,
    ),
    why_not=why_not_hc_pre,
    declares=("tf32",),  # HF32 in the projection, which no switch reaches
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
    x, post, comb = HC_PRE(
        x=streams.contiguous(),
        hc_fn=fn.contiguous(),
        hc_scale=scale.contiguous(),
        hc_base=base.contiguous(),
        hc_mult=n,
        hc_sinkhorn_iters=sinkhorn_iters,
        norm_eps=norm_eps,
        hc_eps=hc_eps,
    )
    return x, post, comb


@implements(
    ops.residual.hc_post,
    requires=Requires(
        dtypes={
            **dict.fromkeys(("x", "streams"), (torch.bfloat16,)),
            **dict.fromkeys(("post", "comb"), (torch.float32,)),
        },
        arch=">=2",
        missing=HC_POST.missing,
    ),
    why_not=why_not_streams,
)
def hc_post(x: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    if streams.shape[0] == 0:
        return torch.empty_like(streams, memory_format=torch.contiguous_format)
    y: Tensor = HC_POST(x=x.contiguous(), residual=streams.contiguous(), post=post.contiguous(), comb=comb.contiguous())
    return y
