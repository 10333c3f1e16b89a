"""Sparse and latent attention and its indexer on a host: gathers and matrix products in pieces that stay in cache.

Products are in float32 whatever the dtype of the operands: torch rounds the result of a bfloat16 product to bfloat16,
and neither logits nor scores may be rounded so. Extra memory is bounded by the limits below, whatever the context.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT, FLOAT_NAMES
from isolith.numerics.lists import slots_of_columns
from isolith.numerics.pages import FORMATS, entry_dim, format_of
from isolith.numerics.ragged import sequence_of_tokens
from isolith.ops.attention.indexer_score import dequantised as values_of_query
from isolith_backends.cpu.entries import entries_in_slots
from isolith_backends.cpu.scores import largest, score

GATHERED = 16 << 20  # bytes of float32 entries that are gathered at a time
SCORED = 8 << 20  # bytes of scores that are kept for ranking at a time
PAGE = 4 << 20  # bytes of float32 keys that a block may hold
TOKENS = 16  # that share one reading of the keys
RANKED = 4096  # scores from which on a partial selection beats sorting them all

INDEXED = (*DEVICE_FLOAT, torch.float8_e4m3fn, torch.uint8)


def sequences_of(cu_seqlens: Tensor, start_pos: Tensor) -> Iterator[tuple[int, slice, int]]:
    """(sequence, its tokens, position of the first) of every sequence that has tokens in this call."""
    ends = cu_seqlens.tolist()
    for row, first in enumerate(start_pos.tolist()):
        if ends[row + 1] > ends[row]:
            yield row, slice(ends[row], ends[row + 1]), first


def pieces(tokens: slice, most: int) -> Iterator[slice]:
    """The tokens in runs of at most so many."""
    for low in range(tokens.start, tokens.stop, max(1, most)):
        yield slice(low, min(low + max(1, most), tokens.stop))


def attend(
    q: Tensor, pools: list[tuple[Tensor, Tensor]], softmax_scale: float, sink: Tensor | None, value_dim: int
) -> tuple[Tensor, Tensor]:
    """q [tokens, heads, head_dim] over (pool, slots) pairs: (out, lse), both float32."""
    query, entries, logits = q.float(), [], []
    for cache, slots in pools:
        # A weight of 0 does not silence a NaN: an invalid column reads an entry that the token reads anyway.
        invalid, valid_slot = slots < 0, slots.amax(1, keepdim=True)
        kv = entries_in_slots(cache, torch.where(invalid, valid_slot, slots))
        if (valid_slot < 0).any():
            kv[valid_slot[:, 0] < 0] = 0.0
        products = torch.bmm(query, kv.transpose(1, 2)).mul_(softmax_scale)
        logits.append(products.masked_fill_(invalid[:, None, :], -torch.inf))
        entries.append(kv)
    joint = torch.cat(logits, dim=-1)
    largest = joint.amax(-1)
    some = ~largest.isneginf()
    largest = torch.where(some, largest, 0.0)
    weights = joint.sub_(largest[..., None]).exp_()
    total = weights.sum(-1)
    denominator = total if sink is None else total + (sink.float() - largest).exp()
    parts = weights.split([slots.shape[1] for _, slots in pools], dim=-1)
    out = sum(torch.bmm(part, kv[..., :value_dim]) for part, kv in zip(parts, entries, strict=True))
    out = torch.where(some[..., None], out / denominator[..., None], 0.0)
    return out, torch.where(some, largest + total.log(), torch.inf)


def pools_refused(q: Tensor, *caches: Tensor | None) -> WhyNot:
    for cache in caches:
        if cache is None:
            continue
        if cache.numel() == 0:
            return "the pool is empty"
        if cache.dtype != torch.uint8 and not cache.is_contiguous():
            return f"pages of a float pool lie apart; strides {tuple(cache.stride())}"
        if cache.dtype == torch.float64:
            return "the pool is float64; products here are in float32"
    return "no tokens" if q.shape[0] == 0 else None


def listed_pools_refused(
    q: Tensor,
    kv_cache: Tensor,
    indices: Tensor,
    extra_kv_cache: Tensor | None,
    extra_indices: Tensor | None,
    **_: object,
) -> WhyNot:
    columns = indices.shape[1] + (0 if extra_indices is None else extra_indices.shape[1])
    if indices.shape[0] * columns * q.shape[2] < GATHERED // 256:
        return f"{indices.shape[0]} tokens of {columns} columns; the reference takes no longer"
    if any(cache is not None and format_of(cache) is FORMATS[68] for cache in (kv_cache, extra_kv_cache)):
        return "entries of 68 bytes are dequantised for the indexer alone"
    return pools_refused(q, kv_cache, extra_kv_cache)


@implements(ops.attention.sparse_attn, requires=Requires(dtypes=DEVICE_FLOAT), why_not=listed_pools_refused)
def sparse_attn(
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
    tokens, heads, dim = q.shape
    width = value_dim or dim
    sequence = None if cu_seqlens is None else sequence_of_tokens(cu_seqlens, tokens)
    lists = [(kv_cache, indices, topk_length, block_table)]
    if extra_kv_cache is not None and extra_indices is not None:
        lists.append((extra_kv_cache, extra_indices, extra_topk_length, extra_block_table))
    out, lse = q.new_empty(tokens, heads, width), q.new_empty(tokens, heads, dtype=torch.float32)
    columns = sum(listed.shape[1] for _, listed, _, _ in lists)
    for run in pieces(slice(0, tokens), GATHERED // (4 * columns * dim)):
        pools = [
            (cache, slots_of_columns(cache, listed[run], at(length, run), table, at(sequence, run)))
            for cache, listed, length, table in lists
        ]
        out[run], lse[run] = attend(q[run], pools, softmax_scale, sink, width)
    return out, lse


def at(values: Tensor | None, tokens: slice) -> Tensor | None:
    """The part of an optional tensor that belongs to some tokens."""
    return None if values is None else values[tokens]


def keys_refused(q: Tensor, k_cache: Tensor, max_entries: int) -> WhyNot:
    if max_entries < RANKED // 8:
        return f"max_entries={max_entries}; the reference takes no longer below {RANKED // 8}"
    if k_cache.numel() and k_cache.shape[1] * entry_dim(k_cache) * 4 > PAGE:
        return f"block_size={k_cache.shape[1]}; a page of keys must fit in {PAGE} bytes as float32"
    return pools_refused(q, k_cache)


def scores_refused(q: Tensor, k_cache: Tensor, max_entries: int, out_dtype: str, **_: object) -> WhyNot:
    return "out_dtype=float64" if out_dtype == "float64" else keys_refused(q, k_cache, max_entries)


@implements(ops.attention.indexer_score, requires=Requires(dtypes=INDEXED), why_not=scores_refused)
def indexer_score(
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
    out = torch.empty(q.shape[0], max_entries, dtype=FLOAT_NAMES[out_dtype])
    query, factor = values_of_query(q, q_scale, torch.float32), (weights.float() * softmax_scale)[:, None]
    for row, tokens, first in sequences_of(cu_seqlens, start_pos):
        for run in pieces(tokens, min(TOKENS, SCORED // (4 * max(1, max_entries)))):
            counts = counts_of(run, first - tokens.start, ratio)
            scores = out[run] if out_dtype == "float32" else torch.empty(len(counts), max_entries)
            score(scores, query[run], factor[run], k_cache, block_table[row], counts)
            out[run] = scores
    return out


def counts_of(tokens: slice, shift: int, ratio: int) -> Tensor:
    """How many entries each token sees; its position is its number plus `shift`."""
    return (torch.arange(tokens.start, tokens.stop) + (shift + 1)).div(ratio, rounding_mode="floor")


def selection_refused(scores: Tensor, k: int, candidates: Tensor | None, **_: object) -> WhyNot:
    if candidates is not None:
        return "candidates are given"
    if scores.numel() < RANKED or scores.shape[1] < 4 * k:
        return f"k={k} of {tuple(scores.shape)} scores; the reference's sort takes no longer"
    return None


@implements(ops.attention.indexer_topk, requires=Requires(dtypes=DEVICE_FLOAT), why_not=selection_refused)
def indexer_topk(
    scores: Tensor, lengths: Tensor, k: int, candidates: Tensor | None = None, candidate_block: int = 1
) -> tuple[Tensor, Tensor]:
    tokens, entries = scores.shape
    indices, topk_length = torch.empty(tokens, k, dtype=torch.int32), torch.empty(tokens, dtype=torch.int32)
    for run in pieces(slice(0, tokens), SCORED // (scores.itemsize * entries)):
        counts = lengths[run].clamp(0, entries)
        visible = torch.arange(entries) < counts[:, None]
        indices[run], topk_length[run] = largest(torch.where(visible, scores[run], -torch.inf), counts, k)
    return indices, topk_length


def indexer_refused(
    q: Tensor, k_cache: Tensor, max_entries: int, out_dtype: str, candidates: Tensor | None, **_: object
) -> WhyNot:
    if candidates is not None:
        return "candidates are given"
    return "out_dtype=float64" if out_dtype == "float64" else keys_refused(q, k_cache, max_entries)


@implements(ops.attention.lightning_indexer, requires=Requires(dtypes=INDEXED), why_not=indexer_refused)
def lightning_indexer(
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
    indices = torch.full((q.shape[0], k), -1, dtype=torch.int32)
    topk_length = torch.empty(q.shape[0], dtype=torch.int32)
    query, factor = values_of_query(q, q_scale, torch.float32), (weights.float() * softmax_scale)[:, None]
    for row, tokens, first in sequences_of(cu_seqlens, start_pos):
        last = (first + tokens.stop - tokens.start) // ratio
        for run in pieces(tokens, min(TOKENS, SCORED // (4 * max(1, last)))):
            counts = counts_of(run, first - tokens.start, ratio)
            seen = int(counts[-1])
            if seen <= k:  # every visible entry is selected, whatever its score
                entry = torch.arange(seen)
                indices[run, :seen] = torch.where(entry < counts[:, None], entry, -1).int()
                topk_length[run] = counts.int()
                continue
            scores = torch.empty(len(counts), seen)
            score(scores, query[run], factor[run], k_cache, block_table[row], counts)
            indices[run], topk_length[run] = largest(scores.to(FLOAT_NAMES[out_dtype]), counts, k)
    return indices, topk_length
