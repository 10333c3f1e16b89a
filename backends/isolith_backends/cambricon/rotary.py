"""Rotary embedding of a slice of each head, in float32, and the Hadamard rotation as a product.

Tables stand in tmo with every frequency twice, in the dtype of the rows, sin before cos. The contract rounds no table,
so the slice is turned in float32, as vllm-mlu does for its inverse. Rows of the tables are taken first, so that each
token's alone are spread. The inverse negates sin: a flag for it came with 1.12.1 and computes the same.

Source: domesticated_torch_mlu_ops 9fbf7df6 _ops.py (apply_rotary: heads of 2 to 256; matmul); vllm-mlu b9925203 (the
form with positions and bounds, which both releases have).
"""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT
from isolith.ops.rotary.hadamard import scale_of, signs
from isolith_backends.cambricon.calls import tmo, why_not

APPLY_ROTARY = tmo(
    "apply_rotary",
    (
        *("input", "sin_cache", "cos_cache", "position_ids", "cu_seqlens", "interleaved", "discrete", "dynamic_ntk"),
        "max_seqlen",
    ),
)
MATMUL = tmo("matmul", ("a", "b", "bias", "c", "act_mode", "alpha", "beta"))
MOST_DIMS, MOST_OF_SIGNS = 256, 1024


def angles(
    positions: Tensor, cos_table: Tensor, sin_table: Tensor, inverse: bool, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """(sin, cos), float32 [tokens, 2*pairs]: every value twice, once for each number of its pair."""
    at = positions.long().clamp(0, cos_table.shape[0] - 1)  # memory outside the tables is never touched
    cos, sin = cos_table[at].float(), sin_table[at].float()
    both = (-sin if inverse else sin, cos)
    spread = [part.repeat_interleave(2, dim=-1) if interleaved else torch.cat((part, part), dim=-1) for part in both]
    return spread[0].contiguous(), spread[1].contiguous()


def why_not_rope(cos_table: Tensor, **_: object) -> WhyNot:
    width = 2 * cos_table.shape[1]
    return f"2*pairs={width}; apply_rotary turns heads of at most {MOST_DIMS}" if width > MOST_DIMS else None


@implements(
    ops.rotary.rope,
    requires=Requires(dtypes=DEVICE_FLOAT, missing=APPLY_ROTARY.missing),
    why_not=why_not(why_not_rope),
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
    sin, cos = angles(positions, cos_table, sin_table, inverse, interleaved)
    tokens, width = sin.shape
    start = 0 if rope_first else x.shape[-1] - width
    slice_of_heads = (y[:, None] if y.dim() == 2 else y)[..., start : start + width]
    turned = slice_of_heads.to(torch.float32, copy=True)
    APPLY_ROTARY(  # in place
        input=turned,
        sin_cache=sin,
        cos_cache=cos,
        position_ids=torch.arange(tokens, dtype=torch.int32, device=x.device),
        cu_seqlens=torch.arange(2, dtype=torch.int32, device=x.device) * tokens,
        interleaved=interleaved,
        discrete=True,
        dynamic_ntk=False,
        max_seqlen=tokens,
    )
    slice_of_heads.copy_(turned)
    return y


def why_not_hadamard(x: Tensor, **_: object) -> WhyNot:
    most = f"a matrix of signs is for at most {MOST_OF_SIGNS}"
    return f"the axis has {x.shape[-1]} elements; {most}" if x.shape[-1] > MOST_OF_SIGNS else None


@implements(
    ops.rotary.hadamard,
    requires=Requires(dtypes=DEVICE_FLOAT, missing=MATMUL.missing),
    why_not=why_not(why_not_hadamard),
)
def hadamard(x: Tensor) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    matrix = signs(x, x.dtype).contiguous()
    # alpha multiplies the float32 sums, so that the signs need no rounding.
    y: Tensor = MATMUL(a=rows, b=matrix, bias=None, c=None, act_mode="none", alpha=scale_of(x), beta=0.0)
    return y.view(x.shape)
