"""Attention over listed entries in C++: attention.cpp."""

import ctypes

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT
from isolith_backends.cpu.native.library import Library
from isolith_backends.cpu.native.pages import Pool, pool_of

library = Library("attention")

TILE, LANES = 128, 16  # as in attention.cpp


class Listed(ctypes.Structure):
    """The struct of attention.cpp."""

    _fields_ = (
        ("pool", Pool),
        ("indices", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("wide", "stride", "columns")),
        ("lengths", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("table_width", "window", "ratio")),
    )


Kept = tuple[Tensor | None, ...]
"""What has to stay until the call."""


def described(
    listed: Listed,
    cache: Tensor,
    indices: Tensor | None,
    length: Tensor | None,
    table: Tensor | None,
    window: int = 0,
    ratio: int = 0,
) -> Kept:
    """Fill in a Listed; without indices a token sees its window, or one entry for every `ratio` positions."""
    listed.columns = -1
    if indices is not None:
        indices = indices if indices.stride(1) == 1 else indices.contiguous()
        listed.indices, listed.columns = indices.data_ptr(), indices.shape[1]
        listed.wide, listed.stride = indices.dtype == torch.int64, indices.stride(0)
    if length is not None:
        length = length.long().contiguous()
        listed.lengths = length.data_ptr()
    if table is not None:
        table = table.contiguous()
        listed.table, listed.table_width = table.data_ptr(), table.shape[1]
    listed.pool, listed.window, listed.ratio = pool_of(cache), window, ratio
    return indices, length, table


def attend(
    q: Tensor,
    lists: ctypes.Array[Listed],
    number: int,
    softmax_scale: float,
    sink: Tensor | None,
    cu_seqlens: Tensor | None,
    start_pos: Tensor | None,
    width: int,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of q over the first `number` lists, with start_pos where they say which entries a token sees."""
    tokens, heads, dim = q.shape
    out, lse = q.new_empty(tokens, heads, width), q.new_empty(tokens, heads, dtype=torch.float32)
    if not lse.numel():
        return out, lse
    q = q.contiguous()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    start_pos = None if start_pos is None else start_pos.contiguous()
    sink = None if sink is None else sink.contiguous()
    threads, vectors = torch.get_num_threads(), -(-heads // LANES)
    parts = min(vectors, -(-threads // tokens))
    bytes_each = room_of(heads, dim, width)
    room = q.new_empty((min(threads, tokens * parts), bytes_each), dtype=torch.uint8)
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    library.call(
        *("sparse_attn", q, q.dtype, ctypes.addressof(lists), number, cu_seqlens, start_pos, sequences),
        *(softmax_scale, sink, out, lse, tokens, heads, dim, width, parts, room, bytes_each),
    )
    return out, lse


def room_of(heads: int, dim: int, width: int) -> int:
    """Bytes that attention.cpp's Room takes, and some for the ends of its parts."""
    lanes, units, channels = -(-heads // LANES) * LANES, -(-dim // 32) * 32, -(-width // LANES) * LANES
    words = units * lanes // 2 + units * lanes + TILE * units + TILE // 2 * channels + TILE * lanes + lanes * channels
    return 4 * (words + 3 * lanes) + 64 * 16


def pools_refused(
    kv_cache: Tensor, extra_kv_cache: Tensor | None = None, sink: Tensor | None = None, **_: object
) -> WhyNot:
    for name, value in (("kv_cache", kv_cache), ("extra_kv_cache", extra_kv_cache), ("sink", sink)):
        if value is not None and value.dtype == torch.float64:
            return f"{name} is float64; products here are in float32"
    return None


@implements(
    ops.attention.sparse_attn,
    requires=Requires(dtypes=DEVICE_FLOAT, missing=library.missing),
    why_not=pools_refused,
    batch_invariant=True,
)
def sparse_attn_native(
    q: Tensor,
    kv_cache: Tensor,
    indices: Tensor,
    softmax_scale: float,
    sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    block_table: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    extra_kv_cache: Tensor | None = None,
    extra_indices: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    extra_block_table: Tensor | None = None,
    value_dim: int = 0,
) -> tuple[Tensor, Tensor]:
    lists = (Listed * 2)()
    kept = [described(lists[0], kv_cache, indices, topk_length, block_table)]
    if extra_kv_cache is not None and extra_indices is not None:
        kept.append(described(lists[1], extra_kv_cache, extra_indices, extra_topk_length, extra_block_table))
    return attend(q, lists, len(kept), softmax_scale, sink, cu_seqlens, None, value_dim or q.shape[2])


def caches_refused(window_cache: Tensor, compressed_cache: Tensor | None, sink: Tensor | None, **_: object) -> WhyNot:
    return pools_refused(window_cache, compressed_cache, sink)


@implements(
    ops.attention.hybrid_attention,
    requires=Requires(dtypes=DEVICE_FLOAT, missing=library.missing),
    why_not=caches_refused,
    batch_invariant=True,
)
def hybrid_attention_native(
    q: Tensor,
    window_cache: Tensor,
    window_block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    window: int,
    softmax_scale: float,
    sink: Tensor | None = None,
    ratio: int = 0,
    compressed_cache: Tensor | None = None,
    compressed_block_table: Tensor | None = None,
    topk_indices: Tensor | None = None,
    topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    lists = (Listed * 2)()
    kept = [described(lists[0], window_cache, None, None, window_block_table, window=window)]
    if compressed_cache is not None:
        kept.append(
            described(lists[1], compressed_cache, topk_indices, topk_length, compressed_block_table, ratio=ratio)
        )
    return attend(q, lists, len(kept), softmax_scale, sink, cu_seqlens, start_pos, q.shape[2])
