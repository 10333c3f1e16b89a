"""Compression windows: which entries a call emits, and where the rows of their windows lie.

A compressor of ratio m emits entry w of a sequence with token m*(w+1)-1. It pools the rows of tokens m*w .. m*(w+1)-1;
with overlap also those of the window before, m*(w-1) .. m*w-1. Rows of earlier calls are in a paged state, one per
token; rows before position 0 do not exist.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from isolith.errors import ArgumentError
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


def sources(
    entries: Entries,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    block_table: Tensor,
    block_size: int,
    ratio: int,
    overlap: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the rows are that each entry pools, in ascending order: [rows, m], or [rows, 2m] with overlap.

    Returns:
        token: The token of this call, or -1.
        slot: The slot of the state, or -1.
        missing: The position of a row that an earlier call brought and that has no block, or -1.
    """
    windows = 2 if overlap else 1
    sequence = entries.sequence[:, None]
    offset = torch.arange(windows * ratio, device=cu_seqlens.device)
    position = (entries.window[:, None] - (windows - 1)) * ratio + offset
    start = start_pos.long()[sequence]
    exists = entries.emitted[:, None] & (position >= 0)
    token = torch.where(exists & (position >= start), cu_seqlens.long()[sequence] + position - start, -1)
    earlier = exists & (position < start)
    slot = slots_of_items(block_table, sequence, torch.where(earlier, position, -1), block_size)
    return token, slot, torch.where(earlier & (slot < 0), position, -1)


def check_windows(operator: str, entries: Entries, missing: Tensor, ratio: int, length: int) -> None:
    """Raise ArgumentError for an entry beyond the rotary tables and for rows without a block; reads values."""
    last = int(entries.window.max()) * ratio if entries.window.numel() else -1
    if last >= length:
        raise ArgumentError(f"{operator}: cos_table must reach position ratio*w = {last}; got {length} rows.")
    lost = (missing >= 0).nonzero()
    if len(lost):
        row, column = lost[0].tolist()
        raise ArgumentError(
            f"{operator}: state_block_table must have a block for every row that is read; got none for "
            f"position {int(missing[row, column])} of sequence {int(entries.sequence[row])}."
        )


def write_rows(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Write every row that has a slot (-1 = none), in order: of several with one slot the last one stays."""
    order = slots.argsort(stable=True)
    sorted_slots = slots[order]
    follower = torch.cat((sorted_slots[1:], slots.new_full((1,), -1)))[: len(slots)]
    kept = order[(sorted_slots >= 0) & (sorted_slots != follower)]
    cache[slots[kept] // cache.shape[1], slots[kept] % cache.shape[1]] = rows[kept].to(cache.dtype)


def live_rows(block_table: Tensor, lengths: Tensor, ratio: int, overlap: bool, cache: Tensor) -> Tensor:
    """[blocks, block_size] bool: the rows of `cache` that a later call may read, once `lengths` tokens have been seen.

    They are those of positions m*(floor(L/m) - 1) .. L-1 with overlap, m*floor(L/m) .. L-1 without.
    """
    windows = 2 if overlap else 1
    length = lengths.long()[:, None]
    offset = torch.arange(windows * ratio, device=lengths.device)
    position = (length // ratio - (windows - 1)) * ratio + offset
    sequence = torch.arange(len(lengths), device=lengths.device)[:, None]
    position = torch.where(position < length, position, -1)
    slot = slots_of_items(block_table, sequence, position, cache.shape[1])
    # One place more than the pool has takes what has no slot.
    live = torch.zeros(cache.shape[0] * cache.shape[1] + 1, dtype=torch.bool, device=cache.device)
    live[slot.flatten()] = True
    return live[:-1].reshape(cache.shape[:2])


def check_window_rows(
    operator: str, block_table: Tensor, cu_seqlens: Tensor, start_pos: Tensor, window: int, block_size: int
) -> None:
    """Raise ArgumentError for a ring that is shorter than window + tokens - 1 rows; reads values."""
    ends = (start_pos + cu_seqlens.diff()).tolist()
    for sequence, (start, end) in enumerate(zip(start_pos.tolist(), ends, strict=True)):
        # Only the windows of this call count: those of an idle sequence may be gone.
        first = max(0, start - window + 1) if end > start else end
        position = torch.arange(first, end, device=block_table.device)
        slot = slots_of_items(block_table, start_pos.new_tensor(sequence), position, block_size)
        rows = len(slot[slot >= 0].unique())
        if rows < int((slot >= 0).sum()):
            raise ArgumentError(
                f"{operator}: window_cache must hold positions {first}..{end - 1} of sequence {sequence} at once; "
                f"got {rows} rows."
            )
