"""The router, the activation and the combination in C++: routing.cpp."""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT
from isolith.numerics.routing import SCORES
from isolith_backends.cpu.native.library import Library, in_large_pages

library = Library("routing")

FP32 = (torch.float32,)
MOST_EXPERTS, MOST_CHOSEN = 1024, 64  # as in routing.cpp


def too_many(experts: int, k: int) -> WhyNot:
    if experts > MOST_EXPERTS or k > MOST_CHOSEN:
        return f"{k} of {experts} experts; at most {MOST_CHOSEN} of {MOST_EXPERTS} are kept"
    return None


def gate_refused(logits: Tensor, k: int, **_: object) -> WhyNot:
    return too_many(logits.shape[1], k)


def hash_gate_refused(logits: Tensor, table: Tensor, **_: object) -> WhyNot:
    return too_many(logits.shape[1], table.shape[1])


@implements(
    ops.moe.moe_gate,
    requires=Requires(dtypes={"logits": FP32, "bias": FP32}, missing=library.missing),
    why_not=gate_refused,
    batch_invariant=True,
)
def moe_gate_native(
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
    tokens, experts = logits.shape
    topk_idx, topk_weights = torch.empty(tokens, k, dtype=torch.int32), torch.empty(tokens, k)
    bias, mask = (None if value is None else value.contiguous() for value in (bias, mask))
    library.call(
        *("moe_gate", logits.contiguous(), bias, mask, topk_idx, topk_weights, tokens, experts, k),
        *(SCORES.index(score), groups, topk_groups, renormalize, routed_scale),
    )
    return topk_idx, topk_weights


@implements(
    ops.moe.moe_hash_gate,
    requires=Requires(dtypes={"logits": FP32}, missing=library.missing),
    why_not=hash_gate_refused,
    batch_invariant=True,
)
def moe_hash_gate_native(
    logits: Tensor,
    token_ids: Tensor,
    table: Tensor,
    score: str = "sqrtsoftplus",
    renormalize: bool = True,
    routed_scale: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    (tokens, experts), k = logits.shape, table.shape[1]
    topk_idx, topk_weights = torch.empty(tokens, k, dtype=torch.int32), torch.empty(tokens, k)
    mask = None if mask is None else mask.contiguous()
    library.call(
        *("moe_hash_gate", logits.contiguous(), token_ids.long().contiguous(), table.contiguous()),
        *(table.dtype == torch.int64, mask, topk_idx, topk_weights, tokens, experts, k),
        *(SCORES.index(score), renormalize, routed_scale),
    )
    return topk_idx, topk_weights


@implements(
    ops.moe.swiglu,
    requires=Requires(dtypes={"x": DEVICE_FLOAT, "row_weight": FP32}, missing=library.missing),
    batch_invariant=True,
)
def swiglu_native(x: Tensor, limit: float = 0.0, row_weight: Tensor | None = None) -> Tensor:
    x, half = x.contiguous(), x.shape[-1] // 2
    y = in_large_pages(x.new_empty((*x.shape[:-1], half)))
    row_weight = None if row_weight is None else row_weight.contiguous()
    library.call("swiglu", x, x.dtype, row_weight, y, y.numel() // max(half, 1), half, limit)
    return y


@implements(
    ops.moe.moe_unpermute,
    requires=Requires(
        dtypes={"rows": DEVICE_FLOAT, "topk_weights": FP32, "residual": DEVICE_FLOAT}, missing=library.missing
    ),
    batch_invariant=True,
)
def moe_unpermute_native(
    rows: Tensor, pair_to_pos: Tensor, topk_weights: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    (tokens, k), hidden = pair_to_pos.shape, rows.shape[1]
    y = in_large_pages(rows.new_empty((tokens, hidden)))
    topk_weights, residual = (None if value is None else value.contiguous() for value in (topk_weights, residual))
    library.call(
        *("moe_unpermute", rows.contiguous(), rows.dtype, pair_to_pos.long().contiguous(), topk_weights, residual),
        *(rows.dtype if residual is None else residual.dtype, y, tokens, k, hidden),
    )
    return y
