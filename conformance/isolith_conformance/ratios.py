"""Errors of float results, in proportion to those of the legal family."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from isolith_conformance import limits
from isolith_conformance.limits import ratios_of


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is found of one result."""

    check: str = ""
    problem: str | None = None
    statistics: Mapping[str, float]
    limits: Mapping[str, float] = field(default_factory=dict)
    """What each statistic may be at most."""
    excess: float = 0.0
    """The largest statistic in units of its limit."""


PASSED = Finding(statistics={})


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What a float result is measured against, rows along the last axis.

    Args:
        gold: [rows, columns] float64, 0 where nothing finite is due.
        due: Where a finite value is due.
        infinite: Where a value that is not finite is due, and `values` has it.
        values: Gold with its infinities and NaN.
        r1: The legal root mean square of the error over the tensor.
        r2: The legal root mean square of each row.
        r3: The legal error of an element of each row.
        d: The cap of each row.
        bias: The z of the legal variants; None where bias is not judged.
        dtype: Of the result.
        requantised: Whether legal roundings change codes on the way.
    """

    gold: Tensor
    due: Tensor
    infinite: Tensor
    values: Tensor
    r1: Tensor
    r2: Tensor
    r3: Tensor
    d: Tensor
    bias: float | None
    dtype: torch.dtype
    requantised: bool


def in_rows(values: Tensor) -> Tensor:
    """[rows, columns] in float64; a number is a row of one."""
    return values.double().reshape(-1, values.shape[-1] if values.dim() else 1)


def bar_of(
    gold: Tensor,
    members: list[Tensor],
    variants: slice,
    moved: Mapping[torch.dtype, Tensor],
    operations: float,
    requantised: bool,
) -> Bar:
    """Measure the legal family once.

    Args:
        gold: Not empty, as every other tensor is in the shape of the result.
        members: The legal results.
        variants: Which of them are the operator's own variants; those behind see other inputs.
        moved: Gold after a change of the inputs by the rounding of each dtype that the call's results have.
        operations: How many operations an element of the results takes, on average.
        requantised: Whether legal roundings change codes on the way.
    """
    dtype = members[0].dtype
    # Beyond the dtype's largest value the right result is an infinity.
    overflown = gold.to(dtype)
    values = in_rows(torch.where(overflown.isinf(), overflown.double(), gold))
    legal = [in_rows(member) for member in members]
    # Where legal roundings overflow otherwise than gold does, either is right.
    loose = torch.stack([member.isfinite() != values.isfinite() for member in legal]).any(0)
    due = values.isfinite()
    exact = values.masked_fill(~due, 0.0)
    errors = [(member - exact).abs().masked_fill(~due | ~member.isfinite(), 0.0) for member in legal]
    r1, r2, r3 = legal_errors(exact, errors, dtype)
    return Bar(
        gold=exact,
        due=due & ~loose,
        infinite=~due & ~loose,
        values=values,
        r1=r1,
        r2=r2,
        r3=r3,
        d=caps(exact, legal, variants, moved, dtype, requantised),
        bias=legal_bias(exact, legal[: variants.stop], dtype, operations),
        dtype=dtype,
        requantised=requantised,
    )


def legal_errors(gold: Tensor, errors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The legal error of the tensor, of each row, and of an element of each row."""
    info = torch.finfo(dtype)
    scale, largest, count = rms(gold), gold.abs().amax(-1), gold.shape[-1]
    whole = torch.stack([rms(error.flatten()) for error in errors]).amax()
    rows = torch.stack([rms(error) for error in errors]).amax(0)
    elements = torch.stack([error.amax(-1) for error in errors]).amax(0)
    # Subnormal numbers lie as far apart as the smallest normal ones, and may be flushed to zero in their last bit.
    once = limits.ONE_ROUNDING * info.eps * scale.clamp(min=info.smallest_normal)
    most = limits.LARGEST_ROUNDING * info.eps * largest.clamp(min=info.smallest_normal)
    # A row of few elements has few errors to tell its legal size by; the tensor's, in proportion, is as legal.
    few = 1 + limits.FEW_ELEMENTS / count
    share = few * scale * ratio(whole, rms(gold.flatten()))
    proportion = ratio(rows, scale)
    known = proportion[proportion.isfinite()]
    median = limits.ROW_FLOOR * scale * (known.median() if known.numel() else 0.0)
    r2 = torch.stack((rows, once, share.nan_to_num(0.0, 0.0), median)).amax(0)
    r3 = torch.stack((elements, most, limits.ELEMENT_SPREAD * r2)).amax(0)
    r1 = (whole * (1 + limits.FEW_ELEMENTS / gold.numel())).clamp(min=rms(once))
    return r1, r2, r3


def caps(
    gold: Tensor,
    legal: list[Tensor],
    variants: slice,
    moved: Mapping[torch.dtype, Tensor],
    dtype: torch.dtype,
    requantised: bool,
) -> Tensor:
    """The largest d of each row, whatever the operator's variants err."""
    found = torch.stack([differences(member.masked_fill(~member.isfinite(), 0.0), gold) for member in legal])
    trusted = torch.cat((found[: variants.start], found[variants.stop :]))
    cap = torch.full_like(gold[:, 0], limits.D_CAP_REQUANTISED if requantised else 0.0)
    cap = cap.maximum(cap_of(gold, moved, dtype)).maximum(limits.D_TRUSTED * trusted.amax(0))
    if dtype != torch.float32:
        return cap
    # Values that the contract lets a kernel round to a narrower dtype on the way.
    narrow = max(moved, key=lambda each: torch.finfo(each).eps, default=dtype)
    if narrow != dtype and bool((found > cap).any()):
        return cap.maximum(cap_of(gold, moved, narrow))
    return cap.maximum((limits.D_TRUSTED * found.amax()).minimum(limits.D_REACH * cap))


def cap_of(gold: Tensor, moved: Mapping[torch.dtype, Tensor], dtype: torch.dtype) -> Tensor:
    """The cap of each row by its condition, for a chain of roundings to a dtype."""
    if dtype not in moved:
        return torch.full_like(gold[:, 0], limits.D_CAP[dtype])
    near = in_rows(moved[dtype])
    spread = differences(near.masked_fill(~near.isfinite(), 0.0), gold)
    size = torch.finfo(dtype).eps / 2
    return limits.D_CAP[dtype] * (limits.CONDITION_SHARE * spread / size**2).clamp(min=1.0)


def legal_bias(gold: Tensor, legal: list[Tensor], dtype: torch.dtype, operations: float) -> float | None:
    """The z that the legal variants agree on; None where there is no such thing."""
    if dtype == torch.float32 or gold.numel() < limits.BIAS_ELEMENTS or operations > limits.BIAS_FLOPS:
        return None
    found = [z_of(member, gold) for member in legal]
    return sorted(found)[len(found) // 2] if max(found) - min(found) <= limits.BIAS_SPREAD else None


def z_of(result: Tensor, gold: Tensor) -> float:
    """The sum of the signs of |c|-|g| over its standard deviation were they random: a truncating cast is negative."""
    return float((result.abs() - gold.abs()).sign().nan_to_num(0.0).sum()) / math.sqrt(max(gold.numel(), 1))


def differences(result: Tensor, gold: Tensor) -> Tensor:
    """|c-g|^2 / (|c|^2+|g|^2) of each row."""
    return ratio((result - gold).square().sum(-1), result.square().sum(-1) + gold.square().sum(-1))


def measured(bar: Bar, result: Tensor, profile: str) -> Finding:
    """Measure a result of the right shape and dtype."""
    values = in_rows(result)
    finite = values.isfinite()
    same = (values == bar.values) | (values.isnan() & bar.values.isnan())
    misplaced = (bar.infinite & ~same) | (bar.due & ~finite)
    error = (values - bar.gold).masked_fill(~finite | bar.infinite, 0.0).abs()
    found = torch.where(error > 0, values, bar.gold)
    allowed = ratios_of(profile, bar.dtype, bar.requantised)
    rows = {"r2": ratio(rms(error), bar.r2), "r3": ratio(error.amax(-1), bar.r3), "d": differences(found, bar.gold)}
    worst = {"r1": ratio(rms(error.flatten()), bar.r1), **{name: row.amax() for name, row in rows.items()}}
    statistics = {name: min(float(value), 1e300) for name, value in worst.items()}
    excess = {"R1": statistics["r1"] / allowed.r1, "R2": statistics["r2"] / allowed.r2}
    excess |= {"R3": statistics["r3"] / allowed.r3, "D": min(float((rows["d"] / bar.d).amax()), 1e300)}
    if bar.bias is not None:
        statistics["bias"] = abs(z_of(found, bar.gold) - bar.bias)
        excess["bias"] = statistics["bias"] / limits.BIAS
    most = max(excess.values())
    bounds = {"r1": allowed.r1, "r2": allowed.r2, "r3": allowed.r3, "bias": limits.BIAS}
    if excess["D"] > 0:
        bounds["d"] = statistics["d"] / excess["D"]
    bounds = {name: bound for name, bound in bounds.items() if name in statistics}
    if bool(misplaced.any()):
        row = int(misplaced.any(-1).nonzero()[0])
        problem = f"non-finite values stand elsewhere than in gold, first in row {row}"
        return Finding(check="nonfinite", problem=problem, statistics=statistics, limits=bounds, excess=math.inf)
    wrong = next((name for name, part in excess.items() if not part <= 1), None)
    if wrong is None:
        return Finding(statistics=statistics, limits=bounds, excess=most)
    value = statistics[wrong.lower()]
    row = int((rows["d"] / bar.d if wrong == "D" else rows["r3" if wrong == "R3" else "r2"]).argmax())
    problem = f"{wrong} is {value:.3g}, at most {value / excess[wrong]:.3g}; worst row {row}"
    return Finding(check=wrong, problem=problem, statistics=statistics, limits=bounds, excess=most)


def rms(error: Tensor) -> Tensor:
    """Root mean square over the last axis."""
    return error.square().mean(-1).sqrt()


def ratio(error: Tensor, legal: Tensor) -> Tensor:
    """error / legal, where 0 / 0 is 0."""
    return torch.where(error == 0, torch.zeros_like(error), error / legal)


CHUNK = 2**22
"""Elements compared at once."""


def beside(reference: Tensor, result: Tensor, limit: float) -> Finding:
    """Measure a result by d of its rows from the reference's, both of one shape and dtype and not empty."""
    width = result.shape[-1] if result.dim() else 1
    mine, theirs = result.reshape(-1, width), reference.reshape(-1, width)
    step, worst, place = max(CHUNK // max(width, 1), 1), 0.0, 0
    for start in range(0, mine.shape[0], step):
        values, due = mine[start : start + step].double(), theirs[start : start + step].double()
        finite = due.isfinite()
        misplaced = (~finite & ~((values == due) | (values.isnan() & due.isnan()))) | (finite & ~values.isfinite())
        if bool(misplaced.any()):
            row = start + int(misplaced.any(-1).nonzero()[0])
            problem = f"non-finite values stand elsewhere than in the reference, first in row {row}"
            return Finding(check="nonfinite", problem=problem, statistics={}, excess=math.inf)
        found = differences(values.masked_fill(~finite, 0.0), due.masked_fill(~finite, 0.0))
        if float(found.amax()) > worst:
            worst, place = float(found.amax()), start + int(found.argmax())
    known: dict[str, Any] = {"statistics": {"d": worst}, "limits": {"d": limit}, "excess": worst / limit}
    if worst <= limit:
        return Finding(**known)
    return Finding(
        check="D", problem=f"D is {worst:.3g} beside the reference, at most {limit:.3g}; row {place}", **known
    )
