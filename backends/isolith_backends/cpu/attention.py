"""Sparse and latent attention and its indexer on a host: gathers and matrix products in pieces that stay in cache.

Products are in float32 whatever the dtype of the operands: torch rounds the result of a bfloat16 product to bfloat16,
and neither logits nor scores may be rounded so. Extra memory is bounded by the limits below, whatever the context.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import FLOAT_NAMES
from isolith.numerics.lists import slots_of_columns
from isolith.numerics.pages import FORMATS, ROPE, Format, entry_dim, format_of, views
from isolith.numerics.ragged import sequence_of_tokens
from isolith.ops.attention.indexer_score import dequantised as values_of_query

GATHERED = 16 << 20  # bytes of float32 entries that are gathered at a time
SCORED = 8 << 20  # bytes of scores that are kept for ranking at a time
PIECE = 1 << 20  # bytes of products at a time: what a second-level cache holds
TOKENS = 16  # that share one reading of the keys
RANKED = 4096  # scores from which on a partial selection beats sorting them all

FAST = (torch.float32, torch.bfloat16, torch.float16)
INDEXED = (*FAST, torch.float8_e4m3fn, torch.uint8)


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


def entries_of_blocks(cache: Tensor, blocks: Tensor) -> Tensor:
    """All entries of some blocks in order, in float32; -1 reads block 0, which its owner has to make harmless."""
    pages = cache.index_select(0, blocks.clamp(min=0).long())
    layout = format_of(pages)
    if layout is None:
        return pages.flatten(0, 1).float()
    return dequantised(*views(pages, layout), layout).flatten(0, 1)


def dequantised(data: Tensor, scales: Tensor, layout: Format) -> Tensor:
    """Entries from their bytes, in float32; the elements of 68-byte ones in the order 0, 2, .., 126, 1, 3, .., 127.

    A code becomes a float16 by two operations on its bits, where a cast or a table takes ten times as long: sign
    extended to 16 bits, shifted, and cleared between sign and exponent. The two NaN codes of e4m3 read as 480.
    """
    codes = data[..., : layout.code_bytes].contiguous()
    if layout.entry == 68:
        codes = torch.cat((codes << 4, codes), dim=-1)  # the code of each byte's lower and upper half on top
        shift, kept, bias = 5, -0x7200, 2.0**14  # exponents of e2m1 count from 1, of float16 from 15
        groups, group = 2 * layout.scales, layout.group // 2
    else:
        shift, kept, bias = 7, -0x4001, 2.0**8  # exponents of e4m3 count from 7
        groups, group = layout.scales, layout.group
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(shift).bitwise_and_(kept)
    factor = scales[..., : layout.scales * layout.scale_dtype.itemsize].contiguous()
    if layout.scale_dtype == torch.float32:
        factor = factor.view(torch.float32) * bias
    else:
        factor = (factor.int() << 23).view(torch.float32) * bias  # a ue8m0 byte is a float32 exponent
    if layout.entry == 68:
        factor = torch.cat((factor, factor), dim=-1)
    scaled: Tensor = bits.view(torch.float16).unflatten(-1, (groups, group)) * factor[..., None]
    values = scaled.flatten(-2)
    if layout.dim == layout.quantised:
        return values
    rope = data[..., layout.data_bytes - 2 * ROPE :].contiguous().view(torch.bfloat16)
    return torch.cat((values, rope.float()), dim=-1)


def entries_in_slots(cache: Tensor, slots: Tensor) -> Tensor:
    """The entries in [tokens, n] slots, in float32; -1 gives some entry of the pool."""
    layout, slot = format_of(cache), slots.clamp(min=0)
    if layout is None:
        rows = cache.view(-1, cache.shape[2]).index_select(0, slot.flatten())
        return rows.float().view(*slots.shape, -1)
    data, scales = views(cache, layout)
    block, row = slot // cache.shape[1], slot % cache.shape[1]
    return dequantised(data[block, row], scales[block, row], layout)


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
) -> WhyNot:
    columns = indices.shape[1] + (0 if extra_indices is None else extra_indices.shape[1])
    if indices.shape[0] * columns * q.shape[2] < GATHERED // 256:
        return f"{indices.shape[0]} tokens of {columns} columns; the reference takes no longer"
    if any(cache is not None and format_of(cache) is FORMATS[68] for cache in (kv_cache, extra_kv_cache)):
        return "entries of 68 bytes are dequantised for the indexer alone"
    return pools_refused(q, kv_cache, extra_kv_cache)


@implements(ops.attention.sparse_attn, requires=Requires(dtypes=FAST), why_not=listed_pools_refused)
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


def score(out: Tensor, q: Tensor, weights: Tensor, k_cache: Tensor, blocks: Tensor, counts: Tensor) -> None:
    """Write the scores of tokens of one sequence; -inf from a token's count on.

    Args:
        out: [tokens, n] float32, n at least the largest count.
        q: [tokens, heads, head_dim] float32.
        weights: [tokens, 1, heads] float32, scales included.
        k_cache: The pool.
        blocks: The sequence's row of the block table.
        counts: [tokens], how many entries each token sees, ascending.
    """
    (tokens, heads, dim), block_size, last = q.shape, k_cache.shape[1], int(counts[-1])
    blocks = pad(blocks, (0, max(0, -(-last // block_size) - blocks.shape[0])), value=-1)
    step = block_size * max(1, PIECE // (4 * max(tokens * heads, dim) * block_size))
    query = q.flatten(0, 1)
    if k_cache.dtype == torch.uint8 and k_cache.shape[2] == 68:
        query = torch.cat((query[:, 0::2], query[:, 1::2]), dim=-1)  # as the keys are dequantised
    for low in range(0, last, step):
        high = min(low + step, last)
        some = blocks[low // block_size : -(-high // block_size)]
        keys = entries_of_blocks(k_cache, some)
        if (some < 0).any():
            keys.unflatten(0, (-1, block_size))[some < 0] = 0.0
        dots = torch.mm(query, keys[: high - low].T).relu_().view(tokens, heads, -1)
        out[:, low:high] = torch.bmm(weights, dots)[:, 0]
    first = int(counts[0])
    hidden = torch.arange(first, out.shape[1]) >= counts[:, None]
    out[:, first:].masked_fill_(hidden, -torch.inf)


def keys_refused(q: Tensor, k_cache: Tensor, max_entries: int) -> WhyNot:
    if max_entries < RANKED // 8:
        return f"max_entries={max_entries}; the reference takes no longer below {RANKED // 8}"
    if k_cache.numel() and k_cache.shape[1] * entry_dim(k_cache) * 4 > 4 * PIECE:
        return f"block_size={k_cache.shape[1]}; a page of keys must fit in {4 * PIECE} bytes as float32"
    return pools_refused(q, k_cache)


def scores_refused(
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
) -> WhyNot:
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


def largest(scores: Tensor, counts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, by (-score, column), -1 behind the row's count; and how many there are.

    `scores` has -inf from a row's count on; it is written to.
    """
    width = min(k, scores.shape[1])
    scores = scores.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    values, chosen = scores.topk(width, dim=1)
    least = values[:, -1:]
    if ((scores >= least).sum(1) > width).any():
        # topk takes any of equal scores: take those above the least, then the lowest columns of those equal to it.
        above, equal = scores > least, scores == least
        wanted = width - above.sum(1, keepdim=True)
        chosen = (above | (equal & (equal.cumsum(1, dtype=torch.int32) <= wanted))).nonzero()[:, 1].view(-1, width)
    chosen = chosen.sort(dim=1).values
    order = scores.gather(1, chosen).argsort(dim=1, descending=True, stable=True)
    number = counts.clamp(max=width)
    indices = torch.where(torch.arange(width) < number[:, None], chosen.gather(1, order), -1)
    return pad(indices, (0, k - width), value=-1).int(), number.int()


def selection_refused(
    scores: Tensor, lengths: Tensor, k: int, candidates: Tensor | None = None, candidate_block: int = 1
) -> WhyNot:
    if candidates is not None:
        return "candidates are given"
    if scores.numel() < RANKED or scores.shape[1] < 4 * k:
        return f"k={k} of {tuple(scores.shape)} scores; the reference's sort takes no longer"
    return None


@implements(ops.attention.indexer_topk, requires=Requires(dtypes=FAST), why_not=selection_refused)
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
