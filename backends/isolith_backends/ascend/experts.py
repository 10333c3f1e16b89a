"""A whole mixture-of-experts layer by the vendor's parts, in the dtype of x between them.

Source: the parts' modules; the order of calls: vllm-ascend 182b75ea vllm_ascend/ops/fused_moe (dispatch, grouped
product, activation, grouped product, combination, without expert parallelism).
"""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import dtype_name
from isolith.numerics.scaled_matmul import resolve_act_quant
from isolith_backends.ascend.moe import (
    CUMSUM,
    FINALIZE_ROUTING,
    GROUPED_MATMUL,
    HALF,
    INIT_ROUTING,
    SWIGLU,
    activated,
    combined,
    product,
    routed,
    to_the_last_row,
    why_not_weight,
)
from isolith_backends.ascend.quant import DYNAMIC_QUANT, QUANT_MATMUL, int8_rows
from isolith_backends.vendor_calls import first_missing

SMALLEST = 1e-10
"""The floor of act_quant_int8."""


def missing_parts() -> WhyNot:
    """What this installation lacks of the layer's parts."""
    return first_missing(INIT_ROUTING, GROUPED_MATMUL, SWIGLU, FINALIZE_ROUTING, DYNAMIC_QUANT, QUANT_MATMUL)


def why_not_kind(name: str, x: Tensor, weight: Tensor, act_quant: str) -> WhyNot:
    """A weight must be x's dtype and nothing quantised, or int8 and activations too."""
    activations = resolve_act_quant(act_quant, weight)
    if (weight.dtype, activations) in ((x.dtype, "none"), (torch.int8, "int8")):
        return None
    kinds = f"{name} is {dtype_name(weight.dtype)} and activations {activations}"
    return f"{kinds}; both {dtype_name(x.dtype)}, or both int8 have vendor calls on A2 and A3"


def why_not_layer(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    shared_w13: Tensor | None,
    shared_w2: Tensor | None,
    act_quant: str,
    **_: object,
) -> WhyNot:
    routed_weights = {"w13": w13, "w2": w2}
    shared_weights = {"shared_w13": shared_w13, "shared_w2": shared_w2}
    for name, weight in {**routed_weights, **shared_weights}.items():
        if weight is not None and (reason := why_not_kind(name, x, weight, act_quant)):
            return reason
        if weight is not None and weight.dtype == torch.int8 and x.dtype != torch.bfloat16:
            return f"x is {dtype_name(x.dtype)}; products of int8 with float32 scales give bfloat16"
    for name, weight in routed_weights.items():
        if 0 in weight.shape:
            return f"{name} has shape {tuple(weight.shape)}; the vendor's calls take no empty weight"
        if reason := why_not_weight(name, weight):
            return reason
    return None


def grouped(rows: Tensor, weight: Tensor, scale: Tensor | None, ends: Tensor) -> Tensor:
    """The product of every expert's rows, which are quantised first where the weight is."""
    if weight.dtype != torch.int8:
        return product(rows, weight, ends, rows.dtype)
    codes, row_scale = int8_rows(rows, None, SMALLEST)
    return product(codes, weight, ends, rows.dtype, row_scale, scale)


def linear(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """A shared expert's product."""
    if weight.dtype != torch.int8:
        return torch.nn.functional.linear(x, weight)
    return ops.quant.quant_linear(x, weight, scale, out_dtype=dtype_name(x.dtype))


@implements(
    ops.moe.fused_moe,
    requires=Requires(dtypes={"x": HALF}, arch=">=2", missing=missing_parts),
    why_not=why_not_layer,
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
    residual = None
    if shared_w13 is not None and shared_w2 is not None:
        hidden = linear(x, shared_w13, shared_w13_scale)
        residual = linear(activated(hidden, swiglu_limit), shared_w2, shared_w2_scale)

    rows, place, sums, _ = routed(x, topk_idx, w13.shape[0], CUMSUM)
    ends = to_the_last_row(sums, rows.shape[0])
    hidden = grouped(rows, w13, w13_scale, ends)
    if weight_before_down:
        # In float32: rows of one token that differ by their weight alone must not all err the same way.
        weights = weight_of_rows(topk_weights, place)
        hidden = (activated(hidden.float(), swiglu_limit) * weights[:, None]).to(x.dtype)
    else:
        hidden = activated(hidden, swiglu_limit)
    down = grouped(hidden, w2, w2_scale, ends)
    return combined(down, place.view(topk_idx.shape), None if weight_before_down else topk_weights, residual)


def weight_of_rows(topk_weights: Tensor, place: Tensor) -> Tensor:
    """[rows]: the routing weight of the pair in each row; 0 behind the last one."""
    pairs = place.numel()
    at = torch.where(place >= 0, place, pairs).long().flatten()
    nothing = torch.zeros(pairs + 1, dtype=torch.float32, device=place.device)
    return nothing.scatter(0, at, topk_weights.float().flatten())[:pairs]
