"""Calls of whole layers for samples: small weights, and caches as the tokens before have left them.

A selection inside a layer can flip where rounding closes a gap, and everything behind it with it. So the samples keep
such gaps wide: channels 0 and 1 of x decide what the indexer selects. Channel 0 is one level for all tokens of a
window, no two windows of a sequence alike, channel 1 is 1; the index keys have nothing but these two, and every score
grows with the level. The gap between neighbours is several percent, rounding moves scores by a few thousandths.
Channels 2 to 5 are 1 or -1, and a router that reads them alone has wide gaps for each of the 16 patterns.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isolith.dispatch import using
from isolith.materials.relations import Ragged, tokens_of_steps
from isolith.numerics.rope_tables import rope_frequencies, rope_tables
from isolith.operator import AnyOperator
from isolith.sample import Make
from isolith_conformance.family import only_references

HIDDEN, HEADS, DIM, PAIRS, RANK, GROUPS, O_RANK, WINDOW = 64, 4, 32, 4, 24, 2, 16, 8
INDEX_HEADS, INDEX_DIM, INDEX_K = 2, 16, 3
GATING = slice(2, 6)
"""The channels that a router reads."""

TOKENS = Ragged(tokens=("x",), sequences=("window_table", "entries_table", "keys_table"))

Arguments = dict[str, Any]  # Any: an operator's arguments


def weights(make: Make, ratio: int, k: int) -> Arguments:
    """The weights of an attention layer."""
    given: Arguments = {
        "wq_a": projection(make, RANK, HIDDEN),
        "q_norm": make.normal(RANK, std=0.1, mean=1.0, dtype=torch.float32),
        "wq_b": projection(make, HEADS * DIM, RANK),
        "wkv": projection(make, DIM, HIDDEN),
        "kv_norm": make.normal(DIM, std=0.1, mean=1.0, dtype=torch.float32),
        "wo_a": projection(make, GROUPS, O_RANK, HEADS * DIM // GROUPS),
        "wo_b": projection(make, HIDDEN, GROUPS * O_RANK),
        "sink": make.normal(HEADS, dtype=torch.float32),
        "window": WINDOW,
        "ratio": ratio,
        "k": k,
    }
    if ratio:
        given |= compressor(make, "main", DIM, ratio)
    if k:
        given |= compressor(make, "index", INDEX_DIM, ratio) | indexer(make, ratio)
        # The second query rank of x's constant channel alone is what the index queries are made of.
        given["wq_a"][0], given["wq_a"][0, 1] = 0.0, 2.0
    return given


def projection(make: Make, *shape: int) -> Tensor:
    """A weight that keeps the size of what it multiplies."""
    return make.normal(*shape, std=shape[-1] ** -0.5)


def compressor(make: Make, name: str, dim: int, ratio: int) -> Arguments:
    """The weights of a compressor; those of ratio 4 overlap."""
    channels = dim * (2 if ratio == 4 else 1)
    return {
        f"{name}_wkv": projection(make, channels, HIDDEN),
        f"{name}_wgate": projection(make, channels, HIDDEN),
        f"{name}_norm": make.normal(dim, std=0.1, mean=1.0, dtype=torch.float32),
        f"{name}_ape": make.normal(ratio, channels, dtype=torch.float32),
    }


def indexer(make: Make, ratio: int) -> Arguments:
    """An indexer that ranks windows by the level of their tokens."""
    wkv = make.zeros(2 * INDEX_DIM, HIDDEN)
    # The window's own half of the channels: the level in one, the constant in another, neither of them turned.
    wkv[INDEX_DIM, 0], wkv[INDEX_DIM + 1, 1] = 1.0, 1.0
    wq = make.zeros(INDEX_HEADS, INDEX_DIM, RANK)
    # Against the unit vector of (level, 1) both heads grow with the level, as far as it goes.
    wq[:, 0, 0] = 1.0
    wq[:, 1, 0] = make.tensor([0.0, -0.25])
    head_weights = make.zeros(INDEX_HEADS, HIDDEN)
    head_weights[:, 1] = make.tensor([1.0, 0.5])
    # The softmax of a window is over its own tokens: the window before has no weight in these channels.
    ape = make.normal(ratio, 2 * INDEX_DIM, dtype=torch.float32)
    ape[:, :INDEX_DIM] = -60.0
    norm = make.full(1.0, INDEX_DIM, dtype=torch.float32)
    return {
        "index_wq": wq.flatten(0, 1),
        "index_weights": head_weights,
        "index_wkv": wkv,
        "index_norm": norm,
        "index_ape": ape,
    }


def caches(make: Make, ends: Sequence[int], ratio: int, k: int) -> Arguments:
    """Paged caches for so many positions of each sequence, NaN everywhere."""
    given = pool(make, "window_cache", "window_table", ends, DIM, make.dtype)
    length = max([*ends, 1])
    given["cos_table"], given["sin_table"] = rope_tables(rope_frequencies(2 * PAIRS, 160000.0), length, make.device)
    compressors = ([("main", "entries", DIM)] if ratio else []) + ([("index", "keys", INDEX_DIM)] if k else [])
    for name, entries, dim in compressors:
        state = 2 * dim * (2 if ratio == 4 else 1)
        given |= pool(make, f"{name}_state", f"{name}_state_table", ends, state, torch.float32)
        given |= pool(make, entries, f"{entries}_table", [end // ratio for end in ends], dim, make.dtype)
    return given


def pool(make: Make, name: str, table: str, items: Sequence[int], width: int, dtype: torch.dtype) -> Arguments:
    """A pool of nothing but NaN with a table of shuffled blocks."""
    pages = make.pages(items, 4)
    cache = make.full(torch.nan, pages.blocks, pages.block_size, width, dtype=dtype)
    return {name: cache, table: pages.block_table}


def residual(make: Make, lengths: Sequence[int], ratio: int) -> Tensor:
    """Tokens [sum(lengths), hidden] of sequences from position 0 on, with the channels that select."""
    x = make.normal(sum(lengths), HIDDEN, dtype=torch.float64)
    x[:, GATING] = make.integers(0, 2, sum(lengths), 4).cpu().double() * 2 - 1
    low = 0
    for length in lengths:
        count = -(-length // (ratio or 4))
        levels = (make.permutation(count).double() + 1) * (1.25 / max(count, 1))
        x[low : low + length, 0] = levels.repeat_interleave(ratio or 4)[:length]
        low += length
    x[:, 1] = 1.0
    return make.place(x, make.dtype)


def batch(
    make: Make, layer: AnyOperator, tokens: Sequence[int], start: Sequence[int] = (), ratio: int = 0, k: int = 0
) -> Arguments:
    """A call with so many tokens of each sequence, on caches that the layer has filled with the tokens before."""
    start = list(start) or [0] * len(tokens)
    ends = [first + count for first, count in zip(start, tokens, strict=True)]
    call = weights(make, ratio, k) | caches(make, ends, ratio, k)
    call["x"] = residual(make, ends, ratio)
    call["cu_seqlens"], call["start_pos"] = make.batch(ends)
    return continued(layer, call, start, "x")


def continued(layer: AnyOperator, call: Arguments, start: Sequence[int], rows: str) -> Arguments:
    """The last tokens of a call, the first `start` ones of each sequence being in the caches already."""
    lengths = call["cu_seqlens"].diff().tolist()
    counts = [length - first for length, first in zip(lengths, start, strict=True)]
    before, after = tokens_of_steps(call, [list(start), counts])
    steps = []
    for tokens, step, position in ((before, start, [0] * len(start)), (after, counts, start)):
        batch = {"cu_seqlens": torch.tensor([0, *step]).cumsum(0).int(), "start_pos": torch.tensor(position).int()}
        placed = {name: value.to(call[rows].device) for name, value in batch.items()}
        steps.append({**call, **placed, rows: call[rows][tokens.to(call[rows].device)]})
    if len(before):
        with using(only_references()):
            layer.reference(**steps[0])
    return steps[1]


STREAMS, EXPERTS, INTER, PER_TOKEN = 4, 8, 32, 2
WIDE_GAP = 0.04


def block(
    make: Make, layer: AnyOperator, tokens: Sequence[int], start: Sequence[int] = (), *, ratio: int, k: int
) -> Arguments:
    """A call of a decoder block, on caches that the block has filled with the tokens before."""
    start = list(start) or [0] * len(tokens)
    ends = [first + count for first, count in zip(start, tokens, strict=True)]
    call = weights(make, ratio, k) | caches(make, ends, ratio, k) | experts(make)
    for name in ("attn", "ffn"):
        mixes = (2 + STREAMS) * STREAMS
        call[f"{name}_fn"] = make.normal(mixes, STREAMS * HIDDEN, std=(STREAMS * HIDDEN) ** -0.5, dtype=torch.float32)
        call[f"{name}_scale"] = make.uniform(3, low=0.5, high=1.5, dtype=torch.float32)
        call[f"{name}_base"] = make.normal(mixes, std=0.5, dtype=torch.float32)
        call[f"{name}_norm"] = make.normal(HIDDEN, std=0.1, mean=1.0, dtype=torch.float32)
        call[f"{name}_norm"][: GATING.stop] = 1.0
    # What selects is the same in every stream, and no sublayer adds to it: it stays what it is, times a factor.
    streams = make.normal(sum(ends), STREAMS, HIDDEN)
    streams[:, :, : GATING.stop] = residual(make, ends, ratio)[:, None, : GATING.stop]
    call["wo_b"][: GATING.stop] = 0.0
    call["streams"] = streams
    call["cu_seqlens"], call["start_pos"] = make.batch(ends)
    return continued(layer, call, start, "streams")


def experts(make: Make) -> Arguments:
    """A router with wide gaps, experts and a shared one."""
    gate = make.zeros(EXPERTS, HIDDEN)
    rows, bias = router(make)
    gate[:, GATING] = rows.to(gate)
    return {
        "gate": gate,
        "gate_bias": bias.to(make.device, torch.float32),
        "w13": projection(make, EXPERTS, 2 * INTER, HIDDEN),
        "w2": projection(make, EXPERTS, HIDDEN, INTER),
        "shared_w13": projection(make, 2 * INTER, HIDDEN),
        "shared_w2": projection(make, HIDDEN, INTER),
        "per_token": PER_TOKEN,
    }


def router(make: Make) -> tuple[Tensor, Tensor]:
    """Weights [experts, 4] and bias [experts] by which the choice is clear for any pattern of signs, times 1 to 2.8."""
    patterns = torch.tensor([[1.0 if number >> bit & 1 else -1.0 for bit in range(4)] for number in range(16)])
    factors = torch.tensor([1.0, 1.4, 2.0, 2.8])[:, None, None]
    # One draw in sixteen serves. Multiples of 1/8, so that no dtype rounds them.
    rows = (torch.randn(1000, 1, EXPERTS, 4, generator=make.generator) * 8).round() / 8
    bias = torch.randn(1000, 1, 1, EXPERTS, generator=make.generator) * 0.05
    choice = torch.nn.functional.softplus(patterns @ rows.mT * factors).sqrt() + bias
    best = choice.topk(PER_TOKEN + 1, dim=-1).values
    narrowest = (best[..., PER_TOKEN - 1] - best[..., PER_TOKEN]).flatten(1).amin(1)
    widest = int(narrowest.argmax())
    assert narrowest[widest] > WIDE_GAP, "a thousand draws hold one that serves"
    return rows[widest, 0], bias[widest, 0, 0]
