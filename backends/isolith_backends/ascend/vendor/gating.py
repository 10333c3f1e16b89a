"""Routers: the fused top-k of torch_npu, vllm-ascend and cann-recipes.

Source: Ascend/op-plugin 517f2e7d npu_moe_gating_top_k (documented norm_type 0 and 1; its golden takes every other value
for sigmoid); vllm-ascend 182b75ea csrc/moe/moe_gating_top_k{,_hash}; cann-recipes-infer fbc225d2
ops/ascendc/examples/test_npu_moe_gating_top_k.py (norm_type 2 is the root of softplus).
"""

import functools
from typing import Any

import torch
from torch import Tensor

from isolith_backends.ascend.vendor.rules import FLOATS, need, need_dtype, need_shape, poison

MOST_EXPERTS, MOST_OF_A_TABLE = 2048, 64
INDICES = (torch.int32, torch.int64)


def scores_of(logits: Tensor, norm_type: int) -> Tensor:
    """The scores before the bias."""
    if norm_type == 0:
        return logits.softmax(-1)
    if norm_type == 1:
        return logits.sigmoid()
    return torch.nn.functional.softplus(logits).sqrt()


def check(name: str, x: Tensor, k: int, bias: Tensor | None, k_group: int, group_count: int) -> None:
    """The rules of the tiling."""
    need_dtype(name, "x", x, FLOATS)
    need(name, x.dim() == 2 and x.numel() > 0, f"x has shape {tuple(x.shape)}, not [T, E]")
    experts = x.shape[1]
    need(name, experts <= MOST_EXPERTS, f"{experts} experts; at most {MOST_EXPERTS}")
    need(name, 0 < k_group <= group_count and experts % group_count == 0, f"{k_group} of {group_count} groups")
    size = experts // group_count
    need(name, 1 <= k <= size * k_group, f"k is {k}; {size * k_group} experts to choose from")
    if group_count > 1:
        need(name, size > 2, f"a group has {size} experts; more than 2")
        padded = -(-size // 32) * 32 * group_count
        need(name, padded <= MOST_EXPERTS, f"groups padded to 32 have {padded} experts; at most {MOST_EXPERTS}")
    if bias is not None:
        need_dtype(name, "bias", bias, (x.dtype,))
        need_shape(name, "bias", bias, (experts,))


def in_groups(biased: Tensor, k_group: int, group_count: int, group_select_mode: int) -> Tensor:
    """The biased scores with the experts of losing groups at -inf."""
    groups = biased.unflatten(-1, (group_count, -1))
    best = groups.amax(-1) if group_select_mode == 0 else groups.topk(2, dim=-1).values.sum(-1)
    chosen = torch.argsort(best, dim=-1, descending=True, stable=True)[:, :k_group]
    loses = torch.ones_like(best, dtype=torch.bool).scatter(1, chosen, False)
    kept: Tensor = groups.masked_fill(loses[..., None], float("-inf")).flatten(-2)
    return kept


def from_table(input_ids: Tensor, tid2eid: Tensor) -> Tensor:
    """The rows of the table; an id outside it reads what is no expert."""
    legal = (input_ids >= 0) & (input_ids < tid2eid.shape[0])
    rows = tid2eid[torch.where(legal, input_ids, 0).long()].int()
    return torch.where(legal[:, None], rows, poison((), torch.int32))


def gated(
    name: str,
    x: Tensor,
    k: int,
    bias: Tensor | None,
    input_ids: Tensor | None,
    tid2eid: Tensor | None,
    k_group: int,
    group_count: int,
    group_select_mode: int,
    renorm: int,
    norm_type: int,
    out_flag: bool,
    routed_scaling_factor: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check(name, x, k, bias, k_group, group_count)
    need(name, group_select_mode in (0, 1), f"group_select_mode is {group_select_mode}")
    need(name, (input_ids is None) == (tid2eid is None), "input_ids and tid2eid go together")
    scores = scores_of(x.float(), norm_type)
    if input_ids is not None and tid2eid is not None:
        need_shape(name, "input_ids", input_ids, (x.shape[0],))
        need_shape(name, "tid2eid", tid2eid, (-1, k))
        chosen = from_table(input_ids, tid2eid)
    else:
        biased = scores if bias is None else scores + bias.float()
        if group_count > 1:
            biased = in_groups(biased, k_group, group_count, group_select_mode)
        chosen = torch.argsort(biased, dim=-1, descending=True, stable=True)[:, :k].int()
    legal = (chosen >= 0) & (chosen < x.shape[1])
    weights = scores.gather(1, torch.where(legal, chosen, 0).long()).masked_fill(~legal, float("nan"))
    if norm_type != 0 or renorm:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    out = scores if out_flag else poison(scores.shape, torch.float32)
    return (weights * routed_scaling_factor).to(x.dtype), chosen, out


def npu_moe_gating_top_k(x: Tensor, k: int, renorm: int, norm_type: int, **rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """torch_npu's."""
    name = "npu_moe_gating_top_k"
    need(name, renorm == 0, f"renorm is {renorm}; only 0")
    for which in ("input_ids", "tid2eid"):
        if rest[which] is not None:
            need_dtype(name, which, rest[which], INDICES)
    return gated(name, x, k, renorm=0, norm_type=min(abs(norm_type), 1), **rest)


def moe_gating_top_k_hash(x: Tensor, k: int, renorm: int, norm_type: int, **rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """vllm-ascend's: int64 ids and an int32 table alone, whatever the documents say."""
    name = "moe_gating_top_k_hash"
    need(name, renorm == 0, f"renorm is {renorm}; only 0")
    need(name, norm_type in (0, 1, 2), f"norm_type is {norm_type}")
    if rest["input_ids"] is not None:
        need_dtype(name, "input_ids", rest["input_ids"], (torch.int64,))
    if rest["tid2eid"] is not None:
        need_dtype(name, "tid2eid", rest["tid2eid"], (torch.int32,))
    return gated(name, x, k, renorm=0, norm_type=norm_type, **rest)


def custom_gating_top_k(x: Tensor, k: int, renorm: int, norm_type: int, **rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """cann-recipes'."""
    name = "custom npu_moe_gating_top_k"
    need(name, renorm == 0, f"renorm is {renorm}; only 0")
    need(name, norm_type in (0, 1, 2), f"norm_type is {norm_type}")
    need(name, rest["tid2eid"] is None or k <= MOST_OF_A_TABLE, f"k is {k}; at most {MOST_OF_A_TABLE} with a table")
    for which in ("input_ids", "tid2eid"):
        if rest[which] is not None:
            need_dtype(name, which, rest[which], INDICES)
    return gated(name, x, k, renorm=0, norm_type=norm_type, **rest)


def moe_gating_top_k(
    x: Tensor, k: int, renorm: int, norm_type: int, bias_opt: Tensor | None, **rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """vllm-ascend's without a table: renorm 1 divides softmax weights too, before the factor."""
    name = "moe_gating_top_k"
    need(name, renorm in (0, 1) and norm_type in (0, 1), f"renorm is {renorm}, norm_type {norm_type}")
    call = functools.partial(gated, name, x, k, bias=bias_opt, input_ids=None, tid2eid=None)
    return call(renorm=renorm, norm_type=norm_type, **rest)
