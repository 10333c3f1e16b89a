"""Products: group_gemm, smooth_quant_group_gemm, matmul, batch_matmul and scaled_matmul of tmo 1.12.1
(domesticated_torch_mlu_ops@9fbf7df6 _ops.py). Sums are in float32 and are rounded once.
"""

from typing import Any

import torch
from torch import Tensor

from isolith_backends.cambricon.vendor.active import activated
from isolith_backends.cambricon.vendor.rules import (
    FLOATS,
    FP8,
    HALVES,
    need,
    need_dtype,
    need_int32,
    need_none,
    need_shape,
    need_within,
    undefined,
)

BLOCK = 128  # of the scales of fp8
MX_GROUP = 32
MX_SCALES = (torch.float8_e8m0fnu, torch.bfloat16)


def group_gemm(
    a: Tensor,
    b: Tensor,
    group_list: Tensor,
    expand_idx: Tensor | None,
    c: Tensor | None,
    alpha: Any,  # Any: a tensor or a number; no source says
    beta: Any,
    max_in_group_list: int,
    bias: Tensor | None = None,
    d: Tensor | None = None,
    trans_a: bool = False,
    trans_b: bool = True,
    tile_config: dict[str, int] | None = None,
    idx_offset: Tensor | None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    call = "group_gemm"
    need_dtype(call, FLOATS, a=a)
    need_dtype(call, (a.dtype,), b=b)
    need_none(call, c=c, alpha=alpha, beta=beta, trans_a=trans_a or None)
    need_none(call, two_dimensional_b=b.shape if b.dim() == 2 else None)
    weights = (b if trans_b else b.transpose(1, 2)).float()
    need_shape(call, b=(weights, (group_list.shape[0], -1, a.shape[1])), bias=(bias, tuple(weights.shape[:2])))
    rows, expert, total = grouped(call, a, group_list, expand_idx, idx_offset, max_in_group_list)
    result = torch.empty(len(rows), weights.shape[1])
    for group in range(group_list.shape[0]):
        mine = expert == group
        result[mine] = rows[mine].float() @ weights[group].T
    if bias is not None:
        result += bias.float()[expert]
    return handed_back(call, result, total, d, output_dtype or a.dtype)


def smooth_quant_group_gemm(
    a: Tensor,
    b: Tensor,
    m_list: Tensor,
    expand_idx: Tensor | None,
    c: Tensor | None,
    alpha: Any,  # Any: a tensor or a number; no source says
    beta: Any,
    a_scale: Tensor,
    b_scale: Tensor,
    dtype: torch.dtype,
    max_m: int,
    bias: Tensor | None = None,
    quant_flag: list[int] | None = None,
    d: Tensor | None = None,
    tile_config: dict[str, int] | None = None,
    a_calibration: Tensor | None = None,
    b_calibration: Tensor | None = None,
    a_quant_bit_size: int = 8,
    a_lora: Tensor | None = None,
    b_lora: Tensor | None = None,
    idx_offset: Tensor | None = None,
    is_symmetric_quant: bool = True,
) -> Tensor:
    call = "smooth_quant_group_gemm"
    need(dtype in HALVES, f"{call}: dtype must be half or bfloat16, but is {dtype}.")
    need_dtype(call, (torch.int8, *FP8), a=a, b=b)
    need((a.dtype == torch.int8) == (b.dtype == torch.int8), f"{call}: a is {a.dtype}, b is {b.dtype}.")
    need_none(call, c=c, alpha=alpha, beta=beta, quant_flag=quant_flag, a_calibration=a_calibration, a_lora=a_lora)
    need_none(call, b_calibration=b_calibration, b_lora=b_lora, symmetric=None if is_symmetric_quant else False)
    need_none(call, a_quant_bit_size=None if a_quant_bit_size == 8 else a_quant_bit_size)
    need_shape(call, b=(b, (m_list.shape[0], -1, a.shape[1])), bias=(bias, tuple(b.shape[:2])))
    rows, expert, total = grouped(call, a, m_list, expand_idx, idx_offset, max_m)
    # The scales are in expanded order already: the gather does not touch them.
    first = 0 if idx_offset is None else int(idx_offset)
    result = torch.empty(len(rows), b.shape[1])
    for group in range(m_list.shape[0]):
        mine = expert == group
        if mine.any():
            at = first + mine.nonzero().flatten()
            result[mine] = scaled_product(call, rows[mine], b[group], a_scale, at, total, b_scale[group])
    if bias is not None:
        result += bias.float()[expert]
    return handed_back(call, result, total, d, dtype)


def scaled_product(
    call: str, a: Tensor, b: Tensor, a_scale: Tensor, rows: Tensor, total: int, b_scale: Tensor
) -> Tensor:
    """One group's product in float32: scales a row and a column, 1 x 128 by 128 x 128, or groups of 32."""
    k_blocks = -(-a.shape[1] // BLOCK)
    if a.dtype == torch.int8:
        need_dtype(call, (torch.float32,), a_scale=a_scale, b_scale=b_scale)
        need_shape(call, a_scale=(a_scale, (total,)), b_scale=(b_scale, (b.shape[0],)))
        return exact(a, b) * a_scale[rows, None] * b_scale
    if a_scale.dtype in MX_SCALES:
        groups = a.shape[1] // MX_GROUP
        need_dtype(call, (a_scale.dtype,), b_scale=b_scale)
        need_shape(call, a_scale=(a_scale, (groups, total)), b_scale=(b_scale, (groups, b.shape[0])))
        left = a_scale.float()[:, rows].T.repeat_interleave(MX_GROUP, 1)
        right = b_scale.float().T.repeat_interleave(MX_GROUP, 1)
    else:
        need_dtype(call, (torch.float32,), a_scale=a_scale, b_scale=b_scale)
        need_shape(call, a_scale=(a_scale, (k_blocks, total)), b_scale=(b_scale, (-(-b.shape[0] // BLOCK), k_blocks)))
        left = a_scale[:, rows].T.repeat_interleave(BLOCK, 1)[:, : a.shape[1]]
        right = spread_blocks(b_scale, b)
    return (a.float() * left) @ (b.float() * right).T


def exact(a: Tensor, b: Tensor) -> Tensor:
    """The product of int8 rows, whose sums are integers, in float32."""
    return (a.double() @ b.double().T).float()


def spread_blocks(scale: Tensor, b: Tensor) -> Tensor:
    """Scales of 128 x 128 blocks, one for each element of b."""
    return scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: b.shape[0], : b.shape[1]]


def grouped(
    call: str, a: Tensor, counts: Tensor, expand_idx: Tensor | None, idx_offset: Tensor | None, most: int
) -> tuple[Tensor, Tensor, int]:
    """(rows in expert order, the expert of each, rows of the output)."""
    need_int32(call, group_list=counts, expand_idx=expand_idx, idx_offset=idx_offset)
    need_shape(call, a=(a, (-1, -1)), group_list=(counts, (-1,)), expand_idx=(expand_idx, (-1,)))
    need_shape(call, idx_offset=(idx_offset, (1,)))
    need(idx_offset is None or expand_idx is not None, f"{call}: idx_offset needs expand_idx.")
    largest, taken = int(counts.max()) if counts.numel() else 0, int(counts.sum())
    need(largest <= most, f"{call}: a group has {largest} rows; max_in_group_list says {most}.")
    first = 0 if idx_offset is None else int(idx_offset)
    total = a.shape[0] if expand_idx is None else expand_idx.shape[0]
    need(first + taken <= total, f"{call}: groups take {taken} rows from {first}, but there are {total}.")
    expert = torch.arange(counts.shape[0]).repeat_interleave(counts.long())
    if expand_idx is None:
        return a[:taken], expert, total
    index = expand_idx[first : first + taken]
    need_within(call, a.shape[0], expand_idx=index)
    return a.view(torch.uint8)[index.long()].view(a.dtype) if a.dtype in FP8 else a[index.long()], expert, total


def handed_back(call: str, result: Tensor, total: int, d: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The defined rows in front of the others."""
    rows = undefined((total, result.shape[1]), dtype) if d is None else d
    need_shape(call, d=(rows, (total, result.shape[1])))
    rows[: len(result)] = result.to(rows.dtype)
    return rows


def scaled_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    output_dtype: torch.dtype,
    bias: Tensor | None = None,
    c: Tensor | None = None,
    act_mode: str = "none",
    quant_bit_size: int = 8,
    alpha: float = 1.0,
    beta: float = 1.0,
    use_hp_active: bool = False,
    a_quant_bit_size: int = -1,
    a_calib: Tensor | None = None,
    b_calib: Tensor | None = None,
    output: Tensor | None = None,
    tile_config: dict[str, int] | None = None,
) -> Tensor:
    call = "scaled_matmul"
    need(output_dtype in HALVES, f"{call}: output_dtype must be half or bfloat16, but is {output_dtype}.")
    need_dtype(call, (torch.int8, *FP8), a=a, b=b)
    need_dtype(call, (torch.float32,), a_scale=a_scale, b_scale=b_scale)
    need((a.dtype == torch.int8) == (b.dtype == torch.int8), f"{call}: a is {a.dtype}, b is {b.dtype}.")
    need_none(call, a_calib=a_calib, b_calib=b_calib, quant_bit_size=None if quant_bit_size == 8 else quant_bit_size)
    need_none(call, a_quant_bit_size=None if a_quant_bit_size in (-1, 8) else a_quant_bit_size)
    need_shape(call, a=(a, (-1, -1)), b=(b, (-1, a.shape[1])))
    need_shape(call, a_scale=(a_scale, (a.shape[0],) if a_scale.dim() == 1 else (a.shape[0], -1)))
    if a.dtype == torch.int8 and a_scale.dim() == b_scale.dim() == 1:
        need_shape(call, b_scale=(b_scale, (b.shape[0],)))
        result = exact(a, b) * a_scale[:, None] * b_scale
    else:
        result = (a.float() * spread(a_scale, a)) @ (b.float() * scales_of_weight(call, b_scale, b)).T
    return finished(call, result, bias, c, alpha, beta, act_mode, output, output_dtype)


def scales_of_weight(call: str, scale: Tensor, b: Tensor) -> Tensor:
    """[N], [N, G], or [N / 128, K / 128] of fp8."""
    blocks = (-(-b.shape[0] // BLOCK), -(-b.shape[1] // BLOCK))
    if scale.dim() == 2 and scale.shape[0] != b.shape[0]:
        need(b.dtype in FP8, f"{call}: b_scale in blocks of 128 x 128 is for fp8, but b is {b.dtype}.")
        need_shape(call, b_scale=(scale, blocks))
        return spread_blocks(scale, b)
    need_shape(call, b_scale=(scale, (b.shape[0],) if scale.dim() == 1 else (b.shape[0], -1)))
    return spread(scale, b)


def spread(scale: Tensor, x: Tensor) -> Tensor:
    """Scales a row or a group of a row, so that they multiply x."""
    if scale.dim() == 1:
        return scale[:, None]
    need(x.shape[1] % scale.shape[1] == 0, f"scaled_matmul: {scale.shape[1]} groups do not divide {x.shape[1]}.")
    return scale.repeat_interleave(x.shape[1] // scale.shape[1], 1)


def matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    c: Tensor | None = None,
    act_mode: str = "none",
    alpha: float = 1.0,
    beta: float = 0.0,
    fast_act: bool = True,
    approximate: bool = True,
    dtype: torch.dtype | None = None,
    a_scale: float | None = None,
    b_scale: float | None = None,
    trans_a: bool = False,
    trans_b: bool = True,
    tile_config: dict[str, int] | None = None,
    output: Tensor | None = None,
) -> Tensor:
    call = "matmul"
    need_dtype(call, FLOATS, a=a)
    need_dtype(call, (a.dtype,), b=b)
    need_none(call, a_scale=a_scale, b_scale=b_scale)
    left, right = (a.T if trans_a else a).float(), (b.T if trans_b else b).float()
    need_shape(call, a=(left, (-1, -1)), b=(right, (left.shape[1], -1)))
    return finished(call, left @ right, bias, c, alpha, beta, act_mode, output, dtype or a.dtype)


def batch_matmul(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    a_scale: float | None = None,
    b_scale: float | None = None,
    trans_a: bool = False,
    trans_b: bool = True,
    d: Tensor | None = None,
    bias: Tensor | None = None,
    act_mode: str = "none",
    dtype: torch.dtype | None = None,
    use_hp_active: bool = False,
    approximate: bool = False,
) -> Tensor:
    call = "batch_matmul"
    need_dtype(call, FLOATS, a=a)
    need_dtype(call, (a.dtype,), b=b)
    need_none(call, a_scale=a_scale, b_scale=b_scale)
    left = (a.transpose(1, 2) if trans_a else a).float()
    right = (b.transpose(1, 2) if trans_b else b).float()
    need_shape(call, a=(left, (-1, -1, -1)), b=(right, (left.shape[0], left.shape[2], -1)))
    return finished(call, left @ right, bias, c, alpha, beta, act_mode, d, dtype or a.dtype)


def finished(
    call: str,
    product: Tensor,
    bias: Tensor | None,
    c: Tensor | None,
    alpha: float,
    beta: float,
    act_mode: str,
    output: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """act(alpha * product + bias + beta * c), rounded once."""
    result = product * alpha
    if bias is not None:
        need_shape(call, bias=(bias, (product.shape[-1],)))
        result = result + bias.float()
    if c is not None:
        need_shape(call, c=(c, tuple(product.shape)))
        result = result + beta * c.float()
    if act_mode != "none":
        result = activated(result, act_mode, is_gated=False, active_coef=1.0, limit=0)
    if output is None:
        return result.to(dtype)
    need_dtype(call, (dtype,), output=output)
    need_shape(call, output=(output, tuple(product.shape)))
    return output.copy_(result.to(dtype))
