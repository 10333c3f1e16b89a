"""int8 by row, products of int8 and of floats; e4m3 in groups and e2m1 have no call (README.md says why).

Source: domesticated_torch_mlu_ops 9fbf7df6 _ops.py (scaled_quantize: a factor multiplies, scale amax/127; nothing is
said of rows of zeros; scaled_matmul; matmul).
"""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT, FLOAT_NAMES, dtype_name
from isolith.numerics.codes import INT8_MAX
from isolith.numerics.scaled_matmul import resolve_act_quant
from isolith_backends.cambricon.calls import HALF, tmo, why_not
from isolith_backends.cambricon.rotary import MATMUL

SCALED_QUANTIZE = tmo(
    "scaled_quantize",
    ("x", "scale", "zero", "scale_ub", "quant_type", "quant_mode", "act_mode", "active_coef", "is_gated"),
)
SCALED_MATMUL = tmo(
    "scaled_matmul",
    (
        *("a", "b", "a_scale", "b_scale", "output_dtype", "bias", "c", "act_mode", "quant_bit_size", "alpha", "beta"),
        *("use_hp_active", "a_quant_bit_size", "a_calib", "b_calib"),
    ),
)
SMALLEST = 1e-10
"""The floor of act_quant_int8."""
BLOCK = 128
KINDS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
"""Dtypes of scaled_matmul, and what an operator calls such activations."""


def int8_rows(x: Tensor, smooth: Tensor | None, amax_floor: float = SMALLEST) -> tuple[Tensor, Tensor]:
    """(codes [rows, n], scales [rows, 1]) of rows with columns."""
    factor = None if smooth is None else smooth.float().contiguous()
    q, scale = SCALED_QUANTIZE(
        x=x.contiguous(),
        scale=factor,
        zero=None,
        scale_ub=None,
        quant_type=torch.int8,
        quant_mode="dynamic_per_token",
        act_mode="none",
        active_coef=1.0,
        is_gated=False,
    )
    scale, least = scale.reshape(-1, 1), amax_floor / INT8_MAX
    # The call knows no floor, and a row of zeros has no codes.
    values = x.float() if factor is None else x.float() * factor
    at_floor = (values / least).round().clamp(-INT8_MAX, INT8_MAX)
    codes = torch.where(scale < least, at_floor, q.float()).clamp(min=-INT8_MAX)
    return codes.to(torch.int8), scale.clamp(min=least)


@implements(
    ops.quant.act_quant_int8,
    requires=Requires(dtypes=DEVICE_FLOAT, missing=SCALED_QUANTIZE.missing),
    why_not=why_not(),
)
def act_quant_int8(x: Tensor, smooth: Tensor | None = None, amax_floor: float = 1e-10) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], 1)
    if x.numel() == 0:
        least = torch.full(shape, amax_floor / INT8_MAX, dtype=torch.float32, device=x.device)
        return torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format), least
    q, scale = int8_rows(x.reshape(-1, x.shape[-1]), smooth, amax_floor)
    return q.view(x.shape), scale.view(shape)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, K] times weight [N, K], of one dtype, rounded to it."""
    y: Tensor = MATMUL(a=x.contiguous(), b=weight.contiguous(), bias=None, c=None, act_mode="none", alpha=1.0, beta=0.0)
    return y


def scaled_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x [rows, K] times weight [N, K], both int8 with a scale for each row and output, or both e4m3 with blocks'."""
    if x.dtype == torch.int8:
        x_scale, weight_scale = x_scale.flatten(), weight_scale.flatten()
    y: Tensor = SCALED_MATMUL(
        a=x.contiguous(),
        b=weight.contiguous(),
        a_scale=x_scale.float().contiguous(),
        b_scale=weight_scale.float().contiguous(),
        output_dtype=dtype,
        bias=None,
        c=None,
        act_mode="none",
        quant_bit_size=8,
        alpha=1.0,
        beta=1.0,
        use_hp_active=False,
        a_quant_bit_size=-1,
        a_calib=None,
        b_calib=None,
    )
    return y


def why_not_blocks(weight: Tensor, act_group: int, block_n: int, block_k: int) -> WhyNot:
    """What scaled_matmul says of e4m3 weights."""
    if (act_group, block_n, block_k) != (BLOCK,) * 3:
        sizes = f"act_group={act_group}, block_n={block_n}, block_k={block_k}"
        return f"{sizes}; scaled_matmul takes {BLOCK} for each"
    outputs, inputs = weight.shape
    if inputs % BLOCK or outputs == 1:  # one output's scales are of one row, as those of rows are
        return (
            f"weight is {outputs} x {inputs}; scaled_matmul of e4m3 is adapted for columns in whole blocks of {BLOCK}"
        )
    return None


def why_not_linear(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    act_quant: str,
    act_group: int,
    block_n: int,
    block_k: int,
    out_dtype: str,
    **_: object,
) -> WhyNot:
    kind = KINDS.get(x.dtype, "none") if x_scale is not None else resolve_act_quant(act_quant, weight)
    if weight.dtype in KINDS:
        if kind != KINDS[weight.dtype]:
            return f"activations are {kind}; scaled_matmul takes {KINDS[weight.dtype]} beside such weights"
        if FLOAT_NAMES[out_dtype] not in HALF:
            return f"out_dtype is {out_dtype}; scaled_matmul gives bfloat16 or float16"
        return None if kind == "int8" else why_not_blocks(weight, act_group, block_n, block_k)
    kinds = f"x is {dtype_name(x.dtype)}, weight {dtype_name(weight.dtype)} and out_dtype {out_dtype}"
    if kind != "none" or x.dtype != weight.dtype:
        return f"{kinds}, activations {kind}; products of one float dtype and of int8 are adapted"
    return None if FLOAT_NAMES[out_dtype] == x.dtype else f"{kinds}; matmul gives the dtype of x"


def missing_products() -> WhyNot:
    """What this installation lacks for a linear layer."""
    return next((r for call in (SCALED_QUANTIZE, SCALED_MATMUL, MATMUL) if (r := call.missing())), None)


@implements(
    ops.quant.quant_linear,
    requires=Requires(dtypes={"x": (*DEVICE_FLOAT, *KINDS)}, missing=missing_products),
    why_not=why_not(why_not_linear),
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
    shape = (*x.shape[:-1], weight.shape[0])
    if 0 in shape or x.shape[-1] == 0:
        return x.new_zeros(shape, dtype=FLOAT_NAMES[out_dtype])
    rows = x.reshape(-1, x.shape[-1])
    if weight_scale is None:
        return product(rows, weight).view(shape)
    if x_scale is not None:
        codes, scale = rows, x_scale.reshape(-1, x_scale.shape[-1])
    elif weight.dtype == torch.int8:
        codes, scale = int8_rows(rows, None)
    else:  # tmo has no groups of 128
        codes, scale = ops.quant.act_quant_fp8.reference(rows, act_group, scale_format)
    return scaled_product(codes, scale, weight, weight_scale, FLOAT_NAMES[out_dtype]).view(shape)
