"""Tensors as kernels take them: their types, their bytes, their rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith import WhyNot

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
ROW = 16384  # elements that a program of 16 warps holds in registers: 32 of each thread


def row_too_long(x: Tensor, **_: object) -> WhyNot:
    """Why a kernel that holds whole rows does not take these."""
    columns = x.shape[-1]
    return None if columns <= ROW else f"rows of {columns}; a program holds one of at most {ROW}"


def stored(tensor: Tensor) -> Tensor:
    """The tensor as kernels take it: e4m3 and e8m0 as bytes, which every architecture has."""
    narrow = (torch.float8_e4m3fn, torch.float8_e8m0fnu)
    return tensor.view(torch.uint8) if tensor.dtype in narrow else tensor


def dense(tensor: Tensor) -> Tensor:
    """The tensor with a last axis of stride 1, copied where it has another."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def rows_of(x: Tensor) -> Tensor:
    """[outer inner columns] of stride 1 in columns; a view up to three axes, so that a slice of heads is not copied."""
    if x.is_contiguous() and x.numel():
        return x.reshape(-1, 1, x.shape[-1])  # where inner is 1, kernels divide nothing
    x = dense(x) if x.dim() <= 3 else x.contiguous().flatten(0, -3)
    return x.reshape((1,) * (2 - x.dim()) + tuple(x.shape)).unsqueeze(1) if x.dim() < 3 else x


@triton.jit
def start_of_rows(row, stride, inner, inner_stride):
    """Where rows of what `rows_of` gives begin."""
    return (row // inner).to(tl.int64) * stride + (row % inner).to(tl.int64) * inner_stride
