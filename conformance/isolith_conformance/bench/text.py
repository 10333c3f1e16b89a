"""A benchmark for a terminal."""

import textwrap
from collections.abc import Iterator

from isolith.commands.command import columns
from isolith_conformance.bench.growth import Growth, growths
from isolith_conformance.bench.record import Bench, Limits, Row, Timing
from isolith_conformance.report_text import first_line, inert

HEADING = (
    *("operator", "call", "context", "tokens", "kernel", "median", "spread", "n", "GB/s", "GFLOP/s", "least"),
    *("% of limit", "by", "x reference", "check"),
)
WIDE = 100


def seconds(value: float) -> str:
    """A time with a unit and three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value / size < 100 else f"{value / size:.0f} {unit}"
    return f"{value / 1e-9:.0f} ns"


def number(value: float | None, digits: int = 3) -> str:
    """A figure in so many digits, without an exponent; a dash where there is none."""
    if value is None:
        return "–"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def spread(time: Timing) -> str:
    """The interquartile range in percent of the median."""
    return f"{100 * time.spread / time.median:.0f} %"


def short(kernel: str, ran: tuple[str, ...]) -> str:
    """A kernel's name; a composition's with its number of parts."""
    parts = len(ran) - 1
    return f"{kernel} ({parts} parts)" if kernel == "composition" and parts > 0 else kernel


def cells(row: Row) -> list[str]:
    """A row of the table."""
    head = [row.operator, row.label, f"{row.context}", f"{row.tokens}", short(row.kernel, row.ran) or "–"]
    if row.fallback:
        head[-1] += " (step down)"
    least = seconds(row.roofline_s)
    if row.time is None:
        middle = ["–", "–", "–", "–", "–", least, "–", row.bound, "–"]
    else:
        took = [seconds(row.time.median), spread(row.time), f"{row.time.repeats}"]
        rates = [number(row.gbs), number(row.gflops), least, number(row.percent), row.bound]
        middle = [*took, *rates, number(row.ratio)]
    return [*map(inert, head), *middle, row.state.lower() if row.state == "RIGHT" else row.state]


def row_line(row: Row) -> str:
    """A row for who waits."""
    if row.time is None:
        return f"{row.state}: {first_line(row.problem)}"
    words = [f"{inert(row.kernel)}: {seconds(row.time.median)} (spread {spread(row.time)}, n {row.time.repeats})"]
    words.append(f"{number(row.percent)} % of the {row.bound} limit")
    if row.ratio is not None:
        words.append(f"the reference takes x {number(row.ratio)}")
    words += [f"{peer.name} x {number(peer.ratio)}" for peer in row.peers if peer.ratio is not None]
    return ", ".join([*words, "right" if row.state == "RIGHT" else f"WRONG: {first_line(row.problem)}"])


def limit_lines(limits: Limits) -> Iterator[str]:
    """What the machine can do."""
    yield f"reads {limits.read_gbs:.1f} GB/s, copies {limits.copy_gbs:.1f} GB/s (read and written)"
    yield "products: " + ", ".join(f"{inert(name)} {rate:,.0f} GFLOP/s" for name, rate in limits.gflops.items())
    for name, reason in limits.assumed.items():
        yield f"{inert(name)} counts with bfloat16's rate: {inert(reason)}"
    if limits.launch_us is not None:
        yield f"a launch takes {limits.launch_us:.1f} us"
    yield f"measured with {inert(limits.how)}"


def table(bench: Bench) -> str:
    """The whole benchmark."""
    return "\n".join(lines(bench))


def lines(bench: Bench) -> Iterator[str]:
    """The lines of `table`."""
    run = bench.run
    yield inert(f"{run.model}, {run.phase}, backend {bench.backend.name} {bench.backend.version}")
    yield inert(f"{bench.backend.device}; torch {bench.environment.torch}, {run.threads} threads on the host")
    yield from limit_lines(bench.limits)
    yield ""
    yield columns([list(HEADING), *(cells(row) for row in bench.rows)])
    yield from peer_lines(bench)
    yield from growth_lines(bench)
    yield from note_lines(bench)
    yield ""
    wrong = [row for row in bench.rows if row.state != "RIGHT"]
    for row in wrong:
        yield f"{row.state}: {inert(row.operator)} ({inert(row.label)}): {first_line(row.problem)}"
    if not run.complete:
        yield "The run did not come to its end."
    yield "Every result is right." if bench.all_right else f"{len(wrong)} of {len(bench.rows)} rows are not right."


def peer_lines(bench: Bench) -> Iterator[str]:
    """The peers, below the table: each says what it computes."""
    rows = [["operator", "call", "context", "peer", "median", "x kernel"]]
    computes: dict[str, str] = {}
    for row in bench.rows:
        for peer in row.peers:
            computes[f"{inert(peer.name)}, for {inert(row.operator)}"] = inert(peer.computes)
            time = "–" if peer.time is None else seconds(peer.time.median)
            head = [inert(row.operator), inert(row.label), f"{row.context}", inert(peer.name)]
            rows.append([*head, time, number(peer.ratio) if peer.ratio is not None else first_line(peer.why_not)])
    if len(rows) == 1:
        return
    yield ""
    yield columns(rows)
    yield ""
    for name, statement in computes.items():
        yield textwrap.fill(f"{name}: {statement}.", WIDE, subsequent_indent="    ")


GROWTH_HEADING = ("operator", "call", "against", "from", "to", "time", "by cost", "memory", "written")


def growth_cells(found: Growth) -> list[str]:
    """An exponent's row."""
    ends = [f"{found.low}", f"{found.high}"]
    figures = [found.time, found.least, found.memory, found.written]
    head = [inert(found.operator), inert(found.label), found.axis]
    return [*head, *ends, *("–" if figure is None else f"{figure:.2f}" for figure in figures)]


def growth_lines(bench: Bench) -> Iterator[str]:
    """The exponents, where a run has several contexts, numbers of tokens or of experts."""
    rows = [growth_cells(found) for found in growths(bench)]
    if rows:
        yield ""
        yield "Exponents: 1 is linear, 0 is flat. Time, beside the least time of the cost; memory beyond the arguments,"
        yield "beside the bytes that the cost says are written."
        yield columns([list(GROWTH_HEADING), *rows])


def notes_of(bench: Bench) -> list[str]:
    """What must be said of rows that are not what they seem."""
    found: dict[str, list[str]] = {}
    for row in bench.rows:
        name = f"{row.operator} ({row.label})"
        if row.note:
            found.setdefault(row.note, []).append(name)
        if row.reference_note:
            found.setdefault(f"no time of the reference, {row.reference_note}", []).append(name)
        if row.state == "RIGHT" and row.checked != "the reference":
            found.setdefault(f"checked with {row.checked}", []).append(name)
    return [f"{note}: {', '.join(dict.fromkeys(names))}" for note, names in found.items()]


def note_lines(bench: Bench) -> Iterator[str]:
    """The notes, and what the columns mean."""
    yield ""
    notes = notes_of(bench)
    notes.append(f"spread: the interquartile range; caches are {bench.run.caches} before every repeat")
    notes.append(
        "least: the time that the operator's own cost takes under the limits above; % of limit: least / median"
    )
    notes.append("x reference, x kernel: how many times as long the reference, or the peer, takes")
    for note in notes:
        yield textwrap.fill(inert(note), WIDE, initial_indent="- ", subsequent_indent="  ")
