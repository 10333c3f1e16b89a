"""Rotary embedding: apply_rotary of tmo 1.12.1 (domesticated_torch_mlu_ops@9fbf7df6 _ops.py).

Both tables have the full rotary width, so each frequency stands in them twice, and sin comes first. Three ways to say
where tokens are: their positions; the bounds of sequences that begin at 0 or at given positions; positions and bounds
(xllm@3906f5a9 and vllm-mlu@b9925203, by their calls).
"""

import torch
from torch import Tensor

from isolith_backends.cambricon.vendor.rules import (
    FLOATS,
    need,
    need_dtype,
    need_int32,
    need_none,
    need_shape,
    need_within,
)


def apply_rotary(
    input: Tensor,
    sin_cache: Tensor,
    cos_cache: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    discrete: bool,
    dynamic_ntk: bool,
    max_seqlen: int,
    output: Tensor | None = None,
    is_inverse: bool = False,
) -> Tensor:
    call = "apply_rotary"
    need_dtype(call, FLOATS, input=input)
    need_dtype(call, (input.dtype,), sin_cache=sin_cache, cos_cache=cos_cache, output=output)
    need_int32(call, position_ids=position_ids, cu_seqlens=cu_seqlens)
    need_none(call, dynamic_ntk=dynamic_ntk or None, padded_input=None if input.dim() == 3 else input.shape)
    head, width = input.shape[-1], sin_cache.shape[-1]
    need(2 <= head <= 256, f"{call}: head_size must lie in [2, 256], but is {head}.")
    need(
        width % 2 == 0 and width <= head, f"{call}: the tables' width must be even and at most {head}, but is {width}."
    )
    need_shape(call, sin_cache=(sin_cache, (-1, width)), cos_cache=(cos_cache, tuple(sin_cache.shape)))
    need_shape(call, output=(output, tuple(input.shape)))
    position = positions_of(call, input.shape[0], position_ids, cu_seqlens, discrete, max_seqlen)
    need_within(call, sin_cache.shape[0], position_ids=position)
    sin, cos = sin_cache[position].float()[:, None], cos_cache[position].float()[:, None]
    target = input if output is None else output
    rotated = rotate(input[..., :width].float(), -sin if is_inverse else sin, cos, interleaved)
    target[..., :width] = rotated.to(input.dtype)
    return target


def positions_of(
    call: str, tokens: int, position_ids: Tensor | None, cu_seqlens: Tensor | None, discrete: bool, max_seqlen: int
) -> Tensor:
    """The position of every token."""
    if cu_seqlens is not None:
        batch, lengths = cu_seqlens.shape[0] - 1, cu_seqlens.long().diff()
        need(batch <= 10240, f"{call}: batch must be at most 10240, but is {batch}.")
        longest = int(lengths.max()) if batch else 0
        need(longest <= max_seqlen, f"{call}: max_seqlen is {max_seqlen}, but a sequence has {longest} tokens.")
        need(int(cu_seqlens[-1]) == tokens, f"{call}: cu_seqlens ends at {int(cu_seqlens[-1])} of {tokens} tokens.")
    if discrete:
        need(position_ids is not None, f"{call}: discrete needs position_ids.")
        assert position_ids is not None
        need_shape(call, position_ids=(position_ids, (tokens,)))
        need(
            cu_seqlens is not None or max_seqlen == tokens, f"{call}: max_seqlen must be {tokens}, but is {max_seqlen}."
        )
        return position_ids.long()
    need(cu_seqlens is not None, f"{call}: packed input that is not discrete needs cu_seqlens.")
    assert cu_seqlens is not None
    need_shape(call, position_ids=(position_ids, (batch,)))
    start = torch.zeros(batch, dtype=torch.long) if position_ids is None else position_ids.long()
    shift = (start - cu_seqlens[:-1].long()).repeat_interleave(lengths)
    return torch.arange(tokens) + shift


def rotate(x: Tensor, sin: Tensor, cos: Tensor, interleaved: bool) -> Tensor:
    """Pairs (2i, 2i+1), or (i, i + half), by the tables' own entries for each of the two."""
    if interleaved:
        other = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        other = torch.cat((-second, first), dim=-1)
    return x * cos + other * sin
