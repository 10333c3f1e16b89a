"""Mixture of experts: the activation, grouped products and the combination.

moe_permute is the reference's: the order within an expert that moe_gen_idx gives is not documented.

Source: domesticated_torch_mlu_ops 9fbf7df6 _ops.py (moe_active, group_gemm, smooth_quant_group_gemm,
moe_combine_result); xllm 3906f5a9, vllm-mlu b9925203 (their calls).
"""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT, FLOAT_NAMES, dtype_name
from isolith_backends.cambricon.calls import HALF, int32, tmo, why_not

ACTIVE = ("input", "act_mode", "is_gated", "output", "bias", "cusum_token_count", "start_expert_id", "expert_size")
MOE_ACTIVE = tmo("moe_active", ACTIVE)
MOE_ACTIVE_CLAMPED = tmo("moe_active", ACTIVE, ("swiglu_limit",))
COMBINE = tmo(
    "moe_combine_result",
    (
        *("input", "reduce_weight", "gather_ids", "residual", "cusum_token_count", "start_expert_id", "expert_size"),
        "bias",
    ),
    ("output",),
)
GROUP_GEMM = tmo(
    "group_gemm", ("a", "b", "group_list", "expand_idx", "c", "alpha", "beta", "max_in_group_list"), ("d",)
)
QUANT_GROUP_GEMM = tmo(
    "smooth_quant_group_gemm",
    ("a", "b", "m_list", "expand_idx", "c", "alpha", "beta", "a_scale", "b_scale", "dtype", "max_m"),
    ("d",),
)
MOST_LIMIT, BLOCK = 256, 128


def activated(x: Tensor, limit: float) -> Tensor:
    """SiLU of the first half times the second half, clamped; rows [*, gate_up]."""
    whole = limit == int(limit) and limit < MOST_LIMIT
    call, clamp = MOE_ACTIVE, {}
    if limit and whole and MOE_ACTIVE_CLAMPED.missing() is None:
        call, clamp = MOE_ACTIVE_CLAMPED, {"swiglu_limit": int(limit)}
    elif limit:
        gate, up = x.chunk(2, dim=-1)
        x = torch.cat((gate.clamp(max=limit), up.clamp(-limit, limit)), dim=-1)
    y: Tensor = call(
        input=x,
        act_mode="silu",
        is_gated=True,
        output=None,
        bias=None,
        cusum_token_count=None,
        start_expert_id=0,
        expert_size=0,
        **clamp,
    )
    return y


@implements(
    ops.moe.swiglu,
    requires=Requires(dtypes={"x": DEVICE_FLOAT}, missing=MOE_ACTIVE.missing),
    why_not=why_not(),
)
def swiglu(x: Tensor, limit: float = 0.0, row_weight: Tensor | None = None) -> Tensor:
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    if x.numel() == 0:
        return x.new_empty(shape)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if row_weight is None and limit == int(limit):
        return activated(rows, limit).view(shape)
    # In float32: the weight multiplies before the rounding, and a limit that x's dtype lacks is not rounded. What
    # moe_active takes as its weight is not documented.
    y = activated(rows.float(), limit)
    y = y if row_weight is None else y * row_weight.float().reshape(-1, 1)
    return y.to(x.dtype).view(shape)


def combined(rows: Tensor, pair_to_pos: Tensor, topk_weights: Tensor | None, residual: Tensor | None) -> Tensor:
    """Every token's rows, weighted and added up, the residual too, rounded once."""
    total = rows.shape[0]
    # Pairs without a row are beyond the range of experts 0..0, which has all rows: they add nothing.
    place = torch.where(pair_to_pos < 0, total, pair_to_pos)
    weights = torch.ones_like(pair_to_pos, dtype=torch.float32) if topk_weights is None else topk_weights.float()
    y: Tensor = COMBINE(
        input=rows.contiguous(),
        reduce_weight=weights.masked_fill(pair_to_pos < 0, 0.0).contiguous(),
        gather_ids=int32(place.flatten()),
        residual=None if residual is None else residual.contiguous(),
        cusum_token_count=torch.arange(2, dtype=torch.int32, device=rows.device) * total,
        start_expert_id=0,
        expert_size=1,
        bias=None,
        output=None,
    )
    return y


@implements(
    ops.moe.moe_unpermute,
    requires=Requires(dtypes={"rows": DEVICE_FLOAT, "residual": DEVICE_FLOAT}, missing=COMBINE.missing),
    why_not=why_not(),
)
def moe_unpermute(
    rows: Tensor, pair_to_pos: Tensor, topk_weights: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    shape = (pair_to_pos.shape[0], rows.shape[1])
    if 0 in shape or rows.shape[0] == 0 or pair_to_pos.shape[1] == 0:
        return rows.new_zeros(shape) if residual is None else residual.to(rows.dtype, copy=True).contiguous()
    if residual is None or residual.dtype == rows.dtype:
        return combined(rows, pair_to_pos, topk_weights, residual)
    return combined(rows.float(), pair_to_pos, topk_weights, residual.float()).to(rows.dtype)


def product(
    rows: Tensor,
    weight: Tensor,
    group_list: Tensor,
    most: int,
    out_dtype: torch.dtype,
    row_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """rows [P, K] times weight [E, N, K] of the expert whose rows they are; rows behind the last are undefined.

    Args:
        rows: Sorted by expert, without room between experts.
        weight: Of the same dtype.
        group_list: [E], how many rows each expert has.
        most: At least its largest.
        out_dtype: Of floats the rows' own.
        row_scale: [P, 1] of int8, [P, ceil(K/128)] of e4m3.
        weight_scale: [E, N, 1] of int8, [E, ceil(N/128), ceil(K/128)] of e4m3.
    """
    # No gather: the rows are sorted by expert already.
    groups = {"expand_idx": None, "c": None, "alpha": None, "beta": None, "d": None}
    by_row = rows.dtype == torch.int8
    y: Tensor
    if row_scale is None or weight_scale is None:
        y = GROUP_GEMM(
            a=rows.contiguous(), b=weight.contiguous(), group_list=int32(group_list), max_in_group_list=most, **groups
        )
    else:
        y = QUANT_GROUP_GEMM(
            a=rows.contiguous(),
            b=weight.contiguous(),
            m_list=int32(group_list),
            # A scale a row, or all rows of one group of columns after another.
            a_scale=row_scale.float().flatten() if by_row else row_scale.float().t().contiguous(),
            b_scale=(weight_scale[..., 0] if by_row else weight_scale).float().contiguous(),
            dtype=out_dtype,
            max_m=most,
            **groups,
        )
    return y


def why_not_operands(x: Tensor, weight: Tensor, out_dtype: str, name: str = "weight") -> WhyNot:
    """What the grouped products say of a weight's and its rows' dtype, and of the result's."""
    if x.dtype != weight.dtype:
        return f"x is {dtype_name(x.dtype)} and {name} {dtype_name(weight.dtype)}; tmo's grouped products take one"
    if x.dtype in DEVICE_FLOAT:
        if FLOAT_NAMES[out_dtype] != x.dtype:
            return f"out_dtype is {out_dtype}; group_gemm of {dtype_name(x.dtype)} gives {dtype_name(x.dtype)}"
        return None
    if FLOAT_NAMES[out_dtype] not in HALF:
        return f"out_dtype is {out_dtype}; smooth_quant_group_gemm gives bfloat16 or float16"
    return None


def why_not_grouped_gemm(
    x: Tensor, weight: Tensor, out_dtype: str, act_group: int, block_n: int, block_k: int, **_: object
) -> WhyNot:
    if x.dtype == torch.float8_e4m3fn and (act_group, block_n, block_k) != (BLOCK,) * 3:
        sizes = f"act_group={act_group}, block_n={block_n}, block_k={block_k}"
        return f"{sizes}; smooth_quant_group_gemm takes {BLOCK} for each"
    return why_not_operands(x, weight, out_dtype)


def missing_products() -> WhyNot:
    """What this installation lacks of the two grouped products."""
    return GROUP_GEMM.missing() or QUANT_GROUP_GEMM.missing()


@implements(
    ops.moe.grouped_gemm,
    requires=Requires(dtypes={"x": (*DEVICE_FLOAT, torch.int8, torch.float8_e4m3fn)}, missing=missing_products),
    why_not=why_not(why_not_grouped_gemm),
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
    rows = x.reshape(-1, x.shape[-1])
    if x.dim() == 3:
        groups = torch.full((experts,), x.shape[1], dtype=torch.int32, device=x.device)
    else:
        # The room between segments is computed as if it were rows: nobody looks at it.
        groups = (expert_counts + alignment - 1) // alignment * alignment
    scale = None if x_scale is None else x_scale.reshape(-1, x_scale.shape[-1])
    return product(rows, weight, groups, rows.shape[0], FLOAT_NAMES[out_dtype], scale, weight_scale).view(shape)
