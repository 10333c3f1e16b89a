"""Routing: scores of the experts, weights of the chosen ones, and the range that their numbers must be in."""

import torch
from torch import Tensor

from isolith.errors import ArgumentError

SCORES = ("sqrtsoftplus", "sigmoid", "softmax")
"""What a `score` argument may say."""

SUM_FLOOR = 1e-20
"""Added to the sum of the chosen scores: a token whose scores all underflow gets zeros, not 0/0."""

SOFTPLUS_IDENTITY = 20.0
"""softplus(x) = x above it, in every implementation: part of the definition."""


def router_scores(logits: Tensor, score: str) -> Tensor:
    """[T,E] scores of wide logits."""
    if score == "sqrtsoftplus":
        return torch.nn.functional.softplus(logits, threshold=SOFTPLUS_IDENTITY).sqrt()
    return logits.sigmoid() if score == "sigmoid" else logits.softmax(dim=-1)


def router_scores_by_parts(logits: Tensor, score: str) -> Tensor:
    """The same in other steps: softplus with the larger part taken out, quotients of exponentials."""
    if score == "sqrtsoftplus":
        softplus = logits.clamp(min=0) + torch.log1p(torch.exp(-logits.abs()))
        return torch.where(logits > SOFTPLUS_IDENTITY, logits, softplus).sqrt()
    if score == "sigmoid":
        return 1 / (1 + torch.exp(-logits))
    parts = torch.exp(logits - logits.amax(-1, keepdim=True)) if logits.numel() else logits
    return parts / parts.sum(-1, keepdim=True)


def router_weights(
    scores: Tensor, chosen: Tensor, renormalize: bool, routed_scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """([T,k] int32 experts, [T,k] weights) of the chosen experts; -1 and 0 where the mask is off."""
    weights = scores.gather(1, chosen)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + SUM_FLOOR)
    return masked(chosen, weights * routed_scale, mask)


def router_weights_by_inverse(
    scores: Tensor, chosen: Tensor, renormalize: bool, routed_scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same with one factor a token: the scale times the inverse of the sum, slots added one by one."""
    weights = scores.gather(1, chosen)
    total = torch.full_like(weights[:, :1], SUM_FLOOR)
    for slot in weights.split(1, dim=1):
        total = total + slot
    factor = routed_scale * total.reciprocal() if renormalize else routed_scale
    return masked(chosen, weights * factor, mask)


def masked(chosen: Tensor, weights: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Expert -1 and weight 0 for every token that the mask switches off."""
    experts = chosen.to(torch.int32, memory_format=torch.contiguous_format)
    if mask is None:
        return experts, weights
    return experts.masked_fill(~mask[:, None], -1), weights.masked_fill(~mask[:, None], 0.0)


def specified(logits: Tensor, mask: Tensor | None) -> Tensor:
    """[T] bool: tokens whose routing is specified, those with finite logits or switched off."""
    finite = logits.isfinite().all(-1)
    return finite if mask is None else finite | ~mask


def check_topk_idx(operator: str, topk_idx: Tensor, experts: int) -> None:
    """Raise ArgumentError unless all are experts or -1; reads values."""
    if topk_idx.numel() == 0:
        return
    low, high = (int(bound) for bound in topk_idx.aminmax())
    if low < -1 or high >= experts:
        got = low if low < -1 else high
        raise ArgumentError(f"{operator}: topk_idx must be in 0..experts-1 = {experts - 1}, or -1; got {got}.")


def live(logits: Tensor, mask: Tensor | None) -> Tensor:
    """[T] bool: tokens that are not switched off."""
    return torch.ones_like(logits[:, 0], dtype=torch.bool) if mask is None else mask


def wrong_experts(indices: Tensor, on: Tensor, experts: int) -> str | None:
    """What is wrong with the range of chosen experts, or None; `on` are the tokens that have any."""
    low = torch.where(on, 0, -1)[:, None]
    high = torch.where(on, experts - 1, -1)[:, None]
    wrong = bool(((indices < low) | (indices > high)).any())
    return f"topk_idx is not in 0..experts-1 = {experts - 1}, or -1 where mask is off" if wrong else None


def wrong_weights(weights: Tensor, on: Tensor, defined: Tensor) -> str | None:
    """What is wrong with routing weights whatever the scores, or None."""
    if bool(((weights != 0).any(1) & ~on).any()):
        return "topk_weights is not 0 where mask is off"
    return None if bool(weights[defined].isfinite().all()) else "topk_weights is not finite"
