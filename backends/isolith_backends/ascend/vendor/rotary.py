"""Rotary products of torch_npu, vllm-ascend and cann-recipes.

Source: Ascend/op-plugin docs of npu_rotary_mul; vllm-ascend 182b75ea and cann-recipes-infer fbc225d2,
inplace_partial_rotary_mul.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from isolith_backends.ascend.vendor.rules import FLOATS, need, need_dtype, rotated
from isolith_backends.ascend.vendor.soc import current

MOST_DIMS = 1024
LAYOUTS = {"BNSD": ("11SD", "B1SD", "BNSD"), "BSND": ("1S1D", "BS1D", "BSND"), "SBND": ("S11D", "SB1D", "SBND")}
"""Of x, with those of the tables in mode "half"; "interleave" takes the first of them alone."""


def has_layout(x: Tensor, table: Tensor, mode: str) -> bool:
    """Whether there is a layout on A2 and A3 that x and a table have, within its sizes."""
    known = LAYOUTS if x.dim() == 4 else {"TND": ("T1D", "TND")}
    for layout, tables in known.items():
        sizes = dict(zip(layout, x.shape, strict=True)) | {"1": 1}
        batch, heads = sizes.get("B", 1), sizes["N"]
        fits = batch * heads < 1000 if mode == "interleave" else max(batch, heads) < 1000
        for of_table in tables[:1] if mode == "interleave" else tables:
            if fits and sizes["D"] < 896 and tuple(table.shape) == tuple(sizes[axis] for axis in of_table):
                return True
    return False


def npu_rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str, rotate: Tensor | None) -> Tensor:
    name = "npu_rotary_mul"
    need_dtype(name, "x", input, FLOATS)
    need(name, input.dim() in (3, 4), f"x has {input.dim()} axes, not 3 or 4")
    need(name, rotary_mode in ("half", "interleave"), f"rotary_mode is {rotary_mode!r}")
    need(name, rotate is None, "rotate is for training kernels")
    need(name, input.shape[-1] % 2 == 0, f"the last axis has {input.shape[-1]} elements, an odd number")
    for which, table in (("r1", r1), ("r2", r2)):
        need_dtype(name, which, table, (input.dtype,))
        sizes = zip(table.shape, input.shape, strict=False)
        fits = table.dim() == input.dim() and all(a in (1, b) for a, b in sizes) and table.shape[-1] == input.shape[-1]
        fits = fits and (current().name == "A5" or has_layout(input, table, rotary_mode))
        need(name, fits, f"{which} {tuple(table.shape)} does not go with x {tuple(input.shape)} in {rotary_mode!r}")
    return rotated(input, r1, r2, rotary_mode).to(input.dtype)


def inplace_partial_rotary_mul(
    x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str, partial_slice: Sequence[int]
) -> None:
    name = "inplace_partial_rotary_mul"
    need_dtype(name, "x", x, FLOATS)
    need(name, x.dim() == 4 and x.is_contiguous(), f"x must be 4-D and contiguous, not {tuple(x.shape)} {x.stride()}")
    size = x.shape[-1]
    need(name, size % 2 == 0 and size <= MOST_DIMS, f"the last axis has {size} elements; even, at most {MOST_DIMS}")
    need(name, rotary_mode == "interleave", f"rotary_mode is {rotary_mode!r}; only interleave")
    start, end = partial_slice
    legal = 0 <= start < end == size and (end - start) % 2 == 0
    need(name, legal, f"partial_slice {list(partial_slice)} is no even tail of {size}")
    for which, table in (("r1", r1), ("r2", r2)):
        mixed = x.dtype == torch.bfloat16 and table.dtype == torch.float32
        need(name, table.dtype == x.dtype or mixed, f"{which} is {table.dtype} beside x of {x.dtype}")
        fits = table.dim() == 4 and table.shape[0] == x.shape[0] and table.shape[1] in (1, x.shape[1])
        fits = fits and table.shape[2:] == (1, end - start)
        need(name, fits, f"{which} {tuple(table.shape)} is not [b, 1 or s, 1, {end - start}]")
    need(name, r1.shape == r2.shape and r1.dtype == r2.dtype, "r1 and r2 differ in shape or dtype")
    x[..., start:] = rotated(x[..., start:], r1, r2, rotary_mode).to(x.dtype)
