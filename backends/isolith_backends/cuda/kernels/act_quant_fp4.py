"""Quantisation to e2m1 in groups: every element read once, half a byte written for it, a scale for its group.

Memory is the floor: of bfloat16, 2.5 bytes an element and a scale. Two neighbouring columns lie in one thread, which
makes their byte.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.kernels.act_quant_fp8 import inverse_of_e8m0
from isolith_backends.cuda.kernels.codes import e2m1_of, e8m0_at_least
from isolith_backends.cuda.kernels.groups import groups_of, places
from isolith_backends.cuda.kernels.tensors import stored
from isolith_backends.cuda.launch import launch


@triton.jit
def act_quant_fp4_groups(
    X,
    Q,
    S,
    total,
    a_row,
    columns,
    size,
    stride,
    inner,
    inner_stride,
    floor,
    TOGETHER: tl.constexpr,
    PADDED: tl.constexpr,
    INDEX: tl.constexpr,
):
    group, _, start, column, inside = places(
        total, a_row, columns, size, stride, inner, inner_stride, TOGETHER, PADDED, INDEX
    )
    x = tl.load(X + start[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(x), axis=1), floor)
    scale = e8m0_at_least(tl.div_rn(amax, 6.0))
    code = e2m1_of(x * inverse_of_e8m0(scale)[:, None])
    low, high = tl.split(tl.reshape(code, (TOGETHER, PADDED // 2, 2)))
    within = tl.arange(0, PADDED // 2)[None, :]
    real = (group < total)[:, None] & (2 * within < size)
    place = group.to(tl.int64)[:, None] * (size // 2) + within  # groups are whole: rows have no other columns
    tl.store(Q + place, low | (high << 4), mask=real)
    tl.store(S + group, scale, mask=group < total)


def act_quant_fp4(x: Tensor, group_size: int, amax_floor: float) -> tuple[Tensor, Tensor]:
    """Packed codes of x, and the scales of its groups."""
    *leading, columns = x.shape
    q = torch.empty((*leading, columns // 2), dtype=torch.uint8, device=x.device)
    scale = torch.empty((*leading, columns // group_size), dtype=torch.float8_e8m0fnu, device=x.device)
    if x.numel() == 0:
        return q, scale
    groups = groups_of(x, group_size)
    launch(
        act_quant_fp4_groups,
        groups.grid,
        groups.flat,
        q,
        stored(scale),
        *groups.runtime,
        amax_floor,
        warps=groups.warps,
        stages=1,
        TOGETHER=groups.together,
        PADDED=groups.padded,
        INDEX=groups.index,
    )
    return q, scale
