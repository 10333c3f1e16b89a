"""The vendors' own rules of accuracy: their figures by hand, and that they decide nothing."""

import pytest
import torch

from isolith import OPERATORS
from isolith_conformance import house_rules
from isolith_conformance.judge import expect
from isolith_conformance.page import page
from isolith_conformance.page_picture import pictures_of
from isolith_conformance.report_text import summary_text

GOLD = torch.tensor([[1.0, -2.0, 4.0, 0.0]], dtype=torch.float64)
RESULT = torch.tensor([[1.5, -2.0, 3.0, 0.0]])
PEER = torch.tensor([[1.0, -2.25, 4.0, 0.0]])


def figures(operator="rms_norm", gold=GOLD, reference=PEER, result=RESULT):
    return house_rules.figures_of(operator, gold, reference, result)


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("ascend_mare", 0.5, 10 * 2**-13),
        ("ascend_mere", (0.5 + 0.25) / 4, 2**-13),
        ("ascend_rmse", (1.25 / 4) ** 0.5, None),
        ("ascend_mare_quotient", 0.5 / 0.125, 5.0),
        ("ascend_mere_quotient", 0.75 / 0.125, 1.5),
        ("ascend_rmse_quotient", (1.25 / 0.0625) ** 0.5, 1.5),
        ("cambricon_diff1", 1.5 / 7, 3e-3),
        ("cambricon_diff2", (1.25 / 21) ** 0.5, 3e-3),
        ("cambricon_diff3_1", 0.5, None),
        ("cambricon_diff3_2", 1.0, None),
    ],
)
def test_figures_are_those_of_the_standards(name, value, limit):
    assert figures()[name] == (pytest.approx(value, rel=1e-6), limit)


def test_products_in_float32_have_the_narrow_limit():
    assert figures("grouped_gemm")["cambricon_diff1"][1] == 1e-5
    assert figures("grouped_gemm", result=RESULT.half())["cambricon_diff1"][1] == 3e-3


def test_the_limit_follows_the_dtype_of_the_result():
    assert figures(result=RESULT.bfloat16())["ascend_mere"][1] == 2**-7


def test_infinities_are_left_to_our_rules():
    gold = torch.tensor([[torch.inf, 1.0]], dtype=torch.float64)
    found = figures(gold=gold, reference=gold.float(), result=gold.float())
    assert found["ascend_mare"][0] == 0
    assert "ascend_mare_quotient" not in found  # the peer does not err


@pytest.mark.parametrize(("above", "kept"), [(100, False), (99, True)])
def test_errors_of_one_side_break_a_rule_of_cambricon(above, kept):
    gold = torch.ones(1, 100, dtype=torch.float64)
    result = torch.ones(1, 100) + 1e-5
    result[0, above:] -= 2e-5
    values, limits = house_rules.worst_of([figures(gold=gold, reference=gold.float(), result=result)])
    assert house_rules.keeps(house_rules.RULES[2], values, limits) is kept


def test_fewer_than_a_hundred_points_have_no_side():
    assert "cambricon_diff4" not in figures()


def test_the_worst_result_of_a_call_counts_by_its_own_limit():
    several = [{"ascend_mere": (0.004, 0.008)}, {"ascend_mere": (0.001, 0.0001)}, {"ascend_rmse": (2.0, None)}]
    assert house_rules.worst_of(several) == ({"ascend_mere": 0.001, "ascend_rmse": 2.0}, {"ascend_mere": 0.0001})


def test_a_call_has_figures_of_its_float_results_and_none_where_the_shape_is_wrong():
    operator = OPERATORS["rms_norm"]
    x, weight = torch.randn(3, 256), torch.ones(256)
    expectation = expect(operator, operator.arguments(x, weight))
    result = operator.reference(x, weight)
    values, limits = expectation.house_figures([result])
    assert 0 < values["cambricon_diff1"] < 1e-6 < limits["cambricon_diff1"]
    assert values["ascend_rmse_quotient"] == 1
    assert expectation.house_figures([result[:2]]) == ({}, {})


def test_selections_are_measured_in_the_order_of_their_indices():
    operator = OPERATORS["moe_gate"]
    logits = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    given = operator.arguments(logits, 3, score="sigmoid")
    indices, weights = operator.reference(**given)
    values, _ = expect(operator, given).house_figures([indices.flip(-1), weights.flip(-1)])
    assert values["ascend_rmse_quotient"] == 1


@pytest.fixture
def with_figure(make_case):
    """A passed case whose diff1 has the limit 1."""

    def make(name, diff1):
        statistics, limits = {"r1": 0.5, "cambricon_diff1": diff1}, {"r1": 1.4, "cambricon_diff1": 1.0}
        return make_case(sample=name, statistics=statistics, limits=limits)

    return make


def test_a_broken_house_rule_is_told_and_decides_nothing(with_figure, make_report):
    report = make_report(with_figure("kept", 0.5), with_figure("broken", 2.0))
    assert "Cambricon 1 of 2" in summary_text(report)
    assert "<td>1 of 2</td>" in page(report)
    assert [picture.statistic for picture in pictures_of(report.cases)] == ["r1"]
    assert report.summary.conformant


def test_a_report_without_figures_tells_of_no_house_rule(make_report):
    assert "own rules" not in summary_text(make_report())
    assert "own rules" not in page(make_report())
