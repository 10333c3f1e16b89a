"""Quantising activations and reading quantised weights in C++: quant.cpp."""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT, FLOAT_NAMES
from isolith.numerics.codes import SCALE_FORMATS, groups_of
from isolith.numerics.scaled_matmul import inner_of
from isolith_backends.cpu.native.library import Library, in_large_pages

library = Library("quant")

CODES_OF = {torch.float8_e4m3fn: 0, torch.int8: 1, torch.uint8: 2}
"""How quant.cpp spells the dtypes of codes."""


@implements(
    ops.quant.act_quant_fp8,
    requires=Requires(dtypes=DEVICE_FLOAT, missing=library.missing),
    batch_invariant=True,
)
def act_quant_fp8_native(
    x: Tensor, group_size: int = 128, scale_format: str = "ue8m0", amax_floor: float = 1e-4
) -> tuple[Tensor, Tensor]:
    x, columns = x.contiguous(), x.shape[-1]
    q = in_large_pages(torch.empty_like(x, dtype=torch.float8_e4m3fn))
    scale = x.new_empty((*x.shape[:-1], groups_of(columns, group_size)), dtype=SCALE_FORMATS[scale_format])
    rows, power_of_two = x.numel() // max(columns, 1), scale_format == "ue8m0"
    library.call("act_quant_fp8", x, x.dtype, q, scale, rows, columns, group_size, amax_floor, power_of_two)
    return q, scale


@implements(
    ops.quant.act_quant_fp4,
    requires=Requires(dtypes=DEVICE_FLOAT, missing=library.missing),
    batch_invariant=True,
)
def act_quant_fp4_native(x: Tensor, group_size: int = 32, amax_floor: float = 6 * 2.0**-126) -> tuple[Tensor, Tensor]:
    x, columns = x.contiguous(), x.shape[-1]
    q = in_large_pages(x.new_empty((*x.shape[:-1], columns // 2), dtype=torch.uint8))
    scale = x.new_empty((*x.shape[:-1], columns // group_size), dtype=torch.float8_e8m0fnu)
    library.call("act_quant_fp4", x, x.dtype, q, scale, x.numel() // max(columns, 1), columns, group_size, amax_floor)
    return q, scale


@implements(
    ops.quant.act_quant_int8,
    requires=Requires(dtypes={"x": DEVICE_FLOAT, "smooth": DEVICE_FLOAT}, missing=library.missing),
    batch_invariant=True,
)
def act_quant_int8_native(x: Tensor, smooth: Tensor | None = None, amax_floor: float = 1e-10) -> tuple[Tensor, Tensor]:
    x, columns = x.contiguous(), x.shape[-1]
    smooth = None if smooth is None else smooth.contiguous()
    q = in_large_pages(torch.empty_like(x, dtype=torch.int8))
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    smooth_dtype = torch.float32 if smooth is None else smooth.dtype
    library.call("act_quant_int8", x, x.dtype, smooth, smooth_dtype, q, scale, scale.numel(), columns, amax_floor)
    return q, scale


def wide_output(out_dtype: str, **_: object) -> WhyNot:
    return "values in float64 are left to the reference" if out_dtype == "float64" else None


@implements(
    ops.quant.block_dequant,
    requires=Requires(missing=library.missing),
    why_not=wide_output,
    batch_invariant=True,
)
def block_dequant_native(
    q: Tensor, scale: Tensor, block_n: int = 128, block_k: int = 128, out_dtype: str = "bfloat16"
) -> Tensor:
    q, scale, columns = q.contiguous(), scale.contiguous(), inner_of(q)
    y = in_large_pages(q.new_empty((*q.shape[:-1], columns), dtype=FLOAT_NAMES[out_dtype]))
    if y.numel():
        library.call(
            *("block_dequant", q, CODES_OF[q.dtype], scale, scale.dtype == torch.float8_e8m0fnu, y, y.dtype),
            *(y.numel() // columns, q.shape[-2], columns, *scale.shape[-2:], block_n, block_k),
        )
    return y
