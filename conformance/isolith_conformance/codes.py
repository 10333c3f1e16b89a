"""Codes of quantised outputs and their scales: the nearest to the exact value, or beside a boundary its neighbour.

A code is compared as its place among the format's values, counted from 0 with a sign: -0 is 0, neighbours differ by 1,
and what is no code of the format has a place of its own.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from isolith.numerics.codes import E2M1_VALUES, unpack_nibbles
from isolith_conformance.limits import CODE_WINDOW, SCALE_ULPS
from isolith_conformance.ratios import PASSED, Finding

CODES = (torch.float8_e4m3fn, torch.int8, torch.uint8)
"""Dtypes of codes; uint8 is two e2m1 codes a byte."""
NO_CODE = 1 << 20


@functools.cache
def magnitudes(dtype: torch.dtype) -> Tensor:
    """The values of a format from 0 up, float64."""
    if dtype == torch.float8_e4m3fn:
        return torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return torch.arange(128).double() if dtype == torch.int8 else torch.tensor(E2M1_VALUES, dtype=torch.float64)


def places(codes: Tensor) -> Tensor:
    """The signed place of every code."""
    if codes.dtype == torch.int8:
        return codes.int().masked_fill(codes == -128, NO_CODE)
    if codes.dtype == torch.uint8:
        nibbles = unpack_nibbles(codes).int()
        return torch.where(nibbles >= 8, 8 - nibbles, nibbles)
    # A view needs a last axis to count bytes by.
    bits = codes.contiguous().reshape(-1).view(torch.uint8).reshape(codes.shape).int()
    magnitude = bits & 127
    return torch.where(bits >= 128, -magnitude, magnitude).masked_fill(magnitude == 127, NO_CODE)


def nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The signed place of the code nearest to float64 values; ties to the even one, saturating."""
    steps = magnitudes(dtype)
    middles = (steps[1:] + steps[:-1]) / 2
    size = values.abs().contiguous()
    low, high = torch.searchsorted(middles, size), torch.searchsorted(middles, size, right=True)
    place = torch.where(low % 2 == 0, low, high).int()
    return torch.where(values < 0, -place, place)


@dataclass(frozen=True, kw_only=True)
class CodeBar:
    """The legal codes: one place, and another beside a boundary; anything where nothing is specified."""

    place: Tensor
    other: Tensor
    free: Tensor


def code_bar(exact: Tensor, dtype: torch.dtype, window: bool) -> CodeBar:
    """What values in float64 may be rounded to; `window` = whether their scale is not exact."""
    place, width = nearest(exact, dtype), CODE_WINDOW if window else 0.0
    above, below = nearest(exact * (1 + width), dtype), nearest(exact * (1 - width), dtype)
    return CodeBar(place=place, other=torch.where(above != place, above, below), free=exact.isnan())


def judged_codes(bar: CodeBar, result: Tensor, exact: bool) -> Finding:
    """Compare codes of the right shape and dtype; in exact mode none is free."""
    found = places(result)
    wrong = (found != bar.place) & ~bar.free
    if not exact:
        wrong &= found != bar.other
    if not bool(wrong.any()):
        return PASSED
    row = int(wrong.reshape(-1, wrong.shape[-1]).any(-1).nonzero()[0])
    problem = f"{int(wrong.sum())} of {wrong.numel()} codes are not the nearest, first in row {row}"
    return Finding(check="codes", problem=problem, statistics={"wrong_codes": float(wrong.sum())}, excess=float("inf"))


def judged_scales(exact: Tensor, result: Tensor, bits: bool) -> Finding:
    """Compare scales with float64 values: an e8m0 scale is equal, a float32 one at most some units off."""
    values = result.float()
    if result.dtype == torch.float32:
        away = (ordinal(values) - ordinal(exact.float())).abs()
        wrong = away > (0 if bits else SCALE_ULPS)
    else:
        wrong = values.double() != exact
    wrong &= ~exact.isnan()
    if not bool(wrong.any()):
        return PASSED
    row = int(wrong.reshape(-1, wrong.shape[-1]).any(-1).nonzero()[0])
    problem = f"{int(wrong.sum())} of {wrong.numel()} scales are wrong, first in row {row}"
    return Finding(
        check="scales", problem=problem, statistics={"wrong_scales": float(wrong.sum())}, excess=float("inf")
    )


def ordinal(values: Tensor) -> Tensor:
    """float32 values as integers in their own order, neighbours 1 apart."""
    bits = values.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
