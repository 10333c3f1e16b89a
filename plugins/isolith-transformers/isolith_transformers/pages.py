"""Paged pools of a cache: which blocks each sequence has, and the tensors that the blocks lie in.

A table is shared by all layers that keep the same kind of items (tokens, compressed entries, compressor states); a pool
is one layer's tensor. Tables are kept on the host, since lengths are known there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

REWIND = 16
"""Tokens that can be taken back by `crop`, whatever the calls were."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a table holds, and for how long.

    Args:
        block_size: Items of a block.
        ratio: Tokens of an entry, where items are entries; 0 where they are tokens.
        window: Tokens that a query sees, where the others are forgotten; 0 = all.
        group: Tokens that a compressor pools, where items are its states; 0 where they are not.
        overlap: Whether the compressor pools the group before as well.
    """

    block_size: int
    ratio: int = 0
    window: int = 0
    group: int = 0
    overlap: bool = False

    def items(self, tokens: int) -> int:
        """Items of a sequence of so many tokens."""
        return tokens // self.ratio if self.ratio else tokens

    def live(self, tokens: int) -> int:
        """The first item that a sequence of so many tokens still needs."""
        if self.group:
            return max(0, self.group * (tokens // self.group - int(self.overlap)))
        return max(0, tokens - self.window + 1) if self.window else 0


class Table:
    """The blocks of every sequence: block of item i in column i // block_size, -1 = none."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.rows: list[list[int]] = []
        self.low: list[int] = []  # of each row, a column before which all is dropped
        self.free: list[int] = []
        self.blocks = 0
        self.version = 0
        self.gather: list[int] | None = None  # the old block that each block is, where this version moved them
        self.pending: list[int] | None = None
        self.tensor: Tensor | None = None

    def clear(self, sequences: int) -> None:
        """Forget all items; the blocks stay."""
        self.rows = [[] for _ in range(sequences)]
        self.low = [0] * sequences
        self.free = list(range(self.blocks))
        self.tensor = None

    def select(self, rows: Sequence[int]) -> None:
        """Keep the sequences `rows`, in this order and as often as named; each gets blocks of its own."""
        moved: list[int] = []
        chosen = []
        for row in rows:
            blocks = []
            for block in self.rows[row]:
                blocks.append(-1 if block < 0 else len(moved))
                if block >= 0:
                    moved.append(block)
            chosen.append(blocks)
        self.rows, self.low = chosen, [self.low[row] for row in rows]
        self.pending = moved if self.pending is None else [self.pending[block] for block in moved]
        self.blocks, self.free, self.tensor = len(moved), [], None

    def begin(self, seen: Sequence[int], tokens: Sequence[int]) -> None:
        """Drop what nobody needs any more, and find blocks for the tokens of a call."""
        kind, missing = self.kind, []
        for row, (old, new) in enumerate(zip(seen, tokens, strict=True)):
            self.drop(row, kind.live(max(0, old - REWIND)) // kind.block_size)
            end = old + new
            first = kind.items(old)
            if kind.group:
                # Of the states that a call makes, it writes those that live on and reads none.
                first = max(first, kind.live(max(0, end - REWIND)))
            columns = self.rows[row]
            wanted = -(-kind.items(end) // kind.block_size)
            columns.extend([-1] * (wanted - len(columns)))
            missing += [(row, column) for column in range(first // kind.block_size, wanted) if columns[column] < 0]
        if len(self.free) - len(missing) > 3 * self.blocks // 4:
            # A long prompt has passed through: the pools shrink to what is left of it.
            self.select(range(len(self.rows)))
        grown = max(self.blocks, 1)
        if len(missing) > len(self.free):
            grown = max(self.blocks + len(missing) - len(self.free), self.blocks + self.blocks // 2)
        if self.pending is not None or grown != self.blocks:
            self.version += 1
            self.gather, self.pending = self.pending, None
            self.free += range(self.blocks, grown)
            self.blocks = grown
        for row, column in missing:
            self.rows[row][column] = self.free.pop()
            self.tensor = None

    def drop(self, row: int, column: int) -> None:
        """Free the blocks before a column."""
        columns = self.rows[row]
        for index in range(self.low[row], min(column, len(columns))):
            if columns[index] >= 0:
                self.free.append(columns[index])
                columns[index] = -1
                self.tensor = None
        self.low[row] = max(self.low[row], min(column, len(columns)))

    def holds(self, row: int, length: int) -> bool:
        """Whether all that a sequence of so many tokens needs is there."""
        kind = self.kind
        first, last = kind.live(length) // kind.block_size, -(-kind.items(length) // kind.block_size)
        return all(block >= 0 for block in self.rows[row][first:last])

    def on(self, device: torch.device) -> Tensor:
        """The table as the operators take it: [sequences, columns] int32, at least one column."""
        if self.tensor is None or self.tensor.device != device:
            width = max([1, *map(len, self.rows)])
            rows = [[*row, *[-1] * (width - len(row))] for row in self.rows]
            self.tensor = torch.tensor(rows, dtype=torch.int32, device=device).view(len(rows), width)
        return self.tensor


class Pool:
    """One layer's tensor of one kind of items: [blocks, block_size, width]."""

    def __init__(self, table: Table, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.table = table
        self.version = table.version
        self.entries = blank(table.blocks, table.kind.block_size, width, dtype, device)

    def ready(self) -> Tensor:
        """The tensor, its blocks moved and added as the table says."""
        table = self.table
        if self.version != table.version:
            old = self.entries
            if table.gather is not None:
                old = old[torch.tensor(table.gather, dtype=torch.long, device=old.device)]
            self.entries = blank(table.blocks, old.shape[1], old.shape[2], old.dtype, old.device)
            self.entries[: len(old)] = old
            self.version = table.version
        return self.entries


def blank(blocks: int, block_size: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Blocks that nobody has written: operators never read them."""
    return torch.empty(blocks, block_size, width, dtype=dtype, device=device)


def slots_of(table: Tensor, sequence: Tensor, items: Tensor, block_size: int) -> Tensor:
    """Slots of the sequences' items; -1 where there is no block or the item is -1."""
    block = table[sequence, items.clamp(min=0) // block_size]
    slot = block * block_size + items % block_size
    return torch.where((items >= 0) & (block >= 0), slot, -1).to(torch.int32)
