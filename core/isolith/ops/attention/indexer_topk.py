"""The k entries of largest score, of the visible ones, for every token.

    order[t]      = entries s < lengths[t] that compete, by (-scores[t, s], s)
    indices[t]    = order[t, 0..k-1] as far as there are so many, then -1
    topk_length[t] = min(k, number of entries that compete)

Equal scores: the lowest entry wins and stands first (0.0 and -0.0 are equal). A visible entry of score -inf competes,
and comes after all finite ones. A NaN score: unspecified which entries, but competing ones, each once. The order of the
valid indices is not part of the contract; consumers must not depend on it. k may exceed the number of entries.

With `candidates` only entries of the blocks that it lists compete: block c is entries c*candidate_block up to
(c+1)*candidate_block - 1; -1 lists none, a block behind the entries too, and a block listed twice counts once.

Source: DeepSeek-V4 (arXiv:2606.19348) section 2.3 and inference/model.py, Indexer; stable order: TileKernels 36d9e45
stable_topk; candidates: DeepSeek-V4.1's two-level selection.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from isolith.dtypes import FLOAT, INTEGER
from isolith.errors import ArgumentError
from isolith.materials.lists import wrong_list
from isolith.materials.relations_indexer import relations_of_topk
from isolith.operator import Cost, Operator
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(
    scores: Tensor, lengths: Tensor, k: int, candidates: Tensor | None = None, candidate_block: int = 1
) -> tuple[Tensor, Tensor]:
    entries, competes = scores.shape[1], competing(scores, lengths, candidates, candidate_block)
    # Two stable sorts: by score, ties staying in the order of entries; then what competes before what does not.
    by_score = scores.argsort(dim=1, descending=True, stable=True)
    first = (~competes.gather(1, by_score)).to(torch.uint8).argsort(dim=1, stable=True)
    order = torch.nn.functional.pad(by_score.gather(1, first)[:, :k], (0, max(0, k - entries)))
    topk_length = competes.sum(1).clamp(max=k)
    indices = torch.where(torch.arange(k, device=scores.device) < topk_length[:, None], order, -1)
    return indices.to(torch.int32), topk_length.to(torch.int32)


def competing(
    scores: Tensor, lengths: Tensor, candidates: Tensor | None = None, candidate_block: int = 1, **_: object
) -> Tensor:
    """Whether an entry is visible and among the candidates: [tokens, entries]."""
    visible = torch.arange(scores.shape[1], device=scores.device) < lengths[:, None]
    return visible if candidates is None else visible & listed(candidates, candidate_block, scores.shape[1])


def listed(candidates: Tensor, candidate_block: int, entries: int) -> Tensor:
    """Whether an entry's block is among the candidates: [tokens, entries]."""
    blocks = -(-entries // candidate_block)
    legal = (candidates >= 0) & (candidates < blocks)
    # One more block takes what names none.
    marks = torch.zeros(candidates.shape[0], blocks + 1, dtype=torch.bool, device=candidates.device)
    marks.scatter_(1, torch.where(legal, candidates, blocks).long(), True)
    return marks[:, torch.arange(entries, device=candidates.device) // candidate_block]


def scores_of(scores: Tensor, **_: object) -> Tensor:
    """What the selection ranks."""
    return scores


def fake(scores: Tensor, lengths: Tensor, k: int, **_: object) -> tuple[Tensor, Tensor]:
    tokens = scores.shape[0]
    return lengths.new_empty(tokens, k, dtype=torch.int32), lengths.new_empty(tokens, dtype=torch.int32)


def check(k: int, candidate_block: int, **_: object) -> None:
    if k < 1:
        raise ArgumentError(f"indexer_topk: k must be at least 1; got {k}.")
    if candidate_block < 1:
        raise ArgumentError(f"indexer_topk: candidate_block must be at least 1; got {candidate_block}.")


def cost(scores: Tensor, lengths: Tensor, k: int, candidates: Tensor | None, **_: object) -> Cost:
    return Cost(
        flops=scores.numel(),  # one comparison with the k-th largest each
        bytes_read=scores.nbytes + lengths.nbytes + (0 if candidates is None else candidates.nbytes),
        bytes_written=scores.shape[0] * (k + 1) * 4,
    )


def samples(make: Make) -> Iterator[Sample]:
    def lengths(*values: int) -> Tensor:
        return make.tensor(values, torch.int32)

    flash = {"scores": make.normal(2, 4096), "lengths": lengths(4096, 3000), "k": 512}
    yield Sample("flash", "model", **flash)
    yield Sample("v32", "model", **flash | {"k": 2048})
    # 0, fewer than k, k, and more than k visible entries; one length beyond the entries.
    scores = make.normal(6, 40)
    yield Sample("lengths_around_k", scores=scores, lengths=lengths(0, 3, 8, 9, 40, 50), k=8)
    yield Sample("int64_lengths", scores=scores, lengths=lengths(0, 3, 8, 9, 40, 41).long(), k=8)
    yield Sample("k_beyond_entries", scores=scores, lengths=lengths(0, 3, 8, 9, 40, 50), k=64)
    yield Sample("one", scores=scores, lengths=lengths(1, 1, 2, 5, 7, 40), k=1)
    # Ties: the k-th and its equals straddle k; all scores zero of either sign; few distinct values.
    yield Sample("all_zero", "exact", scores=make.zeros(3, 300), lengths=lengths(300, 100, 5), k=32)
    yield Sample(
        "zeros_of_both_signs",
        "exact",
        scores=make.zeros(2, 64) * make.small_integers(2, 64),
        lengths=lengths(64, 60),
        k=7,
    )
    yield Sample("few_values", "exact", scores=make.small_integers(4, 700), lengths=lengths(700, 600, 65, 2), k=64)
    yield Sample(
        "bfloat16_ties", "exact", scores=make.normal(2, 3000, dtype=torch.bfloat16), lengths=lengths(3000, 2999), k=500
    )
    # Negative and tiny values, by whose bits a radix selection sorts: those above 0 are subnormal.
    small = make.normal(2, 200, std=1e-6)
    tiny = torch.where(small > 0, small * 2.0**-120, small)
    yield Sample("tiny_of_both_signs", scores=tiny, lengths=lengths(200, 190), k=130)
    yield Sample("subnormal", scores=tiny, lengths=lengths(200, 190), k=30)
    yield Sample("all_negative", scores=-make.normal(2, 200).abs(), lengths=lengths(200, 150), k=20)
    # Neighbours of a dtype: who ranks by fewer bits mistakes them.
    close = make.tensor([make.permutation(90).tolist() for _ in range(2)]) * torch.finfo(make.dtype).eps + 1.0
    yield Sample("neighbouring_values", "exact", scores=close, lengths=lengths(90, 80), k=37)
    yield Sample("entries_70000", scores=make.normal(2, 70000), lengths=lengths(70000, 66000), k=512)
    # Visible entries of -inf compete after finite ones; the invisible hold NaN and inf.
    holes = make.normal(3, 20)
    holes[:, ::2], holes[1, :] = -torch.inf, -torch.inf
    holes[:, 15:], holes[:, 12:15] = torch.nan, torch.inf
    yield Sample("infinite", "exact", scores=holes, lengths=lengths(12, 10, 3), k=8)
    yield from samples_of_candidates(make)
    yield from samples_of_many(make)


def samples_of_candidates(make: Make) -> Iterator[Sample]:
    rows = make.tensor([[3, -1, 0, 3], [-1, -1, -1, -1], [1, 99, 3, 2**31 - 1], [2, 4, 2, 4]], torch.int32)
    call = {"lengths": make.tensor([40, 40, 40, 34], torch.int32), "candidates": rows}
    yield Sample("candidates_of_8", scores=make.normal(4, 40), k=12, candidate_block=8, **call)
    yield Sample("candidates_of_1", scores=make.normal(4, 40), k=2, **call | {"candidates": rows.long()})
    yield Sample("candidate_ties", "exact", scores=make.zeros(4, 40), k=9, candidate_block=8, **call)
    # The last block is short, and k more than the candidates of any token.
    yield Sample("short_last_block", scores=make.normal(4, 37), k=20, candidate_block=8, **call)
    yield Sample("no_candidate_columns", scores=make.normal(4, 40), k=3, **call | {"candidates": rows[:, :0]})
    none = make.integers(0, 1, 0)
    yield Sample("no_tokens", scores=make.zeros(0, 40), lengths=none, k=4)
    yield Sample("no_entries", scores=make.zeros(2, 0), lengths=make.integers(0, 1, 2), k=4)


def samples_of_many(make: Make) -> Iterator[Sample]:
    """Judged by the invariants alone: more entries than 20 bits count, more tokens than 16."""
    long = {"scores": make.integers(-50, 50, 1, 1_048_577).to(make.dtype), "lengths": make.full(2**30, 1)}
    yield Sample("4096_of_1048577", "invariants", scores=long["scores"], lengths=long["lengths"].int(), k=4096)
    lengths = make.integers(0, 12, 70_000)
    many = {"scores": make.small_integers(70_000, 9), "lengths": lengths, "k": 5}
    yield Sample("tokens_70000", "invariants", **many)
    pairs = make.integers(-1, 4, 70_000, 2)
    yield Sample("candidates_70000", "invariants", **many | {"candidates": pairs, "candidate_block": 3})


def errors(make: Make) -> Iterator[ErrorSample]:
    scores, lengths = make.normal(3, 10), make.integers(0, 11, 3)
    yield ErrorSample("k_0", scores=scores, lengths=lengths, k=0, says="indexer_topk: k must be at least 1; got 0.")
    says = "indexer_topk: candidate_block must be at least 1; got 0."
    yield ErrorSample("candidate_block_0", scores=scores, lengths=lengths, k=1, candidate_block=0, says=says)
    says = "indexer_topk: tokens is 3 in scores but 2 in lengths."
    yield ErrorSample("lengths", scores=scores, lengths=lengths[:2], k=1, says=says)
    says = "indexer_topk: lengths must be int32 or int64; got float32."
    yield ErrorSample("float_lengths", scores=scores, lengths=lengths.float(), k=1, says=says)


def relations(make: Make) -> Iterator[Relation]:
    yield from relations_of_topk(make)


def invariants(
    results: list[Tensor],
    scores: Tensor,
    lengths: Tensor,
    candidates: Tensor | None,
    candidate_block: int,
    **_: object,
) -> str | None:
    return wrong_selection(results, lengths, scores.shape[1], candidates, candidate_block)


def wrong_selection(
    results: list[Tensor], lengths: Tensor, entries: int, candidates: Tensor | None, candidate_block: int
) -> str | None:
    """The first thing wrong with a selection apart from its values, or None."""
    indices, topk_length = results
    end = lengths.clamp(min=0, max=entries)
    competing = end
    if candidates is not None:
        seen = torch.arange(entries, device=lengths.device) < lengths[:, None]
        marks = listed(candidates, candidate_block, entries) & seen
        competing = marks.sum(1)
    due = competing.clamp(max=indices.shape[1])
    if not torch.equal(topk_length.long(), due.long()):
        return "topk_length is not the smaller of k and the number of entries that compete"
    wrong = wrong_list(indices, due, end)
    if wrong is None and candidates is not None and entries:
        chosen = marks.gather(1, indices.clamp(min=0).long()) | (indices < 0)
        return None if bool(chosen.all()) else "a list names an entry outside the candidates"
    return wrong


indexer_topk = Operator(
    name="indexer_topk",
    shapes="scores[tokens entries] lengths[tokens] candidates?[tokens _] -> indices[tokens k] topk_length[tokens]",
    dtypes={"scores": FLOAT, "lengths": INTEGER, "candidates": INTEGER},
    reference=reference,
    variants=(),
    fake=fake,
    check=check,
    cost=cost,
    samples=samples,
    errors=errors,
    selects_by=scores_of,
    competes=competing,
    relations=relations,
    invariants=invariants,
)
