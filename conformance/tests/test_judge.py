"""The judge kills wrong results and lets right ones live."""

import pytest
import torch

import isolith
from isolith import OPERATORS, Make
from isolith_conformance.judge import expect, judge


def call_of(name, label, dtype=torch.bfloat16):
    operator = OPERATORS[name]
    made = {sample.name: sample for sample in operator.samples(Make(dtype, seed=name))}
    return operator.arguments(**made[label].arguments)


def results_of(name, call):
    result = OPERATORS[name].reference(**{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in call.items()})
    return list(result) if isinstance(result, tuple) else [result]


def verdict(name, call, results):
    return judge(OPERATORS[name], call, results)


@pytest.mark.parametrize("name", ["rms_norm", "sparse_attn", "indexer_topk", "moe_gate", "moe_permute", "fused_moe"])
def test_the_reference_passes(name):
    operator = OPERATORS[name]
    made = operator.samples(Make(torch.bfloat16, seed=name))
    call = operator.arguments(**next(sample for sample in made if "model" not in sample.tags).arguments)
    assert verdict(name, call, results_of(name, call)).problem is None


def test_nan_where_gold_has_nan_passes():
    call = call_of("swiglu", "nan_row")
    assert verdict("swiglu", call, results_of("swiglu", call)).problem is None


def test_an_overflow_to_infinity_is_right_and_saturation_is_wrong():
    x = torch.full((1, 4), 2.0, dtype=torch.float16)
    call = isolith.quant_linear.arguments(x, torch.full((3, 4), 60000.0, dtype=torch.float16), out_dtype="float16")
    (result,) = results_of("quant_linear", call)
    assert result.isinf().all()
    assert verdict("quant_linear", call, [result]).problem is None
    assert verdict("quant_linear", call, [torch.full_like(result, 65504.0)]).problem is not None


def truncated(y):
    """Rounded toward zero."""
    return (y.float().view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()


def test_a_truncating_cast_fails():
    call = call_of("rms_norm", "hidden_4096")
    wide = OPERATORS["rms_norm"].reference(call["x"].float(), call["weight"].float(), call["eps"])
    assert verdict("rms_norm", call, [truncated(wide)]).problem.startswith("result 0: R1 is ")


@pytest.mark.parametrize(
    ("breakage", "problem"),
    [
        (lambda y: y.index_fill(0, torch.tensor([3]), 0.0), "result 0: R1 is "),
        (lambda y: y.index_fill(0, torch.tensor([3]), torch.nan), "result 0: non-finite values"),
        (lambda y: y[:-1], "result 0: torch.bfloat16 (15, 4096); due is torch.bfloat16 (16, 4096)"),
        (lambda y: y.float(), "result 0: torch.float32 (16, 4096); due is torch.bfloat16 (16, 4096)"),
        (lambda y: y.roll(1, 0), "result 0: R1 is "),
    ],
    ids=["zero_row", "nan_row", "row_missing", "wrong_dtype", "rows_shifted"],
)
def test_a_broken_result_fails(breakage, problem):
    call = call_of("rms_norm", "hidden_4096")
    (result,) = results_of("rms_norm", call)
    assert verdict("rms_norm", call, [breakage(result)]).problem.startswith(problem)


def test_one_wrong_element_of_many_fails():
    call = call_of("rms_norm", "hidden_4096")
    (result,) = results_of("rms_norm", call)
    result[2, int(result[2].abs().argmax())] *= 1 + 2.0**-5
    assert "R3" in verdict("rms_norm", call, [result]).problem or "R2" in verdict("rms_norm", call, [result]).problem


def test_one_wrong_index_of_a_permutation_fails():
    call = isolith.moe_permute.arguments(torch.randn(4, 8), torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1]]).int(), 3)
    results = results_of("moe_permute", call)
    results[4] = results[4].roll(1)
    assert verdict("moe_permute", call, results).problem.startswith("result 4: ")


TIES = isolith.indexer_topk.arguments(torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0]]), torch.tensor([5]), 3)


@pytest.mark.parametrize(
    ("indices", "problem"),
    [
        ([1, 2, 3], None),
        ([3, 1, 2], None),
        ([1, 2, 4], "result 0: row 0 breaks ties otherwise than by the lowest index"),
        ([1, 2, 0], "result 0: row 0 selects a value below those of gold"),
        ([1, 2, 2], "result 0: an index twice in a row, first in row 0"),
        ([1, 2, -1], "result 0: another number of valid indices, first in row 0"),
        ([1, 2, 5], "result 0: an index beyond 5, or below -1"),
    ],
    ids=str,
)
def test_a_selection_is_judged_by_its_values(indices, problem):
    results = [torch.tensor([indices]).int(), torch.tensor([3]).int()]
    assert verdict("indexer_topk", TIES, results).problem == problem


def test_weights_of_another_order_of_experts_are_compared_by_expert():
    call = isolith.moe_gate.arguments(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), 4)
    experts, weights = results_of("moe_gate", call)
    expectation = expect(OPERATORS["moe_gate"], call)
    assert expectation.judge([experts.flip(1), weights.flip(1)]).problem is None
    assert expectation.judge([experts.flip(1), weights]).problem.startswith("result 1: ")
