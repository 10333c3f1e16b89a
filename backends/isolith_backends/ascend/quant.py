"""int8 by row, and products of int8; e4m3 and e2m1 have no kernel here (README.md says why).

Source: Ascend/op-plugin 517f2e7d (npu_dynamic_quant: scale amax/127, float16 and bfloat16 of two axes or more;
npu_quant_matmul: a scale for each output and one for each token).
"""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import FLOAT_NAMES, dtype_name
from isolith.numerics.codes import INT8_MAX
from isolith.numerics.scaled_matmul import resolve_act_quant
from isolith_backends.vendor_calls import VendorCall

DYNAMIC_QUANT = VendorCall(("npu::npu_dynamic_quant",), ("input", "smooth_scales"))
QUANT_MATMUL = VendorCall(("npu::npu_quant_matmul",), ("x1", "x2", "scale", "pertoken_scale", "output_dtype"))
HALF = (torch.bfloat16, torch.float16)


def int8_rows(x: Tensor, smooth: Tensor | None, amax_floor: float) -> tuple[Tensor, Tensor]:
    """(codes [rows, n], scales [rows, 1]) of rows with columns."""
    q, scale = DYNAMIC_QUANT(input=x, smooth_scales=smooth)
    scale, least = scale.reshape(-1, 1), amax_floor / INT8_MAX
    # The call divides a row of zeros by 0, and knows no floor.
    values = x.float() if smooth is None else x.float() * smooth.float()
    at_floor = (values / least).round().clamp(-INT8_MAX, INT8_MAX)
    return torch.where(scale < least, at_floor, q.float()).to(torch.int8), scale.clamp(min=least)


def why_not_quant(x: Tensor, smooth: Tensor | None, **_: object) -> WhyNot:
    if smooth is not None and smooth.dtype != x.dtype:
        return f"smooth is {dtype_name(smooth.dtype)} and x {dtype_name(x.dtype)}; npu_dynamic_quant takes one dtype"
    return None


@implements(
    ops.quant.act_quant_int8,
    requires=Requires(dtypes=HALF, arch=">=2", missing=DYNAMIC_QUANT.missing),
    why_not=why_not_quant,
)
def act_quant_int8(x: Tensor, smooth: Tensor | None = None, amax_floor: float = 1e-10) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], 1)
    if x.numel() == 0:
        least = torch.full(shape, amax_floor / INT8_MAX, dtype=torch.float32, device=x.device)
        return torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format), least
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    q, scale = int8_rows(rows, None if smooth is None else smooth.contiguous(), amax_floor)
    return q.view(x.shape), scale.view(shape)


def why_not_linear(
    x: Tensor, weight: Tensor, x_scale: Tensor | None, act_quant: str, out_dtype: str, **_: object
) -> WhyNot:
    if weight.dtype != torch.int8:
        return f"weight is {dtype_name(weight.dtype)}; npu_quant_matmul of int8 weights alone is adapted"
    kind = dtype_name(x.dtype) if x_scale is not None else resolve_act_quant(act_quant, weight)
    if kind != "int8":
        return f"activations are {kind}; npu_quant_matmul takes int8 beside int8 weights"
    if out_dtype != "bfloat16":
        return f"out_dtype is {out_dtype}; npu_quant_matmul with float32 scales gives bfloat16"
    return None


@implements(
    ops.quant.quant_linear,
    requires=Requires(dtypes={"x": (*HALF, torch.int8)}, arch=">=2", missing=QUANT_MATMUL.missing),
    why_not=why_not_linear,
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
    if 0 in shape or x.shape[-1] == 0 or weight_scale is None:
        return x.new_zeros(shape, dtype=FLOAT_NAMES[out_dtype])
    if x_scale is None:
        x, x_scale = ops.quant.act_quant_int8(x)
    y: Tensor = QUANT_MATMUL(
        x1=x.reshape(-1, x.shape[-1]).contiguous(),
        x2=weight.contiguous().T,
        scale=weight_scale.float().flatten(),
        pertoken_scale=x_scale.float().flatten(),
        output_dtype=FLOAT_NAMES[out_dtype],
    )
    return y.view(shape)
