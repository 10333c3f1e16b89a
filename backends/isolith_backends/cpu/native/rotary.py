"""Rotations in C++: rotary.cpp."""

import math

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT
from isolith_backends.cpu.native.library import Library, in_large_pages

library = Library("rotary")

FP32 = (torch.float32,)
MOST_PAIRS, MOST_WIDTH = 1024, 16384  # as in rotary.cpp


def many_pairs(cos_table: Tensor, **_: object) -> WhyNot:
    pairs = cos_table.shape[1]
    return f"{pairs} pairs; the angles of at most {MOST_PAIRS} are kept" if pairs > MOST_PAIRS else None


def wide_rows(x: Tensor, **_: object) -> WhyNot:
    width = x.shape[-1]
    return f"rows of {width}; at most {MOST_WIDTH} are kept" if width > MOST_WIDTH else None


@implements(
    ops.rotary.rope,
    requires=Requires(dtypes={"x": DEVICE_FLOAT, "cos_table": FP32, "sin_table": FP32}, missing=library.missing),
    why_not=many_pairs,
    batch_invariant=True,
)
def rope_native(
    x: Tensor,
    positions: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    inverse: bool = False,
    interleaved: bool = True,
    rope_first: bool = False,
) -> Tensor:
    x, positions = x.contiguous(), positions.long().contiguous()
    y, width, pairs = in_large_pages(torch.empty_like(x)), x.shape[-1], cos_table.shape[1]
    heads = x.shape[1] if x.dim() == 3 else 1
    library.call(
        *("rope", x, x.dtype, positions, cos_table.contiguous(), sin_table.contiguous(), y, x.shape[0], heads, width),
        *(pairs, 0 if rope_first else width - 2 * pairs, inverse, interleaved),
    )
    return y


@implements(
    ops.rotary.hadamard,
    requires=Requires(dtypes=DEVICE_FLOAT, missing=library.missing),
    why_not=wide_rows,
    batch_invariant=True,
)
def hadamard_native(x: Tensor) -> Tensor:
    x, width = x.contiguous(), x.shape[-1]
    y = in_large_pages(torch.empty_like(x))
    library.call("hadamard", x, x.dtype, y, x.numel() // width, width, 1 / math.sqrt(width))
    return y
