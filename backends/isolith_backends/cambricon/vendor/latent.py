"""Prologues of latent attention: fused_mla_q_v2 and fused_mla_kv of tmo 1.12.1 (domesticated_torch_mlu_ops@9fbf7df6
_ops.py; the order of the steps of the first from its use in xllm@3906f5a9).
"""

import torch
from torch import Tensor

from isolith_backends.cambricon.vendor.quantize import quantized
from isolith_backends.cambricon.vendor.rotary import rotate
from isolith_backends.cambricon.vendor.rules import (
    HALVES,
    need,
    need_dtype,
    need_int32,
    need_none,
    need_shape,
    need_within,
    slots_of,
)


def fused_mla_q_v2(
    input_q: Tensor,
    gamma: Tensor,
    smooth_quant_scale: Tensor | None,
    weight_b: Tensor,
    weight_b_scale: Tensor | None,
    sin: Tensor,
    cos: Tensor,
    position_id: Tensor,
    output: Tensor | None = None,
    eps: float = 1e-06,
    interleaved: bool = True,
    store_norm: bool = False,
    output_norm: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    call = "fused_mla_q_v2"
    need_dtype(call, (torch.bfloat16,), input_q=input_q, gamma=gamma, sin=sin, cos=cos, output=output)
    need_dtype(call, (torch.bfloat16, torch.int8), weight_b=weight_b)
    need_int32(call, position_id=position_id)
    quantised = weight_b.dtype == torch.int8
    both = (smooth_quant_scale is not None, weight_b_scale is not None)
    need(both == (quantised, quantised), f"{call}: an int8 weight_b needs smooth_quant_scale and weight_b_scale, both.")
    batch, queries, width = input_q.shape
    heads, dim, _ = weight_b.shape
    need_shape(call, weight_b=(weight_b, (-1, -1, width)), gamma=(gamma, (width,)), position_id=(position_id, (batch,)))
    need(queries == 1, f"{call}: a sequence must have 1 token, but has {queries}.")
    need_within(call, sin.shape[0], position_id=position_id)
    normed = rms_normed(input_q.float(), eps) * gamma.float()
    norm = normed.bfloat16() if output_norm is None else output_norm.copy_(normed.bfloat16())
    if smooth_quant_scale is None or weight_b_scale is None:
        projected = torch.einsum("bsi,hdi->bshd", norm.float(), weight_b.float())
    else:
        codes, scale = quantized(norm.float() * smooth_quant_scale, torch.int8)
        need_shape(call, weight_b_scale=(weight_b_scale, (heads, dim)))
        exact = torch.einsum("bsi,hdi->bshd", codes.double(), weight_b.double()).float()
        projected = exact * scale[..., None, None] * weight_b_scale
    rows = rms_normed(projected, eps)
    turned, at = slice(dim - sin.shape[-1], dim), position_id.long()
    sines, cosines = (table[at].float()[:, None, None] for table in (sin, cos))
    rows[..., turned] = rotate(rows[..., turned], sines, cosines, interleaved)
    result = rows.bfloat16() if output is None else output.copy_(rows.bfloat16())
    return (result, norm) if store_norm else result


def rms_normed(rows: Tensor, eps: float) -> Tensor:
    """Rows over their root mean square."""
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)


def fused_mla_kv(
    kv: Tensor,
    sin: Tensor,
    cos: Tensor,
    position_id: Tensor,
    gamma: Tensor,
    kv_cache: Tensor,
    kv_cache_scale: Tensor | None,
    slot_mapping: Tensor,
    cache_bs_id: Tensor | None = None,
    cache_seq_offset: Tensor | None = None,
    is_paged_cache: bool = True,
    eps: float = 1e-05,
    interleaved: bool = True,
    quant_mode: str = "dynamic_per_token",
) -> Tensor:
    call = "fused_mla_kv"
    need_none(
        call, cache_bs_id=cache_bs_id, cache_seq_offset=cache_seq_offset, linear_cache=None if is_paged_cache else 1
    )
    # Stacks pass "none" or "static_per_channel" where there is no scale; both write rows as they are.
    modes = ("none", "static_per_channel") if kv_cache_scale is None else ("dynamic_per_token",)
    need(quant_mode in modes, f"{call}: quant_mode must be one of {modes}, but is {quant_mode!r}.")
    need_dtype(call, HALVES, kv=kv)
    need_dtype(call, (kv.dtype,), gamma=gamma, sin=sin, cos=cos)
    need_dtype(call, (kv.dtype,) if kv_cache_scale is None else (torch.int8,), kv_cache=kv_cache)
    need_int32(call, position_id=position_id, slot_mapping=slot_mapping)
    batch, queries, width = kv.shape
    need_shape(call, position_id=(position_id, (batch,)), slot_mapping=(slot_mapping.flatten(), (batch * queries,)))
    need_shape(call, kv_cache=(kv_cache, (-1, 1, -1, width)), sin=(sin, (-1, width - gamma.shape[0])))
    at = (position_id.long()[:, None] + torch.arange(queries)).flatten()
    need_within(call, sin.shape[0], position_id=at)
    rows, norm = kv.float().flatten(0, 1), gamma.shape[0]
    latent = rms_normed(rows[:, :norm], eps) * gamma.float()
    rows = torch.cat((latent, rotate(rows[:, norm:], sin[at].float(), cos[at].float(), interleaved)), dim=-1)
    block, offset = slots_of(call, kv_cache, slot_mapping.flatten())
    if kv_cache_scale is None:
        kv_cache[block, 0, offset] = rows.to(kv_cache.dtype)
        return kv_cache
    codes, scale = quantized(rows, torch.int8)
    kv_cache[block, 0, offset] = codes
    kv_cache_scale[block, 0, offset] = scale
    return kv_cache
