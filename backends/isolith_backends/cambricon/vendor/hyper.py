"""Hyper-connections: hc_split_sinkhorn, fused_mul_reduce_sum and fused_mhc_post of tmo 1.12.1
(domesticated_torch_mlu_ops@9fbf7df6 _ops.py; the order of the Sinkhorn steps from the test of xllm@3906f5a9).
"""

import torch
from torch import Tensor

from isolith_backends.cambricon.vendor.profile import current
from isolith_backends.cambricon.vendor.rules import HALVES, need, need_dtype, need_none, need_shape


def hc_split_sinkhorn(
    mixes: Tensor,
    hc_scale: Tensor,
    hc_base: Tensor,
    pre_scale: Tensor | None = None,
    hc_mult: int = 4,
    sinkhorn_iter: int = 20,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    call, lanes = "hc_split_sinkhorn", (2 + hc_mult) * hc_mult
    need_dtype(call, (torch.float32, torch.bfloat16), mixes=mixes)
    need_dtype(call, (torch.float32,), hc_scale=hc_scale, hc_base=hc_base, pre_scale=pre_scale)
    need(mixes.dim() in (2, 3), f"{call}: mixes must have 2 or 3 dimensions, but has {mixes.dim()}.")
    need_shape(call, mixes=(mixes, (*mixes.shape[:-1], lanes)), hc_scale=(hc_scale, (3,)), hc_base=(hc_base, (lanes,)))
    need_shape(call, pre_scale=(pre_scale, tuple(mixes.shape[:-1])))
    mixed = mixes.float() if pre_scale is None else mixes.float() * pre_scale[..., None]
    parts = mixed.split((hc_mult, hc_mult, hc_mult * hc_mult), dim=-1)
    bases = hc_base.split((hc_mult, hc_mult, hc_mult * hc_mult))
    to_pre, to_post, to_comb = (part * hc_scale[i] + bases[i] for i, part in enumerate(parts))
    comb = to_comb.unflatten(-1, (hc_mult, hc_mult)).softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(sinkhorn_iter - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return to_pre.sigmoid() + eps, 2 * to_post.sigmoid(), comb


def fused_mul_reduce_sum(x: Tensor, w: Tensor) -> Tensor:
    call = "fused_mul_reduce_sum"
    need_dtype(call, HALVES, x=x)
    need_dtype(call, (torch.float32,), w=w)
    need_shape(call, x=(x, (-1, -1, -1)), w=(w, tuple(x.shape[:2])))
    need(x.shape[2] <= 4096, f"{call}: hidden must be at most 4096, but is {x.shape[2]}.")
    need(x.shape[1] <= 8, f"{call}: streams must be at most 8, but are {x.shape[1]}.")
    return (x.float() * w[..., None]).sum(1).to(x.dtype)


def fused_mhc_post(
    x: Tensor,
    residual: Tensor,
    post: Tensor,
    comb: Tensor,
    compute_rms: bool,
    eps: float,
    output: Tensor | None = None,
    output_rms: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    call = "fused_mhc_post"
    need_dtype(call, HALVES, x=x)
    need_dtype(call, (x.dtype,), residual=residual, output=output)
    need_dtype(call, (torch.float32,), post=post, comb=comb, output_rms=output_rms)
    tokens, hidden = x.shape
    if current().day0:
        need(hidden == 4096, f"{call}: hidden must be 4096, but is {hidden}.")
    need(hidden <= 7168, f"{call}: hidden must be at most 7168, but is {hidden}.")
    need_shape(call, residual=(residual, (tokens, 4, hidden)), post=(post, (tokens, 4)), comb=(comb, (tokens, 4, 4)))
    need_shape(call, output=(output, (tokens, 4, hidden)), output_rms=(output_rms, (tokens,)))
    mixed = torch.einsum("tjk,tjh->tkh", comb, residual.float()) + post[..., None] * x.float()[:, None]
    y = mixed.to(x.dtype)
    y = y if output is None else output.copy_(y)
    if not compute_rms:
        need_none(call, output_rms_without_compute_rms=output_rms)
        return y
    rms = torch.rsqrt(mixed.square().mean((1, 2)) + eps)
    return y, rms if output_rms is None else output_rms.copy_(rms)
