"""The router: k experts per token by their scores, and the weights that their outputs get.

    s[t, e] = sqrt(softplus(logits[t, e])) | sigmoid(logits[t, e]) | softmax over e of logits[t, :]
    choice  = s + bias                                   bias decides the choice alone, never a weight
    topk_idx[t, :] = the k experts with the largest choice, largest first
    topk_weights[t, i] = s[t, topk_idx[t, i]] / (sum_j s[t, topk_idx[t, j]] + 1e-20) * routed_scale

softplus(x) is log1p(exp(x)), and x above 20. Without `renormalize` the quotient is left out. With `groups` G > 1 the
experts are G contiguous ranges; a group's score is the sum of its two largest choices (its largest alone where there is
no bias, or one expert a group), and only the experts of the `topk_groups` best groups compete, the others have choice
-inf. Equal choices: the lowest expert; equal group scores: the lowest group. A token that `mask` switches off gets
experts -1 and weights 0, whatever its logits. Logits that are not finite make that token's result unspecified, but its
experts stay in 0..experts-1; other tokens do not change.

Source: DeepSeek-V4 inference/model.py, Gate.forward (sqrtsoftplus, bias); DeepSeek-V3 inference/model.py, Gate.forward
(groups); TileKernels 36d9e45 tile_kernels/torch/moe (stable top-k, 1e-20).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isolith.dtypes import BOOL, WIDE
from isolith.errors import ArgumentError
from isolith.materials.lists import repeated
from isolith.materials.relations import joined, reordered, same, scaled, take
from isolith.numerics import routing
from isolith.numerics.codes import check_at_least_one, check_choice
from isolith.operator import Cost, Operator
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(
    logits: Tensor,
    k: int,
    bias: Tensor | None = None,
    score: str = "sqrtsoftplus",
    groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = True,
    routed_scale: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    scores = routing.router_scores(logits, score)
    choice = choices(scores, bias, groups, topk_groups)
    return routing.router_weights(scores, largest(choice, k), renormalize, routed_scale, mask)


def choices(scores: Tensor, bias: Tensor | None, groups: int, topk_groups: int) -> Tensor:
    """What the experts are ranked by; -inf in the groups that lose."""
    choice = scores if bias is None else scores + bias.to(scores.dtype)
    if groups == 1:
        return choice
    grouped: Tensor = choice.unflatten(1, (groups, -1))
    best = min(1 if bias is None else 2, grouped.shape[-1])
    winners = largest(grouped.sort(dim=-1, descending=True).values[..., :best].sum(-1), topk_groups)
    wins = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(1, winners, True)
    return grouped.masked_fill(~wins[..., None], float("-inf")).flatten(1)


def largest(values: Tensor, k: int) -> Tensor:
    """[T,n] -> [T,k]: columns of the k largest, descending; of equal ones the lowest column first."""
    order: Tensor = values.sort(dim=1, descending=True, stable=True).indices
    return order[:, :k]


def by_parts(
    logits: Tensor,
    k: int,
    bias: Tensor | None = None,
    score: str = "sqrtsoftplus",
    groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = True,
    routed_scale: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores from exponentials of what is not positive, and one factor a token for the weights."""
    scores = routing.router_scores_by_parts(logits, score)
    choice = choices(scores, bias, groups, topk_groups)
    return routing.router_weights_by_inverse(scores, largest(choice, k), renormalize, routed_scale, mask)


def selects_by(logits: Tensor, bias: Tensor | None, score: str, groups: int, topk_groups: int, **_: object) -> Tensor:
    return choices(routing.router_scores(logits, score), bias, groups, topk_groups)


def defined(logits: Tensor, mask: Tensor | None, **_: object) -> tuple[Tensor | None, ...]:
    rows = routing.specified(logits, mask)
    return rows, rows


def fake(logits: Tensor, k: int, **_: object) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape)


def check(logits: Tensor, k: int, score: str, groups: int, topk_groups: int, **_: object) -> None:
    experts = logits.shape[1]
    check_choice("moe_gate", "score", score, routing.SCORES)
    check_at_least_one("moe_gate", k=k)
    if k > experts:
        raise ArgumentError(f"moe_gate: k must be at most experts = {experts}; got {k}.")
    if groups < 1 or experts % groups:
        raise ArgumentError(f"moe_gate: groups must divide experts = {experts}; got {groups}.")
    if not 1 <= topk_groups <= groups:
        raise ArgumentError(f"moe_gate: topk_groups must be in 1..groups = {groups}; got {topk_groups}.")
    within = topk_groups * (experts // groups)
    if k > within:
        raise ArgumentError(f"moe_gate: k must be at most topk_groups*experts/groups = {within}; got {k}.")


def cost(logits: Tensor, k: int, bias: Tensor | None, mask: Tensor | None, **_: object) -> Cost:
    small = sum(tensor.nbytes for tensor in (bias, mask) if tensor is not None)
    return Cost(
        flops=5 * logits.numel() + 3 * logits.shape[0] * k,  # exponential, log, root, bias, comparison; sum and scale
        bytes_read=logits.nbytes + small,
        bytes_written=logits.shape[0] * k * (4 + logits.element_size()),
    )


def samples(make: Make) -> Iterator[Sample]:
    yield from ordinary_samples(make)
    yield from tie_samples(make)
    yield from near_samples(make)
    yield from range_samples(make)
    yield from edge_samples(make)
    yield from many_samples(make)


def ordinary_samples(make: Make) -> Iterator[Sample]:
    """The routers of the released models. Biases are wide enough to change most tokens' choice."""
    bias = make.normal(256, std=0.5)
    yield Sample("v4_flash", "model", logits=make.normal(32, 256, std=2.0), k=6, bias=bias, routed_scale=1.5)
    bias = make.normal(384, std=0.5)
    yield Sample("v4_pro", "model", logits=make.normal(8, 384, std=2.0), k=6, bias=bias, routed_scale=2.5)
    v3 = {"score": "sigmoid", "groups": 8, "topk_groups": 4, "routed_scale": 2.5}
    yield Sample("v3", "model", logits=make.normal(32, 256), k=8, bias=make.normal(256, std=0.3), **v3)
    v2 = {"score": "softmax", "groups": 8, "topk_groups": 3, "renormalize": False, "routed_scale": 16.0}
    yield Sample("v2", "model", logits=make.normal(16, 160), k=6, **v2)
    # A scale that no narrow format holds.
    k2 = {"score": "sigmoid", "routed_scale": 2.827}
    yield Sample("k2", "model", logits=make.normal(8, 384), k=8, bias=make.normal(384, std=0.3), **k2)
    yield Sample("qwen3_next", "model", logits=make.normal(8, 512), k=10, score="softmax")
    yield Sample("no_bias", logits=make.normal(9, 24), k=4)
    yield Sample("softmax_bias", logits=make.normal(9, 24), k=4, bias=make.normal(24, std=0.1), score="softmax")
    yield Sample("sigmoid_plain", logits=make.normal(9, 33), k=5, score="sigmoid", renormalize=False, routed_scale=1.1)
    # Without a bias a group counts by its largest score, with one by its two largest: the winners differ.
    yield Sample("groups_without_bias", logits=make.normal(16, 32, std=2.0), k=4, groups=8, topk_groups=2)
    yield Sample(
        "groups_zero_bias", logits=make.normal(16, 32, std=2.0), k=4, bias=make.zeros(32), groups=8, topk_groups=2
    )
    yield Sample("groups_of_one", logits=make.normal(4, 8), k=2, bias=make.normal(8), groups=8, topk_groups=3)
    yield Sample("every_group", logits=make.normal(4, 16), k=2, bias=make.normal(16), groups=4, topk_groups=4)


def tie_samples(make: Make) -> Iterator[Sample]:
    """Equal choices, also across the k-th place and between groups."""
    yield Sample("all_equal", logits=make.zeros(3, 33), k=5)
    yield Sample("all_equal_groups", logits=make.zeros(3, 32), k=6, bias=make.zeros(32), groups=8, topk_groups=4)
    coarse = make.integers(-1, 2, 24, 40).to(make.dtype)
    yield Sample("few_levels", logits=coarse, k=6)
    yield Sample("few_levels_groups", logits=coarse, k=6, bias=make.zeros(40), score="sigmoid", groups=8, topk_groups=3)
    # Scores saturate: different logits, one score.
    yield Sample("saturated_sigmoid", logits=make.uniform(6, 20, low=40.0, high=200.0), k=4, score="sigmoid")


def near_samples(make: Make) -> Iterator[Sample]:
    """Choices that only float32 tells apart: a narrower format makes them equal."""
    ranks = torch.stack([make.permutation(40) for _ in range(6)])
    yield Sample("near_logits", logits=make.place(1 + ranks * 2.0**-13, make.dtype), k=5)
    bias = make.place(1 + make.permutation(40) * 2.0**-13, make.dtype)
    yield Sample("near_biases", logits=make.normal(6, 1).expand(6, 40).contiguous(), k=5, bias=bias)
    # No two groups are equal, and the last ones are best.
    ranks = torch.arange(8)[:, None] * 8 + make.permutation(5)
    bias = make.place(1 + ranks.flatten() * 2.0**-13, make.dtype)
    given = {"logits": make.normal(6, 1).expand(6, 40).contiguous(), "bias": bias, "score": "sigmoid"}
    yield Sample("near_groups", **given, k=12, groups=8, topk_groups=3)


def range_samples(make: Make) -> Iterator[Sample]:
    """Logits from everywhere in their range."""
    yield Sample("wide_logits", logits=make.normal(6, 48, std=60.0), k=4, routed_scale=1.5)
    yield Sample("low_logits", logits=make.uniform(6, 24, low=-30.0, high=-6.0), k=24)
    around = make.uniform(6, 48, low=19.0, high=21.0)
    yield Sample("softplus_threshold", logits=around, k=4)
    # Where softplus is nearly, but not yet, the identity; every expert, since the largest alone are past it.
    yield Sample("softplus_tail", logits=make.uniform(6, 12, low=8.0, high=18.0), k=12)
    yield Sample("scores_underflow", logits=make.full(-400.0, 2, 16), k=4)
    # Sums of scores as small as what is added to them.
    tiny = make.uniform(6, 12, low=-47.0, high=-44.0)
    yield Sample("sum_near_the_floor", logits=tiny, k=2, score="sigmoid")
    far = make.uniform(6, 24, low=80.0, high=110.0)
    yield Sample("far_logits_softmax", logits=far, k=4, score="softmax", renormalize=False)
    apart = make.normal(6, 24) + make.tensor([[300.0], [0.0]] * 3)
    apart[4] = float("nan")
    yield Sample("tokens_far_apart", logits=apart, k=4, score="softmax")


def edge_samples(make: Make) -> Iterator[Sample]:
    """Choices below zero, as many as there are, masked tokens, tokens that are not finite."""
    # Choices below zero: a group or a padded expert at 0 would win.
    low = make.normal(12, 36, std=0.5)
    bias = make.uniform(36, low=-6.0, high=-4.0)
    yield Sample("negative_choices", logits=low, k=4, bias=bias)
    yield Sample("negative_choices_groups", logits=low, k=6, bias=bias, score="sigmoid", groups=6, topk_groups=2)
    yield Sample("k_is_experts", logits=make.normal(5, 7), k=7, bias=make.normal(7))
    yield Sample("k_is_one", logits=make.normal(5, 12), k=1, routed_scale=2.5)
    yield Sample("one_expert", logits=make.normal(3, 1), k=1)
    mask = torch.arange(10, device=make.device) % 3 != 1
    poisoned = make.normal(10, 24)
    poisoned[1] = float("nan")
    yield Sample("masked_token_is_nan", logits=poisoned, k=4, bias=make.normal(24), mask=mask)
    yield Sample("all_masked", logits=make.normal(4, 12), k=2, mask=torch.zeros_like(mask[:4]))
    # The unmasked NaN and infinite tokens are unspecified, their neighbours are not.
    wild = make.normal(8, 24)
    wild[2], wild[5, 3], wild[6, 0] = float("nan"), float("nan"), float("inf")
    yield Sample("wild_tokens", logits=wild, k=4, bias=make.normal(24), groups=4, topk_groups=2)
    yield Sample("no_tokens", logits=make.normal(0, 16), k=4, bias=make.normal(16), groups=4, topk_groups=2)
    yield Sample("one_token", logits=make.normal(1, 16), k=3, mask=torch.ones_like(mask[:1]))


def many_samples(make: Make) -> Iterator[Sample]:
    """Judged by the invariants alone: more tokens than 16 bits count."""
    few = {"logits": make.normal(100_000, 12), "bias": make.normal(12), "mask": make.uniform(100_000) > 0.1}
    yield Sample("tokens_100000", "invariants", **few, k=3)
    yield Sample("tokens_100000_groups", "invariants", **few, k=3, groups=4, topk_groups=2)
    yield Sample("experts_4096", "invariants", logits=make.small_integers(300, 4096), k=64, groups=64, topk_groups=4)


def errors(make: Make) -> Iterator[ErrorSample]:
    logits = make.normal(4, 8)

    def wrong(name: str, says: str, **given: object) -> ErrorSample:
        return ErrorSample(name, says=f"moe_gate: {says}", **{"logits": logits, "k": 2, **given})

    yield wrong("k_zero", "k must be at least 1; got 0.", k=0)
    yield wrong("k_above_experts", "k must be at most experts = 8; got 9.", k=9)
    yield wrong("score", "score must be 'sqrtsoftplus', 'sigmoid' or 'softmax'; got 'relu'.", score="relu")
    yield wrong("groups_do_not_divide", "groups must divide experts = 8; got 3.", groups=3)
    yield wrong("groups_zero", "groups must divide experts = 8; got 0.", groups=0)
    yield wrong("topk_groups_high", "topk_groups must be in 1..groups = 4; got 5.", groups=4, topk_groups=5)
    yield wrong("topk_groups_zero", "topk_groups must be in 1..groups = 4; got 0.", groups=4, topk_groups=0)
    says = "k must be at most topk_groups*experts/groups = 4; got 5."
    yield wrong("k_above_groups", says, k=5, groups=4, topk_groups=2)
    yield wrong("bias_width", "experts is 8 in logits but 7 in bias.", bias=make.normal(7))
    yield wrong("mask_rows", "tokens is 4 in logits but 3 in mask.", mask=logits[:3, 0] > 0)
    yield wrong("mask_dtype", "mask must be bool; got int32.", mask=make.integers(0, 2, 4))
    yield wrong("rank", "logits must be [tokens experts], 2 axes; got shape (8,).", logits=logits[0])
    says = "logits must be float32 or float64; got bfloat16."
    yield wrong("narrow_logits", says, logits=logits.to(torch.bfloat16))


def relations(make: Make) -> Iterator[Relation]:
    mask = make.uniform(9) > 0.2
    v4 = {
        "logits": make.normal(9, 64, std=2.0),
        "k": 6,
        "bias": make.normal(64, std=0.5),
        "mask": mask,
        "routed_scale": 1.5,
    }
    v3 = v4 | {"score": "sigmoid", "groups": 8, "topk_groups": 3}
    for name, call in (("v4", v4), ("v3", v3)):
        order = make.permutation(9)
        yield reordered(f"{name}_tokens_reordered", call, order, {"logits": 0, "mask": 0}, {0: 0, 1: 0})
        yield scaled(f"{name}_weights_times_4", call, {"routed_scale": 2}, [0, 2])
    yield experts_renumbered("experts_renumbered", v4, make.permutation(64))
    # Whole groups change places, and experts within each of them.
    within = torch.stack([make.permutation(8) for _ in range(8)]) + 8 * make.permutation(8)[:, None]
    yield experts_renumbered("groups_renumbered", v3, within.flatten())
    # Logits and the shift are multiples of 1/16, so that adding is exact.
    coarse = make.tensor([[(7 * t + e * e * 5) % 127 - 60 for e in range(61)] for t in range(9)]) / 16
    softmax = {"logits": coarse, "k": 5, "score": "softmax"}
    yield same("softmax_of_shifted_logits", softmax, {"logits": coarse + 4.0})
    unmasked = v4 | {"mask": None}
    yield same("nobody_masked", unmasked, {"mask": torch.ones_like(mask)})
    flash = {"logits": make.normal(32, 256, std=2.0), "k": 6, "bias": make.normal(256, std=0.5)}
    yield joined("flash_tokens_apart", flash, [1, 17], ["logits"])


def experts_renumbered(name: str, call: dict[str, Any], order: Tensor) -> Relation:  # Any: arguments
    """The experts in another order: the same ones are chosen."""
    part = call | {"logits": take(call["logits"], order, 1), "bias": take(call["bias"], order)}

    def assemble(parts: list[list[Tensor]]) -> list[Tensor]:
        indices, weights = parts[0]
        number = order.to(indices.device, indices.dtype)[indices.clamp(min=0).long()]
        return [torch.where(indices < 0, indices, number), weights]

    return Relation(name=name, whole=call, parts=(part,), assemble=assemble)


def invariants(
    results: list[Tensor],
    logits: Tensor,
    groups: int,
    topk_groups: int,
    mask: Tensor | None,
    **_: object,
) -> str | None:
    indices, weights = results
    on, defined = routing.live(logits, mask), routing.specified(logits, mask)
    wrong = routing.wrong_experts(indices, on, logits.shape[1])
    if wrong is not None:
        return wrong
    if bool((repeated(indices) & defined).any()):
        return "topk_idx names an expert twice in a row"
    group = indices.clamp(min=0) // (logits.shape[1] // groups)
    marks = torch.zeros(len(indices), groups, dtype=torch.bool, device=logits.device).scatter_(1, group.long(), True)
    if bool(((marks.sum(1) > topk_groups) & on & defined).any()):
        return f"topk_idx names experts of more than topk_groups = {topk_groups} groups"
    return routing.wrong_weights(weights, on, defined)


moe_gate = Operator(
    name="moe_gate",
    shapes="logits[tokens experts] bias?[experts] mask?[tokens] -> topk_idx[tokens k] topk_weights[tokens k]",
    dtypes={"logits": WIDE, "bias": WIDE, "mask": BOOL},
    reference=reference,
    variants=(by_parts,),
    fake=fake,
    check=check,
    cost=cost,
    samples=samples,
    errors=errors,
    selects_by=selects_by,
    ordered=True,
    defined=defined,
    sample_dtypes=(torch.float32,),
    relations=relations,
    invariants=invariants,
)
