"""Compression windows: which entries a call emits, and where the rows of their windows lie.

A compressor of ratio m emits entry w of a sequence with token m*(w+1)-1. It pools the rows of tokens m*w .. m*(w+1)-1;
with overlap also those of the window before, m*(w-1) .. m*w-1. Rows of earlier calls are in a paged state, one per
token; rows before position 0 do not exist.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from isolith.errors import ArgumentError
from isolith.numerics.pages import check_held, slots_of_items
from isolith.numerics.ragged import items_of_spans


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


def sources(
    entries: Entries,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    state: Tensor,
    block_table: Tensor,
    ratio: int,
    overlap: bool,
) -> tuple[Tensor, Tensor]:
    """Where the rows are that each entry pools, in ascending order: [rows, m], or [rows, 2m] with overlap.

    Returns:
        token: The token of this call, or -1.
        slot: The slot of the state, or -1.
    """
    windows = 2 if overlap else 1
    sequence = entries.sequence[:, None]
    offset = torch.arange(windows * ratio, device=cu_seqlens.device)
    position = (entries.window[:, None] - (windows - 1)) * ratio + offset
    start = start_pos.long()[sequence]
    exists = entries.emitted[:, None] & (position >= 0)
    token = torch.where(exists & (position >= start), cu_seqlens.long()[sequence] + position - start, -1)
    earlier = torch.where(exists & (position < start), position, -1)
    return token, slots_of_items(block_table, sequence, earlier, state.shape[1])


def check_windows(
    operator: str,
    state: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    overlap: bool,
    length: int,
) -> None:
    """Raise ArgumentError for an entry beyond the `length` rows of the rotary tables, and for rows of earlier calls
    that are read but have no slot of their own; reads values.
    """
    first, behind = start_pos // ratio, (start_pos + cu_seqlens.diff()) // ratio
    emits = behind > first
    # Rows that no entry fills are rotated at position 0.
    last = int(torch.where(emits, behind - 1, 0).max()) * ratio if int(cu_seqlens[-1]) else -1
    if last >= length:
        raise ArgumentError(f"{operator}: cos_table must reach position ratio*w = {last}; got {length} rows.")
    oldest = ((first - int(overlap)) * ratio).clamp(min=0)
    sequence, position = items_of_spans(torch.where(emits, oldest, start_pos), start_pos)
    lost = (slots_of_items(block_table, sequence, position, state.shape[1]) < 0).nonzero()
    if len(lost):
        raise ArgumentError(
            f"{operator}: state_block_table must have a block for every row that is read; got none for "
            f"position {int(position[lost[0]])} of sequence {int(sequence[lost[0]])}."
        )
    check_held(operator, "state_cache", state, block_table, sequence, position)


def write_rows(state: Tensor, block_table: Tensor, sequence: Tensor, position: Tensor, rows: Tensor) -> None:
    """Write the row of every token that has a slot, in order: of several with one slot the last one stays."""
    slots = slots_of_items(block_table, sequence, position, state.shape[1])
    order = slots.argsort(stable=True)
    sorted_slots = slots[order]
    follower = torch.cat((sorted_slots[1:], slots.new_full((1,), -1)))[: len(slots)]
    kept = order[(sorted_slots >= 0) & (sorted_slots != follower)]
    state[slots[kept] // state.shape[1], slots[kept] % state.shape[1]] = rows[kept].to(state.dtype)


def live_rows(state: Tensor, block_table: Tensor, lengths: Tensor, ratio: int, overlap: bool) -> Tensor:
    """[blocks, block_size] bool: the rows that a later call may read, once `lengths` tokens have been seen.

    They are those of positions m*(floor(L/m) - 1) .. L-1 with overlap, m*floor(L/m) .. L-1 without.
    """
    windows = 2 if overlap else 1
    length = lengths.long()[:, None]
    offset = torch.arange(windows * ratio, device=lengths.device)
    position = (length // ratio - (windows - 1)) * ratio + offset
    sequence = torch.arange(len(lengths), device=lengths.device)[:, None]
    position = torch.where(position < length, position, -1)
    slot = slots_of_items(block_table, sequence, position, state.shape[1])
    # One place more than the pool has takes what has no slot.
    live = torch.zeros(state.shape[0] * state.shape[1] + 1, dtype=torch.bool, device=state.device)
    live[slot.flatten()] = True
    return live[:-1].reshape(state.shape[:2])
