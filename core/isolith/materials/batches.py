"""Paged pools for samples: values in the items that a call may read, NaN in all others."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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


def batch_of_lists(
    make: Make,
    tokens: Sequence[int],
    items: Sequence[int],
    extra: Sequence[int],
    heads: int,
    dim: int,
    columns: tuple[int, int],
) -> dict[str, Any]:  # Any: arguments
    """Arguments of sparse_attn over two paged pools: tokens of each sequence, items of each in the two pools."""
    count = sum(tokens)
    pool, extra_pool = make.pages(items, 16), make.pages(extra, 61)
    caches = [make.normal(p.blocks, p.block_size, dim) for p in (pool, extra_pool)]
    for cache, pages in zip(caches, (pool, extra_pool), strict=True):
        cache[~torch.isin(torch.arange(pages.blocks, device=make.device), pages.block_table)] = torch.nan
    return {
        "q": make.normal(count, heads, dim),
        "kv_cache": caches[0],
        "indices": make.integers(-3, max(items, default=0) + 32, count, columns[0]),  # some behind the table
        "softmax_scale": dim**-0.5,
        "sink": make.normal(heads, dtype=torch.float32),
        "block_table": pool.block_table,
        "cu_seqlens": make.batch(tokens)[0],
        "extra_kv_cache": caches[1],
        "extra_indices": make.integers(-3, max(extra, default=0) + 122, count, columns[1]),
        "extra_block_table": extra_pool.block_table,
    }
