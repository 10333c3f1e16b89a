"""The judge without gold: a large call beside the reference's own result."""

import pytest
import torch

from isolith.ops import attention, moe, norm
from isolith_conformance.judge import judge_beside
from isolith_conformance.limits import BESIDE_D

X = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
GIVEN = norm.rms_norm.arguments(X, torch.ones(256))
DUE = [norm.rms_norm.reference(**GIVEN)]


def verdict(result):
    return judge_beside(norm.rms_norm, GIVEN, DUE, [result])


def test_reference_passes():
    assert verdict(DUE[0]).passed


def test_one_rounding_in_bfloat16_passes():
    assert verdict((DUE[0].float() * (1 + 2.0**-10)).bfloat16()).passed


@pytest.mark.parametrize("factor", [1.02, 0.98, -1.0])
def test_factor_fails(factor):
    assert verdict((DUE[0].float() * factor).bfloat16()).check == "D"


def test_one_row_that_is_wrong_fails_with_its_number():
    wrong = DUE[0].clone()
    wrong[5] = 0
    assert verdict(wrong).problem.endswith("row 5")


def test_nan_fails():
    wrong = DUE[0].clone()
    wrong[2, 3] = torch.nan
    assert verdict(wrong).check == "nonfinite"


def test_dtype_is_judged():
    assert verdict(DUE[0].float()).check == "shape"


def test_limit_stands_in_the_verdict():
    assert verdict(DUE[0]).limits == {"d": BESIDE_D[torch.bfloat16]}


PERMUTED = moe.moe_permute.arguments(X, torch.tensor([[0], [1]] * 4), 2)
ROWS = list(moe.moe_permute.reference(**PERMUTED))


def test_bitwise_result_fails_by_one_bit():
    wrong = [ROWS[0].clone(), *ROWS[1:]]
    wrong[0].view(torch.int16)[0, 0] ^= 1
    assert judge_beside(moe.moe_permute, PERMUTED, ROWS, wrong).check == "bits"


def test_count_fails_by_one():
    wrong = [*ROWS[:2], ROWS[2] + 1, *ROWS[3:]]
    assert judge_beside(moe.moe_permute, PERMUTED, ROWS, wrong).check == "bits"


SCORES = torch.linspace(0, 1, 64).repeat(2, 1)
CHOICE = attention.indexer_topk.arguments(SCORES, torch.full((2,), 64), 4)
CHOSEN = list(attention.indexer_topk.reference(**CHOICE))


def chosen(*indices):
    given = [torch.tensor([indices] * 2, dtype=torch.int32), CHOSEN[1]]
    return judge_beside(attention.indexer_topk, CHOICE, CHOSEN, given)


def test_selection_in_another_order_passes():
    assert chosen(60, 61, 63, 62).passed


def test_selection_of_a_smaller_value_fails():
    assert chosen(59, 61, 62, 63).check == "selection"


def test_selection_of_one_twice_fails():
    assert chosen(63, 63, 62, 61).check == "duplicates"


def test_variant_of_the_operator_passes():
    given = norm.rms_norm.arguments(X, torch.full((256,), 0.3), round_before_weight=True)
    due = [norm.rms_norm.reference(**given)]
    assert all(judge_beside(norm.rms_norm, given, due, [variant(**given)]).passed for variant in norm.rms_norm.variants)
