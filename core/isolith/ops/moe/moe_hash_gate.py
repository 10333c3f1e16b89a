"""The router of hash layers: a table gives each token's experts, the learned scores give their weights.

    topk_idx[t, :] = table[token_ids[t], :]              in the table's order, not sorted
    topk_weights[t, i] = s[t, topk_idx[t, i]] / (sum_j s[t, topk_idx[t, j]] + 1e-20) * routed_scale

with the scores s of moe_gate. An expert that a row of the table repeats is legal: each of its slots counts in the sum
and is run. A token that `mask` switches off gets experts -1 and weights 0; its id must be legal all the same. An id
outside 0..vocab-1, or an expert outside 0..experts-1 in a row that is used, is an error. Logits that are not finite
make that token's weights unspecified.

Source: DeepSeek-V4 inference/model.py, Gate.forward (hash layers, tid2eid).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from isolith.dtypes import BOOL, INTEGER, WIDE
from isolith.errors import ArgumentError
from isolith.materials.relations import inverse, joined, reordered, same, scaled, take
from isolith.numerics import routing
from isolith.numerics.codes import check_choice
from isolith.operator import Cost, Operator
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(
    logits: Tensor,
    token_ids: Tensor,
    table: Tensor,
    score: str = "sqrtsoftplus",
    renormalize: bool = True,
    routed_scale: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    chosen = table[token_ids.long()].long()
    return routing.router_weights(routing.router_scores(logits, score), chosen, renormalize, routed_scale, mask)


def by_parts(
    logits: Tensor,
    token_ids: Tensor,
    table: Tensor,
    score: str = "sqrtsoftplus",
    renormalize: bool = True,
    routed_scale: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores from exponentials of what is not positive, and one factor a token for the weights."""
    chosen = table[token_ids.long()].long()
    scores = routing.router_scores_by_parts(logits, score)
    return routing.router_weights_by_inverse(scores, chosen, renormalize, routed_scale, mask)


def defined(logits: Tensor, mask: Tensor | None, **_: object) -> tuple[Tensor | None, ...]:
    return None, routing.specified(logits, mask)


def fake(logits: Tensor, table: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], table.shape[1])
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape)


def check(score: str, **_: object) -> None:
    check_choice("moe_hash_gate", "score", score, routing.SCORES)


def check_values(logits: Tensor, token_ids: Tensor, table: Tensor, **_: object) -> None:
    vocab, experts = table.shape[0], logits.shape[1]
    check_range("token_ids", token_ids, "vocab", vocab)
    check_range("table", table[token_ids.long()], "experts", experts)


def check_range(name: str, values: Tensor, limit_name: str, limit: int) -> None:
    """Raise ArgumentError unless all values are in 0..limit-1."""
    if values.numel() == 0:
        return
    low, high = (int(bound) for bound in values.aminmax())
    if low < 0 or high >= limit:
        got = low if low < 0 else high
        raise ArgumentError(f"moe_hash_gate: {name} must be in 0..{limit_name}-1 = {limit - 1}; got {got}.")


def cost(logits: Tensor, token_ids: Tensor, table: Tensor, score: str, mask: Tensor | None, **_: object) -> Cost:
    slots = logits.shape[0] * table.shape[1]
    # A softmax needs every logit; the others score the chosen experts alone.
    scored = logits.numel() if score == "softmax" else slots
    ids = token_ids.nbytes + slots * table.element_size() + (0 if mask is None else mask.nbytes)
    return Cost(
        flops=3 * scored + 3 * slots,
        bytes_read=scored * logits.element_size() + ids,
        bytes_written=slots * (4 + logits.element_size()),
    )


def samples(make: Make) -> Iterator[Sample]:
    def drawn(tokens: int, experts: int, k: int, vocab: int, integer: torch.dtype = torch.int32) -> dict[str, Tensor]:
        rows = [make.permutation(experts)[:k] for _ in range(vocab)]
        return {
            "logits": make.normal(tokens, experts, std=2.0),
            "token_ids": make.integers(0, vocab, tokens, dtype=integer),
            "table": make.place(torch.stack(rows), integer),
        }

    yield Sample("v4_flash", "model", **drawn(32, 256, 6, 512), routed_scale=1.5)
    yield Sample("int64", **drawn(9, 24, 10, 40, torch.int64), routed_scale=2.5)
    yield Sample("sigmoid", **drawn(9, 24, 3, 40), score="sigmoid")
    # A scale that no narrow format holds.
    yield Sample("softmax", **drawn(9, 24, 3, 40), score="softmax", renormalize=False, routed_scale=2.827)
    # Ids beyond 15 and 16 bits, experts beyond 8.
    ids = make.tensor([69_999, 65_536, 65_535, 32_768, 32_767, 0], torch.int32)
    table = make.integers(0, 384, 70_000, 2)
    table[65_536:, 0] = make.integers(256, 384, 70_000 - 65_536)
    yield Sample("wide_vocabulary", logits=make.normal(6, 384), token_ids=ids, table=table, routed_scale=2.827)
    yield from range_samples(make, drawn)
    # Descending in the table's order only by chance: a sorted result shows.
    ends = {**drawn(4, 8, 3, 5), "token_ids": make.tensor([0, 4, 4, 0], torch.int32)}
    yield Sample("first_and_last_id", **ends)
    repeated = make.tensor([[2, 2, 5], [7, 0, 7], [1, 1, 1]], torch.int32)
    ids = make.tensor([0, 1, 2, 1], torch.int32)
    yield Sample("repeated_expert", logits=make.normal(4, 8), token_ids=ids, table=repeated)
    mask = torch.arange(6, device=make.device) % 2 == 0
    poisoned = drawn(6, 8, 2, 5)
    poisoned["logits"][1::2] = float("nan")
    yield Sample("masked_token_is_nan", **poisoned, mask=mask)
    wild = drawn(6, 8, 2, 5)
    wild["logits"][3] = float("nan")
    yield Sample("nan_token", **wild)
    # Experts that the table does not choose must not show.
    hidden = drawn(6, 8, 2, 5)
    hidden["table"].fill_(3)
    hidden["logits"][:, 6], hidden["logits"][:, 7] = -3e38, 3e38
    yield Sample("huge_unchosen_logits", **hidden)
    yield Sample("tokens_100000", "invariants", **drawn(100_000, 8, 2, 512))
    yield Sample("no_tokens", **drawn(0, 8, 2, 5))


def range_samples(make: Make, drawn: Callable[..., dict[str, Tensor]]) -> Iterator[Sample]:
    """Logits from everywhere in their range."""

    def within(name: str, low: float, high: float, **given: Any) -> Sample:  # Any: the operator's arguments
        return Sample(name, **{**drawn(6, 12, 3, 5), "logits": make.uniform(6, 12, low=low, high=high), **given})

    yield within("low_logits", -30.0, -6.0)
    # Where softplus is nearly, but not yet, the identity.
    yield within("softplus_tail", 8.0, 18.0)
    for score in routing.SCORES:
        yield within(f"far_logits_{score}", 80.0, 110.0, score=score, renormalize=False, routed_scale=1.5)
    yield Sample("scores_underflow", **{**drawn(3, 8, 2, 5), "logits": make.full(-400.0, 3, 8)})
    # Sums of scores as small as what is added to them.
    yield within("sum_near_the_floor", -47.0, -44.0, score="sigmoid")
    apart = drawn(6, 8, 2, 5)
    apart["logits"] += make.tensor([[300.0], [0.0]] * 3)
    apart["logits"][4] = float("nan")
    yield Sample("tokens_far_apart", **apart, score="softmax", renormalize=False)


def errors(make: Make) -> Iterator[ErrorSample]:
    ids = make.tensor([0, 1, 2, 3], torch.int32)
    table = make.integers(0, 8, 4, 2)
    given = {"logits": make.normal(4, 8), "token_ids": ids, "table": table}

    def wrong(name: str, says: str, **changed: object) -> ErrorSample:
        return ErrorSample(name, says=f"moe_hash_gate: {says}", **{**given, **changed})

    yield wrong("id_too_high", "token_ids must be in 0..vocab-1 = 3; got 4.", token_ids=ids + 1)
    yield wrong("id_negative", "token_ids must be in 0..vocab-1 = 3; got -1.", token_ids=ids - 1)
    off = make.tensor([1, 0, 1, 1], torch.bool)
    says = "token_ids must be in 0..vocab-1 = 3; got -1."
    yield wrong("masked_id_negative", says, token_ids=make.tensor([0, -1, 2, 3], torch.int32), mask=off)
    yield wrong("expert_too_high", "table must be in 0..experts-1 = 7; got 8.", table=table.clone().fill_(8))
    yield wrong("expert_negative", "table must be in 0..experts-1 = 7; got -1.", table=table.clone().fill_(-1))
    yield wrong("score", "score must be 'sqrtsoftplus', 'sigmoid' or 'softmax'; got 'tanh'.", score="tanh")
    yield wrong("ids_rows", "tokens is 4 in logits but 3 in token_ids.", token_ids=ids[:3])
    yield wrong("ids_dtype", "token_ids must be int32 or int64; got float32.", token_ids=make.normal(4))
    yield wrong("table_rank", "table must be [vocab k], 2 axes; got shape (4,).", table=table[:, 0])


def relations(make: Make) -> Iterator[Relation]:
    table = torch.stack([make.permutation(24)[:4] for _ in range(40)]).to(make.device, torch.int32)
    call: dict[str, Any] = {
        "logits": make.normal(9, 24, std=2.0),
        "token_ids": make.integers(0, 40, 9),
        "table": table,
        "routed_scale": 1.5,
    }
    order, ids = make.permutation(9), make.permutation(40)
    yield reordered("tokens_reordered", call, order, {"logits": 0, "token_ids": 0}, {0: 0, 1: 0})
    yield joined("tokens_apart", call, [1, 6], ["logits", "token_ids"])
    yield reordered("slots_reordered", call, make.permutation(4), {"table": 1}, {0: 1, 1: 1})
    number = inverse(ids).to(make.device)[call["token_ids"].long()].int()
    yield same("vocabulary_renumbered", call, {"table": take(table, ids), "token_ids": number})
    yield scaled("weights_times_4", call, {"routed_scale": 2}, [0, 2])


def invariants(
    results: list[Tensor], logits: Tensor, token_ids: Tensor, table: Tensor, mask: Tensor | None, **_: object
) -> str | None:
    indices, weights = results
    on, chosen = routing.live(logits, mask), table[token_ids.long()].to(indices.dtype)
    if not torch.equal(indices, chosen.masked_fill(~on[:, None], -1)):
        return "topk_idx is not the table's row of each token, or -1"
    return routing.wrong_weights(weights, on, routing.specified(logits, mask))


moe_hash_gate = Operator(
    name="moe_hash_gate",
    shapes="logits[tokens experts] token_ids[tokens] table[vocab k] mask?[tokens]"
    " -> topk_idx[tokens k] topk_weights[tokens k]",
    dtypes={"logits": WIDE, "token_ids": INTEGER, "table": INTEGER, "mask": BOOL},
    reference=reference,
    variants=(by_parts,),
    fake=fake,
    check=check,
    check_values=check_values,
    cost=cost,
    samples=samples,
    errors=errors,
    defined=defined,
    sample_dtypes=(torch.float32,),
    relations=relations,
    invariants=invariants,
)
