"""A mixture-of-experts layer: pairs sorted by expert, two grouped products with the activation between, and the sum.

    sort pairs, quantise x -> up product, which gathers its rows -> swiglu, row weight, quantise -> down product -> sum

Rows of x are never copied to their pairs' places: a token's codes are read by each of its experts from the cache. The
activations stay in float32 till they are quantised; else they, and the rows that are summed, are rounded to the dtype
of x. The floor is the weights of the experts that have tokens, read once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from isolith.numerics.scaled_matmul import resolve_act_quant
from isolith_backends.cuda.kernels.grouped_gemm import grouped_gemm
from isolith_backends.cuda.kernels.moe_permute import map_pairs
from isolith_backends.cuda.kernels.moe_unpermute import moe_unpermute
from isolith_backends.cuda.kernels.quant_linear import Rules, linear_of_codes, quantised
from isolith_backends.cuda.kernels.swiglu_quant import swiglu_quant


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The weights of the routed experts or of the shared one, and their scales."""

    w13: Tensor
    w2: Tensor
    w13_scale: Tensor | None
    w2_scale: Tensor | None


def fused_moe(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    routed: Experts,
    shared: Experts | None,
    limit: float,
    weight_before_down: bool,
    rules: Rules,
) -> Tensor:
    """The layer's output in the dtype of x."""
    topk_weights = topk_weights.contiguous()
    residual = None if shared is None else shared_expert(x, shared, limit, rules)
    counts, ends, pair, position, _ = map_pairs(topk_idx, routed.w13.shape[0], 1)
    blocks = (rules.act_group, rules.block_n, rules.block_k)

    codes, scale = quantised(x, routed.w13, rules)
    slots = topk_idx.shape[1]
    kind, between = between_products(x, routed.w2, rules)
    up = (codes, routed.w13, counts, 1, scale, routed.w13_scale, *blocks, between)
    hidden = grouped_gemm(*up, source=pair, slots=slots)
    weights = topk_weights if weight_before_down else None
    how = (limit, kind, rules.act_group, rules.scale_format)
    codes, scale = swiglu_quant(hidden, *how, ends, pair, weights)
    down = grouped_gemm(codes, routed.w2, counts, 1, scale, routed.w2_scale, *blocks, x.dtype)
    return moe_unpermute(down, position, None if weight_before_down else topk_weights, residual)


def between_products(x: Tensor, w2: Tensor, rules: Rules) -> tuple[str, torch.dtype]:
    """(how activations are quantised before w2, the dtype that they have till then)."""
    kind = resolve_act_quant(rules.act_quant, w2)
    # A rounding before the one to codes moves values over the codes' boundaries, by a whole code each.
    return kind, x.dtype if kind == "none" else torch.float32


def shared_expert(x: Tensor, shared: Experts, limit: float, rules: Rules) -> Tensor:
    """The output of the expert that every token has, in float32."""
    codes, scale = quantised(x, shared.w13, rules)
    kind, between = between_products(x, shared.w2, rules)
    hidden = linear_of_codes(codes, scale, shared.w13, shared.w13_scale, rules, between)
    codes, scale = swiglu_quant(hidden, limit, kind, rules.act_group, rules.scale_format)
    return linear_of_codes(codes, scale, shared.w2, shared.w2_scale, rules, torch.float32)
