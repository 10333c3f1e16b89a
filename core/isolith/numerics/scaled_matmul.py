"""What operators with quantised weights share: the kinds of weights and activations, and their values.

The dtype of a weight [*, N, K] tells its kind, and the kind the shape of its scale; leading axes (experts, groups) are
those of the weight:

    float          no scale
    float8_e4m3fn  scale [*, ceil(N/block_n), ceil(K/block_k)]
    uint8          packed e2m1, [*, N, K/2]; scale [*, N, K/32]
    int8           scale [*, N, 1]

Activations x [*, K] are float (no scale), e4m3 with x_scale [*, ceil(K/act_group)], or int8 with x_scale [*, 1].
A value is its code times its scale; scales are float8_e8m0fnu or float32, and only their value counts.

Source: DeepGEMM 54e2261 README (block scales), deep_gemm/utils/math.py (packing); DeepSeek-V4 inference/model.py,
Linear.
"""

import torch
from torch import Tensor

from isolith.dtypes import FLOAT, dtype_name
from isolith.errors import ArgumentError
from isolith.numerics.codes import check_choice, decode, groups_of, spread_groups, spread_scale

FP4_GROUP = 32
ACT_QUANT = ("auto", "none", "fp8", "int8")
"""What an `act_quant` argument may say: how float activations are quantised before a product."""
QUANTISED = (torch.float8_e4m3fn, torch.int8)
"""Dtypes of activations that are quantised already."""
MATH = {torch.float8_e4m3fn: "float8", torch.uint8: "float8", torch.int8: "int8"}
"""Formats of products of quantised activations and weights; e2m1 meets e4m3, at the speed of e4m3."""


def resolve_act_quant(act_quant: str, weight: Tensor) -> str:
    """How activations are quantised before this weight: "none", "fp8" or "int8"."""
    if act_quant != "auto":
        return act_quant
    return {torch.float8_e4m3fn: "fp8", torch.uint8: "fp8", torch.int8: "int8"}.get(weight.dtype, "none")


def math_of(x: Tensor, weight: Tensor, act_quant: str) -> str:
    """The format of the products, for a cost."""
    wide = torch.float32 in (x.dtype, weight.dtype) or torch.float64 in (x.dtype, weight.dtype)
    plain = "float32" if wide else "bfloat16"
    if x.dtype in FLOAT and resolve_act_quant(act_quant, weight) == "none":
        return plain
    return MATH.get(weight.dtype, plain)


def inner_of(weight: Tensor) -> int:
    """K of a weight [*, N, K], packed or not."""
    return weight.shape[-1] * 2 if weight.dtype == torch.uint8 else weight.shape[-1]


def blocks_of(weight: Tensor, block_n: int, block_k: int) -> tuple[int, int]:
    """Rows and columns of a weight that share a scale."""
    if weight.dtype == torch.uint8:
        return 1, FP4_GROUP
    return (1, max(weight.shape[-1], 1)) if weight.dtype == torch.int8 else (block_n, block_k)


def scale_shape(weight: Tensor, block_n: int, block_k: int) -> tuple[int, ...]:
    """The shape of the scale of a quantised weight."""
    if weight.dtype == torch.int8:
        return (*weight.shape[:-1], 1)
    rows, columns = blocks_of(weight, block_n, block_k)
    return (*weight.shape[:-2], groups_of(weight.shape[-2], rows), groups_of(inner_of(weight), columns))


def check_weight_kind(
    operator: str,
    weight: Tensor,
    weight_scale: Tensor | None,
    block_n: int,
    block_k: int,
    inner: int,
    name: str = "weight",
) -> None:
    """Raise ArgumentError unless the weight has `inner` columns and the scale that its kind needs.

    Args:
        operator: Whose message it is.
        weight: [*, N, inner], or uint8 [*, N, inner/2].
        weight_scale: The argument called `<name>_scale`.
        block_n: Rows of an e4m3 weight that share a scale.
        block_k: Columns of it that do.
        inner: K, as the activations have it.
        name: What the operator calls the weight.
    """
    kind = dtype_name(weight.dtype)
    if inner_of(weight) != inner:
        packed = ", two a byte" if weight.dtype == torch.uint8 else ""
        raise ArgumentError(f"{operator}: {name} must have {inner} columns{packed}; got shape {tuple(weight.shape)}.")
    if weight.dtype in FLOAT:
        if weight_scale is not None:
            raise ArgumentError(f"{operator}: {name}_scale must be None where {name} is {kind}; got a Tensor.")
        return
    if weight_scale is None:
        raise ArgumentError(f"{operator}: {name}_scale must be given where {name} is {kind}; got None.")
    if weight.dtype == torch.uint8 and inner % FP4_GROUP:
        raise ArgumentError(f"{operator}: {name} in e2m1 needs columns in multiples of 32; got {inner}.")
    wanted = scale_shape(weight, block_n, block_k)
    if tuple(weight_scale.shape) != wanted:
        raise ArgumentError(
            f"{operator}: {name}_scale must be {list(wanted)} for {kind} {name}; got shape {tuple(weight_scale.shape)}."
        )


def check_activation_kind(operator: str, x: Tensor, x_scale: Tensor | None, act_group: int) -> None:
    """Raise ArgumentError unless x is float without a scale, or quantised with the scale that its kind needs."""
    kind = dtype_name(x.dtype)
    if x.dtype in FLOAT:
        if x_scale is not None:
            raise ArgumentError(f"{operator}: x_scale must be None where x is {kind}; got a Tensor.")
        return
    if x_scale is None:
        raise ArgumentError(f"{operator}: x_scale must be given where x is {kind}; got None.")
    groups = 1 if x.dtype == torch.int8 else groups_of(x.shape[-1], act_group)
    wanted = (*x.shape[:-1], groups)
    if tuple(x_scale.shape) != wanted:
        raise ArgumentError(
            f"{operator}: x_scale must be {list(wanted)} for {kind} x; got shape {tuple(x_scale.shape)}."
        )


def check_act_quant(operator: str, act_quant: str, name: str = "act_quant") -> None:
    """Raise ArgumentError for a way to quantise activations that there is not."""
    check_choice(operator, name, act_quant, ACT_QUANT)


def dequantise_weight(weight: Tensor, scale: Tensor | None, block_n: int, block_k: int, dtype: torch.dtype) -> Tensor:
    """The values of a weight of any kind: [*, N, K] in `dtype`, float32 or float64."""
    values = decode(weight, dtype)
    if scale is None:
        return values
    rows, columns = blocks_of(weight, block_n, block_k)
    return values * spread_scale(scale, values.shape[-2], values.shape[-1], rows, columns).to(dtype)


def dequantise_activation(x: Tensor, x_scale: Tensor | None, act_group: int, dtype: torch.dtype) -> Tensor:
    """The values of activations of any kind: [*, K] in `dtype`, float32 or float64."""
    values = x.to(dtype)
    if x_scale is None:
        return values
    group = max(x.shape[-1], 1) if x.dtype == torch.int8 else act_group
    return values * spread_groups(x_scale.to(dtype), x.shape[-1], group)
