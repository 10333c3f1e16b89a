"""The router of hash layers: a token's experts from a table, the weights of these experts from its logits.

Only the chosen logits are read, but for a softmax, whose largest logit and sum need a pass over all of them, spread as
in moe_gate. The floor is a launch: a few hundred bytes a token move.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith.numerics.routing import SCORES
from isolith_backends.cuda.kernels.exponentials import exp_of
from isolith_backends.cuda.kernels.moe_gate import FLOOR, SOFTMAX, score_of, tile_for
from isolith_backends.cuda.kernels.tensors import dense
from isolith_backends.cuda.launch import ceil_div, launch, power_of_two

SLOTS = 1024  # chosen experts of a token that a program holds


@triton.jit
def softmax_parts(LOGITS, start, live, experts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(largest logit, sum of the exponentials) of each token."""
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    for low in range(0, experts, COLUMNS):
        column = low + tl.arange(0, COLUMNS)
        inside = live[:, None] & (column < experts)[None, :]
        x = tl.load(LOGITS + start[:, None] + column[None, :], mask=inside, other=float("-inf"))
        most = tl.maximum(most, tl.max(x, axis=1))
    total = tl.zeros((ROWS,), tl.float32)
    for low in range(0, experts, COLUMNS):
        column = low + tl.arange(0, COLUMNS)
        inside = live[:, None] & (column < experts)[None, :]
        x = tl.load(LOGITS + start[:, None] + column[None, :], mask=inside, other=0.0)
        total += tl.sum(tl.where(inside, exp_of(x - most[:, None]), 0.0), axis=1)
    return most, total


@triton.jit
def route_by_table(
    LOGITS,
    TOKEN_IDS,
    TABLE,
    MASK,
    INDEX,
    WEIGHT,
    tokens,
    experts,
    stride,
    vocab,
    k,
    routed_scale,
    SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = token < tokens
    slot = tl.arange(0, K)[None, :]
    written = live[:, None] & (slot < k)
    on = live
    if MASK is not None:
        on = tl.load(MASK + token, mask=live, other=0) != 0
    token_id = tl.load(TOKEN_IDS + token, mask=on, other=-1).to(tl.int64)
    named = ((token_id >= 0) & (token_id < vocab))[:, None] & (slot < k)
    expert = tl.load(TABLE + token_id[:, None] * k + slot, mask=named, other=-1).to(tl.int64)
    named = (expert >= 0) & (expert < experts)
    x = tl.load(LOGITS + (token * stride)[:, None] + expert, mask=named, other=0.0)
    if SCORE == SOFTMAX:
        most, total = softmax_parts(LOGITS, token * stride, live, experts, ROWS, COLUMNS)
        score = exp_of(x - most[:, None]) / total[:, None]
    else:
        score = score_of(x, SCORE)
    score = tl.where(named, score, 0.0)
    if RENORMALIZE:
        total = tl.full((ROWS,), FLOOR, tl.float32)
        for number in range(k):
            # All but one term are 0, so the sum is exact: slots are added in their order.
            total += tl.sum(tl.where(slot == number, score, 0.0), axis=1)
        score /= total[:, None]
    score = tl.where(named, score * routed_scale, 0.0)
    at = token[:, None] * k + slot
    tl.store(INDEX + at, tl.where(named, expert, -1).to(tl.int32), mask=written)
    tl.store(WEIGHT + at, score, mask=written)


def moe_hash_gate(
    logits: Tensor,
    token_ids: Tensor,
    table: Tensor,
    score: str,
    renormalize: bool,
    routed_scale: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """([tokens k] int32 experts, [tokens k] float32 weights); -1 and 0 for ids and experts that there are not."""
    (tokens, experts), (vocab, k) = logits.shape, table.shape
    index = torch.empty((tokens, k), dtype=torch.int32, device=logits.device)
    weight = torch.empty((tokens, k), dtype=torch.float32, device=logits.device)
    if k == 0:
        return index, weight
    logits = dense(logits)
    held, columns = power_of_two(k), power_of_two(experts, most=1024)
    rows, warps = tile_for(tokens, max(held, columns) if score == "softmax" else held)
    launch(
        route_by_table,
        (ceil_div(tokens, rows),),
        logits,
        token_ids.contiguous(),
        table.contiguous(),
        None if mask is None else mask.contiguous().view(torch.uint8),
        index,
        weight,
        tokens,
        experts,
        logits.stride(0),
        vocab,
        k,
        float(routed_scale),
        warps=warps,
        stages=1,
        SCORE=SCORES.index(score),
        RENORMALIZE=renormalize,
        ROWS=rows,
        COLUMNS=columns,
        K=held,
    )
    return index, weight
