"""A whole mixture-of-experts layer by tmo's parts, in the dtype of x between them.

A slot without an expert is one of an expert more, whose rows are sorted last: no product and no combination reads them.

Source: the parts' modules; the order of calls: xllm 3906f5a9, vllm-mlu b9925203 (moe_gen_idx, the rows quantised or
expanded, product, activation, product, combination with the shared expert's output as the residual).
"""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import dtype_name
from isolith.numerics.scaled_matmul import resolve_act_quant
from isolith_backends.cambricon import quant
from isolith_backends.cambricon.calls import HALF, int32, tmo, why_not
from isolith_backends.cambricon.moe import COMBINE, MOE_ACTIVE, activated, missing_products, product
from isolith_backends.vendor_calls import first_missing

GEN_IDX = tmo("moe_gen_idx", ("expert_id", "expert_num"))
EXPAND = tmo("moe_expand_input", ("input", "gather_idx", "cusum_token_count", "start_expert_id", "expert_size"))
QUANTIZE = tmo(
    "moe_quantize",
    (
        *("x", "smooth", "zero", "token_count", "gather_index", "gather_index_start_position", "output"),
        *("output_scale", "dynamic_quant", "act_mode", "active_coef", "is_gated", "quant_type"),
    ),
)


def missing_parts() -> WhyNot:
    """What this installation lacks of the layer's parts."""
    lacks = first_missing(GEN_IDX, EXPAND, QUANTIZE, MOE_ACTIVE, COMBINE)
    return lacks or missing_products() or quant.missing_products()


def why_not_kind(name: str, x: Tensor, weight: Tensor, act_quant: str) -> WhyNot:
    """A weight must be x's dtype and nothing quantised, or int8 and activations too."""
    activations = resolve_act_quant(act_quant, weight)
    if (weight.dtype, activations) in ((x.dtype, "none"), (torch.int8, "int8")):
        return f"{name} has shape {tuple(weight.shape)}; tmo takes no empty weight" if 0 in weight.shape else None
    kinds = f"{name} is {dtype_name(weight.dtype)} and activations {activations}"
    return f"{kinds}; both {dtype_name(x.dtype)}, or both int8, are adapted"


def why_not_layer(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    shared_w13: Tensor | None,
    shared_w2: Tensor | None,
    act_quant: str,
    **_: object,
) -> WhyNot:
    weights = {"w13": w13, "w2": w2, "shared_w13": shared_w13, "shared_w2": shared_w2}
    reasons = (why_not_kind(name, x, each, act_quant) for name, each in weights.items() if each is not None)
    return next((reason for reason in reasons if reason), None)


def quantised(rows: Tensor, gather: Tensor | None) -> tuple[Tensor, Tensor]:
    """(codes, scales [rows, 1]) of rows, gathered first; what a row of zeros has for codes meets the scale 0."""
    codes, scale = QUANTIZE(
        x=rows,
        smooth=torch.ones(rows.shape[1], dtype=torch.float32, device=rows.device),
        zero=None,
        token_count=None,
        gather_index=gather,
        gather_index_start_position=None,
        output=None,
        output_scale=None,
        dynamic_quant=True,
        act_mode="none",
        active_coef=1.0,
        is_gated=False,
        quant_type=torch.int8,
    )
    return codes, scale[:, None]


def expanded(x: Tensor, gather: Tensor) -> Tensor:
    """x[gather]."""
    rows: Tensor = EXPAND(input=x, gather_idx=gather, cusum_token_count=None, start_expert_id=0, expert_size=0)
    return rows


def grouped(
    x: Tensor,
    gather: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    counts: Tensor,
    most: int,
    dtype: torch.dtype,
) -> Tensor:
    """The product of every expert's rows, which are gathered where x is not sorted, and quantised as the weight is."""
    if scale is None:
        return product(x if gather is None else expanded(x, gather), weight, counts, most, dtype)
    codes, row_scale = quantised(x, gather)
    return product(codes, weight, counts, most, dtype, row_scale, scale)


def linear(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """A shared expert's product."""
    if scale is None:
        return quant.product(x, weight)
    codes, row_scale = quant.int8_rows(x, None)
    return quant.scaled_product(codes, row_scale, weight, scale, x.dtype)


@implements(
    ops.moe.fused_moe,
    requires=Requires(dtypes={"x": HALF}, missing=missing_parts),
    why_not=why_not(why_not_layer),
)
def fused_moe(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    shared_w13: Tensor | None = None,
    shared_w2: Tensor | None = None,
    shared_w13_scale: Tensor | None = None,
    shared_w2_scale: Tensor | None = None,
    swiglu_limit: float = 0.0,
    weight_before_down: bool = True,
    act_quant: str = "auto",
    act_group: int = 128,
    scale_format: str = "ue8m0",
    block_n: int = 128,
    block_k: int = 128,
) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    x, residual = x.contiguous(), None
    if shared_w13 is not None and shared_w2 is not None:
        hidden = activated(linear(x, shared_w13, shared_w13_scale), swiglu_limit)
        residual = linear(hidden, shared_w2, shared_w2_scale)
    if topk_idx.shape[1] == 0:
        return torch.zeros_like(x) if residual is None else residual
    experts, pairs = w13.shape[0], topk_idx.numel()
    known = torch.where(topk_idx < 0, experts, topk_idx)
    gather, place, counts, ends = GEN_IDX(expert_id=int32(known), expert_num=experts + 1)
    counts = counts[:experts].contiguous()
    hidden = grouped(x, gather, w13, w13_scale, counts, pairs, x.dtype)
    weights = topk_weights.float().masked_fill(topk_idx < 0, 0.0).contiguous()
    if weight_before_down:
        # In float32: rows of one token that differ by their weight alone must not all err the same way.
        of_rows = torch.zeros_like(weights).flatten().scatter(0, place.long(), weights.flatten())
        hidden = (activated(hidden.float(), swiglu_limit) * of_rows[:, None]).to(x.dtype)
        weights = torch.ones_like(weights)
    else:
        hidden = activated(hidden, swiglu_limit)
    down = grouped(hidden, None, w2, w2_scale, counts, pairs, x.dtype)
    y: Tensor = COMBINE(
        input=down,
        reduce_weight=weights,
        gather_ids=place,
        residual=residual,
        cusum_token_count=ends,
        start_expert_id=0,
        expert_size=experts,
        bias=None,
        output=None,
    )
    return y
