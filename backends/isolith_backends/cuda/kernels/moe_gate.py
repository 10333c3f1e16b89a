"""The router in one pass: scores, biased choice, groups, the k best and their weights, of a few tokens a program.

A token's logits are read once and stay in registers; the k best are found by k maxima of 64-bit keys, the choice above
and the expert below, so that of equal choices the lowest expert wins. A token's columns are spread over threads alike
whatever the batch, so that its sums are taken in one order. The floor is the logits' bytes; at decode the chain of k
reductions is what takes the time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith.numerics.routing import SCORES, SOFTPLUS_IDENTITY, SUM_FLOOR
from isolith_backends.cuda.kernels.exponentials import exp_of, log1p_of
from isolith_backends.cuda.kernels.tensors import dense
from isolith_backends.cuda.launch import ceil_div, launch, power_of_two

COLUMNS = 8192  # scores that a program of 16 warps holds, 16 to a thread; each group is padded to a power of two
PROGRAMS = 264  # two for each multiprocessor of an H100: beyond, a program takes more tokens

SQRTSOFTPLUS = tl.constexpr(SCORES.index("sqrtsoftplus"))
SIGMOID = tl.constexpr(SCORES.index("sigmoid"))
SOFTMAX = tl.constexpr(SCORES.index("softmax"))
IDENTITY = tl.constexpr(SOFTPLUS_IDENTITY)
FLOOR = tl.constexpr(SUM_FLOOR)
LOWEST = tl.constexpr(-(1 << 63))


@triton.jit
def score_of(x, SCORE: tl.constexpr):
    """The score of each logit by itself; e^x is for a softmax whose largest logit was taken off."""
    if SCORE == SOFTMAX:
        return exp_of(x)
    u = exp_of(-tl.abs(x))
    if SCORE == SIGMOID:
        return tl.where(x < 0.0, u, 1.0) / (1.0 + u)
    softplus = tl.where(x > 0.0, x, 0.0) + log1p_of(u)
    return tl.sqrt_rn(tl.where(x > IDENTITY, x, softplus))


@triton.jit
def ordered(values):
    """float32 -> int64 whose upper half orders as the values do."""
    bits = values.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32


@triton.jit
def value_of(key):
    """The float32 that a key of `ordered` was made of."""
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def without_losing_groups(
    key, topk_groups, BEST: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr
):
    """Keys [ROWS, GROUPS*WIDTH], the lowest one in groups that are not among the best."""
    grouped = tl.reshape(key, (ROWS, GROUPS, WIDTH))
    first = tl.max(grouped, axis=2)
    score = value_of(first)
    if BEST == 2:
        score += value_of(tl.max(tl.where(grouped == first[:, :, None], LOWEST, grouped), axis=2))
    group = tl.arange(0, GROUPS)[None, :]
    left = tl.where(first == LOWEST, LOWEST, ordered(score) | (GROUPS - 1 - group))
    wins = tl.zeros((ROWS, GROUPS), tl.int32)
    for _ in range(topk_groups):
        best = tl.max(left, axis=1)[:, None]
        wins = tl.where(left == best, 1, wins)
        left = tl.where(left == best, LOWEST, left)
    return tl.reshape(tl.where((wins != 0)[:, :, None], grouped, LOWEST), (ROWS, GROUPS * WIDTH))


@triton.jit
def route(
    LOGITS,
    BIAS,
    MASK,
    INDEX,
    WEIGHT,
    tokens,
    stride,
    k,
    groups,
    per_group,
    topk_groups,
    routed_scale,
    SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BEST: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
):
    COLUMNS: tl.constexpr = GROUPS * WIDTH
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    group, place = column // WIDTH, column % WIDTH
    expert = group * per_group + place
    known = ((group < groups) & (place < per_group))[None, :]
    live = (token < tokens)[:, None]
    x = tl.load(LOGITS + token[:, None] * stride + expert[None, :], mask=live & known, other=0.0).to(tl.float32)
    if SCORE == SOFTMAX:
        x = tl.where(known, x, float("-inf"))
        x -= tl.max(x, axis=1)[:, None]
    score = score_of(x, SCORE)
    if SCORE == SOFTMAX:
        score /= tl.sum(score, axis=1)[:, None]
    choice = score
    if BIAS is not None:
        choice += tl.load(BIAS + expert, mask=(group < groups) & (place < per_group), other=0.0).to(tl.float32)[None, :]
    key = tl.where(known, ordered(choice) | (COLUMNS - 1 - column)[None, :], LOWEST)
    if GROUPS > 1:
        key = without_losing_groups(key, topk_groups, BEST, ROWS, GROUPS, WIDTH)
    slot = tl.arange(0, K)[None, :]
    chosen = tl.zeros((ROWS, K), tl.int64)
    weight = tl.zeros((ROWS, K), tl.float32)
    total = tl.full((ROWS,), FLOOR, tl.float32)
    for number in range(k):
        best = tl.max(key, axis=1)[:, None]
        # All but one term are 0, so the sum is exact.
        mine = tl.sum(tl.where(key == best, score, 0.0), axis=1)
        total += mine
        weight = tl.where(slot == number, mine[:, None], weight)
        chosen = tl.where(slot == number, best, chosen)
        key = tl.where(key == best, LOWEST, key)
    chosen = COLUMNS - 1 - (chosen & 0xFFFFFFFF).to(tl.int32)
    chosen = (chosen // WIDTH) * per_group + chosen % WIDTH
    if RENORMALIZE:
        weight = weight / total[:, None]
    weight *= routed_scale
    if MASK is not None:
        on = tl.load(MASK + token, mask=token < tokens, other=0)[:, None] != 0
        chosen, weight = tl.where(on, chosen, -1), tl.where(on, weight, 0.0)
    at, inside = token[:, None] * k + slot, live & (slot < k)
    tl.store(INDEX + at, chosen, mask=inside)
    tl.store(WEIGHT + at, weight, mask=inside)


def columns_of(experts: int, groups: int) -> tuple[int, int]:
    """(groups, experts of a group), each as a power of two."""
    return power_of_two(groups), power_of_two(experts // groups)


def tile_for(tokens: int, columns: int) -> tuple[int, int]:
    """(rows, warps) of a program; Triton spreads warps along columns first, and with these a row lies alike in all."""
    if columns > 1024:
        return COLUMNS // columns, 16
    most = COLUMNS if columns <= 128 else max(512, columns)
    rows = power_of_two(ceil_div(tokens, PROGRAMS), least=max(1, 128 // columns), most=min(most // columns, 256))
    return rows, ceil_div(rows * columns, 512) if columns <= 128 else 1


def moe_gate(
    logits: Tensor,
    k: int,
    bias: Tensor | None,
    score: str,
    groups: int,
    topk_groups: int,
    renormalize: bool,
    routed_scale: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """([tokens k] int32 experts, [tokens k] float32 weights) of logits [tokens experts]."""
    tokens, experts = logits.shape
    index = torch.empty((tokens, k), dtype=torch.int32, device=logits.device)
    weight = torch.empty((tokens, k), dtype=torch.float32, device=logits.device)
    logits = dense(logits)
    held, width = columns_of(experts, groups)
    columns = held * width
    rows, warps = tile_for(tokens, columns)
    launch(
        route,
        (ceil_div(tokens, rows),),
        logits,
        None if bias is None else bias.contiguous(),
        None if mask is None else mask.contiguous().view(torch.uint8),
        index,
        weight,
        tokens,
        logits.stride(0),
        k,
        groups,
        experts // groups,
        topk_groups,
        float(routed_scale),
        warps=warps,
        stages=1,
        SCORE=SCORES.index(score),
        RENORMALIZE=renormalize,
        BEST=1 if bias is None or experts == groups else 2,
        ROWS=rows,
        GROUPS=held,
        WIDTH=width,
        K=power_of_two(k),
    )
    return index, weight
