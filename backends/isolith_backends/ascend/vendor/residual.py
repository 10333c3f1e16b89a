"""Hyper-connections.

Source: vllm-ascend 182b75ea (npu_hc_pre_v2, npu_hc_post), cann-recipes-infer fbc225d2 (npu_hc_pre and its golden with
to_hf32), Ascend/op-plugin 517f2e7d test_npu_mhc_post.py (the orientation of h_res).
"""

import torch
from torch import Tensor

from isolith_backends.ascend.vendor.rules import FLOATS, hf32, need, need_dtype, need_shape

STREAMS, ITERATIONS = 4, 20
HIDDEN = (4096, 7168)
"""Documented, and tested by vllm-ascend."""


def npu_hc_pre(
    x: Tensor,
    hc_fn: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    hc_mult: int,
    hc_sinkhorn_iters: int,
    norm_eps: float,
    hc_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    name = "npu_hc_pre"
    need(name, hc_mult == STREAMS, f"hc_mult is {hc_mult}, not {STREAMS}")
    need(name, hc_sinkhorn_iters == ITERATIONS, f"hc_sinkhorn_iters is {hc_sinkhorn_iters}, not {ITERATIONS}")
    need_dtype(name, "x", x, (torch.bfloat16,))
    need(name, x.dim() in (3, 4) and x.shape[-2] == STREAMS, f"x has shape {tuple(x.shape)}, not [.., {STREAMS}, d]")
    hidden, mixed = x.shape[-1], STREAMS * (STREAMS + 2)
    need(name, hidden in HIDDEN and x.numel() > 0, f"x has shape {tuple(x.shape)}; d is 4096 or 7168, nothing empty")
    for which, tensor, shape in (
        ("hc_fn", hc_fn, (mixed, STREAMS * hidden)),
        ("hc_scale", hc_scale, (3,)),
        ("hc_base", hc_base, (mixed,)),
    ):
        need_dtype(name, which, tensor, (torch.float32,))
        need_shape(name, which, tensor, shape)
    wide = x.float()
    flat = wide.flatten(-2)
    rsqrt = (flat.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
    mixes = (hf32(flat) @ hf32(hc_fn).T) * rsqrt
    pre, post, comb = mixes.split((STREAMS, STREAMS, STREAMS * STREAMS), dim=-1)
    base = hc_base.split((STREAMS, STREAMS, STREAMS * STREAMS))
    pre = torch.sigmoid(pre * hc_scale[0] + base[0]) + hc_eps
    post = 2 * torch.sigmoid(post * hc_scale[1] + base[1])
    comb = sinkhorn((comb * hc_scale[2] + base[2]).unflatten(-1, (STREAMS, STREAMS)), hc_eps)
    return (pre[..., None] * wide).sum(-2).to(x.dtype), post, comb


def sinkhorn(comb: Tensor, eps: float) -> Tensor:
    """Softmax of rows, columns normalised, then 19 times rows and columns."""
    comb = comb.softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(ITERATIONS - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb


def npu_hc_post(x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    name = "npu_hc_post"
    need_dtype(name, "x", x, FLOATS)
    need_dtype(name, "residual", residual, (x.dtype,))
    need(name, post.dtype == comb.dtype, f"post is {post.dtype}, comb {comb.dtype}")
    need_dtype(name, "post", post, (torch.float32, torch.bfloat16))
    need_shape(name, "residual", residual, (*x.shape[:-1], STREAMS, x.shape[-1]))
    need_shape(name, "post", post, (*x.shape[:-1], STREAMS))
    need_shape(name, "comb", comb, (*x.shape[:-1], STREAMS, STREAMS))
    need(name, x.numel() > 0, "nothing may be empty")
    return joined(x, residual, post, comb)


def joined(out: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """post[h]*out + sum over h' of comb[h', h]*residual[h']."""
    kept = (comb.float()[..., None] * residual.float()[..., None, :]).sum(-3)
    return (post.float()[..., None] * out.float()[..., None, :] + kept).to(out.dtype)


def npu_mhc_post(x: Tensor, h_res: Tensor | None, h_out: Tensor, h_post: Tensor) -> Tensor:
    """x is the residual here, and h_out the block's output."""
    name = "npu_mhc_post"
    need(name, x.dim() in (3, 4) and x.shape[-2] in (4, 6, 8), f"x has shape {tuple(x.shape)}; n is 4, 6 or 8")
    streams, hidden = x.shape[-2:]
    need(name, hidden % 16 == 0, f"D is {hidden}, no multiple of 16")
    need_shape(name, "h_out", h_out, (*x.shape[:-2], hidden))
    need_shape(name, "h_post", h_post, (*x.shape[:-2], streams))
    if h_res is None:
        h_res = torch.eye(streams).expand(*x.shape[:-2], streams, streams)
    need_shape(name, "h_res", h_res, (*x.shape[:-2], streams, streams))
    return joined(h_out, x, h_post, h_res).to(x.dtype)
