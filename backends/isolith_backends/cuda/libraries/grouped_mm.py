"""Grouped products by torch itself.

Facts (torch 2.13, `torch.nn.functional.grouped_mm`): x [rows, inputs] and weight [experts, inputs, outputs] of one
dtype, offs int32 the ends of the experts' rows; strides are multiples of 16 bytes; rows behind the last end are not
written. From sm_90 on it is one kernel; before, torch waits for the offsets on the host, which no graph can hold.
"""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import FLOAT_NAMES

UNIT = 16  # bytes


def grouped_mm_missing() -> WhyNot:
    has = hasattr(torch.nn.functional, "grouped_mm")
    return None if has else f"torch {torch.__version__} has no grouped_mm; 2.10 has"


def grouped_gemm_refused(x: Tensor, weight: Tensor, alignment: int, out_dtype: str, **_: object) -> WhyNot:
    if x.dim() != 2:
        return "x is [experts rows inputs]; takes rows of all experts"
    if FLOAT_NAMES[out_dtype] != x.dtype:
        return f"out_dtype={out_dtype}; takes that of x, {x.dtype}"
    if not x.numel() or not weight.numel():
        return f"x {tuple(x.shape)}, weight {tuple(weight.shape)}; takes no empty ones"
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.stride(-1) != 1 or any(stride * tensor.itemsize % UNIT for stride in tensor.stride()[:-1]):
            return f"{name} has strides {tuple(tensor.stride())}; takes rows that start at multiples of {UNIT} bytes"
        if tensor.storage_offset() * tensor.itemsize % UNIT:
            return f"{name} starts at element {tensor.storage_offset()}; takes multiples of {UNIT} bytes"
    return None


@implements(
    ops.moe.grouped_gemm,
    requires=Requires(
        dtypes={"x": (torch.bfloat16,), "weight": (torch.bfloat16,)}, arch=">=9.0", missing=grouped_mm_missing
    ),
    why_not=grouped_gemm_refused,
)
def grouped_gemm_torch(
    x: Tensor,
    weight: Tensor,
    expert_counts: Tensor,
    alignment: int = 1,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    act_group: int = 128,
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: str = "bfloat16",
) -> Tensor:
    # Padding behind a segment counts to it: its rows are nobody's, and no row's result depends on another.
    padded = (expert_counts.int() + alignment - 1) // alignment * alignment
    ends = padded.cumsum(0, dtype=torch.int32).clamp(max=x.shape[0])
    return torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)
