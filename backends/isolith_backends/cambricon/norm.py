"""Norms of rows and of heads, by fused_rms_norm: float32 inside, one rounding.

Source: domesticated_torch_mlu_ops 9fbf7df6 _ops.py; xllm 3906f5a9 (no gamma for heads). No source shows a gamma of
another dtype than the rows.
"""

import torch
from torch import Tensor

from isolith import Requires, implements, ops
from isolith.dtypes import DEVICE_FLOAT
from isolith_backends.cambricon.calls import tmo, why_not

FUSED_RMS_NORM = tmo(
    "fused_rms_norm",
    (
        *("x", "residual", "gamma", "beta", "bias", "eps", "store_output_before_norm", "quant_scale", "out"),
        "dynamic_quant",
    ),
)


def normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x normalised and weighted in its dtype, rounded once."""
    y: Tensor = FUSED_RMS_NORM(
        x=x.contiguous(),
        residual=None,
        gamma=None if weight is None else weight.contiguous(),
        beta=None,
        bias=None,
        eps=eps,
        store_output_before_norm=False,
        quant_scale=None,
        out=None,
        dynamic_quant=False,
    )
    return y


@implements(
    ops.norm.rms_norm,
    requires=Requires(dtypes={"x": DEVICE_FLOAT, "weight": DEVICE_FLOAT}, missing=FUSED_RMS_NORM.missing),
    why_not=why_not(),
)
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, round_before_weight: bool = False) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    if round_before_weight:
        return (normed(x, None, eps).float() * weight.float()).to(x.dtype)
    if weight.dtype == x.dtype:
        return normed(x, weight, eps)
    return normed(x.float(), weight.float(), eps).to(x.dtype)


@implements(
    ops.norm.head_rms_norm,
    requires=Requires(dtypes=DEVICE_FLOAT, missing=FUSED_RMS_NORM.missing),
    why_not=why_not(),
)
def head_rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    return normed(x, None, eps) if x.numel() else torch.empty_like(x, memory_format=torch.contiguous_format)
