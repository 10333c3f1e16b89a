"""Pictures of errors: how far the statistics of many cases stay below their limits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from isolith_conformance.house_rules import of_house
from isolith_conformance.report import Case

SMALLEST, LARGEST = -2.0, 1.0
"""Decades of statistic / limit that a picture shows; what lies beyond stands in the first or last bar."""
BARS = 48
BAR_WIDTH = 6
HEIGHT = 26
ORDER = ("r1", "r2", "r3", "d", "bias")


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar, in the picture's own units."""

    x: int
    y: float
    height: float
    beyond: bool


@dataclass(frozen=True, kw_only=True)
class Picture:
    """How often a statistic was which part of its limit."""

    statistic: str
    count: int
    largest: float
    bars: tuple[Bar, ...]
    limit_x: int = round(-SMALLEST / (LARGEST - SMALLEST) * BARS) * BAR_WIDTH
    width: int = BARS * BAR_WIDTH
    height: int = HEIGHT


def pictures_of(cases: Sequence[Case]) -> tuple[Picture, ...]:
    """A picture of each statistic that has limits."""
    shares: dict[str, list[float]] = {}
    for case in cases:
        for name, share in shares_of(case).items():
            shares.setdefault(name, []).append(share)
    names = sorted(shares, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    return tuple(picture(name, shares[name]) for name in names)


def shares_of(case: Case) -> dict[str, float]:
    """Each statistic that decides, as a part of its limit; infinite where there is no number."""
    return {
        name: math.inf if math.isnan(value) else value / case.limits[name]
        for name, value in case.statistics.items()
        if name in case.limits and 0 < case.limits[name] < math.inf and not of_house(name)
    }


def share_of_limit(case: Case) -> float:
    """The largest of a case's statistics as parts of their limits; 0 without any."""
    return max(shares_of(case).values(), default=0.0)


def picture(statistic: str, shares: Sequence[float]) -> Picture:
    """The bars of one statistic; the highest is as high as the picture."""
    heights = [0] * BARS
    for share in shares:
        heights[bar_of(share)] += 1
    most = max(heights)
    bars = tuple(
        # A root, so that one bad case among thousands is seen.
        bar(place, math.sqrt(height / most) * HEIGHT)
        for place, height in enumerate(heights)
        if height
    )
    return Picture(statistic=statistic, count=len(shares), largest=max(shares), bars=bars)


def bar(place: int, height: float) -> Bar:
    """One bar, standing on the picture's bottom."""
    height = max(1.0, round(height, 1))
    beyond = place >= round(-SMALLEST / (LARGEST - SMALLEST) * BARS)
    return Bar(x=place * BAR_WIDTH, y=round(HEIGHT - height, 1), height=height, beyond=beyond)


def bar_of(share: float) -> int:
    """Which bar a part of the limit belongs to; the limit itself is the last legal one."""
    if share <= 10**SMALLEST:
        return 0
    if share >= 10**LARGEST:
        return BARS - 1
    step = (math.log10(share) - SMALLEST) / (LARGEST - SMALLEST) * BARS
    place = math.ceil(step) - 1
    return min(max(place, 0), BARS - 1)
