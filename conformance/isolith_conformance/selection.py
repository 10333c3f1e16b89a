"""Selections are judged by the values that they select, as far as legal roundings move those."""

from dataclasses import dataclass

import torch
from torch import Tensor

from isolith.dispatch import using
from isolith.operator import AnyOperator, in_float64
from isolith_conformance.family import Arguments, Numerics, copied, only_references
from isolith_conformance.limits import BESIDE_SLACK, SELECTION_SLACK
from isolith_conformance.ratios import PASSED, Finding


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """What a selection is made by.

    Args:
        values: [rows, n] float64, what gold ranks.
        slack: [rows, 1], by how much legal roundings may mislead; 0 where they change nothing.
        order: [rows, n], from the largest value, equal ones by index.
        equal: [rows, n-1], whether the next in `order` has the same value.
        competes: [rows, n], what may be chosen.
        chosen: [rows, k], what gold chooses.
        least: [rows, k], the values that it chooses, from the largest.
        distinct: [rows], where no index may stand twice: those of specified calls, NaN or not.
        specified: [rows], where the values decide.
        ordered: Whether the chosen stand in the order of their values.
    """

    values: Tensor
    slack: Tensor
    order: Tensor
    equal: Tensor
    competes: Tensor
    chosen: Tensor
    least: Tensor
    distinct: Tensor
    specified: Tensor
    ordered: bool


def ranking_of(
    operator: AnyOperator, arguments: Arguments, chosen: Tensor, defined: Tensor | None, exact: bool
) -> Ranking:
    """Rank once; `chosen` is what gold selects, `defined` its mask."""
    assert operator.selects_by is not None, "the caller has looked"
    with using(only_references()):
        values = operator.selects_by(**in_float64(operator, copied(arguments))).double()
        rounded = [operator.selects_by(**copied(arguments)).double()]
        for way in ("forward", "backward"):
            with Numerics(in_order=way):
                rounded.append(operator.selects_by(**copied(arguments)).double())
        competes = torch.ones_like(values, dtype=torch.bool)
        if operator.competes is not None:
            competes = operator.competes(**copied(arguments))
    slack = torch.zeros_like(values[:, :1]) if exact else slack_of(values, rounded, competes)
    ranked = values.masked_fill(~competes, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    sorted_values = ranked.gather(-1, order)
    equal = (sorted_values[:, 1:] == sorted_values[:, :-1]) & sorted_values[:, 1:].isfinite()
    specified = ~(values.isnan() & competes).any(-1)
    return Ranking(
        values=values,
        slack=slack,
        order=order,
        equal=equal,
        competes=competes,
        chosen=chosen,
        least=values_of(values, chosen).sort(-1, descending=True).values,
        distinct=torch.ones_like(specified) if defined is None else defined,
        specified=specified if defined is None else specified & defined,
        ordered=operator.ordered,
    )


def slack_of(values: Tensor, rounded: list[Tensor], competes: Tensor) -> Tensor:
    """How far rounding may lead a row astray; infinite where it makes another of its values infinite."""
    if not values.shape[-1]:
        return values.new_zeros(values.shape[0], 1)
    known = competes & values.isfinite()
    moved = torch.stack([(each - values).abs().masked_fill(~known, 0.0).nan_to_num(torch.inf) for each in rounded])
    other = torch.stack([(each.isneginf() != values.isneginf()) & competes for each in rounded]).any(0)
    moved = moved.amax(0).masked_fill(other, torch.inf).amax(-1, keepdim=True)
    one = values.masked_fill(~known, 0.0).abs().amax(-1, keepdim=True) * torch.finfo(torch.float32).eps
    return SELECTION_SLACK * torch.where(moved > 0, moved.maximum(one), moved)


def ranking_beside(operator: AnyOperator, arguments: Arguments, chosen: Tensor, defined: Tensor | None) -> Ranking:
    """Rank by the reference's own values, once; `chosen` is what it selects. Ties are not judged."""
    assert operator.selects_by is not None, "the caller has looked"
    with using(only_references()):
        values = operator.selects_by(**arguments).double().cpu()
        competes = torch.ones_like(values, dtype=torch.bool)
        if operator.competes is not None:
            competes = operator.competes(**arguments).cpu()
    known = values.masked_fill(~(competes & values.isfinite()), 0.0)
    largest = known.abs().amax(-1, keepdim=True) if values.shape[-1] else values.new_zeros(values.shape[0], 1)
    specified = ~(values.isnan() & competes).any(-1)
    return Ranking(
        values=values,
        slack=(BESIDE_SLACK * largest).clamp(min=torch.finfo(torch.float32).tiny),  # 0 would say that all is exact
        order=torch.zeros((values.shape[0], min(values.shape[1], 1)), dtype=torch.int64),
        equal=torch.zeros((values.shape[0], 0), dtype=torch.bool),
        competes=competes,
        chosen=chosen,
        least=values_of(values, chosen).sort(-1, descending=True).values,
        distinct=torch.ones_like(specified) if defined is None else defined,
        specified=specified if defined is None else specified & defined,
        ordered=operator.ordered,
    )


def values_of(values: Tensor, indices: Tensor) -> Tensor:
    """The values at indices; -inf and the values at -1 are the least there is."""
    least = torch.finfo(values.dtype).min
    padded = torch.nn.functional.pad(values.nan_to_num(least, neginf=least), (0, 1), value=least)
    return padded.gather(-1, torch.where(indices < 0, values.shape[-1], indices).long())


def judged_selection(ranking: Ranking, chosen: Tensor) -> Finding:
    """Compare a selection of the right shape and dtype."""
    if not chosen.numel():
        return PASSED
    entries, valid = ranking.values.shape[-1], chosen >= 0
    if int(chosen.max()) >= entries or int(chosen.min()) < -1:
        return wrong("range", f"an index beyond {entries}, or below -1")
    expected = (ranking.chosen >= 0).sum(-1)
    if not torch.equal(valid.sum(-1), expected):
        return wrong("count", "another number of valid indices", valid.sum(-1) != expected)
    behind = valid[:, 1:] & ~valid[:, :-1]
    if bool(behind.any()):
        return wrong("tail", "a valid index stands behind -1", behind)
    if not entries:
        return PASSED
    where = torch.where(valid, chosen, entries).long()
    times = torch.zeros((chosen.shape[0], entries + 1), dtype=torch.int32)
    times = times.scatter_add_(1, where, torch.ones_like(where, dtype=torch.int32))[:, :entries]
    twice = (times > 1) & ranking.distinct[:, None]
    if bool(twice.any()):
        return wrong("duplicates", "an index twice in a row", twice)
    missed = (times > 0) & ~ranking.competes
    if bool(missed.any()):
        return wrong("reach", "an index that may not be chosen", missed)
    return judged_values(ranking, chosen, times > 0)


def judged_values(ranking: Ranking, chosen: Tensor, selected: Tensor) -> Finding:
    """The rules that look at values: none below gold's, ties to the lowest index, the order."""
    live = ranking.specified[:, None]
    values = values_of(ranking.values, chosen)
    below = (values.sort(-1, descending=True).values < ranking.least - ranking.slack) & live
    if bool(below.any()):
        return wrong("selection", f"row {first(below)} selects a value below those of gold")
    in_order = selected.gather(-1, ranking.order)
    ties = ranking.equal & in_order[:, 1:] & ~in_order[:, :-1] & live
    same = (chosen.sort(-1).values == ranking.chosen.sort(-1).values).all(-1, keepdim=True)
    ties = ties.any(-1, keepdim=True) | ((ranking.slack == 0) & ~same & live)
    if bool(ties.any()):
        return wrong("ties", f"row {first(ties)} breaks ties otherwise than by the lowest index")
    if not ranking.ordered:
        return PASSED
    rising = (values[:, 1:] > values[:, :-1] + ranking.slack) & live
    rising |= (values[:, 1:] == values[:, :-1]) & (chosen[:, 1:] < chosen[:, :-1]) & live & (chosen[:, 1:] >= 0)
    if bool(rising.any()):
        return wrong("order", f"row {first(rising)} is not in the order of its values")
    return PASSED


def first(rows: Tensor) -> int:
    """The first row with a mark."""
    return int(rows.any(-1).nonzero()[0])


def wrong(check: str, problem: str, rows: Tensor | None = None) -> Finding:
    """A finding, with the first row that it holds of."""
    if rows is not None:
        where = first(rows if rows.dim() > 1 else rows[:, None])
        problem = f"{problem}, first in row {where}"
    return Finding(check=check, problem=problem, statistics={}, excess=float("inf"))


def by_index(results: list[Tensor], chosen: Tensor, instead: list[Tensor]) -> list[Tensor]:
    """Results with the slots of a row in the order of its indices; those of `instead` where it selects others.

    Args:
        results: The selection, then the rest; what has not its shape stays as it is.
        chosen: What gold selects.
        instead: The same of the reference, in the order of its indices already.
    """
    indices, order = results[0].sort(-1)
    same = (indices == chosen.sort(-1).values).all(-1, keepdim=True)
    return [
        torch.where(same, result.gather(-1, order), other.to(result.dtype)) if result.shape == order.shape else result
        for result, other in zip(results, instead, strict=True)
    ]
