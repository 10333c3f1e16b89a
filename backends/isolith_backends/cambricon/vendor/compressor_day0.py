"""The compressor of the day-0 release, as vllm-mlu@b9925203 calls it, with a dense state for each sequence.

The state has coff * ratio rows. Without overlap the row of position p is p % ratio. With overlap the window before
stands in the first ratio rows, and p in row ratio + p % ratio; where a window ends, its rows take the place of those
before (buffers of that stack; xllm@3906f5a9 reference). Prefill is whole, from position 0. At start kv is 0 and score
-inf, which the caller sees to.
"""

import torch
from torch import Tensor

from isolith_backends.cambricon.vendor.compressor import rows_of
from isolith_backends.cambricon.vendor.pooling import head_dim_of, need_row, pooled, stored, unfinished
from isolith_backends.cambricon.vendor.rules import need, need_dtype, need_int32, need_shape, need_within, slots_of

EITHER = (torch.float32, torch.bfloat16)


def fused_compress_multi_kv(
    kv: Tensor,
    score: Tensor,
    kv_state: Tensor,
    score_state: Tensor,
    cu_seqlens: Tensor,
    batch_ids: Tensor,
    ape: Tensor,
    max_seqlen: int,
    overlap: bool,
    compressed_kv: Tensor,
) -> Tensor:
    call = "fused_compress_multi_kv"
    need_dtype(call, EITHER, kv=kv, score=score)
    need_dtype(call, (kv.dtype,), compressed_kv=compressed_kv)
    dim = head_dim_of(call, kv, score, ape, overlap)
    need_int32(call, cu_seqlens=cu_seqlens, batch_ids=batch_ids)
    need_shape(call, batch_ids=(batch_ids, (len(cu_seqlens) - 1,)), compressed_kv=(compressed_kv, (-1, dim)))
    need_dense_state(call, kv_state, score_state, batch_ids, ape, overlap)
    ratio, ends, emitted = ape.shape[0], cu_seqlens.tolist(), []
    for sequence, row in enumerate(batch_ids.tolist()):
        tokens = slice(ends[sequence], ends[sequence + 1])
        length = tokens.stop - tokens.start
        need(length <= max_seqlen, f"{call}: max_seqlen is {max_seqlen}, but a sequence has {length} tokens.")
        rows = rows_of(kv[tokens], score[tokens], ape, 0)
        whole = length // ratio
        for window in range(whole):
            before = ratio if overlap and window else 0
            low = window * ratio - before
            emitted.append(pooled(rows[low : low + before + ratio], overlap))
        rest, base = rows[whole * ratio :], ratio if overlap else 0
        for state, part in ((kv_state, 0), (score_state, 1)):
            if overlap and whole:
                state[row, :ratio] = rows[(whole - 1) * ratio : whole * ratio].chunk(2, dim=-1)[part]
            state[row, base : base + len(rest)] = rest.chunk(2, dim=-1)[part]
    need(
        len(emitted) <= compressed_kv.shape[0],
        f"{call}: compressed_kv must hold {len(emitted)} rows, but holds {compressed_kv.shape[0]}.",
    )
    if emitted:
        compressed_kv[: len(emitted)] = torch.stack(emitted).to(compressed_kv.dtype)
    return compressed_kv


def fused_compress_single_kv(
    kv: Tensor,
    score: Tensor,
    position: Tensor,
    state_ids: Tensor,
    ape: Tensor,
    kv_state: Tensor,
    score_state: Tensor,
    gamma: Tensor,
    sin: Tensor,
    cos: Tensor,
    hadamard_matrix: Tensor | None,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    kv_cache_scale: Tensor | None,
    eps: float,
    overlap: bool,
) -> Tensor:
    call = "fused_compress_single_kv"
    need_dtype(call, EITHER, kv=kv, score=score)
    need_shape(call, kv=(kv, (-1, 1, -1)))
    batch, ratio = (kv.shape[0],), ape.shape[0]
    dim = head_dim_of(call, kv, score, ape, overlap)
    need_int32(call, position=position, state_ids=state_ids, slot_mapping=slot_mapping)
    need_shape(call, position=(position, batch), state_ids=(state_ids, batch), slot_mapping=(slot_mapping, batch))
    need_dense_state(call, kv_state, score_state, state_ids, ape, overlap)
    need_row(call, dim, gamma, sin, cos, hadamard_matrix, kv_cache, kv_cache_scale)
    block, offset = slots_of(call, kv_cache, slot_mapping)
    for token, row in enumerate(state_ids.tolist()):
        last = int(position[token])
        kept = rows_of(kv[token], score[token], ape, last)[0]
        at = last % ratio + (ratio if overlap else 0)
        kv_state[row, at], score_state[row, at] = kept.chunk(2)
        if (last + 1) % ratio:
            kv_cache[block[token], offset[token]] = unfinished(kv_cache)
            continue
        result = pooled(torch.cat((kv_state[row], score_state[row]), dim=-1), overlap)
        if overlap:
            kv_state[row, :ratio], score_state[row, :ratio] = kv_state[row, ratio:], score_state[row, ratio:]
        result = stored(call, result, last + 1 - ratio, gamma, sin, cos, hadamard_matrix, eps)
        kv_cache[block[token], offset[token]] = result.to(kv_cache.dtype)
    return kv_cache


def need_dense_state(
    call: str, kv_state: Tensor, score_state: Tensor, rows: Tensor, ape: Tensor, overlap: bool
) -> None:
    """Refuse states of another size."""
    shape = (-1, ape.shape[0] * (2 if overlap else 1), ape.shape[1])
    need_dtype(call, (torch.float32,), kv_state=kv_state, score_state=score_state)
    need_shape(call, kv_state=(kv_state, shape), score_state=(score_state, shape))
    need_within(call, min(kv_state.shape[0], score_state.shape[0]), state_rows=rows)
