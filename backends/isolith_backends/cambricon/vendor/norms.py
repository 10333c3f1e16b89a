"""Norms: fused_rms_norm and fused_layer_norm of tmo 1.12.1 (domesticated_torch_mlu_ops@9fbf7df6 _ops.py)."""

import torch
from torch import Tensor

from isolith_backends.cambricon.vendor.quantize import quantized
from isolith_backends.cambricon.vendor.rules import FLOATS, need, need_dtype, need_none, need_shape


def fused_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    bias: Tensor | None,
    eps: float,
    store_output_before_norm: bool,
    quant_scale: Tensor | None = None,
    out: Tensor | None = None,
    dynamic_quant: bool = False,
    store_output_after_norm: bool = False,
    quant_type: torch.dtype = torch.int8,
    scale_type: torch.dtype = torch.float,
    mx_quant: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    call = "fused_rms_norm"
    row = summed(call, x, residual, gamma, beta, bias, store_output_before_norm)
    normed = row * torch.rsqrt(row.square().mean(-1, keepdim=True) + eps)
    kept = row.to(x.dtype) if store_output_before_norm else None
    normed = scaled_and_shifted(normed, gamma, beta, 0.0)
    need_none(call, mx_quant=mx_quant or None, scale_type=None if scale_type == torch.float32 else scale_type)
    return results(call, x, normed, kept, quant_scale, out, dynamic_quant, store_output_after_norm, quant_type)


def fused_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    bias: Tensor | None,
    eps: float,
    store_output_before_norm: bool,
    quant_scale: Tensor | None = None,
    out: Tensor | None = None,
    dynamic_quant: bool = False,
    store_output_after_norm: bool = False,
    quant_type: torch.dtype = torch.int8,
    gamma_add_coef: float = 0.0,
    scale_type: torch.dtype = torch.float,
    mx_quant: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    call = "fused_layer_norm"
    row = summed(call, x, residual, gamma, beta, bias, store_output_before_norm)
    centred = row - row.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    kept = row.to(x.dtype) if store_output_before_norm else None
    normed = scaled_and_shifted(normed, gamma, beta, gamma_add_coef)
    need_none(call, mx_quant=mx_quant or None, scale_type=None if scale_type == torch.float32 else scale_type)
    return results(call, x, normed, kept, quant_scale, out, dynamic_quant, store_output_after_norm, quant_type)


def summed(
    call: str,
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    bias: Tensor | None,
    store_output_before_norm: bool,
) -> Tensor:
    """x + bias + residual in float32."""
    # No source states a mixed form, so weights have the dtype of the rows.
    need_dtype(call, FLOATS, x=x)
    need_dtype(call, (x.dtype,), residual=residual, gamma=gamma, beta=beta, bias=bias)
    width = (x.shape[-1],)
    need_shape(call, gamma=(gamma, width), beta=(beta, width), bias=(bias, width), residual=(residual, tuple(x.shape)))
    stored = not store_output_before_norm or bias is not None or residual is not None
    need(stored, f"{call}: store_output_before_norm needs bias or residual.")
    row = x.float()
    for term in (bias, residual):
        row = row if term is None else row + term.float()
    return row


def scaled_and_shifted(normed: Tensor, gamma: Tensor | None, beta: Tensor | None, add: float) -> Tensor:
    """normed * (gamma + add) + beta."""
    normed = normed if gamma is None else normed * (gamma.float() + add)
    return normed if beta is None else normed + beta.float()


def results(
    call: str,
    x: Tensor,
    normed: Tensor,
    kept: Tensor | None,
    quant_scale: Tensor | None,
    out: Tensor | None,
    dynamic_quant: bool,
    store_output_after_norm: bool,
    quant_type: torch.dtype,
) -> Tensor | tuple[Tensor, ...]:
    """out, then residual_out, scale and normed_out as asked for; a bare tensor if only out."""
    need(not dynamic_quant or quant_scale is not None, f"{call}: dynamic_quant needs quant_scale.")
    need_none(call, static_quantisation_by_quant_scale=None if dynamic_quant else quant_scale)
    scale = None
    result = normed.to(x.dtype)
    if quant_scale is not None:
        need_dtype(call, (torch.float32,), quant_scale=quant_scale)
        # A smooth of [heads, C] gives one scale to all leading dimensions but the last two; one of [C], a scale a row.
        rows = normed * quant_scale
        if quant_scale.dim() == 2:
            codes, scale = quantized(rows.flatten(-2), quant_type)
            result = codes.view(normed.shape)
        else:
            result, scale = quantized(rows, quant_type)
    if out is not None:
        need_dtype(call, (result.dtype,), out=out)
        result = out.copy_(result)
    after = normed.to(x.dtype) if store_output_after_norm else None
    asked = tuple(value for value in (result, kept, scale, after) if value is not None)
    return asked if len(asked) > 1 else result
