"""The compressor of tmo 1.12.1 (domesticated_torch_mlu_ops@9fbf7df6 _ops.py), with a state that is paged by token.

The row of absolute position p is state_cache[table[b, p // block_size], p % block_size]: kv, then score plus
ape[p % ratio] (xllm@3906f5a9 tests). A row that two tokens of one call share is undefined.
"""

import torch
from torch import Tensor

from isolith_backends.cambricon.vendor.pooling import head_dim_of, need_row, pooled, stored, unfinished
from isolith_backends.cambricon.vendor.rules import (
    fill_undefined,
    need,
    need_dtype,
    need_int32,
    need_shape,
    need_within,
    slots_of,
)

STATE_TOKENS = 128  # that a row of the state's table must have room for


def fused_compress_multi_kv(
    kv: Tensor,
    score: Tensor,
    state_cache: Tensor,
    state_block_table: Tensor,
    cu_seqlens: Tensor,
    positions: Tensor,
    ape: Tensor,
    max_seqlen: int,
    overlap: bool,
    compressed_kv: Tensor,
) -> tuple[Tensor, Tensor]:
    call = "fused_compress_multi_kv"
    need_dtype(call, (torch.bfloat16,), kv=kv, score=score, compressed_kv=compressed_kv)
    dim = head_dim_of(call, kv, score, ape, overlap)
    need_int32(call, cu_seqlens=cu_seqlens, positions=positions)
    need_shape(call, positions=(positions, (kv.shape[0],)), compressed_kv=(compressed_kv, (-1, dim)))
    need_state(call, state_cache, state_block_table, cu_seqlens, kv.shape[1])
    ratio, ends, emitted = ape.shape[0], cu_seqlens.tolist(), []
    for sequence in range(len(ends) - 1):
        tokens = slice(ends[sequence], ends[sequence + 1])
        length = tokens.stop - tokens.start
        need(length <= max_seqlen, f"{call}: max_seqlen is {max_seqlen}, but a sequence has {length} tokens.")
        if not length:
            continue
        first = int(positions[tokens.start])
        consecutive = positions[tokens].long() == torch.arange(first, first + length)
        need(bool(consecutive.all()), f"{call}: positions of a sequence must be consecutive.")
        rows = rows_of(kv[tokens], score[tokens], ape, first)
        back = min(first, first % ratio + (ratio if overlap else 0))
        kept = read_state(call, state_cache, state_block_table[sequence], first - back, first)
        write_state(call, state_cache, state_block_table[sequence], rows, first)
        known = torch.cat((kept, rows))
        for window in range(first // ratio, (first + length) // ratio):
            before = ratio if overlap and window else 0
            low = window * ratio - before - (first - back)
            emitted.append(pooled(known[low : low + before + ratio], overlap))
    need(
        len(emitted) <= compressed_kv.shape[0],
        f"{call}: compressed_kv must hold {len(emitted)} rows, but holds {compressed_kv.shape[0]}.",
    )
    if emitted:
        compressed_kv[: len(emitted)] = torch.stack(emitted).to(compressed_kv.dtype)
    return state_cache, compressed_kv


def fused_compress_single_kv(
    kv: Tensor,
    score: Tensor,
    position: Tensor,
    ape: Tensor,
    gamma: Tensor,
    sin: Tensor,
    cos: Tensor,
    hadamard_matrix: Tensor | None,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    kv_cache_scale: Tensor | None,
    eps: float,
    overlap: bool,
    state_cache: Tensor,
    state_bt: Tensor,
    state_width: int,
    state_block_size: int,
    cu_query_len: Tensor,
    K: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    call = "fused_compress_single_kv"
    need_dtype(call, (torch.float32, torch.bfloat16), kv=kv, score=score)
    need_shape(
        call, kv=(kv, (-1, -1)), position=(position, (kv.shape[0],)), slot_mapping=(slot_mapping, (kv.shape[0],))
    )
    need_int32(call, position=position, slot_mapping=slot_mapping, cu_query_len=cu_query_len)
    dim = head_dim_of(call, kv, score, ape, overlap)
    need_row(call, dim, gamma, sin, cos, hadamard_matrix, kv_cache, kv_cache_scale)
    need_state(call, state_cache, state_bt, cu_query_len, kv.shape[1])
    need(state_width == kv.shape[1], f"{call}: state_width must be {kv.shape[1]}, but is {state_width}.")
    size = state_cache.shape[1]
    need(state_block_size == size, f"{call}: state_block_size must be {size}, but is {state_block_size}.")
    block, offset = slots_of(call, kv_cache, slot_mapping)
    ratio, ends = ape.shape[0], cu_query_len.tolist()
    for sequence in range(len(ends) - 1):
        length = ends[sequence + 1] - ends[sequence]
        need(length <= K + 1, f"{call}: K is {K}, but a sequence has {length} tokens.")
        for token in range(ends[sequence], ends[sequence + 1]):
            last, table = int(position[token]), state_bt[sequence]
            write_state(
                call, state_cache, table, rows_of(kv[token : token + 1], score[token : token + 1], ape, last), last
            )
            if (last + 1) % ratio:
                kv_cache[block[token], offset[token]] = unfinished(kv_cache)
                continue
            first = last + 1 - ratio
            before = ratio if overlap and first else 0
            window = read_state(call, state_cache, table, first - before, last + 1)
            row = pooled(window, overlap)
            row = stored(call, row, first, gamma, sin, cos, hadamard_matrix, eps)
            kv_cache[block[token], offset[token]] = row.to(kv_cache.dtype)
    return state_cache, kv_cache, kv_cache_scale


def need_state(call: str, state_cache: Tensor, table: Tensor, cu_seqlens: Tensor, width: int) -> None:
    """Refuse a state that the kernels cannot page through."""
    need_dtype(call, (torch.float32,), state_cache=state_cache)
    need_int32(call, state_block_table=table)
    need_shape(
        call, state_cache=(state_cache, (-1, -1, 2 * width)), state_block_table=(table, (len(cu_seqlens) - 1, -1))
    )
    need(state_cache[0].is_contiguous(), f"{call}: a block of state_cache must be contiguous.")
    room = table.shape[1] * state_cache.shape[1]
    need(room >= STATE_TOKENS, f"{call}: state_block_table must cover {STATE_TOKENS} tokens, but covers {room}.")


def rows_of(kv: Tensor, score: Tensor, ape: Tensor, first: int) -> Tensor:
    """What the state keeps of tokens: kv, then score plus ape."""
    lane = torch.arange(first, first + kv.shape[0]) % ape.shape[0]
    return torch.cat((kv.float(), score.float() + ape[lane]), dim=-1)


def places(call: str, state: Tensor, table: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """(block, offset) of positions first .. last - 1."""
    position = torch.arange(first, last)
    page = position // state.shape[1]
    need_within(call, table.shape[0], column_of_the_state_block_table=page)
    block = table[page].long()
    need_within(call, state.shape[0], state_block_table=block)
    return block, position % state.shape[1]


def read_state(call: str, state: Tensor, table: Tensor, first: int, last: int) -> Tensor:
    """Rows of positions first .. last - 1."""
    block, offset = places(call, state, table, first, last)
    return state[block, offset]


def write_state(call: str, state: Tensor, table: Tensor, rows: Tensor, first: int) -> None:
    """Keep the rows of the tokens from a position on; a row that several of them share is undefined."""
    block, offset = places(call, state, table, first, first + len(rows))
    state[block, offset] = rows
    place = block * state.shape[1] + offset
    _, which, count = place.unique(return_inverse=True, return_counts=True)
    shared = (count > 1)[which]
    if shared.any():
        state[block[shared], offset[shared]] = fill_undefined(rows[shared])
