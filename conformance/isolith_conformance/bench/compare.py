"""Two benchmarks side by side: the speed of each call in both, under both machines' limits."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from isolith.commands.command import columns
from isolith_conformance.bench.record import Bench, BenchError, Limits, Row, State, read
from isolith_conformance.bench.text import limit_lines, number, seconds
from isolith_conformance.report_json import canonical, encode
from isolith_conformance.report_text import inert


@dataclass(frozen=True, kw_only=True)
class Side:
    """A call in one of the two records."""

    kernel: str
    median: float | None
    percent: float | None
    state: State


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A call in both; `faster` is how many times as fast b is, and `gain` the same of the percent of the limit."""

    operator: str
    label: str
    context: int
    tokens: int
    a: Side
    b: Side
    faster: float | None
    gain: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What differs between two records.

    Args:
        a: What the first is of.
        b: What the second is of.
        a_limits: What the first machine can do.
        b_limits: What the second can.
        pairs: Calls in both.
        changed: How many pairs have two verdicts.
        only_a: Calls of the first alone.
        only_b: Calls of the second alone.
    """

    a: str
    b: str
    a_limits: Limits
    b_limits: Limits
    pairs: tuple[Pair, ...]
    changed: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether both have the same calls with the same verdicts; times never are the same."""
        return not (self.changed or self.only_a or self.only_b)


def compare(a: Bench, b: Bench) -> Comparison:
    """The calls of two records, paired."""
    first, second = ({row.key: row for row in bench.rows} for bench in (a, b))
    pairs = [pair(row, second[key]) for key, row in first.items() if key in second]
    return Comparison(
        a=title(a),
        b=title(b),
        a_limits=a.limits,
        b_limits=b.limits,
        pairs=tuple(pairs),
        changed=sum(pair.a.state != pair.b.state for pair in pairs),
        only_a=tuple(name(row) for key, row in first.items() if key not in second),
        only_b=tuple(name(row) for key, row in second.items() if key not in first),
    )


def title(bench: Bench) -> str:
    """What a record is of."""
    run, backend = bench.run, bench.backend
    commit = (bench.suite.commit or "no commit")[:12]
    state = " with changes" if bench.suite.clean is False else ""
    return (
        f"{run.model} {run.phase}, {backend.name} {backend.version} on {backend.device}, "
        f"torch {bench.environment.torch}, {run.threads} threads, {commit}{state}"
    )


def name(row: Row) -> str:
    """A call in words."""
    note = f", {row.note}" if row.note else ""
    return f"{row.operator} ({row.label}, context {row.context}, {row.tokens} tokens{note})"


def side(row: Row) -> Side:
    """What is told of a row."""
    return Side(
        kernel=row.kernel, median=None if row.time is None else row.time.median, percent=row.percent, state=row.state
    )


def pair(a: Row, b: Row) -> Pair:
    """Two rows of one call."""
    return Pair(
        operator=a.operator,
        label=a.label,
        context=a.context,
        tokens=a.tokens,
        a=side(a),
        b=side(b),
        faster=a.time.median / b.time.median if a.time and b.time else None,
        gain=b.percent / a.percent if a.percent and b.percent else None,
    )


def lines(found: Comparison) -> Iterator[str]:
    """The comparison for a terminal."""
    for letter, words, limits in (("a", found.a, found.a_limits), ("b", found.b, found.b_limits)):
        yield f"{letter}: {inert(words)}"
        yield from (f"   {line}" for line in limit_lines(limits))
    yield ""
    heading = ["operator", "call", "context", "tokens", "a", "b", "b is x as fast", "% of limit a", "b", "x", "check"]
    rows = [heading]
    for each in found.pairs:
        times = ["–" if one.median is None else seconds(one.median) for one in (each.a, each.b)]
        verdicts = dict.fromkeys((each.a.state, each.b.state))
        figures = [number(each.a.percent), number(each.b.percent), number(each.gain)]
        head = [inert(each.operator), inert(each.label), f"{each.context}", f"{each.tokens}"]
        rows.append([*head, *times, number(each.faster), *figures, " -> ".join(verdicts)])
    yield columns(rows)
    for letter, alone in (("a", found.only_a), ("b", found.only_b)):
        if alone:
            yield ""
            yield f"Only in {letter} ({len(alone)}):"
            yield from (f"  {inert(one)}" for one in alone)


def compare_command(a: Path, b: Path, as_json: bool = False) -> int:
    """Print how two records differ.

    Returns:
        0 where both have the same calls with the same verdicts, 1 where not, 2 where a file cannot be read.
    """
    try:
        found = compare(read(a), read(b))
    except BenchError as error:
        print(error)
        return 2
    print(canonical(encode(found)) if as_json else "\n".join(lines(found)))
    return 0 if found.same else 1
