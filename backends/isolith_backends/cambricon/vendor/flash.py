"""Dense and paged prefill attention: flash_attention of tmo 1.12.1 (domesticated_torch_mlu_ops@9fbf7df6 _ops.py).

Where keys are more than queries, no source says how a causal mask is aligned: refused. As in decode, the lse of a call
with a sink is undefined.
"""

import torch
from torch import Tensor

from isolith_backends.cambricon.vendor.attention import attend, need_compute
from isolith_backends.cambricon.vendor.rules import (
    HALVES,
    need,
    need_dtype,
    need_int32,
    need_none,
    need_shape,
    need_within,
    undefined,
)

PAGE = 16


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_kv: Tensor | None,
    alibi_slope: Tensor | None,
    attn_bias: Tensor | None,
    max_seq_len_q: int,
    max_seq_len_kv: int,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    compute_dtype: torch.dtype = torch.float,
    return_lse: bool = False,
    block_tables: Tensor | None = None,
    k_quant_scale: Tensor | None = None,
    v_quant_scale: Tensor | None = None,
    q_quant_scale: Tensor | None = None,
    out_quant_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.half,
    q2k_block_idx: Tensor | None = None,
    q2k_block_num: Tensor | None = None,
    variable_block_sizes: Tensor | None = None,
    q_block_size: int = 256,
    k_block_size: int = 128,
    sink: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    call = "flash_attention"
    need_none(call, alibi_slope=alibi_slope, attn_bias=attn_bias, q2k_block_idx=q2k_block_idx)
    need_none(call, q2k_block_num=q2k_block_num, variable_block_sizes=variable_block_sizes)
    need_none(call, k_quant_scale=k_quant_scale, v_quant_scale=v_quant_scale, q_quant_scale=q_quant_scale)
    need_none(call, out_quant_scale=out_quant_scale, padded_batches=None if q.dim() == 3 else q.shape)
    need_operands(call, q, k, v, out, sink, compute_dtype)
    need_int32(call, cu_seq_lens_q=cu_seq_lens_q, cu_seq_lens_kv=cu_seq_lens_kv, block_tables=block_tables)
    need(cu_seq_lens_q is not None and cu_seq_lens_kv is not None, f"{call}: packed rows need both cu_seq_lens.")
    assert cu_seq_lens_q is not None
    assert cu_seq_lens_kv is not None
    tokens, heads, _ = q.shape
    result = undefined((tokens, heads, v.shape[-1]), q.dtype) if out is None else out
    need_shape(call, out=(result, (tokens, heads, v.shape[-1])))
    lse = undefined((heads, tokens), torch.float32)
    bounds_q, bounds_k = cu_seq_lens_q.tolist(), cu_seq_lens_kv.tolist()
    for sequence in range(len(bounds_q) - 1):
        rows = slice(bounds_q[sequence], bounds_q[sequence + 1])
        queries, keys = rows.stop - rows.start, bounds_k[sequence + 1] - bounds_k[sequence]
        need(queries <= max_seq_len_q, f"{call}: max_seq_len_q is {max_seq_len_q}, but a sequence has {queries}.")
        need(keys <= max_seq_len_kv, f"{call}: max_seq_len_kv is {max_seq_len_kv}, but a sequence has {keys}.")
        table = None if block_tables is None else block_tables[sequence]
        key, value = (part_of(call, tensor, table, bounds_k[sequence], keys) for tensor in (k, v))
        visible = shown(call, queries, keys, is_causal, window_size_left, window_size_right)
        part, lse[:, rows] = attend(q[rows], key, value, visible, softmax_scale, sink, compute_dtype)
        result[rows] = part.to(result.dtype)
    if not return_lse:
        return result
    return result, lse if sink is None else undefined(lse.shape, lse.dtype)


def need_operands(
    call: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, sink: Tensor | None, compute_dtype: torch.dtype
) -> None:
    """Refuse dtypes, and an output that is the queries."""
    need_dtype(call, HALVES, q=q)
    need_dtype(call, (q.dtype,), k=k, v=v, out=out)
    need_dtype(call, (torch.float32,), sink=sink)
    need_shape(call, sink=(sink, (q.shape[1],)))
    need_compute(call, compute_dtype, q)
    need(out is None or not shares_memory(out, q), f"{call}: out must not be q.")


def shares_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors begin at the same place."""
    return one.numel() > 0 and one.data_ptr() == other.data_ptr()


def part_of(call: str, tensor: Tensor, table: Tensor | None, first: int, count: int) -> Tensor:
    """[kv_heads, count, dim] of one sequence in float32, from packed rows or from HND pages."""
    if table is None:
        return tensor[first : first + count].float().transpose(0, 1)
    need_shape(call, paged=(tensor, (-1, -1, PAGE, -1)))
    entry = torch.arange(count)
    need_within(call, table.shape[0], column_of_block_tables=entry // PAGE)
    block = table[entry // PAGE].long()
    need_within(call, tensor.shape[0], block_tables=block)
    return tensor[block, :, entry % PAGE].float().transpose(0, 1)


def shown(call: str, queries: int, keys: int, is_causal: bool, left: int, right: int) -> Tensor:
    """[queries, keys]: what each query sees."""
    restricted = is_causal or left >= 0 or right >= 0
    need_none(call, a_mask_over_more_keys_than_queries=keys - queries if restricted and keys != queries else None)
    own, key = torch.arange(queries)[:, None], torch.arange(keys)
    visible = key <= own if is_causal else torch.ones(queries, keys, dtype=torch.bool)
    if left >= 0:
        visible = visible & (key >= own - left)
    return visible & (key <= own + right) if right >= 0 else visible
