"""Scores and their selection in runs of tokens, so that a bounded number of scores is kept at a time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.kernels.indexer_score import indexer_score
from isolith_backends.cuda.kernels.indexer_topk import indexer_topk
from isolith_backends.cuda.launch import ceil_div, launch, power_of_two

SCORED = 128 << 20  # bytes of scores that are kept at a time: 128 tokens of a million tokens' context at ratio 4


@triton.jit
def count_visible(CU, START, LENGTHS, tokens, sequences, ratio, TOKENS: tl.constexpr, SEQUENCES: tl.constexpr):
    """How many entries each token sees."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    shift = tl.zeros((TOKENS,), tl.int32)
    for base in range(0, sequences, SEQUENCES):
        number = base + tl.arange(0, SEQUENCES)
        begin = tl.load(CU + number, mask=number < sequences, other=0)
        end = tl.load(CU + number + 1, mask=number < sequences, other=0)
        here = (token[:, None] >= begin[None, :]) & (token[:, None] < end[None, :])
        start = tl.load(START + number, mask=number < sequences, other=0)
        shift += tl.sum(tl.where(here, (start - begin)[None, :], 0), axis=1)
    tl.store(LENGTHS + token, (token + shift + 1) // ratio, mask=token < tokens)


@triton.jit
def list_visible(LENGTHS, INDICES, COUNT, tokens, k, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """List every entry that a token sees."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    length = tl.minimum(tl.load(LENGTHS + token, mask=token < tokens, other=0), k)
    tl.store(COUNT + token, length, mask=token < tokens)
    for base in range(0, k, COLUMNS):
        column = base + tl.arange(0, COLUMNS)[None, :]
        entry = tl.where(column < length[:, None], column, -1)
        at = INDICES + token.to(tl.int64)[:, None] * k + column
        tl.store(at, entry, mask=(token < tokens)[:, None] & (column < k))


def visible_entries(cu_seqlens: Tensor, start_pos: Tensor, tokens: int, ratio: int) -> Tensor:
    """[tokens] int32: how many entries each token sees."""
    lengths = torch.empty(tokens, dtype=torch.int32, device=cu_seqlens.device)
    batch = (cu_seqlens.contiguous(), start_pos.contiguous(), lengths)
    size = 64 if tokens <= 8192 else 1024
    sizes = (tokens, start_pos.shape[0], ratio)
    tile = {"TOKENS": size, "SEQUENCES": 4096 // size}
    launch(count_visible, (ceil_div(tokens, size),), *batch, *sizes, warps=4, stages=1, **tile)
    return lengths


def lightning_indexer(
    q: Tensor,
    weights: Tensor,
    k_cache: Tensor,
    batch: tuple[Tensor, Tensor, Tensor],
    ratio: int,
    k: int,
    max_entries: int,
    softmax_scale: float,
    q_scale: Tensor | None,
    out_dtype: torch.dtype,
    candidates: Tensor | None,
    candidate_block: int,
) -> tuple[Tensor, Tensor]:
    """(indices, topk_length); `batch` is block_table, cu_seqlens, start_pos."""
    tokens, device = q.shape[0], q.device
    indices = torch.empty(tokens, k, dtype=torch.int32, device=device)
    topk_length = torch.empty(tokens, dtype=torch.int32, device=device)
    lengths = visible_entries(batch[1], batch[2], tokens, ratio)
    if max_entries <= k and candidates is None:  # no token sees more than it may select
        columns = power_of_two(k, most=1024)
        size = max(1, min(power_of_two(tokens), 4096 // columns))
        sizes = (tokens, k)
        results = (lengths, indices, topk_length)
        tile = {"TOKENS": size, "COLUMNS": columns}
        launch(list_visible, (ceil_div(tokens, size),), *results, *sizes, warps=4, stages=1, **tile)
        return indices, topk_length
    most = max(1, SCORED // (max(max_entries, 1) * out_dtype.itemsize))
    scores = torch.empty(min(most, tokens), max_entries, dtype=out_dtype, device=device)
    for low in range(0, tokens, most):
        run = slice(low, min(low + most, tokens))
        kept = scores[: run.stop - low]
        indexer_score(q, weights, k_cache, *batch, ratio, softmax_scale, q_scale, kept, low)
        listed = None if candidates is None else candidates[run]
        indexer_topk(kept, lengths[run], k, listed, candidate_block, indices[run], topk_length[run])
    return indices, topk_length
