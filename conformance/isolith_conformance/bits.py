"""Whether two results are the same bytes, wherever the operator says what they must be."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from isolith.operator import AnyOperator
from isolith_conformance.family import copied


def differing(
    operator: AnyOperator,
    arguments: Mapping[str, Any],  # Any: a call's own values
    results: list[Tensor],
    others: list[Tensor],
) -> str | None:
    """The first place where two runs' results differ, or None; a NaN is as good as another."""
    if len(results) != len(others):
        return f"{len(others)} results instead of {len(results)}"
    masks = operator.defined(**copied(arguments)) if operator.defined else ()
    for place, (one, other) in enumerate(zip(results, others, strict=True)):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"result {place} is {other.dtype} {tuple(other.shape)} instead of {one.dtype} {tuple(one.shape)}"
        mask = masks[place] if place < len(masks) else None
        rows = unequal_rows(one, other, mask)
        if rows.any():
            return f"result {place} differs in {int(rows.sum())} of {rows.numel()} rows, first {int(rows.nonzero()[0])}"
    return None


def same_bytes(one: Tensor | None, other: Tensor) -> bool:
    """Whether a buffer came back, and every byte of it is that of the other."""
    return one is not None and one.dtype == other.dtype and torch.equal(one, other)


def unequal_rows(one: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor:
    """Which slices of the first axis differ in a byte, outside of NaN and of what is undefined.

    The mask says nothing of a result that has another shape than is due.
    """
    rows = one.shape[0] if one.dim() else 1
    if not one.numel():
        return torch.zeros(rows, dtype=torch.bool)
    wrong = (raw(one) != raw(other)).reshape(*one.shape, one.itemsize).any(-1)
    if one.is_floating_point() and one.dtype != torch.float8_e8m0fnu:
        wrong &= ~(one.float().isnan() & other.float().isnan())
    if mask is not None and wrong.shape[: mask.dim()] == mask.shape:
        wrong &= mask.reshape(*mask.shape, *(1,) * (wrong.dim() - mask.dim()))
    return wrong.reshape(rows, -1).any(-1)


def raw(values: Tensor) -> Tensor:
    """The bytes of all elements, flat."""
    return values.contiguous().reshape(-1).view(torch.uint8)
