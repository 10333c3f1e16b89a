"""Quantised activations: scaled_quantize and moe_quantize of tmo 1.12.1 (domesticated_torch_mlu_ops@9fbf7df6 _ops.py).

A row of zeros has the scale 0; its codes are undefined, since no source says what the division gives.
"""

import torch
from torch import Tensor

from isolith_backends.cambricon.vendor.active import activated
from isolith_backends.cambricon.vendor.rules import (
    FLOATS,
    FP8,
    LARGEST,
    fill_undefined,
    need,
    need_dtype,
    need_int32,
    need_none,
    need_shape,
    need_within,
    undefined,
)


def quantized(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of float32 rows and one scale a row: its largest magnitude over that of the dtype."""
    largest = rows.abs().amax(-1)
    scale = largest / LARGEST[dtype]
    values = rows / scale[..., None]
    if dtype == torch.int8:
        codes = values.nan_to_num(0.0, 0.0, 0.0).round().clamp(-128, 127).to(dtype)
        codes[largest == 0] = -128
    else:
        codes = values.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)
        codes.view(torch.uint8)[largest == 0] = 0x7F
    return codes, scale


def scaled_quantize(
    x: Tensor,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    scale_ub: Tensor | None = None,
    quant_type: torch.dtype = torch.int8,
    quant_mode: str = "dynamic_per_token",
    act_mode: str = "none",
    active_coef: float = 1.0,
    is_gated: bool = False,
    quant_bit_size: int = 8,
    scale_type: torch.dtype = torch.float32,
    need_output_scale_trans: bool = False,
    output_reduced: Tensor | None = None,
    group_size: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    call = "scaled_quantize"
    modes = ("dynamic_per_token", "dynamic_per_tensor", "static_per_tensor", "static_per_channel")
    need(quant_mode in modes, f"{call}: quant_mode must be one of {modes}, but is {quant_mode!r}.")
    need_dtype(call, FLOATS, x=x)
    need_none(
        call,
        zero=zero,
        scale_ub=scale_ub,
        output_reduced=output_reduced,
        need_output_scale_trans=need_output_scale_trans or None,
        group_size=None if group_size == 1 else group_size,
        # The rounding of a block scale to a power of two, and the direction of a static scale, are not public.
        scale_type=None if scale_type == torch.float32 else scale_type,
        quant_mode=quant_mode if quant_mode.startswith("static") else None,
    )
    need_quant_type(call, quant_type, quant_bit_size)
    rows = gated_or_plain(x, act_mode, active_coef, is_gated)
    if scale is not None:
        need_dtype(call, (torch.float32,), scale=scale)
        need_shape(call, scale=(scale, (rows.shape[-1],)))
        rows = rows * scale
    if quant_mode == "dynamic_per_tensor":
        codes, one = quantized(rows.reshape(1, -1), quant_type)
        return codes.view(rows.shape), one
    return quantized(rows, quant_type)


def moe_quantize(
    x: Tensor,
    smooth: Tensor,
    zero: Tensor | None = None,
    token_count: Tensor | None = None,
    gather_index: Tensor | None = None,
    gather_index_start_position: Tensor | None = None,
    output: Tensor | None = None,
    output_scale: Tensor | None = None,
    dynamic_quant: bool = True,
    act_mode: str = "none",
    active_coef: float = 1.0,
    is_gated: bool = False,
    quant_type: torch.dtype = torch.int8,
    quant_bit_size: int = 8,
    scale_type: torch.dtype = torch.float32,
    need_output_scale_trans: bool = False,
    output_reduced: Tensor | None = None,
    group_size: int = 1,
) -> tuple[Tensor, ...]:
    call = "moe_quantize"
    need_dtype(call, FLOATS, x=x)
    need_dtype(call, (torch.float32,), smooth=smooth, output_scale=output_scale)
    need_int32(call, token_count=token_count, gather_index=gather_index, start=gather_index_start_position)
    need_none(
        call,
        zero=zero,
        output_reduced=output_reduced,
        need_output_scale_trans=need_output_scale_trans or None,
        group_size=None if group_size == 1 else group_size,
        scale_type=None if scale_type == torch.float32 else scale_type,
        static_quantisation=None if dynamic_quant else dynamic_quant,
    )
    need_quant_type(call, quant_type, quant_bit_size)
    rows, total = taken(call, x, token_count, gather_index, gather_index_start_position)
    values = gated_or_plain(rows, act_mode, active_coef, is_gated)
    values = values * smooth_of_rows(call, smooth, token_count, values)
    codes, scale = quantized(values, quant_type)
    codes_out = undefined((total, codes.shape[-1]), quant_type) if output is None else output
    scale_out = undefined((total,), torch.float32) if output_scale is None else output_scale
    need_shape(call, output=(codes_out, (total, codes.shape[-1])))
    need_dtype(call, (quant_type,), output=codes_out)
    need(scale_out.numel() >= total, f"{call}: output_scale must hold {total} scales, but holds {scale_out.numel()}.")
    codes_out[: len(codes)] = codes
    scale_out[: len(codes)] = scale
    return codes_out, scale_out


def taken(
    call: str, x: Tensor, token_count: Tensor | None, gather_index: Tensor | None, start: Tensor | None
) -> tuple[Tensor, int]:
    """The rows to quantise, in expert order, and how many rows the output has."""
    need_shape(call, x=(x, (-1, -1)))
    need(start is None or gather_index is not None, f"{call}: a start position needs gather_index.")
    total = x.shape[0] if gather_index is None else gather_index.shape[0]
    count = total if token_count is None else int(token_count.sum())
    first = 0 if start is None else int(start)
    need(first + count <= total, f"{call}: {count} rows from {first} are more than the {total} that there are.")
    if gather_index is None:
        return x[:count], total
    index = gather_index[first : first + count]
    need_within(call, x.shape[0], gather_index=index)
    return x[index.long()], total


def smooth_of_rows(call: str, smooth: Tensor, token_count: Tensor | None, rows: Tensor) -> Tensor:
    """The factors of each row: those of its expert."""
    if smooth.dim() == 1:
        need_shape(call, smooth=(smooth, (rows.shape[-1],)))
        return smooth
    if token_count is None:
        need_shape(call, smooth=(smooth, (1, rows.shape[-1])))
        return smooth
    need_shape(call, smooth=(smooth, (token_count.shape[0], rows.shape[-1])))
    return smooth.repeat_interleave(token_count.long(), 0)


def need_quant_type(call: str, dtype: torch.dtype, bits: int) -> None:
    """Refuse what is no 8-bit type."""
    legal = (torch.int8, *FP8)
    need(dtype in legal, f"{call}: quant_type must be one of {legal}, but is {dtype}.")
    need_none(call, quant_bit_size=None if bits == 8 else bits)


def gated_or_plain(x: Tensor, act_mode: str, active_coef: float, is_gated: bool) -> Tensor:
    """Rows in float32 behind the activation."""
    if act_mode == "none":
        # Halved without an activation: what the half holds is not public.
        return fill_undefined(x.float()[..., : x.shape[-1] // 2].clone()) if is_gated else x.float()
    return activated(x.float(), act_mode, is_gated, active_coef, 0)
