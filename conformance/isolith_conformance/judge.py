"""The only place where numbers are compared.

Gold is the reference in float64 on the bytes of the call. A result in a float dtype may err as much as the legal
variants do, times the ratios of `limits`. A bitwise operator, and every integer result, must equal the reference. A
selection is judged by the values it selects, as far as legal roundings move those; where they are exact, by its
indices.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from isolith.dispatch import dispatcher, references, using
from isolith.operator import AnyOperator, in_float64
from isolith_conformance.limits import LARGEST_ROUNDING, ONE_ROUNDING, ROW_FLOOR, SELECTION_SLACK, STANDARD

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
    if operator.selects_by is not None:
        problem = wrong_selection(operator, arguments, results[0], gold[0])
        if problem is not None:
            return Verdict(problem=f"result 0: {problem}")
        results, gold, *family = (by_index(member, gold[0]) for member in (results, gold, *family))
    for place, (result, exact, mask) in enumerate(zip(results, gold, masks, strict=True)):
        legal = [member[place] for member in family]
        problem = compare(operator, result, exact, legal, mask)
        if problem is not None:
            return Verdict(problem=f"result {place}: {problem}")
    return Verdict(problem=None)


def wrong_selection(operator: AnyOperator, arguments: Arguments, chosen: Tensor, expected: Tensor) -> str | None:
    """The first thing wrong with a selection, or None; `expected` is the one of gold."""
    assert operator.selects_by is not None, "the caller has looked"
    if chosen.shape != expected.shape or chosen.dtype != torch.int32:
        return f"{chosen.dtype} {tuple(chosen.shape)}; due is torch.int32 {tuple(expected.shape)}"
    with using(references(dispatcher())):
        exact = operator.selects_by(**in_float64(operator, copied(arguments)))
        rounded = operator.selects_by(**copied(arguments)).double()
    if not torch.equal((chosen >= 0).sum(-1), (expected >= 0).sum(-1)):
        return "another number of valid indices"
    if chosen.numel() and (int(chosen.max()) >= exact.shape[-1] or int(chosen.min()) < -1):
        return f"an index beyond {exact.shape[-1]}, or below -1"
    ordered = chosen.sort(-1).values
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
        return "an index twice in a row"
    moved = (rounded - exact).nan_to_num(0.0, 0.0, 0.0).abs()
    slack = SELECTION_SLACK * moved.amax(-1, keepdim=True) if moved.shape[-1] else moved.new_zeros(moved.shape[0], 1)
    below = values_of(exact, chosen) < values_of(exact, expected) - slack
    if bool(below.any()):
        return f"row {int(below.any(-1).nonzero()[0])} selects a value below those of gold"
    # With exact values the tie rule decides, and the lowest index wins.
    same = (ordered == expected.sort(-1).values).all(-1)
    wrong = ~same & (slack[..., 0] == 0) & ~exact.isnan().any(-1)
    return (
        f"row {int(wrong.nonzero()[0])} breaks ties otherwise than by the lowest index" if bool(wrong.any()) else None
    )


def values_of(scores: Tensor, indices: Tensor) -> Tensor:
    """The values at a row's valid indices, from the largest; -inf and the values at -1 come last, as the least."""
    least = torch.finfo(scores.dtype).min
    padded = torch.nn.functional.pad(scores.nan_to_num(least, neginf=least), (0, 1), value=least)
    where = torch.where(indices < 0, scores.shape[-1], indices).long()
    return padded.gather(-1, where).sort(-1, descending=True).values


def by_index(results: list[Tensor], expected: Tensor) -> list[Tensor]:
    """Results with the slots of a row in the order of its indices, blank where the row selects other than gold."""
    indices, order = results[0].sort(-1)
    same = (indices == expected.sort(-1).values).all(-1, keepdim=True)
    return [
        torch.where(same, result.gather(-1, order), torch.zeros_like(result)) if result.shape == order.shape else result
        for result in results
    ]


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
    if result.numel() == 0:
        return None
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
    if result.numel() == 0:
        return None
    rows = result.shape[-1] if result.dim() else 1
    result, gold = result.reshape(-1, rows), gold.reshape(-1, rows).double()
    # Beyond the dtype's largest value the right result is an infinity.
    gold = torch.where(gold.to(result.dtype).isinf(), gold.to(result.dtype).double(), gold)
    infinite = ~gold.isfinite()
    same = (result.double() == gold) | (result.isnan() & gold.isnan())
    if not same[infinite].all() or not result.isfinite()[~infinite].all():
        return "non-finite values stand elsewhere than in gold"
    gold = gold.masked_fill(infinite, 0.0)
    error = (result.double() - gold).masked_fill(infinite, 0.0).abs()
    errors = [(member.reshape(-1, rows).double() - gold).masked_fill(infinite, 0.0).abs() for member in legal]
    eps = torch.finfo(result.dtype).eps
    once, most = ONE_ROUNDING * eps * rms(gold), LARGEST_ROUNDING * eps * gold.abs().amax(-1)
    whole = max(rms(e.flatten()) for e in errors)
    # A row of few elements has few errors to tell its legal size by; the tensor's, in proportion, is as legal.
    share = rms(gold) * ratio(whole, rms(gold.flatten()))
    limits = STANDARD[result.dtype]
    r1 = ratio(rms(error.flatten()), whole.clamp(min=rms(once)))
    r2 = ratio(rms(error), row_floor(torch.stack([rms(e) for e in errors]).amax(0), once.maximum(share)))
    r3 = ratio(error.amax(-1), row_floor(torch.stack([e.amax(-1) for e in errors]).amax(0), most))
    for name, value, limit in (("R1", r1, limits.r1), ("R2", r2, limits.r2), ("R3", r3, limits.r3)):
        if not bool((value <= limit).all()):
            return f"{name} is {float(value.max()):.3g}, at most {limit}; worst row {int(value.reshape(-1).argmax())}"
    return None


def rms(error: Tensor) -> Tensor:
    """Root mean square over the last axis."""
    return error.square().mean(-1).sqrt()


def row_floor(error: Tensor, rounding: Tensor) -> Tensor:
    """Legal errors of rows, not below the floors."""
    return torch.maximum(error.clamp(min=float(error.median()) * ROW_FLOOR), rounding)


def ratio(error: Tensor, legal: Tensor) -> Tensor:
    """error / legal, where 0 / 0 is 0."""
    return torch.where(error == 0, torch.zeros_like(error), error / legal)
