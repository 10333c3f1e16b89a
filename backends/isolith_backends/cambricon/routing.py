"""The routers, by tmo's top-k functions, whose division by the sum of the chosen scores has no epsilon.

Source: domesticated_torch_mlu_ops 9fbf7df6 _ops.py. No source says which of equal scores wins, and the group-limited
softmax gives other groups the score 0 instead of leaving them out.
"""

from typing import Any

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.numerics.routing import SUM_FLOOR
from isolith_backends.cambricon.calls import int32, tmo, why_not
from isolith_backends.vendor_calls import first_missing

OUTPUTS = ("reduce_weight", "expert_id")
SOFTPLUS = tmo("moe_softplus_topk", ("input", "topk", "input_ids", "tid2eid", "bias", "route_scale", *OUTPUTS))
GROUPS = ("input", "topk", "normalize", "num_expert_group", "topk_group")
# reduce_weight stands behind the bias here, before it in the softmax.
SIGMOID = tmo("moe_sigmoid_topk", GROUPS, ("route_scale", "score_bias", *OUTPUTS))
SOFTMAX = tmo("moe_softmax_topk", (*GROUPS, "mask", "normed_by", "route_scale", *OUTPUTS, "score_bias"))
UNGROUPED = -1
NOWHERE: dict[str, Any] = dict.fromkeys(OUTPUTS)


def finished(weights: Tensor, idx: Tensor, logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(experts, weights), with what the mask switches off."""
    idx = idx.clamp(0, logits.shape[1] - 1)  # logits that are not finite choose no legal expert
    if mask is None:
        return idx, weights
    return idx.masked_fill(~mask[:, None], -1), weights.masked_fill(~mask[:, None], 0.0)


def with_epsilon(weights: Tensor, idx: Tensor, logits: Tensor) -> Tensor:
    """Weights that moe_softplus_topk divided by the bare sum, 0/0 too, as divided by the sum and the epsilon."""
    chosen = logits.gather(1, idx.long().clamp(0, logits.shape[1] - 1))
    total = torch.nn.functional.softplus(chosen).sqrt().sum(-1, keepdim=True)
    return weights.nan_to_num(nan=0.0) * (total / (total + SUM_FLOOR))


def nothing(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The result for no tokens."""
    return logits.new_empty((0, k), dtype=torch.int32), logits.new_empty((0, k))


def why_not_gate(score: str, groups: int, renormalize: bool, bias: Tensor | None, **_: object) -> WhyNot:
    if score == "sqrtsoftplus":
        if groups > 1:
            return f"groups={groups}; moe_softplus_topk knows no groups"
        return None if renormalize else "renormalize=False; moe_softplus_topk always divides by the sum"
    if score == "softmax" and groups > 1:
        return f"groups={groups}; moe_softmax_topk gives the experts of other groups the score 0"
    if score == "softmax" and bias is not None:
        return "score is 'softmax' with a bias, whose use in moe_softmax_topk is not documented"
    return None


def missing_gates() -> WhyNot:
    """What this installation lacks of the three functions."""
    return first_missing(SOFTPLUS, SIGMOID, SOFTMAX)


@implements(
    ops.moe.moe_gate,
    requires=Requires(dtypes=(torch.float32,), missing=missing_gates),
    why_not=why_not(why_not_gate),
)
def moe_gate(
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
    if logits.shape[0] == 0:
        return nothing(logits, k)
    by_call = score == "sqrtsoftplus" or not renormalize
    given = {"input": logits.contiguous(), "topk": k, "route_scale": routed_scale if by_call else 1.0, **NOWHERE}
    addend = None if bias is None else bias.float().contiguous()
    grouping = {
        "normalize": False,  # without an epsilon; below with one
        "num_expert_group": groups if groups > 1 else UNGROUPED,
        "topk_group": topk_groups if groups > 1 else 0,
    }
    if score == "sqrtsoftplus":
        weights, idx = SOFTPLUS(**given, input_ids=None, tid2eid=None, bias=addend)
        weights = with_epsilon(weights, idx, logits)
    elif score == "sigmoid":
        weights, idx = SIGMOID(**given, **grouping, score_bias=addend)
    else:
        # tmo's mask multiplies scores; the operator's is for tokens.
        weights, idx = SOFTMAX(**given, **grouping, mask=None, normed_by="topk_logit", score_bias=None)
    if not by_call:
        weights = weights / (weights.sum(-1, keepdim=True) + SUM_FLOOR) * routed_scale
    return finished(weights, idx, logits, mask)


def why_not_hash_gate(score: str, renormalize: bool, **_: object) -> WhyNot:
    if score != "sqrtsoftplus":
        return f"score is {score!r}; tmo takes a table in moe_softplus_topk alone"
    return None if renormalize else "renormalize=False; moe_softplus_topk always divides by the sum"


@implements(
    ops.moe.moe_hash_gate,
    requires=Requires(dtypes=(torch.float32,), missing=SOFTPLUS.missing),
    why_not=why_not(why_not_hash_gate),
)
def moe_hash_gate(
    logits: Tensor,
    token_ids: Tensor,
    table: Tensor,
    score: str = "sqrtsoftplus",
    renormalize: bool = True,
    routed_scale: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    tokens, k = logits.shape[0], table.shape[1]
    if tokens == 0:
        return nothing(logits, k)
    # The tokens' rows alone become int32, not the vocabulary's.
    rows = table[token_ids.long().clamp(0, table.shape[0] - 1)]
    weights, idx = SOFTPLUS(
        input=logits.contiguous(),
        topk=k,
        input_ids=torch.arange(tokens, dtype=torch.int32, device=logits.device),
        tid2eid=int32(rows).clamp(0, logits.shape[1] - 1),
        bias=None,
        route_scale=routed_scale,
        **NOWHERE,
    )
    return finished(with_epsilon(weights, idx, logits), idx, logits, mask)
