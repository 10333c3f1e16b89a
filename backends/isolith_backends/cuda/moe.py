"""Mixture of experts: routing, and rows sorted by expert and combined again."""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT, FLOAT_NAMES
from isolith_backends.cuda.kernels import fused_moe as layer
from isolith_backends.cuda.kernels import grouped_gemm as products
from isolith_backends.cuda.kernels import moe_gate as gate
from isolith_backends.cuda.kernels import moe_hash_gate as hash_gate
from isolith_backends.cuda.kernels import moe_permute as permuting
from isolith_backends.cuda.kernels import moe_unpermute as combining
from isolith_backends.cuda.kernels import swiglu as activation
from isolith_backends.cuda.kernels.formats import ACTIVATIONS, INT8_INPUTS, WEIGHTS
from isolith_backends.cuda.kernels.quant_linear import Rules, quantising_refused


def too_many_experts(logits: Tensor, groups: int, **_: object) -> WhyNot:
    held, width = gate.columns_of(logits.shape[1], groups)
    if held * width <= gate.COLUMNS:
        return None
    return f"experts={logits.shape[1]} in groups={groups}; a program holds at most {gate.COLUMNS}, padded"


@implements(
    ops.moe.moe_gate,
    requires=Requires(dtypes={"logits": (torch.float32,)}),
    why_not=too_many_experts,
    batch_invariant=True,
)
def moe_gate(
    logits: Tensor,
    k: int,
    bias: Tensor | None = None,
    score: str = "sqrtsoftplus",
    groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = True,
    routed_scale: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return gate.moe_gate(logits, k, bias, score, groups, topk_groups, renormalize, routed_scale, mask)


def too_many_chosen(table: Tensor, **_: object) -> WhyNot:
    k = table.shape[1]
    return None if k <= hash_gate.SLOTS else f"k={k}; a program holds at most {hash_gate.SLOTS} experts of a token"


@implements(
    ops.moe.moe_hash_gate,
    requires=Requires(dtypes={"logits": (torch.float32,)}),
    why_not=too_many_chosen,
    batch_invariant=True,
)
def moe_hash_gate(
    logits: Tensor,
    token_ids: Tensor,
    table: Tensor,
    score: str = "sqrtsoftplus",
    renormalize: bool = True,
    routed_scale: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return hash_gate.moe_hash_gate(logits, token_ids, table, score, renormalize, routed_scale, mask)


def too_many_experts_to_sort(experts: int, **_: object) -> WhyNot:
    most = permuting.EXPERTS
    return None if experts <= most else f"experts={experts}; a program counts the pairs of at most {most}"


@implements(ops.moe.moe_permute, why_not=too_many_experts_to_sort)
def moe_permute(
    x: Tensor, topk_idx: Tensor, experts: int, alignment: int = 1, x_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    maps = permuting.map_pairs(topk_idx, experts, alignment)
    rows, row_scale = permuting.permute_rows(x, x_scale, maps[3], maps[2].shape[0])
    return rows, row_scale, *maps


def too_many_slots(pair_to_pos: Tensor, **_: object) -> WhyNot:
    k = pair_to_pos.shape[1]
    return None if k <= combining.SLOTS else f"k={k}; a program adds up at most {combining.SLOTS} slots"


@implements(
    ops.moe.moe_unpermute,
    requires=Requires(dtypes={"rows": DEVICE_FLOAT, "topk_weights": (torch.float32,), "residual": DEVICE_FLOAT}),
    why_not=too_many_slots,
    batch_invariant=True,
)
def moe_unpermute(
    rows: Tensor, pair_to_pos: Tensor, topk_weights: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    return combining.moe_unpermute(rows, pair_to_pos, topk_weights, residual)


@implements(
    ops.moe.swiglu,
    requires=Requires(dtypes={"x": DEVICE_FLOAT, "row_weight": (torch.float32,)}),
    batch_invariant=True,
)
def swiglu(x: Tensor, limit: float = 0.0, row_weight: Tensor | None = None) -> Tensor:
    return activation.swiglu(x, limit, row_weight)


def product_refused(x: Tensor, weight: Tensor, out_dtype: str, **_: object) -> WhyNot:
    if out_dtype == "float64":
        return "out_dtype is float64; float32 sums would not do"
    if x.dtype == weight.dtype == torch.int8 and x.shape[-1] > INT8_INPUTS:
        return f"{x.shape[-1]} inputs; int32 holds the sum of {INT8_INPUTS} products of int8 codes"
    return None


@implements(
    ops.moe.grouped_gemm,
    requires=Requires(dtypes={"x": ACTIVATIONS, "weight": WEIGHTS}),
    why_not=product_refused,
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
    blocks = (act_group, block_n, block_k, FLOAT_NAMES[out_dtype])
    return products.grouped_gemm(x, weight, expert_counts, alignment, x_scale, weight_scale, *blocks)


def layer_refused(
    topk_idx: Tensor,
    w13: Tensor,
    w2: Tensor,
    shared_w13: Tensor | None,
    shared_w2: Tensor | None,
    act_quant: str,
    act_group: int,
    **_: object,
) -> WhyNot:
    if w13.shape[0] == 0:
        return "experts=0; there is nothing to sort by"
    if refused := too_many_experts_to_sort(w13.shape[0]) or too_many_slots(topk_idx):
        return refused
    weights = [weight for weight in (w13, w2, shared_w13, shared_w2) if weight is not None]
    reasons = (quantising_refused(weight, act_quant, act_group) for weight in weights)
    return next((reason for reason in reasons if reason), None)


@implements(
    ops.moe.fused_moe,
    requires=Requires(
        dtypes={
            "x": DEVICE_FLOAT,
            "topk_weights": (torch.float32,),
            **dict.fromkeys(("w13", "w2", "shared_w13", "shared_w2"), WEIGHTS),
        }
    ),
    why_not=layer_refused,
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
    rules = Rules(act_quant=act_quant, act_group=act_group, scale_format=scale_format, block_n=block_n, block_k=block_k)
    routed = layer.Experts(w13=w13, w2=w2, w13_scale=w13_scale, w2_scale=w2_scale)
    shared = None
    if shared_w13 is not None and shared_w2 is not None:
        scales = {"w13_scale": shared_w13_scale, "w2_scale": shared_w2_scale}
        shared = layer.Experts(w13=shared_w13, w2=shared_w2, **scales)
    how = (swiglu_limit, weight_before_down, rules)
    return layer.fused_moe(x, topk_idx, topk_weights, routed, shared, *how)
