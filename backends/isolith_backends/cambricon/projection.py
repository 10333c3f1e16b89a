"""Attention's output projection: a batched product over the groups of heads, then a linear layer.

Source: xllm 3906f5a9 (batch_matmul for the first step); the day-0 release has none, and torch's runs there.
"""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT, dtype_name
from isolith.numerics.scaled_matmul import resolve_act_quant
from isolith_backends.cambricon.calls import HALF, tmo, why_not
from isolith_backends.cambricon.quant import int8_rows, missing_products, product, scaled_product

BATCH_MATMUL = tmo("batch_matmul", by_name=("a", "b"))


def by_groups(x: Tensor, weight: Tensor) -> Tensor:
    """[groups, tokens, R] of x [groups, tokens, K] and weight [groups, R, K], rounded to their dtype."""
    if BATCH_MATMUL.missing() is None:
        return BATCH_MATMUL(a=x.contiguous(), b=weight.contiguous())  # type: ignore[no-any-return]  # the vendor's
    return torch.bmm(x, weight.transpose(1, 2))


def why_not_projection(
    x: Tensor, wo_a: Tensor, wo_b: Tensor, act_quant_a: str, act_quant_b: str, **_: object
) -> WhyNot:
    if wo_a.dtype != x.dtype:
        return f"wo_a is {dtype_name(wo_a.dtype)} and x {dtype_name(x.dtype)}; batch_matmul takes one"
    if resolve_act_quant(act_quant_a, wo_a) != "none":
        return f"act_quant_a is {act_quant_a!r}; batch_matmul takes unquantised activations"
    activations = resolve_act_quant(act_quant_b, wo_b)
    if (wo_b.dtype, activations) == (x.dtype, "none"):
        return None
    if (wo_b.dtype, activations) == (torch.int8, "int8") and x.dtype in HALF:
        return None
    return f"wo_b is {dtype_name(wo_b.dtype)} and its activations {activations}; both int8, or as x, are adapted"


@implements(
    ops.attention.grouped_output_proj,
    requires=Requires(dtypes=DEVICE_FLOAT, missing=missing_products),
    why_not=why_not(why_not_projection),
)
def grouped_output_proj(
    x: Tensor,
    wo_a: Tensor,
    wo_b: Tensor,
    wo_a_scale: Tensor | None = None,
    wo_b_scale: Tensor | None = None,
    act_quant_a: str = "none",
    act_quant_b: str = "auto",
    act_group: int = 128,
    scale_format: str = "ue8m0",
    block_n: int = 128,
    block_k: int = 128,
) -> Tensor:
    tokens, groups = x.shape[0], wo_a.shape[0]
    if 0 in (*x.shape, *wo_a.shape, *wo_b.shape):
        return x.new_zeros((tokens, wo_b.shape[0]))
    u = by_groups(x.reshape(tokens, groups, -1).transpose(0, 1), wo_a).transpose(0, 1).reshape(tokens, -1)
    if wo_b_scale is None:
        return product(u, wo_b)
    codes, scale = int8_rows(u, None)
    return scaled_product(codes, scale, wo_b, wo_b_scale, x.dtype)
