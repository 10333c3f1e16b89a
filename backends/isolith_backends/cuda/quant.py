"""Quantisation of activations, and values of quantised weights."""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT, FLOAT_NAMES
from isolith.numerics.scaled_matmul import resolve_act_quant
from isolith_backends.cuda.kernels import act_quant_fp4 as fp4
from isolith_backends.cuda.kernels import act_quant_fp8 as fp8
from isolith_backends.cuda.kernels import act_quant_int8 as int8
from isolith_backends.cuda.kernels import block_dequant as dequant
from isolith_backends.cuda.kernels import quant_linear as linear
from isolith_backends.cuda.kernels.formats import ACTIVATIONS, INT8_INPUTS, WEIGHTS
from isolith_backends.cuda.kernels.tensors import ROW, row_too_long

FLOATS = Requires(dtypes=DEVICE_FLOAT)


def group_too_long(x: Tensor, group_size: int, **_: object) -> WhyNot:
    size = min(group_size, x.shape[-1])
    return None if size <= ROW else f"groups of {size}; a program holds one of at most {ROW}"


@implements(ops.quant.act_quant_fp8, requires=FLOATS, why_not=group_too_long, batch_invariant=True)
def act_quant_fp8(
    x: Tensor, group_size: int = 128, scale_format: str = "ue8m0", amax_floor: float = 1e-4
) -> tuple[Tensor, Tensor]:
    return fp8.act_quant_fp8(x, group_size, scale_format, amax_floor)


def linear_refused(
    x: Tensor, weight: Tensor, x_scale: Tensor | None, act_quant: str, act_group: int, out_dtype: str, **_: object
) -> WhyNot:
    if out_dtype == "float64":
        return "out_dtype is float64; float32 sums would not do"
    if x_scale is None and (reason := linear.quantising_refused(weight, act_quant, act_group)):
        return reason
    kind = "int8" if x.dtype == torch.int8 else resolve_act_quant(act_quant, weight)
    if kind == "int8" and weight.dtype == torch.int8 and x.shape[-1] > INT8_INPUTS:
        return f"{x.shape[-1]} inputs; int32 holds the sum of {INT8_INPUTS} products of int8 codes"
    return None


@implements(
    ops.quant.quant_linear,
    requires=Requires(dtypes={"x": ACTIVATIONS, "weight": WEIGHTS}),
    why_not=linear_refused,
)
def quant_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    act_quant: str = "auto",
    act_group: int = 128,
    scale_format: str = "ue8m0",
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: str = "bfloat16",
) -> Tensor:
    rules = linear.Rules(
        act_quant=act_quant, act_group=act_group, scale_format=scale_format, block_n=block_n, block_k=block_k
    )
    return linear.quant_linear(x, weight, weight_scale, x_scale, rules, FLOAT_NAMES[out_dtype])


@implements(ops.quant.act_quant_fp4, requires=FLOATS, why_not=group_too_long, batch_invariant=True)
def act_quant_fp4(x: Tensor, group_size: int = 32, amax_floor: float = 6 * 2.0**-126) -> tuple[Tensor, Tensor]:
    return fp4.act_quant_fp4(x, group_size, amax_floor)


@implements(ops.quant.act_quant_int8, requires=FLOATS, why_not=row_too_long, batch_invariant=True)
def act_quant_int8(x: Tensor, smooth: Tensor | None = None, amax_floor: float = 1e-10) -> tuple[Tensor, Tensor]:
    return int8.act_quant_int8(x, smooth, amax_floor)


def not_dequantised(q: Tensor, block_k: int, out_dtype: str, **_: object) -> WhyNot:
    if out_dtype == "float64":
        return "out_dtype is float64; products are float32"
    if q.dtype == torch.uint8 and block_k % 2 and block_k < 2 * q.shape[-1]:
        return f"block_k={block_k}; both codes of a byte have one scale here, so that it must be even"
    return None


@implements(ops.quant.block_dequant, why_not=not_dequantised, batch_invariant=True)
def block_dequant(
    q: Tensor, scale: Tensor, block_n: int = 128, block_k: int = 128, out_dtype: str = "bfloat16"
) -> Tensor:
    return dequant.block_dequant(q, scale, block_n, block_k, FLOAT_NAMES[out_dtype])
