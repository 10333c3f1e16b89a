"""Norms of torch_npu.

Source: Ascend/op-plugin 517f2e7d, npu_rms_norm: float32 inside, output in x's dtype, a float32 gamma beside bfloat16.
"""

import torch
from torch import Tensor

from isolith_backends.ascend.vendor.rules import FLOATS, need, need_dtype


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    name = "npu_rms_norm"
    need_dtype(name, "x", input, FLOATS)
    mixed = gamma.dtype == torch.float32 and input.dtype == torch.bfloat16
    need(name, gamma.dtype == input.dtype or mixed, f"gamma is {gamma.dtype} beside x of {input.dtype}")
    axes = gamma.dim()
    need(name, 0 < axes <= input.dim(), f"gamma has {axes} axes, x {input.dim()}")
    need(name, gamma.shape == input.shape[-axes:], f"gamma {tuple(gamma.shape)} is no tail of x {tuple(input.shape)}")
    wide, last = input.float(), tuple(range(-axes, 0))
    rstd = (wide.square().mean(last, keepdim=True) + epsilon).rsqrt()
    return (wide * rstd * gamma.float()).to(input.dtype), rstd
