"""The lightning indexer in C++: indexer.cpp."""

import ctypes

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT, FLOAT_NAMES
from isolith.numerics.pages import entry_dim
from isolith_backends.cpu.native.library import CODES, Library
from isolith_backends.cpu.native.pages import Pool, pool_of

library = Library("indexer")

BLOCK, TILE, LANES = 32, 32, 16  # as in indexer.cpp
HELD = 16 << 20  # bytes of scores that are kept for ranking at a time, where one row does not take more
KINDS = {**CODES, torch.float8_e4m3fn: 3, torch.uint8: 4}
INDEXED = tuple(KINDS)


class Indexer(ctypes.Structure):
    """The struct of indexer.cpp."""

    _fields_ = (
        ("pool", Pool),
        ("q", ctypes.c_void_p),
        ("q_kind", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("q_scale", "weights", "table", "cu_seqlens", "start_pos")),
        *((name, ctypes.c_int64) for name in ("table_width", "sequences", "heads", "dim", "ratio", "max_entries")),
    )


def indexer_of(
    q: Tensor,
    weights: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    max_entries: int,
    softmax_scale: float,
    q_scale: Tensor | None,
) -> tuple[Indexer, list[Tensor]]:
    """The struct, and its tensors, which have to stay until the call."""
    kept = [q, weights.float() * softmax_scale, block_table, cu_seqlens, start_pos]
    if q_scale is not None:
        kept.append(q_scale.float())
    kept = [value.contiguous() for value in kept]
    scale = kept[5].data_ptr() if q_scale is not None else None
    pointers = (kept[0].data_ptr(), KINDS[q.dtype], scale, *(value.data_ptr() for value in kept[1:5]))
    sizes = (block_table.shape[1], start_pos.shape[0], q.shape[1], entry_dim(k_cache), ratio, max_entries)
    return Indexer(pool_of(k_cache), *pointers, *sizes), kept


def words_of(call: Indexer) -> int:
    """What indexer.cpp's Queries and one Tile for each thread take, in units of 4 bytes."""
    units = -(-call.dim // 32) * 32
    queries = BLOCK * (call.heads * (units // 2 + 1) + 1)
    return int(queries + torch.get_num_threads() * units * (LANES + TILE // 2 + TILE + call.heads))


def scratch_of(k: int) -> int:
    """What a Scratch takes."""
    return 4 * (16 * k + 1024 + 3 * LANES)


def listed(candidates: Tensor | None) -> tuple[int, Tensor | None]:
    """How many columns candidates have, and what to pass, which is no null pointer where there are candidates."""
    if candidates is None:
        return 0, None
    columns = candidates.shape[1]
    return columns, candidates.long().contiguous() if candidates.numel() else candidates.new_zeros(1, dtype=torch.int64)


def in_float64(k_cache: Tensor, weights: Tensor, out_dtype: str, **_: object) -> WhyNot:
    if out_dtype == "float64":
        return "out_dtype=float64"
    for name, value in (("k_cache", k_cache), ("weights", weights)):
        if value.dtype == torch.float64:
            return f"{name} is float64; products here are in float32"
    return None


@implements(
    ops.attention.indexer_score,
    requires=Requires(dtypes=INDEXED, missing=library.missing),
    why_not=in_float64,
    batch_invariant=True,
)
def indexer_score_native(
    q: Tensor,
    weights: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    max_entries: int,
    softmax_scale: float = 1.0,
    q_scale: Tensor | None = None,
    out_dtype: str = "float32",
) -> Tensor:
    dtype = FLOAT_NAMES[out_dtype]
    out = q.new_empty((q.shape[0], max_entries), dtype=dtype)
    if out.numel():
        call, kept = indexer_of(
            q, weights, k_cache, block_table, cu_seqlens, start_pos, ratio, max_entries, softmax_scale, q_scale
        )
        room = q.new_empty(words_of(call), dtype=torch.int32)
        library.call("indexer_score", ctypes.addressof(call), dtype, out, room)
        del kept
    return out


@implements(
    ops.attention.indexer_topk,
    requires=Requires(dtypes=DEVICE_FLOAT, missing=library.missing),
    batch_invariant=True,
)
def indexer_topk_native(
    scores: Tensor, lengths: Tensor, k: int, candidates: Tensor | None = None, candidate_block: int = 1
) -> tuple[Tensor, Tensor]:
    tokens, entries = scores.shape
    indices = torch.empty(tokens, k, dtype=torch.int32)
    number = torch.empty(tokens, dtype=torch.int32)
    scores, lengths = scores.contiguous(), lengths.long().contiguous()
    columns, candidates = listed(candidates)
    words = (1 if candidates is None else 3) * -(-entries // LANES) * LANES + scratch_of(min(k, entries))
    room = torch.empty(torch.get_num_threads() * words, dtype=torch.int32)
    library.call(
        *("indexer_topk", scores, scores.dtype, lengths, candidates, columns, candidate_block, tokens, entries, k),
        *(indices, number, room, words),
    )
    return indices, number


@implements(
    ops.attention.lightning_indexer,
    requires=Requires(dtypes=INDEXED, missing=library.missing),
    why_not=in_float64,
    batch_invariant=True,
)
def lightning_indexer_native(
    q: Tensor,
    weights: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    k: int,
    max_entries: int,
    softmax_scale: float = 1.0,
    q_scale: Tensor | None = None,
    out_dtype: str = "float32",
    candidates: Tensor | None = None,
    candidate_block: int = 1,
) -> tuple[Tensor, Tensor]:
    tokens = q.shape[0]
    indices = torch.empty(tokens, k, dtype=torch.int32)
    number = torch.empty(tokens, dtype=torch.int32)
    if not tokens:
        return indices, number
    call, kept = indexer_of(
        q, weights, k_cache, block_table, cu_seqlens, start_pos, ratio, max_entries, softmax_scale, q_scale
    )
    columns, candidates = listed(candidates)
    row = -(-max_entries // TILE) * TILE
    held = max(1, min(BLOCK, tokens, HELD // (4 * max(row, 1))))
    words = words_of(call) + torch.get_num_threads() * scratch_of(min(k, max_entries))
    words += (held if candidates is None else 3) * row
    room = torch.empty(words, dtype=torch.int32)
    library.call(
        *("lightning_indexer", ctypes.addressof(call), FLOAT_NAMES[out_dtype], candidates, columns, candidate_block),
        *(k, indices, number, room, held),
    )
    del kept
    return indices, number
