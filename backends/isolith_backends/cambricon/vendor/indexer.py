"""The lightning indexer: masked_indexer_select_paged_kv and fused_indexer_q of tmo 1.12.1
(domesticated_torch_mlu_ops@9fbf7df6 _ops.py; the start of dense key rows from the reference in the tests of
xllm@3906f5a9). Lengths are those before compression; in the day-0 release those after it (vllm-mlu@b9925203).

The result is slots of the cache to attend to, of no stated order: here the smallest score comes first. Columns behind a
row's count are undefined.
"""

import torch
from torch import Tensor

from isolith_backends.cambricon.vendor.order import largest
from isolith_backends.cambricon.vendor.profile import current
from isolith_backends.cambricon.vendor.rotary import rotate
from isolith_backends.cambricon.vendor.rules import (
    HALVES,
    fill_undefined,
    need,
    need_dtype,
    need_int32,
    need_none,
    need_shape,
    need_within,
    undefined,
)

DTYPES = (*HALVES, torch.int8, torch.float8_e4m3fn)


def masked_indexer_select_paged_kv(
    query: Tensor,
    k_cache: Tensor,
    weights: Tensor,
    kv_cache_block_table: Tensor,
    cu_seq_q_lens: Tensor | None,
    cu_seq_k_lens: Tensor | None,
    k_context_lens: Tensor | None,
    k_cache_block_table: Tensor | None,
    is_prefill: bool,
    index_topk: int,
    kv_cache_block_size: int,
    softmax_scale: float,
    q_scale: Tensor | None = None,
    k_scale_cache: Tensor | None = None,
    sparse_block_table: Tensor | None = None,
    sparse_context_lens: Tensor | None = None,
    is_score_float: bool = False,
    compress_ratio: int = 1,
    kv_cache_block_table_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    call = "masked_indexer_select_paged_kv"
    need_selection(call, query, k_cache, weights, q_scale, k_scale_cache, is_prefill)
    size, offset = kv_cache_block_size, kv_cache_block_table_offset
    need(size == 1 or size % 16 == 0, f"{call}: kv_cache_block_size must be 1 or a multiple of 16, but is {size}.")
    need_int32(call, kv_cache_block_table=kv_cache_block_table, offset=offset)
    need_none(call, an_offset_with_blocks_of=size if offset is not None and size > 1 else None)
    need(offset is None or bool((offset > 0).all()), f"{call}: kv_cache_block_table_offset must be positive.")
    if is_prefill:
        rows = prefill_rows(call, cu_seq_q_lens, cu_seq_k_lens, compress_ratio, k_cache.shape[0])
    else:
        rows = decode_rows(call, query, cu_seq_q_lens, k_context_lens, compress_ratio)
    every = query.flatten(0, -3)
    need(len(rows) == len(every), f"{call}: query has {len(every)} tokens; the lengths say {len(rows)}.")
    shape = (*query.shape[:-2], index_topk)
    table = undefined(shape, torch.int32) if sparse_block_table is None else fill_undefined(sparse_block_table)
    lens = undefined((len(every),), torch.int32) if sparse_context_lens is None else sparse_context_lens
    need_int32(call, sparse_block_table=table, sparse_context_lens=lens)
    need(table.shape[-1] == index_topk and table.numel() == len(every) * index_topk, f"{call}: sparse_block_table.")
    need_shape(call, sparse_context_lens=(lens, (len(every),)))
    factor = (weights.float() if q_scale is None else weights.float() * q_scale.float().view(weights.shape)).flatten()
    factor, flat = factor.view(len(every), -1), table.view(len(every), index_topk)
    for token, (sequence, first, count) in enumerate(rows):
        keys, scale = keys_of(call, k_cache, k_scale_cache, k_cache_block_table, sequence, first, count)
        score = (every[token].float() @ keys.T).relu().mul(factor[token, :, None]).sum(0) * softmax_scale * scale
        score = score if is_score_float else score.bfloat16()
        chosen = largest(score, min(index_topk, count)).flip(0)
        lens[token] = len(chosen)
        flat[token, : len(chosen)] = slots_of_entries(
            call, kv_cache_block_table[sequence], chosen, size, offset, sequence
        )
    return table, lens


def need_selection(
    call: str,
    query: Tensor,
    k_cache: Tensor,
    weights: Tensor,
    q_scale: Tensor | None,
    k_scale_cache: Tensor | None,
    is_prefill: bool,
) -> None:
    """Refuse operands that the kernel is not written for."""
    heads, dim = query.shape[-2:]
    need(heads in (32, 64), f"{call}: heads must be 32 or 64, but are {heads}.")
    need(dim == 128, f"{call}: head_dim must be 128, but is {dim}.")
    need_dtype(call, DTYPES, query=query)
    need_dtype(call, (query.dtype,), k_cache=k_cache)
    need_dtype(call, (torch.bfloat16, torch.float32), weights=weights)
    need_dtype(call, (torch.float32,), q_scale=q_scale, k_scale_cache=k_scale_cache)
    need_shape(call, weights=(weights, (*query.shape[:-1], 1)))
    need(query.dim() in ((3,) if is_prefill else (3, 4)), f"{call}: query must not have {query.dim()} dimensions.")
    need_shape(call, k_cache=(k_cache, (-1, dim) if is_prefill else (-1, 1, -1, dim)))
    scaled = query.dtype not in HALVES
    need(
        scaled == (q_scale is not None) == (k_scale_cache is not None), f"{call}: {query.dtype} and its scales differ."
    )
    need(q_scale is None or q_scale.numel() == weights.numel(), f"{call}: q_scale must have a value for each head.")


def prefill_rows(
    call: str, cu_q: Tensor | None, cu_k: Tensor | None, ratio: int, entries: int
) -> list[tuple[int, int, int]]:
    """(sequence, its first dense key row, how many it sees) of every query token."""
    need(cu_q is not None and cu_k is not None, f"{call}: a prefill needs cu_seq_q_lens and cu_seq_k_lens.")
    assert cu_q is not None
    assert cu_k is not None
    need_int32(call, cu_seq_q_lens=cu_q, cu_seq_k_lens=cu_k)
    need_shape(call, cu_seq_k_lens=(cu_k, tuple(cu_q.shape)))
    day0, rows, first = current().day0, [], 0
    for sequence, (queries, keys) in enumerate(zip(cu_q.diff().tolist(), cu_k.diff().tolist(), strict=True)):
        # Day-0 lengths are compressed, so the position can only count from 0 there: that stack prefills at once.
        start, held = (0, keys) if day0 else (keys - queries, keys // ratio)
        rows += [(sequence, first, min((start + i + 1) // ratio, held)) for i in range(queries)]
        first += held
    need(first <= entries, f"{call}: the lengths need {first} key rows, but k_cache has {entries}.")
    return rows


def decode_rows(
    call: str, query: Tensor, cu_q: Tensor | None, lens: Tensor | None, ratio: int
) -> list[tuple[int, int, int]]:
    """(sequence, 0, how many entries it sees) of every query token."""
    need(lens is not None, f"{call}: a decode needs k_context_lens.")
    assert lens is not None
    need_int32(call, k_context_lens=lens, cu_seq_q_lens=cu_q)
    if query.dim() == 4:
        queries = [query.shape[1]] * query.shape[0]
    else:
        need(cu_q is not None, f"{call}: packed queries need cu_seq_q_lens.")
        assert cu_q is not None
        queries = cu_q.diff().tolist()
    need_shape(call, k_context_lens=(lens, (len(queries),)))
    rows = []
    for sequence, (count, keys) in enumerate(zip(queries, lens.tolist(), strict=True)):
        if current().day0:
            need_none(call, several_tokens_a_sequence=count if count > 1 else None)
            rows.append((sequence, 0, keys))
        else:
            rows += [(sequence, 0, max(0, keys - count + i + 1) // ratio) for i in range(count)]
    return rows


def keys_of(
    call: str, k_cache: Tensor, scales: Tensor | None, table: Tensor | None, sequence: int, first: int, count: int
) -> tuple[Tensor, Tensor | float]:
    """(the keys that a token sees in float32, their scales)."""
    if k_cache.dim() == 2:
        taken = slice(first, first + count)
        return k_cache[taken].float(), 1.0 if scales is None else scales.flatten()[taken]
    need(table is not None, f"{call}: a decode needs k_cache_block_table.")
    assert table is not None
    need_int32(call, k_cache_block_table=table)
    entry, size = torch.arange(count), k_cache.shape[2]
    need_within(call, table.shape[1] * size, entry=entry)
    block = table[sequence][entry // size].long()
    need_within(call, k_cache.shape[0], k_cache_block_table=block)
    keys = k_cache[block, 0, entry % size].float()
    return keys, 1.0 if scales is None else scales.view(k_cache.shape[0], size)[block, entry % size]


def slots_of_entries(
    call: str, table: Tensor, entry: Tensor, size: int, offset: Tensor | None, sequence: int
) -> Tensor:
    """Where entries lie in the cache to attend to."""
    column = entry // size + (0 if offset is None else int(offset[sequence]))
    need_within(call, table.shape[0], column_of_the_kv_cache_block_table=column)
    return (table[column].long() * size + entry % size).int()


def fused_indexer_q(
    q: Tensor,
    w_q: Tensor,
    sin: Tensor,
    cos: Tensor,
    position_id: Tensor,
    output: Tensor | None = None,
    hadamard_matrix: Tensor | None = None,
    w_q_scale: Tensor | None = None,
    output_quant_mode: str = "none",
    output_scale: Tensor | None = None,
    interleaved: bool = True,
    rope_at_front: bool = True,
) -> Tensor:
    call = "fused_indexer_q"
    heads, dim, width = w_q.shape
    need_dtype(call, HALVES, q=q, w_q=w_q)
    need_dtype(call, (q.dtype,), w_q=w_q, hadamard_matrix=hadamard_matrix, output=output)
    need_int32(call, position_id=position_id)
    need(dim % 128 == 0, f"{call}: head_size must be a multiple of 128, but is {dim}.")
    need(w_q_scale is None, f"{call}: a quantised w_q is not supported.")
    need_none(call, output_quant_mode=None if output_quant_mode == "none" else output_quant_mode)
    need_shape(call, q=(q, (-1, width)), position_id=(position_id, (q.shape[0],)))
    need_shape(
        call, sin=(sin, (-1, dim // 2)), cos=(cos, tuple(sin.shape)), hadamard_matrix=(hadamard_matrix, (dim, dim))
    )
    need_shape(call, output=(output, (q.shape[0], heads, dim)))
    need_within(call, sin.shape[0], position_id=position_id)
    heads_out = torch.einsum("ti,hdi->thd", q.float(), w_q.float())
    at = position_id.long()
    turned = slice(0, dim // 2) if rope_at_front else slice(dim - dim // 2, dim)
    heads_out[..., turned] = rotate(
        heads_out[..., turned], sin[at].float()[:, None], cos[at].float()[:, None], interleaved
    )
    result = heads_out if hadamard_matrix is None else heads_out @ hadamard_matrix.float().T
    return result.to(q.dtype) if output is None else output.copy_(result.to(q.dtype))
