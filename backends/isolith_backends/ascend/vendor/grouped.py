"""Products by group of rows.

Source: Ascend/op-plugin 517f2e7d docs of npu_grouped_matmul; vllm-ascend 182b75ea csrc (moe_grouped_matmul,
grouped_matmul_swiglu_quant).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isolith_backends.ascend.vendor.mx_products import mx_grouped_matmul, tiled_grouped_matmul
from isolith_backends.ascend.vendor.rules import HALVES, need, need_dtype, need_shape, per_token, poison
from isolith_backends.ascend.vendor.soc import current
from isolith_backends.ascend.vendor.swiglu import glu

MOST_EXPERTS, MOST_TENSORS, MOST_INNER = 1024, 128, 65536
OUTPUTS = {3: torch.int32, 5: torch.float16, 15: torch.bfloat16}
"""torch's numbers of dtypes."""
ACTIVATIONS = {1: torch.relu, 5: torch.nn.functional.silu}


def sizes_of(name: str, group_list: Tensor, kind: int, rows: int, experts: int) -> list[int]:
    """How many rows each expert has: 0 cumulated, 1 counted, 2 pairs (expert, count)."""
    need_dtype(name, "group_list", group_list, (torch.int64,))
    if kind == 2:
        need(name, group_list.dim() == 2 and group_list.shape[1] == 2, f"group_list is {tuple(group_list.shape)}")
        counts = torch.zeros(experts, dtype=torch.int64)
        for expert, count in group_list.tolist():
            if count <= 0:
                break
            counts[expert] = count
    else:
        need_shape(name, "group_list", group_list, (experts,))
        need(name, kind == 0 or experts > 1, "group_list of counts must not have length 1")
        counts = group_list if kind == 1 else torch.diff(group_list, prepend=torch.zeros(1, dtype=torch.int64))
    # A list of the wrong kind is not noticed: what falls as a cumulated list is a group without rows.
    sizes: list[int] = counts.clamp(min=0).tolist()
    need(name, sum(sizes) <= rows, f"group_list reaches row {sum(sizes)} of {rows} (aicore exception)")
    return sizes


def matrices(name: str, weight: Sequence[Tensor]) -> list[Tensor]:
    """A matrix [K, N] for each expert, from one 3-D tensor or a list."""
    if len(weight) == 1 and weight[0].dim() == 3:
        need(name, weight[0].shape[0] <= MOST_EXPERTS, f"{weight[0].shape[0]} experts; at most {MOST_EXPERTS}")
    else:
        need(name, len(weight) <= MOST_TENSORS, f"{len(weight)} tensors; at most {MOST_TENSORS}")
    for tensor in weight:
        whole = tensor.is_contiguous() or tensor.transpose(-1, -2).is_contiguous()
        need(name, whole, f"weight {tuple(tensor.shape)} {tensor.stride()} is neither contiguous nor transposed")
        need(name, tensor.shape[-1] < MOST_INNER, f"weight has an inner axis of {tensor.shape[-1]}")
    return list(weight[0]) if len(weight) == 1 and weight[0].dim() == 3 else list(weight)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight: exact for int8, else in float32."""
    return (x.double() @ weight.double()).to(torch.int32) if x.dtype == torch.int8 else x.float() @ weight.float()


def only(name: str, which: str, tensors: Sequence[Tensor] | None, shape: tuple[int, ...]) -> Tensor | None:
    """The one tensor of an optional list."""
    if not tensors:
        return None
    need(name, len(tensors) == 1, f"{which} has {len(tensors)} tensors")
    need_shape(name, which, tensors[0], shape)
    return tensors[0]


def of_e4m3(
    x: Tensor,
    weight: Tensor,
    scales: tuple[Sequence[Tensor] | None, Sequence[Tensor] | None],
    group_list: Tensor | None,
    kind: int,
    dtypes: tuple[int | None, int | None],
    output: int | None,
) -> Tensor:
    """npu_grouped_matmul of e4m3: with a scale for every 32, or with three axes of float32 scales for tiles of 128."""
    name = "npu_grouped_matmul"
    need(name, bool(scales[0]) and bool(scales[1]) and group_list is not None, "e4m3 takes both scales and groups")
    assert group_list is not None
    assert scales[0] is not None
    assert scales[1] is not None
    scale, of_rows = scales[0][0], scales[1][0]
    sizes = sizes_of(name, group_list, kind, x.shape[0], weight.shape[0])
    if scale.dim() == 3 and dtypes == (None, None):
        return tiled_grouped_matmul(x, weight, scale, of_rows, output, sizes)
    return mx_grouped_matmul(x, weight, scale, of_rows, dtypes, output, sizes)


def npu_grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    scale: Sequence[Tensor] | None,
    per_token_scale: Sequence[Tensor] | None,
    group_list: Tensor | None,
    split_item: int,
    group_type: int | None,
    group_list_type: int,
    act_type: int,
    output_dtype: int | None,
    **rest: Any,
) -> list[Tensor]:
    """One x over experts (group_type 0), or a product for each pair (group_type -1)."""
    name = "npu_grouped_matmul"
    dtypes = rest.pop("scale_dtype", None), rest.pop("per_token_scale_dtype", None)
    need(name, not any(value for value in rest.values()), f"{sorted(k for k, v in rest.items() if v)} not in this twin")
    fits = all(tensor.numel() > 0 and tensor.shape[-1] < MOST_INNER for tensor in (*x, *weight))
    need(name, fits, f"nothing may be empty, inner axes are below {MOST_INNER}")
    if x[0].dtype == torch.float8_e4m3fn:
        legal = group_type == 0 and split_item in (2, 3) and act_type == 0 and len(x) == len(weight) == 1 and not bias
        need(name, legal, "e4m3 takes one x and one weight with groups of rows, without bias and activation")
        both = scale, per_token_scale
        return [of_e4m3(x[0], weight[0], both, group_list, group_list_type, dtypes, output_dtype)]
    need(name, dtypes == (None, None), f"dtypes of scales are {dtypes}")
    wanted = (torch.float16,) if current().name == "310P" else (*HALVES, torch.int8)
    need_dtype(name, "x", x[0], wanted)
    need(name, all(w.dtype == x[0].dtype for w in weight), f"weight is {weight[0].dtype}, x {x[0].dtype}")
    experts = matrices(name, weight)
    if group_type in (None, -1):
        need(name, group_list is None and split_item in (0, 1), "a product for each pair has no groups")
        need(name, len(x) == len(experts) and x[0].dtype != torch.int8, f"{len(x)} x, {len(experts)} weights")
        return [product(a, b).to(a.dtype) for a, b in zip(x, experts, strict=True)]
    need(name, group_type == 0, f"group_type is {group_type}; this twin knows -1 and 0")
    need(name, split_item in (2, 3) and len(x) == 1, f"split_item is {split_item}: one output alone in this twin")
    need(name, group_list is not None and group_list_type in (0, 1, 2), f"group_list_type is {group_list_type}")
    need(name, group_list_type != 2 or x[0].dtype == torch.int8, "pairs are for int8")
    assert group_list is not None
    rows, inner, columns = x[0].shape[0], x[0].shape[1], experts[0].shape[1]
    need(name, inner == experts[0].shape[0], f"x has {inner} columns, weight {experts[0].shape[0]} rows")
    scales = only(name, "scale", scale, (len(experts), columns))
    tokens = only(name, "per_token_scale", per_token_scale, (rows,))
    added = only(name, "bias", bias, (len(experts), columns))
    out = poison((rows, columns), dtype_out(name, x[0].dtype, scales, tokens, output_dtype))
    need(name, act_type == 0 or (act_type in ACTIVATIONS and tokens is not None), f"act_type is {act_type}")
    start = 0
    for expert, size in enumerate(sizes_of(name, group_list, group_list_type, rows, len(experts))):
        if size:
            at = slice(start, start + size)
            y = dequantised(
                product(x[0][at], experts[expert]),
                None if scales is None else scales[expert],
                None if tokens is None else tokens[at],
                None if added is None else added[expert],
            )
            out[at] = ACTIVATIONS.get(act_type, lambda values: values)(y).to(out.dtype)
        start += size
    return [out]


def dtype_out(
    name: str, x: torch.dtype, scale: Tensor | None, tokens: Tensor | None, number: int | None
) -> torch.dtype:
    """The dtype of the result, after the rules of scales."""
    if x != torch.int8:
        need(name, scale is None and tokens is None, "scales go with int8")
        need(name, number is None or OUTPUTS.get(number) == x, f"output_dtype is {number} for x of {x}")
        return x
    if scale is None:
        need(name, tokens is None and number == 3, f"int8 without scale gives int32 (3); output_dtype is {number}")
        return torch.int32
    need_dtype(name, "scale", scale, (torch.bfloat16, torch.float32))
    if tokens is not None:
        need_dtype(name, "per_token_scale", tokens, (torch.float32,))
    need(name, number in (5, 15), f"output_dtype is {number}; bfloat16 (15) or float16 (5)")
    # The document's table of dtypes: float16 comes of float32 scales, bfloat16 of bfloat16 ones, on A5 of both.
    narrow = torch.bfloat16 if number == 15 else torch.float32
    legal = scale.dtype == narrow or (number == 15 and current().name == "A5")
    need(name, legal, f"output_dtype is {number} for a scale of {scale.dtype}")
    return OUTPUTS[number or 15]


def dequantised(y: Tensor, scale: Tensor | None, tokens: Tensor | None, bias: Tensor | None) -> Tensor:
    """An int32 bias comes before the scales, a float one behind them."""
    if bias is not None and bias.dtype == torch.int32:
        y, bias = y + bias, None
    if scale is not None:
        y = y.float() * scale.float()
    if tokens is not None:
        y = y * tokens[:, None]
    return y if bias is None else y + bias.float()


def moe_grouped_matmul(
    x: Tensor, weight: Tensor, group_list: Tensor, split_item: int, group_type: int, group_list_type: int
) -> list[Tensor]:
    """vllm-ascend's."""
    nothing: dict[str, Any] = dict.fromkeys(("bias", "scale", "per_token_scale", "output_dtype"))
    kinds: dict[str, Any] = {"split_item": split_item, "group_type": group_type, "group_list_type": group_list_type}
    return npu_grouped_matmul(x=[x], weight=[weight], group_list=group_list, act_type=0, **nothing, **kinds)


def grouped_matmul_swiglu_quant(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor,
    group_list: Tensor,
    bias: Tensor | None,
    offset: Tensor | None,
    swiglu_limit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """vllm-ascend's: group_list cumulated, whatever npu_grouped_matmul was given; swiglu_limit 0 clamps nothing."""
    name = "grouped_matmul_swiglu_quant"
    need(name, bias is None and offset is None, "bias and offset are for other formats")
    need_dtype(name, "x", x, (torch.int8,))
    need_dtype(name, "weight", weight, (torch.int8,))
    need_dtype(name, "x_scale", x_scale, (torch.float32,))
    need_shape(name, "x_scale", x_scale, (x.shape[0],))
    need_shape(name, "weight_scale", weight_scale, (weight.shape[0], weight.shape[2]))
    experts = matrices(name, [weight])
    codes, scale = poison((x.shape[0], weight.shape[2] // 2), torch.int8), poison((x.shape[0],), torch.float32)
    start = 0
    for expert, size in enumerate(sizes_of(name, group_list, 0, x.shape[0], len(experts))):
        if size:
            at = slice(start, start + size)
            y = dequantised(product(x[at], experts[expert]), weight_scale[expert], x_scale[at], None)
            gate, up = y.chunk(2, 1)
            codes[at], scale[at] = per_token(glu(gate, up, swiglu_limit, 1.0, 0.0))
        start += size
    return codes, scale, poison((0,), torch.float32)


def weight_list_swiglu_quant(
    weight: Sequence[Tensor], weight_scale: Sequence[Tensor], **rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """vllm-ascend's with a weight for each expert, or one for all."""
    matrix, scale = (
        torch.stack(list(part)) if part[0].dim() < axes else part[0] for part, axes in ((weight, 3), (weight_scale, 2))
    )
    return grouped_matmul_swiglu_quant(weight=matrix, weight_scale=scale, **rest)


def npu_grouped_matmul_swiglu_quant_v2(
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    x_scale: Tensor,
    group_list: Tensor,
    dequant_mode: int,
    dequant_dtype: int,
    quant_mode: int,
    quant_dtype: int,
    group_list_type: int,
    **rest: Any,
) -> tuple[Tensor, Tensor]:
    """torch_npu's: no clamp; the list cumulated (0) or counted (1); dequantised in float32 (6), int8 (1) out."""
    name = "npu_grouped_matmul_swiglu_quant_v2"
    need(name, not any(v is not None for v in rest.values()), f"{sorted(k for k, v in rest.items() if v is not None)}")
    need(name, (dequant_mode, quant_mode) == (0, 0), f"modes {dequant_mode}, {quant_mode} are for newer formats")
    need(name, (dequant_dtype, quant_dtype) == (6, 1), f"dtypes are {dequant_dtype}, {quant_dtype}, not 6 and 1")
    sizes = sizes_of(name, group_list, group_list_type, x.shape[0], len(matrices(name, weight)))
    ends = torch.tensor(sizes, dtype=torch.int64).cumsum(0)
    call = weight_list_swiglu_quant(
        x=x,
        weight=weight,
        weight_scale=weight_scale,
        x_scale=x_scale,
        group_list=ends,
        bias=None,
        offset=None,
        swiglu_limit=0.0,
    )
    return call[0], call[1]
