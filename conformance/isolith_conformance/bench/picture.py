"""Pictures of a benchmark, as SVG: where each row lies below the roofline, and how times grow with the context.

A row's number in a picture is its number in the page's table.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from isolith_conformance.bench.record import Bench, Limits, Row
from isolith_conformance.bench.text import seconds
from isolith_conformance.report_text import inert

WIDTH, HEIGHT = 960, 540
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 44, 48
LEGEND_COLUMNS, LINE = 4, 15
LABEL_WIDTH, LABEL_HEIGHT = 7, 11
AROUND = ((9, 4), (-9, 4), (0, -8), (0, 16), (9, -6), (-9, -6), (9, 13), (-9, 13), (18, 4), (-18, 4), (0, -18), (0, 26))
"""Where a dot's number may stand, from its middle; the first that is free is taken."""

STYLE = """
svg { background: #ffffff; font: 12px system-ui, "DejaVu Sans", sans-serif; }
text { fill: #1c2430; } .faint { fill: #5d6877; } .title { font-size: 15px; font-weight: 600; }
.grid { stroke: #e4e8ee; } .frame { fill: none; stroke: #aab3bf; }
.roof { fill: none; stroke: #1f4e8c; stroke-width: 1.8; }
.memory { fill: #2f7d4f; } .compute { fill: #b3611a; } .wrong { fill: #c01f2b; } .number { font-size: 10px; }
.line { fill: none; stroke-width: 1.3; stroke: #5b7fb0; } .point { fill: #5b7fb0; }
@media (prefers-color-scheme: dark) {
svg { background: #14181f; } text { fill: #e3e8ef; } .faint { fill: #98a4b3; }
.grid { stroke: #262d37; } .frame { stroke: #465160; } .roof { stroke: #8db8f2; }
.memory { fill: #6cc492; } .compute { fill: #eba45f; } .wrong { fill: #ff7a82; }
.line { stroke: #7d9fcf; } .point { fill: #7d9fcf; } }
"""

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Two logarithmic axes: the exponents at their ends, and what has a line of the grid."""

    x: tuple[float, float]
    y: tuple[float, float]
    top: float
    ticks: tuple[float, ...] = ()

    def at(self, x: float, y: float) -> Point:
        """The place of a value."""
        across = (math.log10(x) - self.x[0]) / (self.x[1] - self.x[0])
        up = (math.log10(y) - self.y[0]) / (self.y[1] - self.y[0])
        bottom = self.top + HEIGHT - BOTTOM
        return LEFT + across * (WIDTH - LEFT - RIGHT), bottom - up * (HEIGHT - TOP - BOTTOM)

    def frame(self, titles: tuple[str, str, str], times: bool = False) -> Iterator[str]:
        """Grid, numbers and titles: (picture, x, y); `times` where y is in seconds."""
        left, bottom = self.at(10.0 ** self.x[0], 10.0 ** self.y[0])
        right, top = self.at(10.0 ** self.x[1], 10.0 ** self.y[1])
        for value in self.ticks or tuple(whole_decades(self.x)):
            at, _ = self.at(value, 1.0)
            yield f'<line class="grid" x1="{at:.1f}" y1="{top:.1f}" x2="{at:.1f}" y2="{bottom:.1f}"/>'
            yield text(at, bottom + 17, f"{value:,.0f}" if self.ticks else count(value), "faint", "middle")
        for value in whole_decades(self.y):
            _, at = self.at(1.0, value)
            yield f'<line class="grid" x1="{left:.1f}" y1="{at:.1f}" x2="{right:.1f}" y2="{at:.1f}"/>'
            yield text(left - 7, at + 4, seconds(value) if times else count(value), "faint", "end")
        yield f'<rect class="frame" x="{left}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}"/>'
        yield text(left, self.top + 24, titles[0], "title")
        yield text((left + right) / 2, bottom + 38, titles[1], "faint", "middle")
        middle = (top + bottom) / 2
        turned = f'transform="rotate(-90 16 {middle:.1f})"'
        yield f'<text class="faint" x="16" y="{middle:.1f}" text-anchor="middle" {turned}>{escape(titles[2])}</text>'


def whole_decades(ends: tuple[float, float]) -> Iterator[float]:
    """The powers of ten between two exponents."""
    yield from (10.0**power for power in range(math.ceil(ends[0]), math.floor(ends[1]) + 1))


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """Words at a place."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(inert(words))}</text>'


def count(value: float) -> str:
    """A power of ten."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"


def numbers(bench: Bench) -> dict[tuple[str, str], int]:
    """The number of each call, the same in every context."""
    calls = dict.fromkeys((row.operator, row.label) for row in bench.rows)
    return {call: place for place, call in enumerate(calls, 1)}


def picture(bench: Bench) -> str:
    """Everything in one file."""
    parts, height = list(roofline(bench, 0.0)), float(HEIGHT)
    if len({row.context for row in bench.rows}) > 1:
        parts += scaling(bench, height)
        height += HEIGHT
    legend, lines = list(legend_parts(bench, height)), -(-len(numbers(bench)) // LEGEND_COLUMNS)
    return document([*parts, *legend], height + lines * LINE + 34)


def document(parts: Sequence[str], height: float) -> str:
    """An SVG file."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}"'
    return "\n".join([f'{head} height="{height:.0f}" role="img">', f"<style>{STYLE}</style>", *parts, "</svg>"]) + "\n"


def legend_parts(bench: Bench, top: float) -> Iterator[str]:
    """What the numbers are."""
    known = numbers(bench)
    lines = -(-len(known) // LEGEND_COLUMNS)
    width = (WIDTH - 24) / LEGEND_COLUMNS
    for (operator, label), number in known.items():
        column, line = divmod(number - 1, max(lines, 1))
        words = f"{number} {operator}, {label}"
        yield text(
            14 + column * width, top + 16 + line * LINE, words if len(words) < 40 else f"{words[:38]}…", "number"
        )
    if without := [f"{known[row.operator, row.label]}" for row in drawn_context(bench) if not row.flops and row.time]:
        yield text(
            14, top + 20 + lines * LINE, f"Without FLOPs, not in the roofline: {', '.join(without)}", "faint number"
        )


def drawn_context(bench: Bench) -> list[Row]:
    """The rows of the longest context, of the most tokens and experts: those of the roofline."""
    longest = max((row.context for row in bench.rows), default=0)
    return [row for row in most(bench) if row.context == longest]


def most(bench: Bench) -> list[Row]:
    """The rows of the most tokens and experts."""
    largest = max(((row.tokens, row.experts) for row in bench.rows), default=(0, 0))
    return [row for row in bench.rows if (row.tokens, row.experts) == largest]


def decades(values: Sequence[float]) -> tuple[float, float]:
    """Whole decades around values."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def roofline(bench: Bench, top: float) -> Iterator[str]:
    """Intensity against speed, with the limits as lines."""
    limits, known = bench.limits, numbers(bench)
    rows = [row for row in drawn_context(bench) if row.flops and row.gflops]
    dots = [(row.flops / max(row.bytes_read + row.bytes_written, 1), row.gflops or 1.0, row) for row in rows]
    fastest = max(limits.gflops.values())
    ridge = fastest / limits.read_gbs
    axes = Axes(
        x=decades([*(x for x, _, _ in dots), ridge * 3, 0.1]),
        y=decades([*(y for _, y, _ in dots), fastest * 1.1, limits.read_gbs * 0.1]),
        top=top,
    )
    run = bench.run
    context = max(run.contexts)
    what = f"{run.model} {run.phase}, {max(run.tokens)} tokens, context {context:,}, {bench.backend.name}"
    yield from axes.frame((f"Roofline: {what}", "FLOP per byte, by the operators' cost", "GFLOP/s"))
    yield from roofs(axes, limits)
    yield from numbered(axes, [(x, y, known[row.operator, row.label], row) for x, y, row in dots])
    _, low = axes.at(1.0, 10.0 ** axes.y[0])
    for place, (kind, words) in enumerate(
        (("memory", "bound by memory"), ("compute", "by compute"), ("wrong", "wrong"))
    ):
        across = WIDTH - RIGHT - 330 + 130 * place
        yield f'<circle class="{kind}" cx="{across}" cy="{low - 14:.1f}" r="4"/>'
        yield text(across + 8, low - 10, words, "faint")


def roofs(axes: Axes, limits: Limits) -> Iterator[str]:
    """The memory's slope, and a line for each format."""
    left, right = 10.0 ** axes.x[0], 10.0 ** axes.x[1]
    floor = 10.0 ** axes.y[0]
    start = max(left, floor / limits.read_gbs)
    fastest = max(limits.gflops.values())
    yield path([axes.at(start, start * limits.read_gbs), axes.at(fastest / limits.read_gbs, fastest)], "roof")
    x, y = axes.at(start, start * limits.read_gbs)
    yield text(x + 18, y + 4, f"reads {limits.read_gbs:.0f} GB/s", "faint")
    placed: list[float] = []
    for name, rate in sorted(limits.gflops.items(), key=lambda item: -item[1]):
        yield path([axes.at(rate / limits.read_gbs, rate), axes.at(right, rate)], "roof")
        x, y = axes.at(right, rate)
        # Of formats of nearly one speed the first stands above its line, the others below theirs, side by side.
        near = sum(abs(other - y) < 2 * LABEL_HEIGHT for other in placed)
        placed.append(y)
        yield text(x - 6 - 110 * max(near - 1, 0), y + (13 if near else -4), f"{name} {rate:,.0f}", "faint", "end")


def path(points: Sequence[Point], kind: str) -> str:
    """A line through points."""
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def numbered(axes: Axes, dots: Sequence[tuple[float, float, int, Row]]) -> Iterator[str]:
    """Dots, each with its number where there is room."""
    places = [(*axes.at(x, y), number, row) for x, y, number, row in dots]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y, _, _ in places]
    for x, y, number, row in places:
        kind = row.bound if row.state == "RIGHT" else "wrong"
        told = f"{number} {row.operator}, {row.label}: {row.percent:.0f} % of the limit" if row.percent else ""
        yield f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(inert(told))}</title></circle>'
        width = LABEL_WIDTH * len(str(number)) + 2
        boxes = [(x + dx - width / 2, y + dy - 10, x + dx + width / 2, y + dy + 1) for dx, dy in AROUND]
        free = next((at for at, box in enumerate(boxes) if not any(overlap(box, other) for other in taken)), None)
        if free is not None:
            taken.append(boxes[free])
            yield text(x + AROUND[free][0], y + AROUND[free][1], f"{number}", "number", "middle")


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether two boxes (left, top, right, bottom) share a place."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def scaling(bench: Bench, top: float) -> Iterator[str]:
    """Times against the context, a line for each call."""
    known = numbers(bench)
    lines: dict[int, list[tuple[int, float]]] = {}
    for row in most(bench):
        if row.time is not None:
            lines.setdefault(known[row.operator, row.label], []).append((row.context, row.time.median))
    lines = {number: sorted(points) for number, points in lines.items() if len(points) > 1}
    if not lines:
        return
    contexts = [context for points in lines.values() for context, _ in points]
    times = [time for points in lines.values() for _, time in points]
    ends = (math.log10(min(contexts)) - 0.03, math.log10(max(contexts)))
    room = 0.18 * (ends[1] - ends[0])  # behind the last point, for the numbers
    axes = Axes(x=(ends[0], ends[1] + room), y=decades(times), top=top, ticks=tuple(sorted(set(contexts))))
    yield from axes.frame(("Median time by context", "tokens of context", "median"), times=True)
    taken: list[tuple[float, ...]] = []
    for number, points in sorted(lines.items(), key=lambda item: -item[1][-1][1]):
        places = [axes.at(context, time) for context, time in points]
        yield path(places, "line")
        yield from (f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in places)
        x, y = places[-1]
        box = (x + 4, y - 6, x + 6 + LABEL_WIDTH * len(str(number)), y + 5)
        while any(overlap(box, other) for other in taken):
            box = (box[0] + 3, box[1], box[2] + 3, box[3])
        taken.append(box)
        yield text(box[0] + 2, y + 4, f"{number}", "number")
