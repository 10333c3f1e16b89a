"""The projection of hyper-connections in its legal roundings other than the reference's.

    z = (fn v) / sqrt(mean(v^2) + norm_eps),  v = the streams of a token, flattened stream after stream

Source: DeepGEMM 54e2261 csrc/apis/hyperconnection.hpp, tf32_hc_prenorm_gemm, which multiplies in TF32.
"""

import torch
from torch import Tensor

from isolith.dtypes import widen


def normalised_first(streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """Scale the streams by the inverse root, then project."""
    flat = streams.to(widen(streams.dtype)).flatten(1)
    normed = flat / (flat.square().mean(-1, keepdim=True) + norm_eps).sqrt()
    return normed @ fn.to(flat.dtype).T


def sum_in_order(streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """Add up products and squares one after the other, in one running sum each."""
    flat = streams.to(widen(streams.dtype)).flatten(1)
    product, squares = flat.new_zeros(flat.shape[0], fn.shape[0]), flat.new_zeros(flat.shape[0], 1)
    for element, weights in zip(flat.split(1, -1), fn.to(flat.dtype).unbind(-1), strict=True):
        product += element * weights
        squares += element.square()
    return product * (squares / flat.shape[-1] + norm_eps).rsqrt()


def multiplied_in_tf32(streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """Cut the weights to TF32, which holds bfloat16 and float16 exactly; float32 streams are multiplied in full."""
    flat = streams.to(widen(streams.dtype)).flatten(1)
    weight = fn.to(flat.dtype)
    if streams.dtype in (torch.bfloat16, torch.float16):
        weight = cut_to_tf32(weight)
    return flat @ weight.T * (flat.square().mean(-1, keepdim=True) + norm_eps).rsqrt()


def cut_to_tf32(x: Tensor) -> Tensor:
    """float32 with the 13 lowest of its 23 mantissa bits cleared: what a matrix unit in TF32 or HF32 mode reads."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
