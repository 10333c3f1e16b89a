"""The routers, by the vendor's fused top-k.

Sigmoid and softmax scores have torch_npu's call; the square root of softplus and the table of experts have those of
vllm-ascend and cann-recipes alone, since torch_npu takes every norm_type beside 0 for sigmoid. For sigmoid and for the
root of softplus the calls always divide by the sum of the chosen scores, for softmax they never do.

Source: Ascend/op-plugin 517f2e7d, npu_moe_gating_top_k; vllm-ascend 182b75ea csrc/moe/moe_gating_top_k_hash;
cann-recipes-infer fbc225d2 ops/ascendc, npu_moe_gating_top_k (at most 64 experts a token with a table).
"""

from typing import Any

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.numerics.routing import SUM_FLOOR
from isolith_backends.vendor_calls import VendorCall

GATING = ("x", "k", "bias", "k_group", "group_count", "group_select_mode", "norm_type", "out_flag")
GATING_TOP_K = VendorCall(("npu::npu_moe_gating_top_k",), (*GATING, "renorm", "routed_scaling_factor", "eps"))
GATING_TOP_K_HASH = VendorCall(
    ("_C_ascend::moe_gating_top_k_hash", "custom::npu_moe_gating_top_k"),
    (*GATING, "renorm", "routed_scaling_factor", "eps", "input_ids", "tid2eid"),
)
NORM_TYPES = {"softmax": 0, "sigmoid": 1, "sqrtsoftplus": 2}
LARGEST, SUM_OF_TWO = 0, 1  # group_select_mode
MOST_EXPERTS, MOST_OF_A_TABLE = 2048, 64


def weighed(
    call: VendorCall,
    logits: Tensor,
    score: str,
    renormalize: bool,
    routed_scale: float,
    mask: Tensor | None,
    **options: Any,  # Any: the vendor's other arguments
) -> tuple[Tensor, Tensor]:
    """(experts, weights) as the operators define them."""
    experts, divides = logits.shape[1], score != "softmax"
    # The call's factor is right only where the call does all that comes before it.
    complete = divides == renormalize
    weights, idx, scores = call(
        x=logits.contiguous(),
        norm_type=NORM_TYPES[score],
        renorm=0,
        out_flag=divides and not renormalize,
        routed_scaling_factor=routed_scale if complete else 1.0,
        eps=SUM_FLOOR,
        **options,
    )
    idx = idx.clamp(0, experts - 1)  # logits that are not finite choose no legal expert
    if not complete:
        if renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + SUM_FLOOR)
        else:
            weights = scores.gather(1, idx.long())
        weights = weights * routed_scale
    if mask is None:
        return idx, weights
    return idx.masked_fill(~mask[:, None], -1), weights.masked_fill(~mask[:, None], 0.0)


def too_many_experts(experts: int) -> WhyNot:
    return f"experts={experts}; the vendor's top-k takes at most {MOST_EXPERTS}" if experts > MOST_EXPERTS else None


def why_not_gate(logits: Tensor, groups: int) -> WhyNot:
    experts = logits.shape[1]
    if groups == 1:
        return too_many_experts(experts)
    of_group = experts // groups
    if of_group <= 2:
        return f"{of_group} experts in a group; the vendor's top-k takes more than 2"
    padded = -(-of_group // 32) * 32 * groups
    if padded > MOST_EXPERTS:
        return f"{groups} groups of {of_group} experts, padded to 32, are {padded}; at most {MOST_EXPERTS}"
    return too_many_experts(experts)


def why_not_gating(logits: Tensor, groups: int, score: str, **_: object) -> WhyNot:
    if score == "sqrtsoftplus":
        return "score is 'sqrtsoftplus'; torch_npu documents 'sigmoid' and 'softmax'"
    return why_not_gate(logits, groups)


def why_not_gating_hash(logits: Tensor, groups: int, **_: object) -> WhyNot:
    return why_not_gate(logits, groups)


def gate(
    call: VendorCall,
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
    """moe_gate by a call."""
    if logits.shape[0] == 0:
        return logits.new_empty((0, k), dtype=torch.int32), logits.new_empty((0, k))
    # The bias must have the dtype of the logits.
    selection = {"bias": None if bias is None else bias.to(logits.dtype).contiguous(), "k": k}
    grouping = {
        "k_group": topk_groups,
        "group_count": groups,
        "group_select_mode": LARGEST if bias is None else SUM_OF_TWO,
    }
    return weighed(call, logits, score, renormalize, routed_scale, mask, **selection, **grouping)


@implements(
    ops.moe.moe_gate,
    requires=Requires(dtypes=(torch.float32,), arch=">=2", missing=GATING_TOP_K.missing),
    why_not=why_not_gating,
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
    options = (bias, score, groups, topk_groups, renormalize, routed_scale, mask)
    return gate(GATING_TOP_K, logits, k, *options)


@implements(
    ops.moe.moe_gate,
    requires=Requires(dtypes=(torch.float32,), arch=">=2", missing=GATING_TOP_K_HASH.missing),
    why_not=why_not_gating_hash,
)
def moe_gate_of_any_score(
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
    options = (bias, score, groups, topk_groups, renormalize, routed_scale, mask)
    return gate(GATING_TOP_K_HASH, logits, k, *options)


def why_not_hash_gate(logits: Tensor, table: Tensor, **_: object) -> WhyNot:
    if table.shape[1] > MOST_OF_A_TABLE:
        return f"k={table.shape[1]}; the vendor's call takes at most {MOST_OF_A_TABLE} experts of a table"
    return too_many_experts(logits.shape[1])


@implements(
    ops.moe.moe_hash_gate,
    requires=Requires(dtypes=(torch.float32,), arch=">=2", missing=GATING_TOP_K_HASH.missing),
    why_not=why_not_hash_gate,
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
    k = table.shape[1]
    if logits.shape[0] == 0:
        return logits.new_empty((0, k), dtype=torch.int32), logits.new_empty((0, k))
    # int64 ids and an int32 table are what the kernel itself is compiled for, whatever the documents say.
    ids = token_ids.to(torch.int64).clamp(0, table.shape[0] - 1)
    hashed = {"input_ids": ids.contiguous(), "tid2eid": table.to(torch.int32).contiguous(), "k": k}
    return weighed(GATING_TOP_K_HASH, logits, score, renormalize, routed_scale, mask, **hashed)
