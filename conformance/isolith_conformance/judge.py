"""The only place where numbers are compared.

Gold is the reference in float64 on the bytes of the call. A result in a float dtype may err as much as the legal
variants do, times the ratios of `limits`. A bitwise operator, and every integer result, must equal the reference.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from isolith.dispatch import dispatcher, references, using
from isolith.operator import AnyOperator, in_float64
from isolith_conformance.limits import FLOOR_ULPS, ROW_FLOOR, STANDARD

Arguments = Mapping[str, Any]  # Any: a call's own values


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge found: nothing, or the first thing that is wrong."""

    problem: str | None

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return self.problem is None


def judge(operator: AnyOperator, arguments: Arguments, results: list[Tensor]) -> Verdict:
    """Compare the results of one call: outputs, then mutated arguments after the call.

    Args:
        operator: What was called.
        arguments: The arguments as they were before the call.
        results: What the kernel made of them, on the host.
    """
    masks = operator.defined(**copied(arguments)) if operator.defined else (None,) * len(results)
    gold = evaluate(operator, operator.reference, in_float64(operator, arguments))
    functions = (operator.reference, *operator.variants)
    family = [evaluate(operator, function, arguments) for function in functions]
    if len(results) != len(gold):
        return Verdict(problem=f"{len(results)} results; {len(gold)} are due")
    for place, (result, exact, mask) in enumerate(zip(results, gold, masks, strict=True)):
        legal = [member[place] for member in family]
        problem = compare(operator, result, exact, legal, mask)
        if problem is not None:
            return Verdict(problem=f"result {place}: {problem}")
    return Verdict(problem=None)


def copied(arguments: Arguments) -> dict[str, Any]:  # Any: a call's own values
    """The arguments with tensors of their own."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def evaluate(operator: AnyOperator, function: Any, arguments: Arguments) -> list[Tensor]:  # Any: any signature
    """Outputs, then mutated arguments, of a function run on copies, with references for the parts of a composite."""
    given = copied(arguments)
    with using(references(dispatcher())):
        outputs = function(**given)
    leaves = [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor)]
    return leaves + [given[name] for name in operator.mutates]


def compare(
    operator: AnyOperator, result: Tensor, gold: Tensor, legal: list[Tensor], mask: Tensor | None
) -> str | None:
    """The first thing wrong with one result, or None."""
    expected = legal[0]
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return f"{result.dtype} {tuple(result.shape)}; due is {expected.dtype} {tuple(expected.shape)}"
    if mask is not None:
        result, gold = result[mask], gold[mask]
        legal = [member[mask] for member in legal]
    if operator.bitwise or not result.is_floating_point() or result.dtype not in STANDARD:
        return differing_bits(result, legal)
    return excess_error(result, gold, legal)


def differing_bits(result: Tensor, legal: list[Tensor]) -> str | None:
    """None where the result equals one of the legal ones to the bit."""
    wrong = [(as_bytes(result) != as_bytes(member)).flatten(1).any(1) for member in legal]
    least = min(wrong, key=lambda rows: int(rows.sum()))
    if not least.any():
        return None
    return f"{int(least.sum())} of {least.numel()} rows differ, first {int(least.nonzero()[0])}"


def as_bytes(values: Tensor) -> Tensor:
    """[rows, bytes], rows along the first axis."""
    rows = values.shape[0] if values.dim() else 1
    return values.contiguous().reshape(rows, -1).view(torch.uint8).reshape(rows, -1)


def excess_error(result: Tensor, gold: Tensor, legal: list[Tensor]) -> str | None:
    """None where the errors are within the limits of those of the legal variants."""
    rows = result.shape[-1] if result.dim() else 1
    result, gold = result.reshape(-1, rows), gold.reshape(-1, rows).double()
    if result.numel() == 0:
        return None
    infinite = ~gold.isfinite()
    if not torch.equal(result.double()[infinite], gold[infinite]) or not result.isfinite()[~infinite].all():
        return "non-finite values stand elsewhere than in gold"
    gold = gold.masked_fill(infinite, 0.0)
    error = (result.double() - gold).masked_fill(infinite, 0.0).abs()
    errors = [(member.reshape(-1, rows).double() - gold).masked_fill(infinite, 0.0).abs() for member in legal]
    ulp = torch.finfo(result.dtype).eps * gold.abs().amax(-1) * FLOOR_ULPS
    limits = STANDARD[result.dtype]
    r1 = ratio(rms(error.flatten()), max(rms(e.flatten()) for e in errors).clamp(min=rms(ulp)))
    r2 = ratio(rms(error), row_floor(torch.stack([rms(e) for e in errors]).amax(0), ulp))
    r3 = ratio(error.amax(-1), row_floor(torch.stack([e.amax(-1) for e in errors]).amax(0), ulp))
    for name, value, limit in (("R1", r1, limits.r1), ("R2", r2, limits.r2), ("R3", r3, limits.r3)):
        if not bool((value <= limit).all()):
            return f"{name} is {float(value.max()):.3g}, at most {limit}; worst row {int(value.reshape(-1).argmax())}"
    return None


def rms(error: Tensor) -> Tensor:
    """Root mean square over the last axis."""
    return error.square().mean(-1).sqrt()


def row_floor(error: Tensor, ulp: Tensor) -> Tensor:
    """Legal errors of rows, not below the floors."""
    return torch.maximum(error.clamp(min=float(error.median()) * ROW_FLOOR), ulp)


def ratio(error: Tensor, legal: Tensor) -> Tensor:
    """error / legal, where 0 / 0 is 0."""
    return torch.where(error == 0, torch.zeros_like(error), error / legal)
