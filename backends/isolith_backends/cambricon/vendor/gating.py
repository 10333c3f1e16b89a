"""Routers: the moe_*_topk functions and moe_cast_gating of tmo 1.12.1 (domesticated_torch_mlu_ops@9fbf7df6 _ops.py).

Weights are renormalised without an epsilon, so scores that are all 0 give NaN.
"""

import torch
from torch import Tensor
from torch.nn import functional

from isolith_backends.cambricon.vendor.order import largest
from isolith_backends.cambricon.vendor.rules import (
    FLOATS,
    HALVES,
    need,
    need_dtype,
    need_int32,
    need_shape,
    need_within,
)


def moe_softplus_topk(
    input: Tensor,
    topk: int,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    bias: Tensor | None = None,
    route_scale: float = 1.0,
    reduce_weight: Tensor | None = None,
    expert_id: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    call = "moe_softplus_topk"
    need_router(call, input, topk, bias, reduce_weight, expert_id)
    need_int32(call, input_ids=input_ids, tid2eid=tid2eid)
    need_shape(call, input_ids=(input_ids, tuple(input.shape[:-1])), tid2eid=(tid2eid, (-1, topk)))
    scores = functional.softplus(input.float()).sqrt()
    if tid2eid is None:  # ids without a table are accepted and not used
        experts = largest(scores if bias is None else scores + bias.float(), topk)
    else:
        need(input_ids is not None, f"{call}: tid2eid needs input_ids.")
        need(bias is None, f"{call}: a hash layer has no bias.")
        assert input_ids is not None
        need_within(call, tid2eid.shape[0], input_ids=input_ids)
        experts = tid2eid[input_ids.long()].long()
        need_within(call, input.shape[-1], tid2eid=experts)
    weights = scores.gather(-1, experts)
    weights = weights / weights.sum(-1, keepdim=True) * route_scale
    return handed_back(weights, experts, reduce_weight, expert_id)


def moe_sigmoid_topk(
    input: Tensor,
    topk: int,
    normalize: bool = False,
    num_expert_group: int = -1,
    topk_group: int = 0,
    mask: Tensor | None = None,
    normed_by: str = "topk_logit",
    route_scale: float = 1.0,
    score_bias: Tensor | None = None,
    reduce_weight: Tensor | None = None,
    expert_id: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    call = "moe_sigmoid_topk"
    need_router(call, input, topk, score_bias, reduce_weight, expert_id)
    need(normed_by in ("topk_logit", "sigmoid_logit"), f"{call}: normed_by is {normed_by!r}.")
    scores = torch.sigmoid(input.float())
    grouped = num_expert_group > 1
    if mask is not None and not grouped:  # the grouped path has no use for it
        scores = scores * masked(call, input, mask)
    biased = scores if score_bias is None else scores + score_bias.float()
    every = scores if grouped else biased
    if grouped:
        best = 1 if score_bias is None else 2
        keep = kept_groups(call, biased, num_expert_group, topk_group, best)
        biased = biased.masked_fill(~keep, -torch.inf)
    experts = largest(biased, topk)
    weights = scores.gather(-1, experts)
    if normalize:
        weights = weights / (weights if normed_by == "topk_logit" else every).sum(-1, keepdim=True)
    return handed_back(weights * route_scale, experts, reduce_weight, expert_id)


def moe_softmax_topk(
    input: Tensor,
    topk: int,
    normalize: bool = False,
    num_expert_group: int = -1,
    topk_group: int = 0,
    mask: Tensor | None = None,
    normed_by: str = "topk_logit",
    route_scale: float = 1.0,
    reduce_weight: Tensor | None = None,
    expert_id: Tensor | None = None,
    score_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    call = "moe_softmax_topk"
    need_router(call, input, topk, score_bias, reduce_weight, expert_id)
    need(normed_by in ("topk_logit", "softmax_logit"), f"{call}: normed_by is {normed_by!r}.")
    scores = input.float().softmax(-1)
    grouped = num_expert_group > 1
    if mask is not None and not grouped:
        scores = scores * masked(call, input, mask)
    biased = scores if score_bias is None else scores + score_bias.float()
    if grouped:  # other groups have the score 0, not -inf
        biased = biased * kept_groups(call, biased, num_expert_group, topk_group, 1)
    experts = largest(biased, topk)
    weights = scores.gather(-1, experts)
    if normalize:
        weights = weights / (weights if normed_by == "topk_logit" else scores).sum(-1, keepdim=True)
    return handed_back(weights * route_scale, experts, reduce_weight, expert_id)


def moe_cast_gating(input: Tensor, weight: Tensor) -> Tensor:
    call = "moe_cast_gating"
    need_dtype(call, HALVES, input=input)
    need_dtype(call, (torch.float32,), weight=weight)
    need_gate(call, input, weight)
    return input.float() @ weight.T


def moe_cast_gating_v2(input: Tensor, weight0: Tensor, weight1: Tensor, alpha: float) -> Tensor:
    call = "moe_cast_gating_v2"
    need_dtype(call, (torch.bfloat16,), input=input, weight0=weight0, weight1=weight1)
    need_gate(call, input, weight0)
    need_shape(call, weight1=(weight1, tuple(weight0.shape)))
    return input.float() @ weight0.float().T + alpha * (input.float() @ weight1.float().T)


def need_gate(call: str, input: Tensor, weight: Tensor) -> None:
    """Refuse sizes of the gate's product."""
    need_shape(call, weight=(weight, (-1, input.shape[-1])))
    experts, hidden = weight.shape
    need(hidden <= 16384, f"{call}: hidden must be at most 16384, but is {hidden}.")
    need(experts <= 512, f"{call}: experts must be at most 512, but are {experts}.")


def need_router(
    call: str, input: Tensor, topk: int, bias: Tensor | None, reduce_weight: Tensor | None, expert_id: Tensor | None
) -> None:
    """Refuse arguments that no router takes."""
    experts = input.shape[-1]
    need_dtype(call, FLOATS, input=input, bias=bias)
    need(0 < topk <= experts, f"{call}: topk must lie in [1, {experts}], but is {topk}.")
    out = (*input.shape[:-1], topk)
    need_shape(call, bias=(bias, (experts,)), reduce_weight=(reduce_weight, out), expert_id=(expert_id, out))
    need_dtype(call, (torch.float32,), reduce_weight=reduce_weight)
    need_int32(call, expert_id=expert_id)


def masked(call: str, input: Tensor, mask: Tensor) -> Tensor:
    """The factors that a mask is."""
    need_dtype(call, (input.dtype,), mask=mask)
    return mask.float()


def kept_groups(call: str, scores: Tensor, groups: int, topk_group: int, best: int) -> Tensor:
    """Which experts lie in the best groups, a group being worth the sum of its best few."""
    experts = scores.shape[-1]
    need(experts % groups == 0, f"{call}: {experts} experts do not make {groups} groups.")
    need(0 < topk_group <= groups, f"{call}: topk_group must lie in [1, {groups}], but is {topk_group}.")
    each = scores.unflatten(-1, (groups, experts // groups))
    worth = each.topk(min(best, experts // groups), dim=-1).values.sum(-1)
    keep = torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, largest(worth, topk_group), True)
    return keep.repeat_interleave(experts // groups, -1)


def handed_back(
    weights: Tensor, experts: Tensor, reduce_weight: Tensor | None, expert_id: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights in float32 and ids in int32, in the tensors given."""
    weights, ids = weights.float(), experts.int()
    return (
        weights if reduce_weight is None else reduce_weight.copy_(weights),
        ids if expert_id is None else expert_id.copy_(ids),
    )
