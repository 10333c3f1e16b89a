"""How time and memory grow: measured exponents against context, tokens and experts, beside those of the cost.

An exponent is the slope of a line through the logarithms: 1 is linear, 0 is flat.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from isolith_conformance.bench.record import Bench, Row

AXES = ("context", "tokens", "experts")
LEAST_BYTES = 2**20
"""Below so many bytes a peak is what the allocator makes of it."""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """One call along one axis.

    Args:
        operator: What was called.
        label: Which of the model's calls of it.
        axis: "context", "tokens" or "experts"; the other two stay.
        low: The axis's smallest value.
        high: Its largest.
        time: Exponent of the median.
        least: Exponent of the least time, which the cost gives.
        memory: Exponent of the memory beyond the arguments; None where that is too little, or not known.
        written: Exponent of the bytes written, which the cost gives; None where there are none.
    """

    operator: str
    label: str
    axis: str
    low: int
    high: int
    time: float
    least: float
    memory: float | None
    written: float | None


def growths(bench: Bench) -> Iterator[Growth]:
    """Every call of which the record has several values of an axis, the others at their largest."""
    for axis in AXES:
        others = [other for other in AXES if other != axis]
        largest = {other: max((getattr(row, other) for row in bench.rows), default=0) for other in others}
        rows = [row for row in bench.rows if all(getattr(row, other) == largest[other] for other in others)]
        calls: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            if row.time is not None:
                calls.setdefault((row.operator, row.label), []).append(row)
        for (operator, label), found in calls.items():
            values = [getattr(row, axis) for row in found]
            if len(set(values)) < 2:
                continue
            yield Growth(
                operator=operator,
                label=label,
                axis=axis,
                low=min(values),
                high=max(values),
                time=slope(values, [row.time.median for row in found if row.time]),
                least=slope(values, [row.roofline_s for row in found]),
                memory=slope_of_bytes(values, [row.extra_bytes for row in found], LEAST_BYTES),
                written=slope_of_bytes(values, [row.bytes_written for row in found], 1),
            )


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent that fits best."""
    fitted = statistics.linear_regression([math.log(value) for value in x], [math.log(value) for value in y])
    return fitted.slope


def slope_of_bytes(x: Sequence[float], y: Sequence[int | None], least: int) -> float | None:
    """The exponent of bytes, where there are as many as tell anything."""
    known = [value for value in y if value is not None and value >= least]
    return slope(x, known) if len(known) == len(x) else None
