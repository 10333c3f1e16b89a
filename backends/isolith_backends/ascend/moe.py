"""Mixture of experts: dispatch, grouped products, activation and combination.

Source: Ascend/op-plugin 517f2e7d (npu_moe_init_routing_v2, npu_moe_finalize_routing, npu_swiglu, npu_clipped_swiglu,
npu_grouped_matmul).
"""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT, FLOAT_NAMES, dtype_name
from isolith_backends.ascend import arch
from isolith_backends.vendor_calls import VendorCall

INIT_ROUTING = VendorCall(
    ("npu::npu_moe_init_routing_v2",),
    (
        *("x", "expert_idx", "scale", "expert_num", "drop_pad_mode", "expert_tokens_num_type"),
        *("expert_tokens_num_flag", "quant_mode", "active_expert_range", "row_idx_type"),
    ),
)
FINALIZE_ROUTING = VendorCall(
    ("npu::npu_moe_finalize_routing",),
    (
        *("expanded_permuted_rows", "skip1", "skip2", "bias", "scales", "expanded_src_to_dst_row"),
        *("export_for_source_row", "drop_pad_mode"),
    ),
)
SWIGLU = VendorCall(("npu::npu_swiglu",), ("input", "dim"))
CLIPPED_SWIGLU = VendorCall(
    ("npu::npu_clipped_swiglu",), ("x", "group_index", "dim", "alpha", "limit", "bias", "interleaved")
)
GROUPED_MATMUL = VendorCall(
    ("npu::npu_grouped_matmul",),
    (
        *("x", "weight", "scale", "per_token_scale", "group_list", "split_item", "group_type", "group_list_type"),
        *("act_type", "output_dtype"),
    ),
)

CLIPPED_ON = NARROW_SCALES = ("2", "3")
CUMSUM, COUNTS = 0, 1  # expert_tokens_num_type and group_list_type
GATHER_INDEX = 0  # row_idx_type: the place of each pair
ROW_MAJOR_PADDED = 3  # drop_pad_mode: index t*k + slot, rows [E, C, H], -1 legal
MOST_EXPERTS, INNER_BEHIND = 1024, 65536
HALF = (torch.bfloat16, torch.float16)


def routed(
    x: Tensor, topk_idx: Tensor, experts: int, tokens_num_type: int, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows, place of each pair or -1, counts or their running sums, scale of each row) of pairs sorted by expert."""
    # A dropped pair is one of an expert more, which is not active: the call knows no expert below 0.
    idx = torch.where(topk_idx < 0, experts, topk_idx).to(torch.int32)
    rows, place, tokens_num, row_scale = INIT_ROUTING(
        x=x.contiguous(),
        expert_idx=idx.contiguous(),
        scale=scale,
        expert_num=experts + 1,
        drop_pad_mode=0,
        expert_tokens_num_type=tokens_num_type,
        expert_tokens_num_flag=True,
        quant_mode=-1,
        active_expert_range=[0, experts],
        row_idx_type=GATHER_INDEX,
    )
    return rows, place, tokens_num, row_scale


def why_not_permute(x: Tensor, alignment: int, x_scale: Tensor | None, **_: object) -> WhyNot:
    if alignment != 1:
        return f"alignment={alignment}; npu_moe_init_routing_v2 leaves no room between experts"
    if x.shape[1] == 0:
        return "hidden=0; npu_moe_init_routing_v2 takes rows with columns"
    if x_scale is not None and (x_scale.shape[1] != 1 or x_scale.dtype != torch.float32):
        scales, dtype = x_scale.shape[1], dtype_name(x_scale.dtype)
        return f"x_scale has {scales} {dtype} columns; npu_moe_init_routing_v2 carries one float32 a token"
    return None


@implements(
    ops.moe.moe_permute,
    requires=Requires(dtypes={"x": (*DEVICE_FLOAT, torch.int8)}, arch=">=2", missing=INIT_ROUTING.missing),
    why_not=why_not_permute,
)
def moe_permute(
    x: Tensor, topk_idx: Tensor, experts: int, alignment: int = 1, x_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, k = topk_idx.shape
    pairs = tokens * k
    if pairs == 0:
        nothing = torch.zeros(experts, dtype=torch.int32, device=x.device)
        rows, carried = torch.empty_like(x), x.new_empty(0) if x_scale is None else torch.empty_like(x_scale)
        none = [nothing.new_zeros(shape) for shape in ((experts,), (0,), (tokens, k), (0,))]
        return rows, carried, nothing, none[0], none[1], none[2], none[3]
    scale = None if x_scale is None else x_scale[:, 0].contiguous()
    rows, place, counts, row_scale = routed(x, topk_idx, experts, COUNTS, scale)
    # Written by pairs that have a row; the others, and the entry more than there are rows, take what is dropped.
    at = torch.where(place >= 0, place, pairs).long().flatten()
    nowhere = torch.full((pairs + 1,), -1, dtype=torch.int32, device=x.device)
    pos_to_pair = nowhere.scatter(0, at, torch.arange(pairs, dtype=torch.int32, device=x.device))[:pairs]
    pos_to_expert = nowhere.scatter(0, at, topk_idx.flatten().to(torch.int32))[:pairs]
    carried = x.new_empty(0) if x_scale is None else row_scale[:, None]
    offsets = counts.cumsum(0).to(torch.int32)
    maps = (pos_to_pair.contiguous(), place.view(tokens, k), pos_to_expert.contiguous())
    return rows, carried, counts.to(torch.int32), offsets, *maps


def combined(rows: Tensor, pair_to_pos: Tensor, topk_weights: Tensor | None, residual: Tensor | None) -> Tensor:
    """moe_unpermute in float32, weights, sum and residual in one call, rounded once."""
    if topk_weights is None:
        weights = torch.ones_like(pair_to_pos, dtype=torch.float32)
    else:
        weights = topk_weights.float()
    # As experts with room for one row each: with such bins alone is -1 legal, a row of zeros, and there must be k.
    bins = rows.float().contiguous()[:, None]
    if bins.shape[0] < pair_to_pos.shape[1]:
        bins = torch.nn.functional.pad(bins, (0, 0, 0, 0, 0, pair_to_pos.shape[1] - bins.shape[0]))
    y: Tensor = FINALIZE_ROUTING(
        expanded_permuted_rows=bins,
        skip1=None if residual is None else residual.float().contiguous(),
        skip2=None,
        bias=None,
        scales=weights.masked_fill(pair_to_pos < 0, 0.0).contiguous(),
        expanded_src_to_dst_row=pair_to_pos.to(torch.int32).flatten().contiguous(),
        export_for_source_row=None,
        drop_pad_mode=ROW_MAJOR_PADDED,
    )
    return y.to(rows.dtype)


@implements(
    ops.moe.moe_unpermute,
    requires=Requires(dtypes={"rows": DEVICE_FLOAT}, arch=">=2", missing=FINALIZE_ROUTING.missing),
)
def moe_unpermute(
    rows: Tensor, pair_to_pos: Tensor, topk_weights: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    shape = (pair_to_pos.shape[0], rows.shape[1])
    if 0 in shape or rows.shape[0] == 0:
        return rows.new_zeros(shape) if residual is None else residual.to(rows.dtype, copy=True).contiguous()
    return combined(rows, pair_to_pos, topk_weights, residual)


def activated(x: Tensor, limit: float) -> Tensor:
    """SiLU of the first half times the second half, [rows, gate_up], by whichever call is here."""
    if limit == 0:
        return SWIGLU(input=x, dim=-1)  # type: ignore[no-any-return]  # the vendor's call
    # torch_npu registers it whatever the chip; A5 has no kernel behind it.
    if arch() in CLIPPED_ON and CLIPPED_SWIGLU.missing() is None:
        # The defaults are those of another model: alpha 1.702, one added to the second half, columns interleaved.
        clipped = {"alpha": 1.0, "limit": limit, "bias": 0.0, "interleaved": False}
        return CLIPPED_SWIGLU(x=x, group_index=None, dim=-1, **clipped)  # type: ignore[no-any-return]
    gate, up = x.chunk(2, dim=-1)
    clamped = torch.cat((gate.clamp(max=limit), up.clamp(-limit, limit)), dim=-1)
    return SWIGLU(input=clamped, dim=-1)  # type: ignore[no-any-return]


@implements(
    ops.moe.swiglu,
    requires=Requires(dtypes={"x": DEVICE_FLOAT}, arch=">=2", missing=SWIGLU.missing),
)
def swiglu(x: Tensor, limit: float = 0.0, row_weight: Tensor | None = None) -> Tensor:
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    if x.numel() == 0:
        return x.new_empty(shape)
    rows = x.reshape(-1, x.shape[-1])
    if row_weight is None:
        return activated(rows.contiguous(), limit).view(shape)
    # In float32, so that the weight multiplies before the rounding.
    y = activated(rows.float().contiguous(), limit) * row_weight.float().reshape(-1, 1)
    return y.to(x.dtype).view(shape)


def multiplied(
    rows: Tensor, weight: Tensor, ends: Tensor, out_dtype: torch.dtype | None, *scales: Tensor | None
) -> Tensor:
    """rows [P, K] times weight [E, N, K] by one call, with the scales of outputs and of rows or without any."""
    of_outputs, of_rows = scales or (None, None)
    (y,) = GROUPED_MATMUL(
        x=[rows.contiguous()],
        weight=[weight.contiguous().transpose(1, 2)],
        scale=None if of_outputs is None else [of_outputs],
        per_token_scale=None if of_rows is None else [of_rows],
        group_list=ends,
        split_item=3,
        group_type=0,
        # Running sums alone: a list of counts must not be of one expert.
        group_list_type=CUMSUM,
        act_type=0,
        output_dtype=out_dtype,
    )
    return y  # type: ignore[no-any-return]  # the vendor's call


def product(
    rows: Tensor,
    weight: Tensor,
    ends: Tensor,
    out_dtype: torch.dtype,
    row_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """rows [P, K] times weight [E, N, K] of the expert whose rows they are; `ends` are int64 running sums."""
    if weight_scale is None or row_scale is None:
        return multiplied(rows, weight, ends, None)
    of_outputs, of_rows = (scale.float()[..., 0].contiguous() for scale in (weight_scale, row_scale))
    if arch() not in NARROW_SCALES:
        return multiplied(rows, weight, ends, out_dtype, of_outputs, of_rows)
    # bfloat16 comes of bfloat16 scales alone there, which lose digits: so the sums, and the scales behind them.
    sums = multiplied(rows, weight, ends, torch.int32)
    places = torch.arange(rows.shape[0], device=rows.device)
    expert = (places[:, None] >= ends).sum(1).clamp(max=weight.shape[0] - 1)
    return (sums.float() * of_outputs[expert] * of_rows[:, None]).to(out_dtype)


def to_the_last_row(ends: Tensor, rows: int) -> Tensor:
    """The running sums with the last one raised to the number of rows, which the call's document asks for."""
    ends = ends.clamp(max=rows)
    ends[-1:] = rows
    return ends


def ends_of(x: Tensor, expert_counts: Tensor, alignment: int) -> Tensor:
    """The running sums of the experts' segments of grouped_gemm's x, whose rows between segments nobody looks at."""
    if x.dim() == 3:
        return torch.arange(1, x.shape[0] + 1, dtype=torch.int64, device=x.device) * x.shape[1]
    padded = (expert_counts.long() + alignment - 1) // alignment * alignment
    return to_the_last_row(padded.cumsum(0), x.shape[0])


def why_not_weight(name: str, weight: Tensor) -> WhyNot:
    """What npu_grouped_matmul says of a [E, N, K] weight."""
    experts, *inner = weight.shape
    if experts > MOST_EXPERTS:
        return f"experts={experts}; npu_grouped_matmul takes at most {MOST_EXPERTS} in one weight"
    if max(inner) >= INNER_BEHIND:
        return f"{name} is {inner[0]} x {inner[1]}; npu_grouped_matmul takes sizes below {INNER_BEHIND}"
    return None


def why_not_grouped_gemm(x: Tensor, weight: Tensor, out_dtype: str, **_: object) -> WhyNot:
    if x.dtype != weight.dtype:
        kinds = f"x is {dtype_name(x.dtype)} and weight {dtype_name(weight.dtype)}"
        return f"{kinds}; npu_grouped_matmul on A2 and A3 takes both in bfloat16, float16 or int8"
    gives = torch.bfloat16 if x.dtype == torch.int8 else x.dtype
    if FLOAT_NAMES[out_dtype] != gives:
        return f"out_dtype is {out_dtype}; npu_grouped_matmul of {dtype_name(x.dtype)} gives {dtype_name(gives)}"
    return why_not_weight("weight", weight)


@implements(
    ops.moe.grouped_gemm,
    requires=Requires(dtypes={"x": (*HALF, torch.int8)}, arch=">=2", missing=GROUPED_MATMUL.missing),
    why_not=why_not_grouped_gemm,
)
def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    expert_counts: Tensor,
    alignment: int = 1,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    act_group: int = 128,
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: str = "bfloat16",
) -> Tensor:
    experts, outputs = weight.shape[:2]
    shape = (*x.shape[:-1], outputs)
    if 0 in shape or x.shape[-1] == 0 or experts == 0:
        return x.new_zeros(shape, dtype=FLOAT_NAMES[out_dtype])
    rows, ends = x.reshape(-1, x.shape[-1]), ends_of(x, expert_counts, alignment)
    scale = None if x_scale is None else x_scale.reshape(-1, x_scale.shape[-1])
    return product(rows, weight, ends, FLOAT_NAMES[out_dtype], scale, weight_scale).view(shape)
