"""Norms of rows and of heads, by npu_rms_norm: float32 inside, one rounding.

Source: Ascend/op-plugin 517f2e7d, npu_rms_norm (a float32 gamma is documented beside a bfloat16 input).
"""

import torch
from torch import Tensor

from isolith import Requires, implements, ops
from isolith.dtypes import DEVICE_FLOAT
from isolith_backends.vendor_calls import VendorCall

NPU_RMS_NORM = VendorCall(("npu::npu_rms_norm",), ("input", "gamma", "epsilon"))


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x normalised and weighted, rounded once, with a weight of whatever dtype."""
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    if weight.dtype == x.dtype or (x.dtype, weight.dtype) == (torch.bfloat16, torch.float32):
        taken = x, weight
    else:
        taken = x.float(), weight.float()
    y: Tensor = NPU_RMS_NORM(input=taken[0].contiguous(), gamma=taken[1].contiguous(), epsilon=eps)[0]
    return y.to(x.dtype)


@implements(
    ops.norm.rms_norm,
    requires=Requires(dtypes={"x": DEVICE_FLOAT, "weight": DEVICE_FLOAT}, arch=">=2", missing=NPU_RMS_NORM.missing),
)
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, round_before_weight: bool = False) -> Tensor:
    if not round_before_weight:
        return normed(x, weight, eps)
    plain = normed(x, torch.ones_like(weight, dtype=x.dtype), eps)
    return (plain.float() * weight.float()).to(x.dtype)


@implements(ops.norm.head_rms_norm, requires=Requires(dtypes=DEVICE_FLOAT, arch=">=2", missing=NPU_RMS_NORM.missing))
def head_rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    return normed(x, torch.ones(x.shape[-1], dtype=x.dtype, device=x.device), eps)
