"""Paged attention of tmo 1.12.1: single_query_cached_kv_attn, update_out_and_lse and sliding_window_compress_attention
(domesticated_torch_mlu_ops@9fbf7df6 _ops.py; rows without a key as the tests of xllm@3906f5a9 need them).

No source says whether the lse of a call with a sink counts the sink: here it is undefined.
"""

import torch
from torch import Tensor
from torch.nn import functional

from isolith_backends.cambricon.vendor.rules import (
    FLOATS,
    FP8,
    need,
    need_dtype,
    need_int32,
    need_none,
    need_shape,
    need_within,
    undefined,
)

BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64)


def single_query_cached_kv_attn(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    out: Tensor | None,
    block_tables: Tensor,
    context_lens: Tensor,
    k_cache_quant_scale: Tensor | None,
    v_cache_quant_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    max_context_len: int,
    windows_size_left: int,
    windows_size_right: int,
    softmax_scale: float,
    return_lse: bool = False,
    kv_cache_quant_bit_size: int = -1,
    q_quant_scale: Tensor | None = None,
    out_quant_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.half,
    compute_dtype: torch.dtype = torch.float,
    head_size_v: int = -1,
    mask: Tensor | None = None,
    cu_seq_q: Tensor | None = None,
    max_seq_q: int = -1,
    sink: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    call = "single_query_cached_kv_attn"
    need_none(call, alibi_slopes=alibi_slopes, mask=mask, cu_seq_q=cu_seq_q, q_quant_scale=q_quant_scale)
    need_none(call, out_quant_scale=out_quant_scale)
    need_none(call, kv_cache_quant_bit_size=None if kv_cache_quant_bit_size in (-1, 8) else kv_cache_quant_bit_size)
    need(windows_size_right == -1, f"{call}: windows_size_right must be -1, but is {windows_size_right}.")
    need_compute(call, compute_dtype, q)
    need_pages(call, q, k_cache, v_cache, k_cache_quant_scale)
    batch, queries, heads, _ = q.shape
    width = width_of_values(call, k_cache, v_cache, out, head_size_v)
    result = undefined((batch, queries, heads, width), q.dtype) if out is None else out
    need_shape(call, out=(result, (batch, queries, heads, width)), context_lens=(context_lens, (batch,)))
    need_dtype(call, (q.dtype,), out=result)
    need_dtype(call, (torch.float32,), sink=sink)
    need_int32(call, block_tables=block_tables, context_lens=context_lens)
    need_shape(call, sink=(sink, (heads,)), block_tables=(block_tables, (batch, *([-1] * (block_tables.dim() - 1)))))
    lse = torch.empty(batch, heads, queries)
    for row, length in enumerate(context_lens.tolist()):
        # A maximum below the true one is believed.
        length = min(length, max_context_len) if max_context_len > 0 else length
        k, v = context(
            call, k_cache, v_cache, block_tables[row], length, width, (k_cache_quant_scale, v_cache_quant_scale)
        )
        visible = seen(queries, length, windows_size_left)
        value, lse[row] = attend(q[row], k, v, visible, softmax_scale, sink, compute_dtype)
        result[row] = value.to(result.dtype)
    if not return_lse:
        return result
    return result, lse if sink is None else undefined(lse.shape, lse.dtype)


def need_compute(call: str, compute_dtype: torch.dtype, q: Tensor) -> None:
    """Refuse another precision of the inner products."""
    legal = (torch.float32, torch.float16, *((torch.bfloat16,) if q.dtype in FP8 else ()))
    need(compute_dtype in legal, f"{call}: compute_dtype must be one of {legal}, but is {compute_dtype}.")


def need_pages(call: str, q: Tensor, k_cache: Tensor, v_cache: Tensor | None, scale: Tensor | None) -> None:
    """Refuse queries and pages that the kernel is not written for."""
    need_dtype(call, FLOATS, q=q)
    need_dtype(call, (q.dtype,) if scale is None else (torch.int8, *FP8), k_cache=k_cache)
    need_dtype(call, (k_cache.dtype,), v_cache=v_cache)
    need_dtype(call, (torch.float32,), k_cache_quant_scale=scale)
    need_shape(call, q=(q, (-1, -1, -1, k_cache.shape[-1])), k_cache=(k_cache, (-1, -1, -1, -1)))
    need_shape(call, v_cache=(v_cache, (*k_cache.shape[:3], -1)))
    size, kv_heads = k_cache.shape[2], k_cache.shape[1]
    need(size in BLOCK_SIZES, f"{call}: block_size must be one of {BLOCK_SIZES}, but is {size}.")
    need(q.shape[2] % kv_heads == 0, f"{call}: {kv_heads} kv heads do not divide {q.shape[2]} heads.")
    rows, most = q.shape[1] * (q.shape[2] // kv_heads), 256 if k_cache.dtype == torch.bfloat16 else 128
    need(rows <= most, f"{call}: seq_q * heads / kv_heads must be at most {most}, but is {rows}.")


def width_of_values(call: str, k_cache: Tensor, v_cache: Tensor | None, out: Tensor | None, head_size_v: int) -> int:
    """head_size of the values: of v_cache, or else of out, or else as told."""
    if v_cache is not None:
        return v_cache.shape[-1] if out is None else out.shape[-1]
    width = head_size_v if out is None else out.shape[-1]
    need(0 < width <= k_cache.shape[-1], f"{call}: values that are keys need out or head_size_v; got {width}.")
    return width


def context(
    call: str,
    k_cache: Tensor,
    v_cache: Tensor | None,
    table: Tensor,
    length: int,
    width: int,
    scales: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Keys and values [kv_heads, length, dim] of one row in float32; nothing behind its length is read."""
    blocks, heads, size, _ = k_cache.shape
    by_head = table if table.dim() == 2 else table.expand(heads, -1)
    entry = torch.arange(length)
    need_within(call, by_head.shape[-1], column_of_block_tables=entry // size)
    block = by_head[:, entry // size].long()
    need_within(call, blocks, block_tables=block)
    place = (block, torch.arange(heads)[:, None], entry % size)
    k = scaled(call, k_cache[place].float(), scales[0], place, k_cache)
    v = k if v_cache is None else scaled(call, v_cache[place].float(), scales[1], place, k_cache)
    return k, v[..., :width]


def scaled(call: str, rows: Tensor, scale: Tensor | None, place: tuple[Tensor, ...], cache: Tensor) -> Tensor:
    """Rows of codes with their scales: one a token and head, one a channel, or one for all."""
    if scale is None:
        need(cache.is_floating_point() and cache.dtype not in FP8, f"{call}: {cache.dtype} needs a scale.")
        return rows
    if scale.dim() == 3:
        need_shape(call, quant_scale=(scale, tuple(cache.shape[:3])))
        return rows * scale[place][..., None]
    if scale.dim() == 2:
        need_shape(call, quant_scale=(scale, (cache.shape[1], cache.shape[3])))
        return rows * scale[:, None]
    need_shape(call, quant_scale=(scale, (1,)))
    return rows * scale


def seen(queries: int, length: int, left: int) -> Tensor:
    """[queries, length]: causal up to the row's own key, and as many keys before it as the window has."""
    own = torch.arange(length - queries, length)[:, None]
    key = torch.arange(length)
    visible = key <= own
    return visible if left < 0 else visible & (key >= own - left)


def attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, sink: Tensor | None, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(out [queries, heads, dim], lse [heads, queries] without the sink); a row without a key gives 0 and -inf."""
    queries, heads, width = q.shape
    kv_heads, length, _ = k.shape
    rows = q.float().transpose(0, 1).reshape(kv_heads, -1, width)  # the heads of a group share keys
    logits = (rows @ k.transpose(1, 2)).view(heads, queries, length) * scale
    logits = logits.masked_fill(~visible, -torch.inf)
    lse = logits.logsumexp(-1)
    whole = lse if sink is None else torch.logaddexp(lse, sink[:, None].expand_as(lse))
    weights = (logits - whole[..., None]).exp().where(visible, 0.0)
    if compute_dtype == torch.float16:
        weights = weights.half().float()
    out = weights.view(kv_heads, rows.shape[1], length) @ v
    return out.view(heads, queries, v.shape[-1]).transpose(0, 1), lse


def update_out_and_lse(
    out: Tensor,
    lse: Tensor,
    block_out: Tensor,
    block_lse: Tensor,
    seq_offsets: Tensor | None = None,
    cu_seqs: Tensor | None = None,
    block_cu_seqs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    call = "update_out_and_lse"
    need_none(call, seq_offsets=seq_offsets, cu_seqs=cu_seqs, block_cu_seqs=block_cu_seqs)
    need_dtype(call, FLOATS, out=out, block_out=block_out)
    need_dtype(call, (torch.float32,), lse=lse, block_lse=block_lse)
    batch, queries, heads, _ = out.shape
    need_shape(call, block_out=(block_out, tuple(out.shape)), lse=(lse, (batch, heads, queries)))
    need_shape(call, block_lse=(block_lse, tuple(lse.shape)))
    share = torch.sigmoid(block_lse - lse).transpose(1, 2)[..., None]
    merged = out.float() - share * (out.float() - block_out.float())
    joint = lse - functional.logsigmoid(lse - block_lse)
    return out.copy_(merged.to(out.dtype)), lse.copy_(joint)


def sliding_window_compress_attention(
    q: Tensor,
    cache_swa: Tensor,
    cache_comp: Tensor,
    out: Tensor | None,
    block_tables_swa: Tensor,
    block_tables_comp: Tensor,
    cu_seq_q: Tensor | None,
    context_lens_swa: Tensor,
    context_lens_comp: Tensor,
    q_quant_scale: Tensor | None,
    cache_quant_scale_swa: Tensor | None,
    cache_quant_scale_comp: Tensor | None,
    out_quant_scale: Tensor | None,
    sink: Tensor | None,
    softmax_scale: float,
    max_contxt_len_swa: int,
    max_contxt_len_comp: int,
    max_seq_q: int = -1,
    head_size_out: int = -1,
    return_lse: bool = False,
    kv_cache_quant_bit_size: int = -1,
    out_dtype: torch.dtype = torch.half,
    compute_dtype: torch.dtype = torch.float,
) -> Tensor | tuple[Tensor, Tensor]:
    call = "sliding_window_compress_attention"
    need(cu_seq_q is None, f"{call}: cu_seq_q must be None.")
    need(out is not None or head_size_out > 0, f"{call}: cannot make an output of head_size {head_size_out}.")
    if out is None:
        out = undefined((*q.shape[:3], head_size_out), q.dtype)
    # The first table must be the window already: both calls are without one.
    parts: list[Tensor] = []
    for cache, tables, lens, scale, longest, own_sink, target in (
        (cache_swa, block_tables_swa, context_lens_swa, cache_quant_scale_swa, max_contxt_len_swa, sink, out),
        (cache_comp, block_tables_comp, context_lens_comp, cache_quant_scale_comp, max_contxt_len_comp, None, None),
    ):
        parts += single_query_cached_kv_attn(
            q,
            cache,
            None,
            torch.empty_like(out) if target is None else target,
            *(tables, lens, scale, None, None, longest, -1, -1, softmax_scale, True, kv_cache_quant_bit_size),
            q_quant_scale=q_quant_scale,
            out_quant_scale=out_quant_scale,
            compute_dtype=compute_dtype,
            sink=own_sink,
        )
    merged, lse = update_out_and_lse(*parts)
    return (merged, lse) if return_lse else merged
