"""The vendors' own rules of accuracy, measured beside ours: they decide nothing here.

A vendor knows results by the figures of its own standard. Each float result that the judge measures against gold has
them in the report, with the vendor's limit where there is one, so that a vendor finds its house rule beside ours.

Source: Huawei's ecosystem standard for operators (one benchmark: MERE < T, MARE < 10 T, by the dtype of the result) and
its commercial one (two benchmarks, level L1: quotients by a third party's errors, which are those of the reference in
the same dtype here). Cambricon's MLU-OPS accuracy acceptance standard, 73adc65d, and the evaluator beside it (DIFF4 is
looked at from 100 unequal points on). bfloat16 has no line of its own there and takes float16's.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from isolith_conformance.report import Case

ASCEND_T = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-13}
ASCEND_L1 = {"mare": 5.0, "mere": 1.5, "rmse": 1.5}
ASCEND_FLOOR = 1e-7
CAMBRICON_COMPOSITE = 3e-3
CAMBRICON_PRODUCT_FLOAT32 = 1e-5
CAMBRICON_FLOOR = 1e-9
CAMBRICON_BIAS_POINTS = 100
PRODUCTS = ("grouped_gemm", "quant_linear")
"""Operators in the class of convolutions and products; the others are compositions."""

Figures = dict[str, tuple[float, float | None]]
"""Figure -> (value, limit or None)."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A house rule: the figures that must not exceed their limits."""

    name: str
    figures: tuple[str, ...]


RULES = (
    Rule(name="Ascend, one benchmark", figures=("ascend_mare", "ascend_mere")),
    Rule(
        name="Ascend, two benchmarks, L1",
        figures=("ascend_mare_quotient", "ascend_mere_quotient", "ascend_rmse_quotient"),
    ),
    Rule(name="Cambricon", figures=("cambricon_diff1", "cambricon_diff2", "cambricon_diff4")),
)
PREFIXES = ("ascend_", "cambricon_")


def of_house(statistic: str) -> bool:
    """Whether a statistic of a report belongs to a vendor's rule."""
    return statistic.startswith(PREFIXES)


def figures_of(operator: str, gold: Tensor, reference: Tensor, result: Tensor) -> Figures:
    """The figures of one result.

    Args:
        operator: Its name.
        gold: Float64.
        reference: What the reference gives in the dtypes of the call.
        result: In the shape of gold.
    """
    told = result.double().isfinite() & gold.isfinite() & reference.double().isfinite()
    if not bool(told.any()):
        return {}
    due, values, peer = gold[told], result.double()[told], reference.double()[told]
    found = ascend(due, values, peer, ASCEND_T[result.dtype])
    found.update(cambricon(due, values, 1 if operator in PRODUCTS else 9, result.dtype))
    return found


def ascend(gold: Tensor, result: Tensor, peer: Tensor, t: float) -> Figures:
    """MARE, MERE and RMSE, and each divided by the peer's where that errs at all."""
    mine, theirs = ascend_errors(gold, result), ascend_errors(gold, peer)
    found: Figures = {
        "ascend_mare": (mine["mare"], 10 * t),
        "ascend_mere": (mine["mere"], t),
        "ascend_rmse": (mine["rmse"], None),
    }
    for name, limit in ASCEND_L1.items():
        if theirs[name] > 0:
            found[f"ascend_{name}_quotient"] = (mine[name] / theirs[name], limit)
    return found


def ascend_errors(gold: Tensor, result: Tensor) -> dict[str, float]:
    """The largest and the mean relative error, and the root mean square of the error."""
    error = (result - gold).abs()
    relative = error / (gold.abs() + ASCEND_FLOOR)
    return {
        "mare": float(relative.amax()),
        "mere": float(relative.mean()),
        "rmse": float(error.square().mean().sqrt()),
    }


def cambricon(gold: Tensor, result: Tensor, kind: int, dtype: torch.dtype) -> Figures:
    """diff1 to diff4; `kind` is the standard's class: 1 a product, 9 a composition."""
    error, size = (result - gold).abs(), gold.abs()
    limit = CAMBRICON_PRODUCT_FLOAT32 if kind == 1 and dtype == torch.float32 else CAMBRICON_COMPOSITE
    found: Figures = {
        "cambricon_diff1": (float(error.sum() / (size.sum() + CAMBRICON_FLOOR)), limit),
        "cambricon_diff2": (float((error.square().sum() / (size.square().sum() + CAMBRICON_FLOOR)).sqrt()), limit),
        "cambricon_diff3_1": (float((error / (size + CAMBRICON_FLOOR)).amax()), None),
        "cambricon_diff3_2": (float(error.amax()), None),
    }
    above, below = int((result > gold).sum()), int((result < gold).sum())
    if above + below >= CAMBRICON_BIAS_POINTS:
        # One-sided errors alone fail; the limit is the largest share below 1 that so many points can have.
        points = above + below
        found["cambricon_diff4"] = (max(above, below) / points, (points - 1) / points)
    return found


def worst_of(several: Iterable[Figures]) -> tuple[dict[str, float], dict[str, float]]:
    """(values, limits) of a call with several results: each figure where it is largest for its limit."""
    values: dict[str, float] = {}
    limits: dict[str, float] = {}
    for found in several:
        for name, (value, limit) in found.items():
            if name in values and value / (limit or 1.0) <= values[name] / limits.get(name, 1.0):
                continue
            values[name] = value
            if limit is not None:
                limits[name] = limit
    return values, limits


def keeps(rule: Rule, statistics: Mapping[str, float], limits: Mapping[str, float]) -> bool | None:
    """Whether a case keeps a rule; None where it has none of the rule's figures."""
    known = [name for name in rule.figures if name in statistics]
    return all(statistics[name] <= limits[name] for name in known) if known else None


def kept(rule: Rule, cases: Iterable[Case]) -> tuple[int, int]:
    """(cases that keep a rule, cases that have its figures)."""
    said = [keeps(rule, case.statistics, case.limits) for case in cases]
    return sum(one is True for one in said), sum(one is not None for one in said)
