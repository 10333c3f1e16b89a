"""Rotary embedding, in place on a slice of each head or on the slice alone in float32; Hadamard rotation as a product.

Source: vllm-ascend 182b75ea csrc (inplace_partial_rotary_mul: interleaved pairs only, up to 1024 dimensions, tables in
x's dtype or float32 beside bfloat16); Ascend/op-plugin docs of npu_rotary_mul (layouts and sizes on A2 and A3).
vllm-ascend rotates by a matrix too.
"""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT
from isolith.ops.rotary.hadamard import scale_of, signs
from isolith_backends.ascend import arch
from isolith_backends.vendor_calls import VendorCall

PARTIAL_ROTARY_MUL = VendorCall(
    ("_C_ascend::inplace_partial_rotary_mul", "custom::inplace_partial_rotary_mul"),
    ("x", "r1", "r2", "rotary_mode", "partial_slice"),
)
ROTARY_MUL = VendorCall(("npu::npu_rotary_mul",), ("input", "r1", "r2", "rotary_mode"))
MOST_DIMS = 1024
HEADS_BEHIND, ROTATED_BEHIND = 1000, 896


def angles(
    positions: Tensor, cos_table: Tensor, sin_table: Tensor, inverse: bool, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """(cos, sin), float32 [tokens, 1, 1, 2*pairs]: every value twice, once for each number of its pair."""
    at = positions.long().clamp(0, cos_table.shape[0] - 1)  # memory outside the tables is never touched
    cos, sin = cos_table[at].float(), sin_table[at].float()
    # There is no argument for the inverse rotation.
    both = (cos, -sin if inverse else sin)
    spread = [part.repeat_interleave(2, dim=-1) if interleaved else torch.cat((part, part), dim=-1) for part in both]
    return spread[0][:, None, None], spread[1][:, None, None]


def why_not_in_place(x: Tensor, interleaved: bool, rope_first: bool, **_: object) -> WhyNot:
    if not interleaved:
        return "interleaved=False; inplace_partial_rotary_mul knows interleaved pairs alone"
    if rope_first:
        return "rope_first=True; inplace_partial_rotary_mul takes the last dimensions of a head"
    if x.shape[-1] % 2 or x.shape[-1] > MOST_DIMS:
        return f"head_dim={x.shape[-1]}; inplace_partial_rotary_mul takes even sizes up to {MOST_DIMS}"
    return None


@implements(
    ops.rotary.rope,
    requires=Requires(dtypes=(torch.bfloat16, torch.float32), arch=">=2", missing=PARTIAL_ROTARY_MUL.missing),
    why_not=why_not_in_place,
)
def rope(
    x: Tensor,
    positions: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    inverse: bool = False,
    interleaved: bool = True,
    rope_first: bool = False,
) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    if y.numel() == 0 or cos_table.shape[1] == 0:
        return y
    cos, sin = angles(positions, cos_table, sin_table, inverse, interleaved)
    rotated = [x.shape[-1] - cos.shape[-1], x.shape[-1]]
    heads = y[:, None, None] if y.dim() == 2 else y[:, None]
    PARTIAL_ROTARY_MUL(x=heads, r1=cos, r2=sin, rotary_mode="interleave", partial_slice=rotated)
    return y


def why_not_slice(x: Tensor, cos_table: Tensor, **_: object) -> WhyNot:
    heads, rotated = (x.shape[1] if x.dim() == 3 else 1), 2 * cos_table.shape[1]
    if arch() != "5" and (heads >= HEADS_BEHIND or rotated >= ROTATED_BEHIND):
        limits = f"fewer than {HEADS_BEHIND} and {ROTATED_BEHIND}"
        return f"{heads} heads with {rotated} rotated dimensions; npu_rotary_mul on A2 and A3 takes {limits}"
    return None


@implements(
    ops.rotary.rope,
    requires=Requires(dtypes=DEVICE_FLOAT, arch=">=2", missing=ROTARY_MUL.missing),
    why_not=why_not_slice,
)
def rope_of_slice(
    x: Tensor,
    positions: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    inverse: bool = False,
    interleaved: bool = True,
    rope_first: bool = False,
) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    if y.numel() == 0 or cos_table.shape[1] == 0:
        return y
    cos, sin = angles(positions, cos_table, sin_table, inverse, interleaved)
    start = 0 if rope_first else x.shape[-1] - cos.shape[-1]
    # As [sequence, batch of 1, heads, dim]: the angles differ along the sequence alone, as both modes allow.
    heads = y[:, None, None] if y.dim() == 2 else y[:, None]
    part = heads[..., start : start + cos.shape[-1]]
    # In float32, so that the tables are not rounded to x's dtype.
    mode = "interleave" if interleaved else "half"
    part.copy_(ROTARY_MUL(input=part.float(), r1=cos, r2=sin, rotary_mode=mode))
    return y


def by_signs(x: Tensor) -> Tensor:
    """The Hadamard rotation as one product with a matrix of signs, which HF32 does not round."""
    y: Tensor = x.reshape(-1, x.shape[-1]).float() @ signs(x, torch.float32) * scale_of(x)
    return y.to(x.dtype).view(x.shape)


def why_not_by_signs(x: Tensor, **_: object) -> WhyNot:
    return f"the axis has {x.shape[-1]} elements; a matrix of signs is for at most 1024" if x.shape[-1] > 1024 else None


@implements(ops.rotary.hadamard, requires=Requires(dtypes=DEVICE_FLOAT, arch=">=2"), why_not=why_not_by_signs)
def hadamard(x: Tensor) -> Tensor:
    return by_signs(x)
