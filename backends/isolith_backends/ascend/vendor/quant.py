"""Quantisation by row, and dense products.

Source: Ascend/op-plugin 517f2e7d docs of npu_dynamic_quant, npu_quant_matmul, npu_transpose_batchmatmul and
npu_fused_matmul; cann-recipes-infer fbc225d2 (16cast32 for the router's logits).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isolith_backends.ascend.vendor.grouped import OUTPUTS, dequantised, product
from isolith_backends.ascend.vendor.mx_products import mx_matmul
from isolith_backends.ascend.vendor.rules import (
    FLOATS,
    HALVES,
    need,
    need_dtype,
    need_shape,
    per_token,
    poison,
    to_int8,
)
from isolith_backends.ascend.vendor.soc import current

INT8, E4M3 = (None, 1), (24, 292)
"""Numbers of dtypes, of torch and of torch_npu; None means int8."""


def npu_dynamic_quant(
    input: Tensor,
    smooth_scales: Tensor | None,
    group_index: Tensor | None,
    dst_type: int | None,
    quant_mode: str,
    dst_type_max: float,
) -> tuple[Tensor, Tensor]:
    """group_index holds cumulated ends of rows, the last of which is the number of rows."""
    name = "npu_dynamic_quant"
    need_dtype(name, "x", input, HALVES)
    need(name, input.dim() >= 2 and input.numel() > 0, f"x is {tuple(input.shape)}; at least 2-D and not empty")
    need(name, quant_mode == "pertoken" and dst_type_max == 0.0, f"quant_mode is {quant_mode!r}; not in this twin")
    need(name, dst_type in INT8 or (dst_type in E4M3 and current().name == "A5"), f"dst_type is {dst_type}")
    values = input.float().flatten(0, -2)
    if smooth_scales is not None:
        need_dtype(name, "smooth_scales", smooth_scales, (input.dtype,))
        table = smooth_scales.float().view(-1, input.shape[-1])
        need(name, (table.shape[0] > 1) <= (group_index is not None), "smooth_scales of groups need group_index")
        ends = torch.tensor([values.shape[0]], dtype=torch.int32) if group_index is None else group_index
        need_dtype(name, "group_index", ends, (torch.int32,))
        need(name, ends.numel() == table.shape[0] and int(ends[-1]) == values.shape[0], "group_index ends elsewhere")
        sizes = torch.diff(ends, prepend=ends.new_zeros(1)).clamp(min=0)
        of_row = torch.repeat_interleave(torch.arange(sizes.numel()), sizes)[: values.shape[0]]
        values = torch.cat(
            (values[: of_row.numel()] * table[of_row], poison(values[of_row.numel() :].shape, values.dtype))
        )
    if dst_type in E4M3:
        scale = values.abs().amax(-1) / 448.0
        codes = (values / scale[:, None]).to(torch.float8_e4m3fn)
    else:
        codes, scale = per_token(values)
    return codes.view(input.shape), scale.view(input.shape[:-1])


def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
    output_dtype: int | None,
    **rest: Any,
) -> Tensor:
    name = "npu_quant_matmul"
    if x1.dtype == torch.float8_e4m3fn:
        dtypes = rest["scale_dtype"], rest["pertoken_scale_dtype"]
        need(name, pertoken_scale is not None and offset is None and bias is None, "MX without pertoken_scale")
        assert pertoken_scale is not None
        return mx_matmul(x1, x2, scale, pertoken_scale, dtypes, rest["group_sizes"], output_dtype)
    need(name, not any(v is not None and not (isinstance(v, Sequence) and not v) for v in rest.values()), f"{rest}")
    need(name, offset is None, "offset goes with int8 results; not in this twin")
    need_dtype(name, "x1", x1, (torch.int8,))
    need_dtype(name, "x2", x2, (torch.int8,))
    need(name, x1.dim() == x2.dim() == 2 and x1.shape[1] == x2.shape[0], f"{tuple(x1.shape)} by {tuple(x2.shape)}")
    need(name, x1.numel() > 0 and x2.numel() > 0, "nothing may be empty")
    whole = x2.is_contiguous() or x2.T.is_contiguous()
    need(name, whole, f"x2 {x2.stride()} is neither contiguous nor transposed")
    need(name, tuple(scale.shape) in ((1,), (x2.shape[1],)), f"scale is {tuple(scale.shape)}")
    need_dtype(name, "scale", scale, (torch.float32, torch.bfloat16))
    if pertoken_scale is not None:
        need_dtype(name, "pertoken_scale", pertoken_scale, (torch.float32,))
        need_shape(name, "pertoken_scale", pertoken_scale, (x1.shape[0],))
    need(
        name, output_dtype in (5, 15), f"output_dtype is {output_dtype}; this twin knows float16 (5) and bfloat16 (15)"
    )
    need(name, output_dtype == 15 or pertoken_scale is not None, "float16 without pertoken_scale needs a packed scale")
    return dequantised(product(x1, x2), scale, pertoken_scale, bias).to(OUTPUTS[output_dtype or 15])


def npu_transpose_batchmatmul(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    perm_x1: Sequence[int] | None,
    perm_x2: Sequence[int] | None,
    perm_y: Sequence[int] | None,
    batch_split_factor: int,
) -> Tensor:
    """Permute both operands, multiply batch by batch, permute the result."""
    name = "npu_transpose_batchmatmul"
    need_dtype(name, "input", input, FLOATS)
    need_dtype(name, "weight", weight, (input.dtype,))
    need(name, bias is None and scale is None and batch_split_factor == 1, "bias, scale and splitting not in this twin")
    need(name, input.dim() == weight.dim() == 3, f"{tuple(input.shape)} by {tuple(weight.shape)}")
    need(name, input.numel() > 0 and weight.numel() > 0, "nothing may be empty")
    newest = current().name == "A5"
    for which, perm, legal in (
        ("perm_x1", perm_x1, ([0, 1, 2], [1, 0, 2])),
        ("perm_x2", perm_x2, ([0, 1, 2], [0, 2, 1]) if newest else ([0, 1, 2],)),
        ("perm_y", perm_y, ([1, 0, 2],)),
    ):
        need(name, perm is None or list(perm) in legal, f"{which} is {perm}, not one of {legal}")
    left, right = input.permute(*(perm_x1 or (0, 1, 2))), weight.permute(*(perm_x2 or (0, 1, 2)))
    need(name, left.shape[0] == right.shape[0] and left.shape[2] == right.shape[1], f"{left.shape} by {right.shape}")
    whole = right.shape[1] % 16 == 0 and right.shape[2] % 16 == 0
    wide = right.shape[1] * (right.shape[0] if list(perm_x1 or ()) == [1, 0, 2] else 1)
    fits = whole and max(wide, right.shape[2]) < 65536
    need(name, newest or fits, f"{tuple(right.shape)}: K and N are multiples of 16, K (turned: times B) below 65536")
    return torch.bmm(left.float(), right.float()).permute(*(perm_y or (1, 0, 2))).to(input.dtype).contiguous()


def npu_fused_matmul(x1: Tensor, x2: Tensor, bias: Tensor | None, x3: Tensor | None, fused_op_type: str) -> Tensor:
    """16cast32: a product of 16-bit operands that is not rounded back."""
    name = "npu_fused_matmul"
    need(name, fused_op_type in ("", "16cast32") and x3 is None, f"fused_op_type is {fused_op_type!r}")
    need_dtype(name, "x1", x1, HALVES)
    need_dtype(name, "x2", x2, (x1.dtype,))
    need(name, x1.dim() == x2.dim() == 2 and x1.shape[1] == x2.shape[0], f"{tuple(x1.shape)} by {tuple(x2.shape)}")
    out = x1.float() @ x2.float()
    out = out if bias is None else out + bias.float()
    return out if fused_op_type == "16cast32" else out.to(x1.dtype)


def npu_rms_norm_dynamic_quant(
    x: Tensor, gamma: Tensor, smooth_scale: Tensor | None, beta: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    name = "npu_rms_norm_dynamic_quant"
    need_dtype(name, "x", x, HALVES)
    need_dtype(name, "gamma", gamma, (x.dtype,))
    need_shape(name, "gamma", gamma, (x.shape[-1],))
    wide = x.float()
    normed = wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt() * gamma.float()
    normed = normed if beta is None else normed + beta.float()
    normed = normed if smooth_scale is None else normed * smooth_scale.float()
    scale = normed.abs().amax(-1) / 127.0
    return to_int8(normed, scale[..., None]), scale
