"""Which entries a token attends to: the k of largest indexer score among those that it sees.

    scores                = indexer_score(q, weights, k_cache, ..., out_dtype)
    indices, topk_length  = indexer_topk(scores, lengths, k, candidates, candidate_block)
    lengths[t]            = floor((p + 1) / ratio),   p the position of token t in its sequence

Indices are entries of the token's own sequence, without offset; min(k, lengths[t]) of them, or as many as the
candidates leave, then -1. A token that sees at most k entries selects them all, whatever their scores. Ties, -inf and
NaN as in indexer_topk; scores are rounded to out_dtype before they are ranked, which makes ties. With ratio 1 and
indices given to mla_attention this is DeepSeek-V3.2's sparse attention.

Source: DeepSeek-V3.2 (arXiv:2512.02556) section 2.1; DeepSeek-V4 (arXiv:2606.19348) section 2.3 and inference/model.py,
Indexer.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from isolith.dtypes import E4M3, FLOAT, INT32, INTEGER, PACKED, SCALE
from isolith.errors import ArgumentError
from isolith.materials.indexer import batch_of_scores, errors_of_indexer, quantised_kinds
from isolith.materials.relations_indexer import relations_of_selection
from isolith.numerics.pages import entry_dim
from isolith.numerics.ragged import positions_of_tokens
from isolith.operator import Cost, Operator
from isolith.ops.attention.indexer_score import (
    bytes_of_queries,
    check_indexer,
    check_indexer_values,
    indexer_score,
    math_of_scores,
)
from isolith.ops.attention.indexer_score import reference as reference_scores
from isolith.ops.attention.indexer_topk import competing, indexer_topk, wrong_selection
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(
    q: Tensor,
    weights: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    k: int,
    max_entries: int,
    softmax_scale: float = 1.0,
    q_scale: Tensor | None = None,
    out_dtype: str = "float32",
    candidates: Tensor | None = None,
    candidate_block: int = 1,
) -> tuple[Tensor, Tensor]:
    scores = indexer_score(
        *(q, weights, k_cache, block_table, cu_seqlens, start_pos, ratio, max_entries),
        *(softmax_scale, q_scale, out_dtype),
    )
    _, position = positions_of_tokens(cu_seqlens, start_pos, q.shape[0])
    return indexer_topk(scores, (position + 1) // ratio, k, candidates, candidate_block)


def scores_of(
    q: Tensor,
    weights: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    max_entries: int,
    softmax_scale: float,
    q_scale: Tensor | None,
    out_dtype: str,
    **_: object,
) -> Tensor:
    """What the selection ranks."""
    return reference_scores(
        *(q, weights, k_cache, block_table, cu_seqlens, start_pos, ratio, max_entries),
        *(softmax_scale, q_scale, out_dtype),
    )


def competes(
    q: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    max_entries: int,
    candidates: Tensor | None,
    candidate_block: int,
    **_: object,
) -> Tensor:
    """The entries that are visible, and listed."""
    position = positions_of_tokens(cu_seqlens, start_pos, q.shape[0])[1]
    entries = position.new_empty(()).expand(q.shape[0], max_entries)
    return competing(entries, (position + 1) // ratio, candidates, candidate_block)


def fake(q: Tensor, k: int, **_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape[0], k, dtype=torch.int32), q.new_empty(q.shape[0], dtype=torch.int32)


def check(
    q: Tensor,
    k_cache: Tensor,
    ratio: int,
    k: int,
    max_entries: int,
    q_scale: Tensor | None,
    out_dtype: str,
    candidate_block: int,
    **_: object,
) -> None:
    check_indexer("lightning_indexer", q, k_cache, ratio, max_entries, q_scale, out_dtype)
    if k < 1:
        raise ArgumentError(f"lightning_indexer: k must be at least 1; got {k}.")
    if candidate_block < 1:
        raise ArgumentError(f"lightning_indexer: candidate_block must be at least 1; got {candidate_block}.")


def check_values(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    max_entries: int,
    **_: object,
) -> None:
    check_indexer_values("lightning_indexer", q, k_cache, block_table, cu_seqlens, start_pos, ratio, max_entries)


def cost(
    q: Tensor,
    weights: Tensor,
    k_cache: Tensor,
    start_pos: Tensor,
    k: int,
    max_entries: int,
    q_scale: Tensor | None,
    candidates: Tensor | None,
    candidate_block: int,
    **_: object,
) -> Cost:
    competing, heads = max_entries, q.shape[1]
    if candidates is not None:
        competing = min(max_entries, candidates.shape[1] * candidate_block)
    keys = min(start_pos.shape[0] * max_entries, q.shape[0] * competing, k_cache.shape[0] * k_cache.shape[1])
    lists = 0 if candidates is None else candidates.nbytes
    return Cost(
        flops=2 * q.shape[0] * competing * heads * entry_dim(k_cache),  # the dot products, as indexer_score counts them
        bytes_read=bytes_of_queries(q, weights, q_scale) + lists + keys * k_cache.shape[2] * k_cache.itemsize,
        bytes_written=q.shape[0] * (k + 1) * 4,
        math=math_of_scores(q),
    )


def samples(make: Make) -> Iterator[Sample]:
    flash = batch_of_scores(make, [1, 1], [4095, 1021], 4, 64, 128, 64) | {"k": 512}
    yield Sample("flash_decode", "model", **flash)
    for name, call in quantised_kinds(make, flash, 64):
        yield Sample(name, "model", **call | {"k": 128})
    v32 = batch_of_scores(make, [2], [300], 1, 64, 128, 64) | {"k": 256}
    yield Sample("v32_ratio_1", "model", **v32)
    # Visible: 0, fewer than k, k, more than k.
    ragged = batch_of_scores(make, [9, 0, 1, 1, 5], [0, 8, 2, 3, 125], 4, 8, 32, 2)
    yield Sample("around_the_ratio", **ragged | {"k": 2})
    yield Sample("k_beyond_entries", **ragged | {"k": 50})
    yield Sample("bfloat16_scores", **ragged | {"k": 16, "out_dtype": "bfloat16"})
    yield Sample("max_entries_beyond", **ragged | {"k": 16, "max_entries": 70})
    rows = make.tensor([[3, 0, 3, -1]] * 16, torch.int32)
    yield Sample("candidates_of_8", **ragged | {"k": 9, "candidates": rows, "candidate_block": 8})
    yield Sample("candidates_of_1", **ragged | {"k": 2, "candidates": rows + 1})
    # All dots are negative, so every score is 0 and the lowest entries win, across pages and chunks of any size.
    against = batch_of_scores(make, [3, 1], [560, 1203], 4, 4, 32, 61)
    zeros = {"q": -against["q"].abs(), "k_cache": against["k_cache"].abs()}
    yield Sample("all_scores_zero", "exact", **against | zeros | {"k": 37})
    # Scores of few values: hundreds of ties at the k-th.
    integers = {"q": make.small_integers(4, 4, 32), "weights": make.small_integers(4, 4), "softmax_scale": 0.25}
    keys = make.small_integers(*against["k_cache"].shape)
    yield Sample("many_ties", "exact", **against | integers | {"k_cache": keys, "k": 64})
    # A cheap head over more entries than 16 bits count, and more tokens.
    long = batch_of_scores(make, [2], [131_070], 1, 1, 4, 64)
    yield Sample("entries_131072", "invariants", **long | {"k": 2048})
    many = batch_of_scores(make, [70_000], [0], 16_384, 1, 4, 64)
    yield Sample("tokens_70000", "invariants", **many | {"k": 2})
    yield Sample("nothing_visible", **batch_of_scores(make, [3], [0], 4, 4, 32, 8) | {"k": 4})
    none = batch_of_scores(make, [0, 0], [5, 9], 4, 4, 128, 8) | {"k": 4}
    yield Sample("no_tokens", **none)
    for name, call in quantised_kinds(make, none, 8):
        yield Sample(f"no_tokens_{name}", **call)
    yield Sample("no_sequences", **batch_of_scores(make, [], [], 4, 4, 32, 8) | {"k": 4})


def errors(make: Make) -> Iterator[ErrorSample]:
    call = batch_of_scores(make, [2, 1], [6, 3], 4, 2, 128, 4) | {"k": 2}
    yield from errors_of_indexer(make, "lightning_indexer", call)
    yield ErrorSample("k_0", says="lightning_indexer: k must be at least 1; got 0.", **call | {"k": 0})
    says = "lightning_indexer: candidate_block must be at least 1; got 0."
    yield ErrorSample("candidate_block_0", says=says, **call | {"candidate_block": 0})


def relations(make: Make) -> Iterator[Relation]:
    yield from relations_of_selection(make)


def invariants(
    results: list[Tensor],
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    max_entries: int,
    candidates: Tensor | None,
    candidate_block: int,
    **_: object,
) -> str | None:
    position = positions_of_tokens(cu_seqlens, start_pos, results[0].shape[0])[1]
    return wrong_selection(results, (position + 1) // ratio, max_entries, candidates, candidate_block)


lightning_indexer = Operator(
    name="lightning_indexer",
    shapes="q[tokens heads _] weights[tokens heads] k_cache[blocks block_size _] block_table[sequences max_blocks] "
    "cu_seqlens[sequences+1] start_pos[sequences] q_scale?[*] candidates?[tokens _] "
    "-> indices[tokens k] topk_length[tokens]",
    dtypes={
        "q": FLOAT + E4M3 + PACKED,
        "weights": FLOAT,
        "k_cache": FLOAT + PACKED,
        "block_table": INT32,
        "cu_seqlens": INT32,
        "start_pos": INT32,
        "q_scale": SCALE,
        "candidates": INTEGER,
    },
    reference=reference,
    variants=(),
    fake=fake,
    check=check,
    check_values=check_values,
    cost=cost,
    samples=samples,
    errors=errors,
    selects_by=scores_of,
    competes=competes,
    composed_of=("indexer_score", "indexer_topk"),
    relations=relations,
    invariants=invariants,
)
