"""Activations: active and moe_active of tmo 1.12.1 (domesticated_torch_mlu_ops@9fbf7df6 _ops.py)."""

import torch
from torch import Tensor
from torch.nn import functional

from isolith_backends.cambricon.vendor.rules import FLOATS, need, need_dtype, need_int32, need_none, need_shape

MODES = ("silu", "gelu", "swish")


def active(
    input: Tensor,
    act_mode: str,
    is_gated: bool,
    active_coef: float = 1.0,
    high_precision: bool = False,
    gelu_approximate: str = "none",
) -> Tensor:
    need_dtype("active", FLOATS, input=input)
    return activated(input.float(), act_mode, is_gated, active_coef, 0, gelu_approximate).to(input.dtype)


def moe_active(
    input: Tensor,
    act_mode: str,
    is_gated: bool,
    output: Tensor | None = None,
    bias: Tensor | None = None,
    cusum_token_count: Tensor | None = None,
    start_expert_id: int = 0,
    expert_size: int = 0,
    high_precision: bool = False,
    gelu_approximate: str = "none",
    swiglu_limit: int = 0,
    weight: Tensor | None = None,
) -> Tensor:
    call = "moe_active"
    need_dtype(call, FLOATS, input=input)
    whole = isinstance(swiglu_limit, int) and not isinstance(swiglu_limit, bool)
    need(whole, f"{call}: swiglu_limit must be int, but is {type(swiglu_limit).__name__}.")
    need(0 <= swiglu_limit < 256, f"{call}: swiglu_limit must lie in [0, 256), but is {swiglu_limit}.")
    need_none(call, weight=weight)  # its shape is not public
    rows = input.float()
    if bias is not None:
        rows = rows + bias_of_rows(call, input, bias, cusum_token_count, start_expert_id, expert_size)
    result = activated(rows, act_mode, is_gated, 1.0, swiglu_limit, gelu_approximate).to(input.dtype)
    if output is None:
        return result
    need_dtype(call, (input.dtype,), output=output)
    need_shape(call, output=(output, tuple(result.shape)))
    return output.copy_(result)


def bias_of_rows(
    call: str, input: Tensor, bias: Tensor, cusum: Tensor | None, start_expert_id: int, expert_size: int
) -> Tensor:
    """The bias [global expert, C] of every row; rows count from 0 at the first expert of this rank."""
    need(cusum is not None, f"{call}: bias needs cusum_token_count.")
    assert cusum is not None
    need_int32(call, cusum_token_count=cusum)
    need_shape(call, bias=(bias, (cusum.shape[0] - 1, input.shape[-1])))
    local = slice(start_expert_id, start_expert_id + expert_size)
    added = torch.full(input.shape, torch.nan)
    counts = cusum.long().diff()[local]
    added[: int(counts.sum())] = bias.float()[local].repeat_interleave(counts, 0)
    return added


def activated(
    rows: Tensor, act_mode: str, is_gated: bool, active_coef: float, limit: int, approximate: str = "none"
) -> Tensor:
    """act(gate) * up of float32 rows [gate, up], the gate clamped above and up on both sides by a limit; 0 is none."""
    need(act_mode in MODES, f"active: act_mode must be one of {MODES}, but is {act_mode!r}.")
    need(not is_gated or rows.shape[-1] % 2 == 0, f"active: the last dimension must be even, but is {rows.shape[-1]}.")
    gate, up = rows.chunk(2, dim=-1) if is_gated else (rows, None)
    if limit:
        gate = gate.clamp(max=limit)
        up = None if up is None else up.clamp(-limit, limit)
    if act_mode == "gelu":
        value = functional.gelu(gate, approximate=approximate)
    else:
        value = gate * torch.sigmoid(gate * active_coef if act_mode == "swish" else gate)
    return value if up is None else value * up
