"""Paged caches of keys and values in the order [blocks, block, heads, dim].

Source: Ascend/op-plugin 517f2e7d docs of npu_scatter_pa_kv_cache and npu_gather_pa_kv_cache.
"""

import torch
from torch import Tensor

from isolith_backends.ascend.vendor.paged import rows_of_pages
from isolith_backends.ascend.vendor.rules import need, need_dtype, need_shape

INDICES = (torch.int32, torch.int64)


def npu_scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    compress_lens: Tensor | None,
    compress_seq_offsets: Tensor | None,
    seq_lens: Tensor | None,
    cache_mode: str | None,
) -> None:
    """cache_mode "Norm" alone: "PA_NZ", the default, means caches in fractal blocks, which no twin has."""
    name = "npu_scatter_pa_kv_cache"
    need(name, cache_mode == "Norm", f"cache_mode is {cache_mode!r}; this twin's caches are 'Norm'")
    extras = (compress_lens, compress_seq_offsets, seq_lens)
    need(name, all(extra is None for extra in extras), "compression is not in this twin")
    need_dtype(name, "slot_mapping", slot_mapping, INDICES)
    need_shape(name, "slot_mapping", slot_mapping, (key.shape[0],))
    for rows, cache in ((key, key_cache), (value, value_cache)):
        need_dtype(name, "the cache", cache, (rows.dtype,))
        need(name, cache.dim() == 4 and cache.is_contiguous(), f"the cache is {tuple(cache.shape)} {cache.stride()}")
        need_shape(name, "rows", rows, (-1, *cache.shape[2:]))
        flat = cache.view(-1, *cache.shape[2:])
        slots = slot_mapping.long()
        need(
            name, bool((slots < flat.shape[0]).all()), f"slot {int(slots.max())} of {flat.shape[0]} (aicore exception)"
        )
        flat[slots[slots >= 0]] = rows[slots >= 0]


def npu_gather_pa_kv_cache(
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    key: Tensor,
    value: Tensor,
    seq_offset: Tensor | None,
    is_seq_lens_cumsum: bool,
) -> None:
    """Rows of all requests, one request behind the other; seq_lens plain, or cumulated with a leading 0."""
    name = "npu_gather_pa_kv_cache"
    need(name, seq_offset is None, "seq_offset is not in this twin")
    for which, tensor in (("block_tables", block_tables), ("seq_lens", seq_lens)):
        need_dtype(name, which, tensor, INDICES)
    lengths = (torch.diff(seq_lens) if is_seq_lens_cumsum else seq_lens).tolist()
    need(name, len(lengths) == block_tables.shape[0], f"{len(lengths)} lengths, {block_tables.shape[0]} tables")
    for cache, out in ((key_cache, key), (value_cache, value)):
        need(name, sum(lengths) <= out.shape[0], f"{sum(lengths)} rows, room for {out.shape[0]} (aicore exception)")
        at = 0
        for request, length in enumerate(lengths):
            rows = rows_of_pages(cache, block_tables[request], torch.arange(length))
            out[at : at + length] = rows.view(length, *cache.shape[2:])
            at += length
