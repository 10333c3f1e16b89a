"""Quantisation to e4m3 in groups: every element read once, a byte written for it, a scale for its group.

Memory is the floor: of bfloat16, 3 bytes an element and a scale. A division for each element would cost more than that
on the largest cards, so an element is multiplied by the inverse of its group's scale: exact for a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.kernels.codes import e4m3_of, e8m0_at_least
from isolith_backends.cuda.kernels.groups import groups_of, places
from isolith_backends.cuda.kernels.tensors import stored
from isolith_backends.cuda.launch import capability, launch


@triton.jit
def e4m3_byte(value, NATIVE: tl.constexpr):
    """The byte of a value, saturating; by the conversion of the chip from sm_90 on, the same bits."""
    if NATIVE:
        byte = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        byte = e4m3_of(value)
    return byte


@triton.jit
def inverse_of_e8m0(byte):
    """2^(127-byte), of a byte from 1 to 253."""
    return ((254 - byte.to(tl.uint32)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scales_of_e4m3(amax, POWER_OF_TWO: tl.constexpr):
    """(what is stored, its inverse): the byte of e8m0, or a float32."""
    ratio = tl.div_rn(amax, 448.0)
    if POWER_OF_TWO:
        scale = e8m0_at_least(ratio)
        inverse = inverse_of_e8m0(scale)
    else:
        scale, inverse = ratio, tl.div_rn(1.0, ratio)
    return scale, inverse


@triton.jit
def act_quant_fp8_groups(
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
    POWER_OF_TWO: tl.constexpr,
    NATIVE: tl.constexpr,
    TOGETHER: tl.constexpr,
    PADDED: tl.constexpr,
    INDEX: tl.constexpr,
):
    group, row, start, column, inside = places(
        total, a_row, columns, size, stride, inner, inner_stride, TOGETHER, PADDED, INDEX
    )
    x = tl.load(X + start[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(x), axis=1), floor)
    scale, inverse = scales_of_e4m3(amax, POWER_OF_TWO)
    tl.store(Q + row[:, None] * columns + column, e4m3_byte(x * inverse[:, None], NATIVE), mask=inside)
    tl.store(S + group, scale, mask=group < total)


def act_quant_fp8(x: Tensor, group_size: int, scale_format: str, amax_floor: float) -> tuple[Tensor, Tensor]:
    """e4m3 codes in the shape of x, and the scales of its groups."""
    power_of_two = scale_format == "ue8m0"
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    shape = (*x.shape[:-1], -(-x.shape[-1] // group_size))
    scale = torch.empty(shape, dtype=torch.float8_e8m0fnu if power_of_two else torch.float32, device=x.device)
    if x.numel() == 0:
        return q, scale
    groups = groups_of(x, group_size)
    launch(
        act_quant_fp8_groups,
        groups.grid,
        groups.flat,
        stored(q),
        stored(scale),
        *groups.runtime,
        amax_floor,
        warps=groups.warps,
        stages=1,
        POWER_OF_TWO=power_of_two,
        # sm_89 converts by way of float16 in some releases of Triton, and rounds twice.
        NATIVE=capability(x.device) >= 90,
        TOGETHER=groups.together,
        PADDED=groups.padded,
        INDEX=groups.index,
    )
    return q, scale
