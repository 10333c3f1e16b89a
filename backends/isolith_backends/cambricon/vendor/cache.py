"""Paged caches in HND order, [blocks, heads, block_size, dim]: writes, reads and quantisation of tmo 1.12.1
(domesticated_torch_mlu_ops@9fbf7df6 _ops.py). A slot is block * block_size + offset. reshape_paged_cache alone of these
skips negative slots.
"""

import torch
from torch import Tensor

from isolith_backends.cambricon.vendor.quantize import quantized
from isolith_backends.cambricon.vendor.rules import (
    FLOATS,
    need,
    need_dtype,
    need_int32,
    need_none,
    need_shape,
    need_within,
    slots_of,
)


def reshape_paged_cache(
    k: Tensor,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    slot_mapping: Tensor,
    direction: bool = False,
) -> None:
    call = "reshape_paged_cache"
    need((v is None) == (v_cache is None), f"{call}: v and v_cache must be None together.")
    need_int32(call, slot_mapping=slot_mapping)
    for rows, cache in ((k, k_cache), (v, v_cache)):
        if rows is None or cache is None:
            continue
        need_dtype(call, (*FLOATS, torch.int8), k=rows)
        need_dtype(call, (rows.dtype,), k_cache=cache)
        need_shape(call, k=(rows, (slot_mapping.shape[0], cache.shape[1], cache.shape[3])), k_cache=(cache, (-1,) * 4))
        used = slot_mapping >= 0
        block, offset = slots_of(call, cache, slot_mapping[used])
        if direction:
            rows[used] = cache[block, :, offset]
        else:
            cache[block, :, offset] = rows[used]


def reshape_from_cache(
    key: Tensor,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor | None,
    context_lengths: Tensor,
    max_context_len: int,
    context_seq_offset: Tensor | None = None,
    block_tables: Tensor | None = None,
    cache_seq_offset: Tensor | None = None,
) -> None:
    call = "reshape_from_cache"
    need((value is None) == (value_cache is None), f"{call}: value and value_cache must be None together.")
    need_none(call, cache_seq_offset=cache_seq_offset)
    for rows, cache in ((key, key_cache), (value, value_cache)):
        if rows is None or cache is None:
            continue
        need_dtype(call, (*FLOATS, torch.int8), key=rows)
        need_dtype(call, (rows.dtype,), key_cache=cache)
        places = contexts(call, rows, cache, context_lengths, max_context_len, context_seq_offset, block_tables)
        for at, block, offset in places:
            rows[at] = cache[block, :, offset]


def contexts(
    call: str,
    rows: Tensor,
    cache: Tensor,
    lengths: Tensor,
    longest: int,
    first_rows: Tensor | None,
    tables: Tensor | None,
) -> list[tuple[slice, Tensor, Tensor]]:
    """(rows, block, offset) of every sequence's context."""
    need_int32(call, context_lengths=lengths, context_seq_offset=first_rows, block_tables=tables)
    need_none(call, linear_cache=True if tables is None else None)
    assert tables is not None
    need_shape(call, rows=(rows, (-1, cache.shape[1], cache.shape[3])), block_tables=(tables, (lengths.shape[0], -1)))
    places, first, size = [], 0, cache.shape[2]
    for sequence, length in enumerate(lengths.tolist()):
        need(length <= longest, f"{call}: max_context_len is {longest}, but a sequence has {length} entries.")
        first = first if first_rows is None else int(first_rows[sequence])
        need(first + length <= rows.shape[0], f"{call}: the output has {rows.shape[0]} rows; needs {first + length}.")
        entry = torch.arange(length)
        need_within(call, tables.shape[1], column_of_block_tables=entry // size)
        block = tables[sequence][entry // size].long()
        need_within(call, cache.shape[0], block_tables=block)
        places.append((slice(first, first + length), block, entry % size))
        first += length
    return places


def quant_to_paged_cache(
    k: Tensor,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    k_cache_quant_scale: Tensor,
    v_cache_quant_scale: Tensor | None,
    slot_mapping: Tensor,
) -> None:
    call = "quant_to_paged_cache"
    need((v is None) == (v_cache is None), f"{call}: v and v_cache must be None together.")
    need_int32(call, slot_mapping=slot_mapping)
    for rows, cache, scales in ((k, k_cache, k_cache_quant_scale), (v, v_cache, v_cache_quant_scale)):
        if rows is None or cache is None:
            continue
        need(scales is not None, f"{call}: every cache needs scales.")
        assert scales is not None
        need_dtype(call, FLOATS, k=rows)
        need_dtype(call, (torch.int8, torch.float8_e4m3fn), k_cache=cache)
        need_dtype(call, (torch.float32,), k_cache_quant_scale=scales)
        need_shape(call, k=(rows, (slot_mapping.shape[0], cache.shape[1], cache.shape[3])))
        need_shape(call, k_cache_quant_scale=(scales, tuple(cache.shape[:3])))
        block, offset = slots_of(call, cache, slot_mapping)
        codes, scale = quantized(rows.float(), cache.dtype)
        cache.view(torch.int8)[block, :, offset] = codes.view(torch.int8)
        scales[block, :, offset] = scale


def dequant_from_paged_cache(
    key: Tensor,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor | None,
    key_cache_quant_scale: Tensor,
    value_cache_quant_scale: Tensor | None,
    context_lengths: Tensor,
    max_context_len: int,
    context_seq_offset: Tensor | None,
    block_tables: Tensor,
    quant_mode: int = 0,
    quant_bit: int = 8,
) -> None:
    call = "dequant_from_paged_cache"
    need((value is None) == (value_cache is None), f"{call}: value and value_cache must be None together.")
    need(quant_mode in (0, 1, 2), f"{call}: quant_mode must be 0, 1 or 2, but is {quant_mode}.")
    need_none(call, quant_mode=2 if quant_mode == 2 else None, quant_bit=None if quant_bit == 8 else quant_bit)
    for rows, cache, scales in (
        (key, key_cache, key_cache_quant_scale),
        (value, value_cache, value_cache_quant_scale),
    ):
        if rows is None or cache is None or scales is None:
            continue
        need_dtype(call, FLOATS, key=rows)
        need_dtype(call, (torch.int8, torch.float8_e4m3fn), key_cache=cache)
        by_channel = (cache.shape[1], cache.shape[3])
        need_shape(call, key_cache_quant_scale=(scales, tuple(cache.shape[:3]) if quant_mode else by_channel))
        places = contexts(call, rows, cache, context_lengths, max_context_len, context_seq_offset, block_tables)
        for at, block, offset in places:
            codes = cache.view(torch.int8)[block, :, offset].view(cache.dtype).float()
            rows[at] = (codes * (scales[block, :, offset][..., None] if quant_mode else scales)).to(rows.dtype)
