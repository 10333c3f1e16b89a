"""Sparse attention over latent rows (multi-head latent attention with absorbed projections).

Source: Ascend/op-plugin 517f2e7d docs of npu_sparse_flash_attention; vllm-ascend 182b75ea csrc.
"""

from typing import Any

import torch
from torch import Tensor

from isolith_backends.ascend.vendor.indexer import KEY_LAYOUTS, QUERY_LAYOUTS, KeyRows
from isolith_backends.ascend.vendor.paged import Queries
from isolith_backends.ascend.vendor.rules import HALVES, need, need_dtype, need_shape, poison
from isolith_backends.ascend.vendor.soc import current

HEAD, ROPE = 512, 64


def check(
    query: Tensor, key: Tensor, values: Tensor, query_rope: Tensor | None, key_rope: Tensor | None, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """The rules of dtypes and shapes; gives the parts with rope, which must be there."""
    name = "npu_sparse_flash_attention"
    need_dtype(name, "query", query, HALVES)
    heads = query.shape[-2]
    allowed = 1 <= heads <= 128 and (current().name == "A5" or heads & (heads - 1) == 0)
    need(name, allowed and query.numel() > 0, f"the query is {tuple(query.shape)}; heads are a power of 2 up to 128")
    need(name, query_rope is not None and key_rope is not None, "query_rope and key_rope must be provided")
    assert query_rope is not None
    assert key_rope is not None
    for which, tensor in (("key", key), ("value", values), ("query_rope", query_rope), ("key_rope", key_rope)):
        need_dtype(name, which, tensor, (query.dtype,))
    need(name, query.shape[-1] == key.shape[-1] == values.shape[-1] == HEAD, f"D is {query.shape[-1]}, not {HEAD}")
    need_shape(name, "query_rope", query_rope, (*query.shape[:-1], ROPE))
    need_shape(name, "key_rope", key_rope, (*key.shape[:-1], ROPE))
    need_dtype(name, "sparse_indices", indices, (torch.int32,))
    need_shape(name, "sparse_indices", indices, (*query.shape[:-2], 1, -1))
    return query_rope, key_rope


def npu_sparse_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    sparse_indices: Tensor,
    scale_value: float,
    block_table: Tensor | None,
    actual_seq_lengths_query: Tensor | None,
    actual_seq_lengths_kv: Tensor | None,
    query_rope: Tensor | None,
    key_rope: Tensor | None,
    sparse_block_size: int,
    layout_query: str,
    layout_kv: str,
    sparse_mode: int,
    attention_mode: int,
    return_softmax_lse: bool,
    sinks: Tensor | None = None,
    **ignored: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices are read up to the first -1; those behind the causal limit are masked."""
    name = "npu_sparse_flash_attention"
    need(name, attention_mode == 2, f"attention_mode is {attention_mode}; only 2, though 0 is the default")
    need(name, sparse_block_size == 1 and sparse_mode in (0, 3), f"blocks of {sparse_block_size}, mode {sparse_mode}")
    need(name, layout_query in QUERY_LAYOUTS and layout_kv in KEY_LAYOUTS, f"{layout_query!r}, {layout_kv!r}")
    need(name, not (return_softmax_lse and layout_kv == "PA_BSND"), "no lse with pages")
    values, heads = key if value is None else value, query.shape[-2]
    turned_q, turned_k = check(query, key, values, query_rope, key_rope, sparse_indices)
    queries = Queries.of(name, query, layout_query, actual_seq_lengths_query, None, with_zero=False)
    # Caches must be whole: neither document nor caller shows strided ones.
    pools = [KeyRows(name, part, layout_kv, actual_seq_lengths_kv, block_table) for part in (key, values, turned_k)]
    need(name, len(pools[0].lengths) == queries.batch, f"{queries.batch} requests, {len(pools[0].lengths)} of keys")
    out = poison(query.shape, query.dtype)
    # What is not asked for is empty, as torch_npu's own meta kernel has it.
    asked = query.shape[:-1] if return_softmax_lse else (0,)
    most, total = (poison(asked, torch.float32) for _ in range(2))
    wide = torch.cat((query, turned_q), dim=-1).view(-1, heads, HEAD + ROPE).float()
    indices = sparse_indices.reshape(-1, sparse_indices.shape[-1])
    for request, row, index in queries.each():
        length = pools[0].lengths[request]
        limit = length - queries.lengths[request] + index + 1 if sparse_mode == 3 else length
        listed = indices[row][: valid(indices[row])].long()
        at = listed[listed < limit]
        keys, rows, turned = (part.rows(request, at) for part in pools)
        logits = wide[row] @ torch.cat((keys, turned), dim=1).T * scale_value
        if sinks is not None:
            logits = torch.cat((logits, sinks[:, None].float()), dim=1)
        if not logits.numel():
            continue
        out.view(-1, heads, HEAD)[row] = (logits.softmax(1)[:, : at.numel()] @ rows).to(query.dtype)
        if return_softmax_lse:
            most.view(-1, heads)[row] = logits.amax(1)
            total.view(-1, heads)[row] = (logits - logits.amax(1, keepdim=True)).exp().sum(1)
    return out, most, total


def valid(indices: Tensor) -> int:
    """How many indices come before the first -1."""
    ends = (indices < 0).nonzero()
    return int(ends[0]) if ends.numel() else indices.numel()
