"""Compression windows: which entries a call emits, and where the rows of their windows lie.

A compressor of ratio m emits entry w of a sequence with token m*(w+1)-1. It pools the rows of tokens m*w .. m*(w+1)-1;
with overlap also those of the window before, m*(w-1) .. m*w-1. Rows of earlier calls are in a paged state, one per
token; rows before position 0 do not exist.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from isolith.numerics.pages import slots_of_items


@dataclass(frozen=True, kw_only=True)
class Entries:
    """The entries that a call emits, packed by sequence, then by window.

    Args:
        sequence: [rows] int64, the sequence of each row; the last one where nothing is emitted.
        window: [rows] int64, the window w of each row; 0 where nothing is emitted.
        emitted: [rows] bool; False from cu_entries[sequences] on.
        cu_entries: [sequences+1] int64, where the rows of each sequence start.
    """

    sequence: Tensor
    window: Tensor
    emitted: Tensor
    cu_entries: Tensor


def max_entries_of_call(tokens: int, sequences: int, ratio: int) -> int:
    """The most entries that so many tokens can emit, however they lie: min(T, floor(T/m) + B)."""
    most: int = torch.sym_min(tokens, tokens // ratio + sequences)
    return most


def entries_of_call(cu_seqlens: Tensor, start_pos: Tensor, tokens: int, ratio: int) -> Entries:
    """Windows floor(s/m) .. floor(e/m)-1 of every sequence, whose tokens of this call are at positions s .. e-1."""
    start = start_pos.long()
    first = start // ratio
    counts = (start + cu_seqlens.long().diff()) // ratio - first
    cu_entries = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    row = torch.arange(max_entries_of_call(tokens, len(start), ratio), device=start.device)
    emitted = row < cu_entries[-1]
    sequence = torch.searchsorted(cu_entries[1:].contiguous(), row, right=True).clamp(max=len(start) - 1)
    window = torch.where(emitted, first[sequence] + row - cu_entries[sequence], 0)
    return Entries(sequence=sequence, window=window, emitted=emitted, cu_entries=cu_entries)


def window_positions(entries: Entries, ratio: int, overlap: bool) -> Tensor:
    """Positions that each entry pools, ascending: [rows, m], or [rows, 2m] with overlap; below 0 = no such token."""
    windows = 2 if overlap else 1
    offset = torch.arange(windows * ratio, device=entries.window.device)
    return (entries.window[:, None] - (windows - 1)) * ratio + offset


def window_sources(
    entries: Entries, positions: Tensor, cu_seqlens: Tensor, start_pos: Tensor, block_table: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """(token of this call, slot of the state) of each position: one of them, or -1 in both where there is no row."""
    sequence = entries.sequence[:, None]
    start = start_pos.long()[sequence]
    emitted = entries.emitted[:, None]
    of_this_call = positions >= start
    token = torch.where(emitted & of_this_call, cu_seqlens.long()[sequence] + positions - start, -1)
    slot = slots_of_items(block_table, sequence, positions, block_size)
    return token, torch.where(emitted & ~of_this_call, slot, -1)


def live_rows(block_table: Tensor, lengths: Tensor, ratio: int, overlap: bool, blocks: int, block_size: int) -> Tensor:
    """[blocks, block_size] bool: the state rows that a later call may read, once `lengths` tokens have been seen.

    They are those of positions m*(floor(L/m) - 1) .. L-1 with overlap, m*floor(L/m) .. L-1 without.
    """
    windows = 2 if overlap else 1
    length = lengths.long()[:, None]
    offset = torch.arange(windows * ratio, device=lengths.device)
    position = (length // ratio - (windows - 1)) * ratio + offset
    sequence = torch.arange(len(lengths), device=lengths.device)[:, None]
    slot = slots_of_items(block_table, sequence, torch.where(position < length, position, -1), block_size)
    # One more place than the pool has takes what has no slot.
    live = torch.zeros(blocks * block_size + 1, dtype=torch.bool, device=lengths.device)
    live[slot.flatten()] = True
    return live[:-1].unflatten(0, (blocks, block_size))
