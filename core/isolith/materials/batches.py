"""Paged pools for samples: values in the items that a call may read, NaN in all others."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from isolith.numerics.pages import slots_of_items
from isolith.sample import Make, Pages


def pages_or_ring(make: Make, ends: Sequence[int], block_size: int, ring: int = 0) -> Pages:
    """Shuffled blocks for items 0 .. ends[b]-1 of every sequence, or one block of `ring` rows named again and again."""
    pages = make.pages([ring or end for end in ends], ring or block_size)
    if not ring:
        return pages
    return replace(pages, block_table=pages.block_table.repeat(1, max(ends, default=0) // ring + 1))


def pool_of_items(
    make: Make, items: Sequence[range], block_size: int, width: int, ring: int = 0
) -> tuple[Tensor, Tensor]:
    """(pool, block table) with normal values in so many items of every sequence."""
    pages = pages_or_ring(make, [owned.stop for owned in items], block_size, ring)
    pool = make.full(torch.nan, pages.blocks, pages.block_size, width)
    for row, owned in enumerate(items):
        sequence = torch.tensor(row, device=make.device)
        item = torch.arange(owned.start, owned.stop, device=make.device)
        slots = slots_of_items(pages.block_table, sequence, item, pages.block_size)
        pool[slots // pages.block_size, slots % pages.block_size] = make.normal(len(owned), width)
    return pool, pages.block_table
