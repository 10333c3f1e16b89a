"""Gated units, plain, clipped, and with quantisation on both sides.

Source: Ascend/op-plugin 517f2e7d docs (npu_swiglu, npu_clipped_swiglu, npu_dequant_swiglu_quant); vllm-ascend 182b75ea
and cann-recipes-infer fbc225d2, goldens of npu_dequant_swiglu_quant and npu_dequant_swiglu_clamp_quant.
"""

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from isolith_backends.ascend.vendor.rules import FLOATS, need, need_dtype, need_shape, per_token, poison

Form = Literal["plain", "halves", "even and odd"]


def npu_swiglu(input: Tensor, dim: int) -> Tensor:
    name = "npu_swiglu"
    need_dtype(name, "x", input, FLOATS)
    need(name, input.shape[dim] % 2 == 0, f"axis {dim} has {input.shape[dim]} elements, an odd number")
    gate, up = input.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)


def glu(gate: Tensor, up: Tensor, limit: float, alpha: float, bias: float) -> Tensor:
    """The clamped unit; a limit that is not positive clamps nothing."""
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + bias)


def npu_clipped_swiglu(
    x: Tensor, group_index: Tensor | None, dim: int, alpha: float, limit: float, bias: float, interleaved: bool
) -> Tensor:
    """group_index counts the rows of groups; only so many rows are valid."""
    name = "npu_clipped_swiglu"
    need_dtype(name, "x", x, FLOATS)
    need(name, x.shape[dim] % 2 == 0, f"axis {dim} has {x.shape[dim]} elements, an odd number")
    wide = x.float().movedim(dim, -1)
    gate, up = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)
    out = glu(gate, up, limit, alpha, bias).movedim(-1, dim).to(x.dtype)
    if group_index is not None:
        need_dtype(name, "group_index", group_index, (torch.int64,))
        count = int(group_index.sum())
        out = torch.cat((out[:count], poison(out[count:].shape, out.dtype)))
    return out


def npu_dequant_swiglu_quant(
    x: Tensor,
    activate_left: bool,
    swiglu_mode: int,
    forms: tuple[Form, ...],
    group_index: Tensor | None,
    quant_mode: int,
    clamp_limit: float,
    glu_alpha: float,
    glu_bias: float,
    weight_scale: Tensor | None,
    activation_scale: Tensor | None,
    bias: Tensor | None,
    quant_scale: Tensor | None,
    quant_offset: Tensor | None,
    **rest: Any,
) -> tuple[Tensor, Tensor]:
    """int32 products to int8 rows; group_index has counts, and rows behind their sum are undefined."""
    name = "npu_dequant_swiglu_quant"
    need(name, not any(rest.values()), f"{rest} is for newer chips")
    need_dtype(name, "x", x, (torch.int32, *FLOATS))
    need(name, 0 <= swiglu_mode < len(forms), f"swiglu_mode is {swiglu_mode}; there are {list(enumerate(forms))}")
    need(name, x.dim() == 2 and x.shape[1] % 2 == 0 and x.numel() > 0, f"x is {tuple(x.shape)}")
    rows, wide = x.shape[0], x.shape[1]
    groups = torch.tensor([rows]) if group_index is None else group_index
    need_dtype(name, "group_index", groups, (torch.int64,))
    count = int(groups.sum())
    need(name, count <= rows, f"group_index sums to {count}, x has {rows} rows")
    of_row = torch.repeat_interleave(torch.arange(groups.numel()), groups)
    values = x[:count].float()
    if bias is not None:
        need(name, group_index is None, "bias goes without groups")
        need_dtype(name, "bias", bias, (torch.int32,))
        values = (x[:count] + bias).float()
    if weight_scale is not None:
        need_dtype(name, "weight_scale", weight_scale, (torch.float32,))
        need(name, weight_scale.numel() == groups.numel() * wide, f"weight_scale is {tuple(weight_scale.shape)}")
        values = values * weight_scale.view(-1, wide)[of_row]
    if activation_scale is not None:
        need_dtype(name, "activation_scale", activation_scale, (torch.float32,))
        need_shape(name, "activation_scale", activation_scale, (rows, 1))
        values = values * activation_scale[:count]
    form = forms[swiglu_mode]
    if form == "even and odd":
        out = glu(values[:, ::2], values[:, 1::2], clamp_limit, glu_alpha, glu_bias)
    else:
        left, right = values.chunk(2, 1)
        gate, up = (left, right) if activate_left else (right, left)
        plain = form == "plain"
        out = glu(gate, up, 0.0 if plain else clamp_limit, 1.0 if plain else glu_alpha, 0.0 if plain else glu_bias)
    if quant_scale is not None:
        need_dtype(name, "quant_scale", quant_scale, (torch.float32,))
        out = out * quant_scale.view(groups.numel(), -1)[of_row]
    return requantised(out, rows, quant_mode, quant_offset)


def requantised(out: Tensor, rows: int, quant_mode: int, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """(int8 codes, scales) of the rows there are, and poison behind them."""
    need("npu_dequant_swiglu_quant", quant_mode in (0, 1), f"quant_mode is {quant_mode}")
    codes, scale = poison((rows, out.shape[1]), torch.int8), poison((rows,), torch.float32)
    count = out.shape[0]
    if quant_mode == 1:
        codes[:count], scale[:count] = per_token(out)
    else:
        moved = out if offset is None else out + offset
        codes[:count] = moved.round().clamp(-128, 127).to(torch.int8)
    return codes, scale


TORCH_NPU = functools.partial(npu_dequant_swiglu_quant, forms=("plain", "even and odd", "halves"))
EXTENSIONS = functools.partial(npu_dequant_swiglu_quant, forms=("plain", "halves"))
