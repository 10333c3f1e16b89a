"""Two reports side by side: where two chips, or two versions, differ from each other and from gold.

A statistic is an error relative to gold. Two reports whose cases have equal inputs can also be compared with each
other to the bit, where both hold hashes of their results.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from isolith_conformance.report import Case, Report, ReportError, read
from isolith_conformance.report_json import Statistic, canonical, encode
from isolith_conformance.report_text import first_line, inert, mark, reproduce_command

MOST_LINES = 20
"""Of each kind of difference in the text; the JSON has all."""

Sameness = Literal["equal", "different", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two cases of a pair."""

    id: str
    verdict: str
    problem: str | None
    reproduce: str


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A statistic whose value differs; ratio is b / a, 0 where a is infinitely larger."""

    statistic: str
    a: Statistic
    b: Statistic
    ratio: Statistic


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One case in both reports."""

    a: Side
    b: Side
    inputs: Sameness
    results: Sameness
    moved: tuple[Moved, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What differs between two reports.

    Args:
        a: The first report's mark.
        b: The second's.
        pairs: How many cases are in both.
        inputs: Of how many pairs the inputs are equal, different, unknown.
        results: Of how many pairs the result bytes are; unknown where the inputs are not equal.
        changed: Pairs with two verdicts.
        moved: Pairs with one verdict, and a statistic or a result that differs; the largest change first.
        only_a: Cases of the first report alone.
        only_b: Cases of the second alone.
    """

    a: str
    b: str
    pairs: int
    inputs: dict[str, int]
    results: dict[str, int]
    changed: tuple[Pair, ...]
    moved: tuple[Pair, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether both reports have the same cases with the same verdicts."""
        return not (self.changed or self.only_a or self.only_b)


def compare(a: Report, b: Report) -> Comparison:
    """Where two reports differ."""
    ids, only_a, only_b = paired(a, b)
    pairs = [pair_of(first, second) for first, second in ids]
    moved = [pair for pair in pairs if pair.a.verdict == pair.b.verdict and (pair.moved or differs(pair))]
    return Comparison(
        a=mark(a),
        b=mark(b),
        pairs=len(pairs),
        inputs=tally(pair.inputs for pair in pairs),
        results=tally(pair.results for pair in pairs),
        changed=tuple(pair for pair in pairs if pair.a.verdict != pair.b.verdict),
        moved=tuple(sorted(moved, key=lambda pair: (-largest_change(pair), pair.a.id))),
        only_a=tuple(case.id for case in only_a),
        only_b=tuple(case.id for case in only_b),
    )


def paired(a: Report, b: Report) -> tuple[list[tuple[Case, Case]], list[Case], list[Case]]:
    """Cases that belong together, and those of one report alone."""
    twins = other_names(a, b)
    waiting: dict[Hashable, list[Case]] = defaultdict(list)
    for case in b.cases:
        waiting[key_of(case, case.backend if case.backend not in twins.values() else "")].append(case)
    pairs, only_a = [], []
    for case in a.cases:
        candidates = waiting[key_of(case, case.backend if case.backend not in twins else "")]
        if candidates:
            pairs.append((case, candidates.pop(0)))
        else:
            only_a.append(case)
    only_b = [case for rest in waiting.values() for case in rest]
    return pairs, only_a, sorted(only_b, key=lambda case: case.id)


def other_names(a: Report, b: Report) -> dict[str, str]:
    """The one backend of each report that the other lacks, as a pair: two chips under one suite."""
    in_a, in_b = ({case.backend for case in report.cases} for report in (a, b))
    if len(in_a - in_b) == len(in_b - in_a) == 1:
        return dict(zip(in_a - in_b, in_b - in_a, strict=True))
    return {}


def key_of(case: Case, backend: str) -> Hashable:
    """What two cases of one kind have in common; their kernels too, where the backend is one."""
    kind = (case.operator, case.sample, case.dtype, case.check)
    return (*kind, backend, case.kernel) if backend else kind


def pair_of(a: Case, b: Case) -> Pair:
    """Two cases, and how they differ."""
    inputs = sameness(a.input_hash, b.input_hash)
    results = sameness(a.result_hash, b.result_hash) if inputs == "equal" else "unknown"
    moved = [
        Moved(statistic=name, a=a.statistics[name], b=b.statistics[name], ratio=ratio)
        for name in a.statistics
        if name in b.statistics and (ratio := quotient(b.statistics[name], a.statistics[name])) != 1
    ]
    return Pair(a=side_of(a), b=side_of(b), inputs=inputs, results=results, moved=tuple(moved))


def side_of(case: Case) -> Side:
    """What is told of a case."""
    return Side(id=case.id, verdict=case.verdict, problem=case.problem, reproduce=reproduce_command(case))


def sameness(a: str | None, b: str | None) -> Sameness:
    """Whether two hashes agree, where both are known."""
    return "unknown" if a is None or b is None else "equal" if a == b else "different"


def quotient(b: float, a: float) -> float:
    """b / a; 1 where both are the same, be it no number at all."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 1.0
    if math.isnan(a) or math.isnan(b) or (math.isinf(a) and math.isinf(b)):
        return math.nan
    return b / a if a else math.copysign(math.inf, b)


def differs(pair: Pair) -> bool:
    """Whether the two results are not the same bits."""
    return pair.results == "different"


def largest_change(pair: Pair) -> float:
    """How far a statistic has moved, up or down, as the logarithm of its ratio."""
    return max((change(moved.ratio) for moved in pair.moved), default=0.0)


def change(ratio: float) -> float:
    """The size of the ratio's logarithm; what has none counts as infinite."""
    return abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf


def tally(words: Iterator[Sameness]) -> dict[str, int]:
    """How often each word occurs, zeros too."""
    found = Counter(words)
    return {"equal": found["equal"], "different": found["different"], "unknown": found["unknown"]}


def comparison_text(comparison: Comparison) -> str:
    """The comparison for a terminal."""
    return "\n".join(comparison_lines(comparison))


def comparison_lines(comparison: Comparison) -> Iterator[str]:
    """The lines of `comparison_text`."""
    yield f"a: {comparison.a}"
    yield f"b: {comparison.b}"
    count = "1 case is" if comparison.pairs == 1 else f"{comparison.pairs} cases are"
    yield f"{count} in both. {inputs_sentence(comparison)}"
    results = comparison.results
    if results["equal"] or results["different"]:
        yield f"Of equal inputs, {results['equal']} results are the same bits and {results['different']} are not."
    yield from section("Verdicts that differ", [line for pair in comparison.changed for line in verdict_lines(pair)], 5)
    yield from section("Results that differ", [moved_line(pair) for pair in comparison.moved], 1)
    yield from section("Only in a", [f"  {inert(case)}" for case in comparison.only_a], 1)
    yield from section("Only in b", [f"  {inert(case)}" for case in comparison.only_b], 1)
    if comparison.same:
        yield "Every case has the same verdict in both."


def inputs_sentence(comparison: Comparison) -> str:
    """What may be concluded from numbers that differ."""
    inputs = comparison.inputs
    if comparison.pairs and inputs["equal"] == comparison.pairs:
        return "Their inputs are the same bytes."
    return (
        f"The inputs of {inputs['equal']} are the same bytes, of {inputs['different']} they differ, of "
        f"{inputs['unknown']} that is not known: across different inputs only verdicts and sizes of errors compare."
    )


def verdict_lines(pair: Pair) -> list[str]:
    """A pair with two verdicts: what each says, and how to see it again."""
    lines = [f"  {inert(pair.a.id)}: {pair.a.verdict} -> {pair.b.verdict}"]
    for name, side in (("a", pair.a), ("b", pair.b)):
        lines.append(f"    {name}: {first_line(side.problem) if side.problem else side.verdict}")
        lines.append(f"       {side.reproduce}")
    return lines


def moved_line(pair: Pair) -> str:
    """A pair with one verdict: which statistics moved."""
    moved = "; ".join(f"{inert(m.statistic)} {m.a:.3g} -> {m.b:.3g} (x {m.ratio:.3g})" for m in pair.moved)
    bits = {"equal": "the same bits", "different": "other bits", "unknown": ""}[pair.results]
    return f"  {inert(pair.a.id)}: {'; '.join(part for part in (moved, bits) if part)}"


def section(title: str, lines: list[str], each: int) -> Iterator[str]:
    """A titled list, cut after MOST_LINES entries of so many lines each."""
    if not lines:
        return
    count = len(lines) // each
    yield ""
    yield f"{title} ({count}):"
    yield from lines[: MOST_LINES * each]
    if count > MOST_LINES:
        yield f"  and {count - MOST_LINES} more; --json has all"


def compare_command(a: Path, b: Path, as_json: bool = False) -> int:
    """Print how two reports differ.

    Returns:
        0 where every case has the same verdict in both, 1 where not, 2 where a report cannot be read.
    """
    try:
        comparison = compare(read(a), read(b))
    except ReportError as error:
        print(error)
        return 2
    print(canonical(encode(comparison)) if as_json else comparison_text(comparison))
    return 0 if comparison.same else 1
