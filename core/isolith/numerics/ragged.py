"""Ragged batches: flat tokens of several sequences, each at its own position.

Sequence b owns tokens cu_seqlens[b] .. cu_seqlens[b+1]-1 of the call; token t of it is at position
start_pos[b] + t - cu_seqlens[b]. Sequences without tokens are legal.
"""

from itertools import pairwise

import torch
from torch import Tensor

from isolith.errors import ArgumentError


def sequence_of_tokens(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The sequence that each token belongs to: [tokens] int64."""
    token = torch.arange(tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long().contiguous(), token, right=True)


def positions_of_tokens(cu_seqlens: Tensor, start_pos: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """(sequence, position) of each token: [tokens] int64 each."""
    sequence = sequence_of_tokens(cu_seqlens, tokens)
    token = torch.arange(tokens, device=cu_seqlens.device)
    return sequence, start_pos.long()[sequence] + token - cu_seqlens.long()[sequence]


def items_of_spans(first: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """(sequence, item) of the items first[b] .. end[b]-1 of every sequence, one sequence after the other."""
    counts = (end - first).clamp(min=0).long()
    sequence = torch.arange(len(counts), device=first.device).repeat_interleave(counts)
    offset = torch.arange(len(sequence), device=first.device) - (counts.cumsum(0) - counts)[sequence]
    return sequence, first.long()[sequence] + offset


def check_cu_seqlens(operator: str, cu_seqlens: Tensor, tokens: int) -> None:
    """Raise ArgumentError unless cu_seqlens starts at 0, never decreases and ends at `tokens`; reads values."""
    values = cu_seqlens.tolist()
    if not values or values[0] != 0:
        raise ArgumentError(f"{operator}: cu_seqlens must start at 0; got {values[0] if values else 'no element'}.")
    for row, (low, high) in enumerate(pairwise(values)):
        if high < low:
            raise ArgumentError(f"{operator}: cu_seqlens must not decrease; got {low}, {high} at {row}.")
    if values[-1] != tokens:
        raise ArgumentError(f"{operator}: cu_seqlens must end at the number of tokens, {tokens}; got {values[-1]}.")


def check_start_pos(operator: str, start_pos: Tensor) -> None:
    """Raise ArgumentError for a negative start position; reads values."""
    if start_pos.numel() and int(start_pos.min()) < 0:
        raise ArgumentError(f"{operator}: start_pos must not be negative; got {int(start_pos.min())}.")
