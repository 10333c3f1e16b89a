"""Whether results are right. Numbers are compared here and in the modules that this one calls, nowhere else.

Gold is the reference in float64 on the bytes of the call. A result in a float dtype may err as much as the legal
family does, times the ratios of `limits`. A bitwise operator, and every integer result, must equal the reference, to
the bit; codes of quantised outputs are the nearest to their exact values, or beside a boundary the neighbour. A
selection is judged by the values it selects, as far as legal roundings move those; where they are exact, by indices.

Where a sample is exact, every legal rounding gives the same numbers, and so must the results: -0.0 equals 0.0 there,
since the order of a sum decides the sign of nothing, and NaN equals NaN.

`expect` computes all that does not depend on the results, so that many may be judged. `judge_beside` is for calls too
large for gold: it compares with the reference's own result, in the same dtypes, and forgives more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from isolith.operator import AnyOperator
from isolith_conformance import house_rules
from isolith_conformance.codes import CODES, CodeBar, code_bar, judged_codes, judged_scales
from isolith_conformance.family import Arguments, Family, Numerics, copied, evaluate, family_of
from isolith_conformance.limits import BESIDE, BESIDE_D, BESIDE_D_REQUANTISED, STANDARD
from isolith_conformance.ratios import PASSED, Bar, Finding, bar_of, beside, measured
from isolith_conformance.selection import Ranking, by_index, judged_selection, ranking_beside, ranking_of


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge found: nothing, or the first thing that is wrong.

    Args:
        problem: A sentence with the figure, the limit, the result and the row; None where nothing is wrong.
        check: The rule that is broken: "shape", "bits", "exact", "nonfinite", "R1", "R2", "R3", "D", "bias", "codes",
            "scales", or of selections "range", "count", "tail", "duplicates", "reach", "selection", "ties", "order".
        statistics: Of the result that is worst by its limits.
        limits: What each of the statistics may be at most.
    """

    problem: str | None
    check: str
    statistics: Mapping[str, float]
    limits: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return self.problem is None


@dataclass(frozen=True, kw_only=True)
class Due:
    """What is due for one result.

    Args:
        reference: The reference's result.
        legal: Every legal one, where bits count.
        mask: Which elements are specified; None = all.
        bar: For floats.
        codes: For codes.
        scales: For scales, in float64.
        beside: For floats without gold: the largest d of a row.
    """

    reference: Tensor
    legal: tuple[Tensor, ...]
    mask: Tensor | None
    bar: Bar | None = None
    codes: CodeBar | None = None
    scales: Tensor | None = None
    beside: float | None = None


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """All that is due for one call.

    Args:
        operator: What is called.
        due: By result: outputs, then mutated arguments.
        ranking: For selections.
        sorted_reference: For selections: the reference's results in the order of their indices.
        exact: Whether every legal rounding gives the same numbers.
    """

    operator: AnyOperator
    due: tuple[Due, ...]
    ranking: Ranking | None
    sorted_reference: tuple[Tensor, ...]
    exact: bool

    def verdict_on(self, results: list[Tensor], profile: str = "standard") -> Verdict:
        """The selection, where there is one, then everything else; the arguments are those of `judge`."""
        if self.ranking is not None:
            chosen = self.selection(results)
            if not chosen.passed:
                return chosen
        return self.judge(results, profile)

    def judge(self, results: list[Tensor], profile: str = "standard") -> Verdict:
        """Everything but which entries a selection chooses.

        Args:
            results: What the kernel made, on the host: outputs, then mutated arguments after the call.
            profile: "strict", "standard" or "basic".
        """
        shape = self.misshapen(results)
        if shape is not None:
            return shape
        if self.ranking is not None:
            results = by_index(results, self.ranking.chosen, list(self.sorted_reference))
        worst, place = PASSED, 0
        for at, (due, result) in enumerate(zip(self.due, results, strict=True)):
            if self.ranking is not None and at == 0:
                continue
            finding = self.finding(due, result, profile)
            if finding.problem is not None:
                return verdict(finding, at)
            if finding.excess > worst.excess or not worst.statistics:
                worst, place = finding, at
        return verdict(worst, place)

    def selection(self, results: list[Tensor]) -> Verdict:
        """Which entries a selection chooses, and nothing else; only for operators with `selects_by`."""
        shape = self.misshapen(results)
        if shape is not None:
            return shape
        assert self.ranking is not None, "only selections have a selection"
        return verdict(judged_selection(self.ranking, results[0]), 0)

    def house_figures(self, results: list[Tensor]) -> tuple[dict[str, float], dict[str, float]]:
        """(figures, limits) of the vendors' own rules, of results that have the shapes that are due."""
        if self.misshapen(results) is not None:
            return {}, {}
        if self.ranking is not None:
            results = by_index(results, self.ranking.chosen, list(self.sorted_reference))
        found = []
        for due, result in zip(self.due, results, strict=True):
            if due.bar is None:
                continue
            expected = due.reference
            if due.mask is not None:
                result, expected = result[due.mask], expected[due.mask]
            gold = due.bar.values.reshape(result.shape)
            found.append(house_rules.figures_of(self.operator.name, gold, expected, result))
        return house_rules.worst_of(found)

    def misshapen(self, results: list[Tensor]) -> Verdict | None:
        """A verdict on number, shapes and dtypes, where these are wrong."""
        problem = None
        if len(results) != len(self.due):
            problem = f"{len(results)} results; {len(self.due)} are due"
        else:
            for at, (due, result) in enumerate(zip(self.due, results, strict=True)):
                said, wanted = described(result), described(due.reference)
                if said != wanted:
                    problem = f"result {at}: {said}; due is {wanted}"
                    break
        return None if problem is None else Verdict(problem=problem, check="shape", statistics={})

    def finding(self, due: Due, result: Tensor, profile: str) -> Finding:
        """What is found of one result."""
        expected = due.reference
        if due.mask is not None:
            result, expected = result[due.mask], expected[due.mask]
        if result.numel() == 0:
            return PASSED
        if due.codes is not None:
            return judged_codes(due.codes, result, self.exact)
        if due.scales is not None:
            return judged_scales(due.scales, result, self.exact)
        if due.beside is not None:
            return beside(expected, result, due.beside)
        if due.bar is None:
            return differing_bits(result, due.legal)
        found = measured(due.bar, result, profile)
        if not self.exact:
            return found
        different = ~((result == expected) | (result.isnan() & expected.isnan()))
        if not bool(different.any()):
            return Finding(statistics=found.statistics, excess=0.0)
        rows = different.reshape(-1, result.shape[-1] if result.dim() else 1)
        problem = (
            f"{int(rows.sum())} elements differ where sums are exact, first in row {int(rows.any(-1).nonzero()[0])}"
        )
        return Finding(check="exact", problem=problem, statistics=found.statistics, excess=float("inf"))


def described(result: Tensor) -> str:
    """Dtype and shape, in words."""
    if not isinstance(result, Tensor) or result.layout != torch.strided or result.device.type != "cpu":
        return "no tensor on the host"
    return f"{result.dtype} {tuple(result.shape)}"


def verdict(finding: Finding, place: int) -> Verdict:
    """A finding of a result, said of the whole."""
    problem = None if finding.problem is None else f"result {place}: {finding.problem}"
    return Verdict(
        problem=problem, check=finding.check, statistics=dict(finding.statistics), limits=dict(finding.limits)
    )


def judge(
    operator: AnyOperator, arguments: Arguments, results: list[Tensor], profile: str = "standard", exact: bool = False
) -> Verdict:
    """Compare the results of one call: outputs, then mutated arguments after the call.

    Args:
        operator: What was called.
        arguments: The arguments as they were before the call.
        results: What the kernel made of them, on the host.
        profile: "strict", "standard" or "basic".
        exact: Whether every legal rounding gives the same numbers.
    """
    return expect(operator, arguments, exact).verdict_on(results, profile)


def expect(
    operator: AnyOperator, arguments: Arguments, exact: bool = False, declared: tuple[str, ...] = ()
) -> Expectation:
    """Compute what is due for a call.

    Args:
        operator: What is called.
        arguments: The arguments as they are before the call.
        exact: Whether every legal rounding gives the same numbers.
        declared: Numerics that the kernel has declared, of those in `operator.declared`.
    """
    family = family_of(operator, arguments, declared)
    count = len(family.gold)
    masks = operator.defined(**copied(arguments)) if operator.defined else (None,) * count
    ranking, sorted_reference = None, list(family.members[0])
    members, moved, gold = family.members, family.moved, family.gold
    if operator.selects_by is not None:
        chosen = gold[0]
        ranking = ranking_of(operator, arguments, chosen, masks[0], exact)
        gold = by_index(gold, chosen, gold)
        sorted_reference = by_index(members[0], chosen, gold)
        members = [by_index(member, chosen, gold) for member in members]
        moved = {dtype: by_index(results, chosen, gold) for dtype, results in moved.items()}
    unrounded = operator.unrounded(**copied(arguments)) if operator.unrounded else (None,) * count
    sorted_family = replace(family, gold=gold, members=members, moved=moved)
    load = load_of(operator, arguments, family.gold)
    return Expectation(
        operator=operator,
        due=tuple(due_of(operator, sorted_family, at, masks[at], unrounded[at], load) for at in range(count)),
        ranking=ranking,
        sorted_reference=tuple(sorted_reference),
        exact=exact,
    )


def load_of(operator: AnyOperator, arguments: Arguments, results: list[Tensor]) -> float:
    """Operations an element of the results, on average."""
    elements = sum(result.numel() for result in results)
    return operator.cost(**arguments).flops / max(elements, 1)


def due_of(
    operator: AnyOperator, family: Family, at: int, mask: Tensor | None, unrounded: Tensor | None, load: float
) -> Due:
    """What is due for one result."""
    reference = family.members[0][at]
    legal = [member[at] for member in family.members]
    due = Due(reference=reference, legal=(), mask=mask)
    if unrounded is not None:
        if reference.dtype not in CODES:
            return Due(reference=reference, legal=(), mask=mask, scales=unrounded)
        # A power of two divides exactly: every kernel has the same quotient.
        window = all(member.dtype != torch.float8_e8m0fnu for member in family.members[0])
        return Due(reference=reference, legal=(), mask=mask, codes=code_bar(unrounded, reference.dtype, window))
    gold, moved = family.gold[at], {dtype: near[at] for dtype, near in family.moved.items()}
    if mask is not None:
        gold, legal = gold[mask], [member[mask] for member in legal]
        moved = {dtype: near[mask] for dtype, near in moved.items()}
    if operator.bitwise or reference.dtype not in STANDARD:
        return Due(reference=reference, legal=tuple(legal), mask=mask)
    if not gold.numel():
        return due
    bar = bar_of(gold, legal, family.variants, moved, load, family.requantised)
    return Due(reference=reference, legal=(), mask=mask, bar=bar)


def judge_beside(
    operator: AnyOperator, arguments: Arguments, reference: list[Tensor], results: list[Tensor]
) -> Verdict:
    """Compare the results of a large call with the reference's: outputs, then mutated arguments after the call.

    Args:
        operator: What was called.
        arguments: The arguments as they were before the call, on any device.
        reference: What the reference made of them, on the host.
        results: What the kernel made of them, on the host.
    """
    due = dues_beside(operator, arguments, reference)
    ranking, in_order = None, list(reference)
    if operator.selects_by is not None:
        mask = due[0].mask
        ranking = ranking_beside(operator, arguments, reference[0], mask)
        in_order = by_index(reference, reference[0], reference)
        due = [replace(each, reference=values) for each, values in zip(due, in_order, strict=True)]
    expected = Expectation(
        operator=operator, due=tuple(due), ranking=ranking, sorted_reference=tuple(in_order), exact=False
    )
    verdict = expected.verdict_on(results)
    if verdict.check not in ("D", "bits"):
        return verdict
    # Rare, and it takes a run of everything that is legal: other roundings than the reference's.
    return replace(expected, due=tuple(wider(operator, arguments, due))).verdict_on(results)


def dues_beside(operator: AnyOperator, arguments: Arguments, reference: list[Tensor]) -> list[Due]:
    """What is due for each result, of the reference's alone."""
    count = len(reference)
    masks = operator.defined(**arguments) if operator.defined else (None,) * count
    exact = operator.unrounded(**arguments) if operator.unrounded else (None,) * count
    made = []
    for values, mask, unrounded in zip(reference, masks, exact, strict=True):
        known = Due(reference=values, legal=(values,), mask=None if mask is None else mask.cpu())
        if unrounded is not None and values.dtype in CODES:
            window = all(each.dtype != torch.float8_e8m0fnu for each in reference)
            known = replace(known, codes=code_bar(unrounded.cpu(), values.dtype, window))
        elif unrounded is not None:
            known = replace(known, scales=unrounded.cpu())
        elif not operator.bitwise and values.dtype in BESIDE_D:
            known = replace(known, beside=BESIDE_D[values.dtype])
        # `legal` is compared under the mask, as results are.
        made.append(known if known.mask is None else replace(known, legal=(values[known.mask],)))
    return made


def wider(operator: AnyOperator, arguments: Arguments, due: list[Due]) -> list[Due]:
    """What is due where the operator's variants are legal too, and codes that they change on the way."""
    watch = Numerics()
    evaluate(operator, operator.reference, arguments, watch)
    members = [evaluate(operator, variant, arguments) for variant in operator.variants]
    made = []
    for at, each in enumerate(due):
        legal = [each.reference, *(member[at].cpu() for member in members)]
        if each.mask is not None:
            legal = [values[each.mask] for values in legal]
        if each.beside is None:
            made.append(replace(each, legal=tuple(legal)))
            continue
        found = [beside(legal[0], values, each.beside).statistics.get("d", 0.0) for values in legal if values.numel()]
        limit = max([each.beside, *(BESIDE * d for d in found), BESIDE_D_REQUANTISED if watch.codes else 0.0])
        made.append(replace(each, beside=limit))
    return made


def differing_bits(result: Tensor, legal: tuple[Tensor, ...]) -> Finding:
    """Whether the result equals one of the legal ones to the bit."""
    wrong = [(as_bytes(result) != as_bytes(member)).flatten(1).any(1) for member in legal]
    least = min(wrong, key=lambda rows: int(rows.sum()))
    if not bool(least.any()):
        return PASSED
    problem = f"{int(least.sum())} of {least.numel()} rows differ, first {int(least.nonzero()[0])}"
    return Finding(check="bits", problem=problem, statistics={}, excess=float("inf"))


def as_bytes(values: Tensor) -> Tensor:
    """[rows, bytes], rows along the first axis."""
    rows = values.shape[0] if values.dim() else 1
    return values.contiguous().reshape(rows, -1).view(torch.uint8).reshape(rows, -1)
