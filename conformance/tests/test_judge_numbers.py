"""What the statistics of float results catch, and what they let live."""

from dataclasses import replace

import pytest
import torch

import isolith
from isolith import OPERATORS, Make
from isolith_conformance import limits
from isolith_conformance.family import copied, evaluate
from isolith_conformance.judge import expect, judge


def call_of(name, label, dtype=torch.bfloat16, seed=None):
    made = OPERATORS[name].samples(Make(dtype, seed=seed or name))
    return OPERATORS[name].arguments(**next(sample for sample in made if sample.name == label).arguments)


def results_of(name, call):
    return evaluate(OPERATORS[name], OPERATORS[name].reference, call)


def linear(dtype, inputs, out, low=-1.0, seed=0):
    make = Make(dtype, seed=seed)
    x, weight = make.uniform(5, inputs, low=low), make.uniform(24, inputs, low=low)
    return isolith.quant_linear.arguments(x, weight, act_quant="none", out_dtype=out)


def product(call, columns=slice(None), rounded=lambda x: x):
    """The product in float32, after a change of the inputs."""
    return rounded(call["x"].float())[:, columns] @ rounded(call["weight"].float())[:, columns].T


def cut(x, bits):
    """float32 with its lowest mantissa bits cleared."""
    return (x.contiguous().view(torch.int32) & -(1 << bits)).view(torch.float32)


def narrow_sum(call, step, dtype):
    """Partial sums rounded to a dtype."""
    total = torch.zeros(5, 24, dtype=dtype)
    for start in range(0, call["x"].shape[1], step):
        total = (total.float() + product(call, slice(start, start + step))).to(dtype)
    return total


def test_a_truncating_cast_to_float16_fails():
    call = linear(torch.float16, 64, "float16")
    wide = product(call)
    halves = wide.half()
    away = halves.float().abs() > wide.abs()
    truncated = torch.where(away, (halves.view(torch.int16) - 1).view(torch.float16), halves)
    assert judge(OPERATORS["quant_linear"], call, [truncated]).check == "R1"


def test_a_bfloat16_accumulator_fails():
    call = linear(torch.bfloat16, 7168, "bfloat16")
    assert judge(OPERATORS["quant_linear"], call, [narrow_sum(call, 128, torch.bfloat16)]).check == "R1"


def test_a_product_in_e4m3_fails():
    call = linear(torch.bfloat16, 512, "bfloat16")
    result = product(call, rounded=lambda x: x.to(torch.float8_e4m3fn).float()).bfloat16()
    assert judge(OPERATORS["quant_linear"], call, [result]).check == "R1"


def test_a_product_without_its_last_column_fails():
    call = linear(torch.bfloat16, 512, "bfloat16")
    assert judge(OPERATORS["quant_linear"], call, [product(call, slice(511)).bfloat16()]).check == "R1"


def test_tf32_in_float32_fails():
    call = linear(torch.float32, 512, "float32")
    assert judge(OPERATORS["quant_linear"], call, [product(call, rounded=lambda x: cut(x, 13))]).check == "R1"


def test_the_cap_holds_whatever_the_variants_err():
    call = linear(torch.float32, 512, "float32")
    operator = with_variant(OPERATORS["quant_linear"], lambda **given: product(given, rounded=lambda x: cut(x, 13)))
    assert judge(operator, call, [product(call, rounded=lambda x: cut(x, 13))]).check == "D"


def with_variant(operator, variant):
    """The operator with one more legal variant."""
    return replace(operator, variants=(*operator.variants, variant))


def test_tf32_in_the_projection_of_streams_fails():
    operator, call = OPERATORS["hc_pre"], call_of("hc_pre", "flash")
    (variant,) = operator.declared["tf32"]
    assert judge(operator, call, evaluate(operator, variant, call)).check == "R1"


def test_tf32_in_the_projection_of_streams_passes_where_it_is_declared():
    operator, call = OPERATORS["hc_pre"], call_of("hc_pre", "flash")
    (variant,) = operator.declared["tf32"]
    assert expect(operator, call, declared=("tf32",)).judge(evaluate(operator, variant, call)).problem is None


def test_one_zero_row_of_4096_fails_by_its_row():
    make = Make(torch.bfloat16, seed="rows")
    call = isolith.rms_norm.arguments(make.normal(4096, 64), make.normal(64))
    (result,) = results_of("rms_norm", call)
    result[1234] = 0
    verdict = judge(OPERATORS["rms_norm"], call, [result])
    assert "worst row 1234" in verdict.problem


def test_a_small_row_beside_large_ones_is_judged_by_its_own_size():
    make = Make(torch.bfloat16, seed="sizes")
    x = make.normal(64, 128) * torch.exp2(torch.arange(-32, 32))[:, None].bfloat16()
    call = isolith.hadamard.arguments(x)
    (result,) = results_of("hadamard", call)
    result[3] = 0
    assert judge(OPERATORS["hadamard"], call, [result]).check == "R2"


def test_one_wrong_element_fails():
    call = isolith.rms_norm.arguments(Make(torch.bfloat16).normal(2, 65536), torch.ones(65536))
    (result,) = results_of("rms_norm", call)
    result[1, int(result[1].abs().argmax())] *= 1 + 3 * 2.0**-7
    assert judge(OPERATORS["rms_norm"], call, [result]).check == "R3"


def half_away(wide):
    """float32 -> bfloat16, to nearest, ties away from zero."""
    return ((wide.view(torch.int32) + 0x8000) & ~0xFFFF).view(torch.float32).bfloat16()


def test_rounding_halves_away_fails_by_its_bias():
    make = Make(torch.bfloat16, seed="halves")
    rows = make.integers(-256, 257, 2 * 4096, 64).bfloat16() / 4
    positions = torch.arange(2 * 4096, dtype=torch.int32).view(4096, 2)
    call = isolith.moe_unpermute.arguments(rows, positions)
    result = half_away(rows.float()[positions.long()].sum(1))
    assert judge(OPERATORS["moe_unpermute"], call, [result]).check == "bias"


def test_an_infinity_or_its_absence_at_the_edge_of_float16_is_legal():
    x = torch.tensor([[255.875, 0.125]], dtype=torch.float16)
    weight = torch.tensor([[256.0, 128.0]], dtype=torch.float16)
    call = isolith.quant_linear.arguments(x, weight, out_dtype="float16")
    (result,) = results_of("quant_linear", call)
    assert judge(OPERATORS["quant_linear"], call, [result]).problem is None


def test_a_value_that_rounds_to_infinity_may_not_saturate():
    x = torch.tensor([[255.875, 0.125]], dtype=torch.float16)
    weight = torch.tensor([[256.0, 208.0]], dtype=torch.float16)  # the product is 65530; infinity begins at 65520
    call = isolith.quant_linear.arguments(x, weight, out_dtype="float16")
    assert judge(OPERATORS["quant_linear"], call, [torch.tensor([[65504.0]]).half()]).check == "nonfinite"


def test_zero_is_zero_whatever_its_sign():
    call = isolith.quant_linear.arguments(torch.zeros(2, 4), torch.ones(3, 4), out_dtype="float32")
    assert judge(OPERATORS["quant_linear"], call, [-torch.zeros(2, 3)], exact=True).problem is None


def test_an_exact_sum_may_not_be_off_by_a_bit():
    call = call_of("quant_linear", "exact_float", torch.float32)
    (result,) = results_of("quant_linear", call)
    result[0, 0] += result[0, 0].abs() * 2.0**-23 + 2.0**-23
    assert judge(OPERATORS["quant_linear"], call, [result], exact=True).check == "exact"


def test_a_copy_is_compared_to_the_bit():
    call = isolith.moe_permute.arguments(torch.zeros(2, 4), torch.tensor([[0], [1]]).int(), 2)
    results = results_of("moe_permute", call)
    results[0] = -results[0]
    assert judge(OPERATORS["moe_permute"], call, results).check == "bits"


@pytest.mark.parametrize(
    "hostile",
    [
        lambda y: [],
        lambda y: [y, y],
        lambda y: [y.t()],
        lambda y: [y.double()],
        lambda y: [y.to_sparse()],
        lambda y: [None],
        lambda y: [y.to("meta")],
        lambda y: [y[:0]],
    ],
    ids=["none", "two", "transposed", "wider", "sparse", "nothing", "elsewhere", "empty"],
)
def test_what_is_no_result_is_a_verdict_on_its_shape(hostile):
    call = call_of("rms_norm", "hidden_4096")
    (result,) = results_of("rms_norm", call)
    assert judge(OPERATORS["rms_norm"], call, hostile(result)).check == "shape"


def test_strides_of_a_result_do_not_matter():
    call = call_of("rms_norm", "hidden_4096")
    (result,) = results_of("rms_norm", call)
    assert judge(OPERATORS["rms_norm"], call, [result.t().contiguous().t()]).problem is None


def test_statistics_are_told_of_what_passes():
    call = call_of("rms_norm", "hidden_4096")
    verdict = judge(OPERATORS["rms_norm"], call, results_of("rms_norm", call))
    assert {"r1", "r2", "r3", "d"} <= set(verdict.statistics)


@pytest.mark.parametrize("profile", limits.PROFILES)
def test_the_reference_passes_under_every_profile(profile):
    call = call_of("rms_norm", "hidden_4096")
    assert judge(OPERATORS["rms_norm"], call, results_of("rms_norm", call), profile).problem is None


def test_strict_is_stricter_than_standard():
    call = linear(torch.bfloat16, 64, "bfloat16")
    wide = product(call)
    result = (wide * (1 + 0.46 * 2.0**-8)).bfloat16()
    expectation = expect(OPERATORS["quant_linear"], call)
    assert [expectation.judge([result], profile).passed for profile in ("strict", "standard", "basic")] == [
        False,
        True,
        True,
    ]


def test_a_normal_value_that_is_not_rounded_before_the_weight_fails():
    call = call_of("rms_norm", "rounded_twice")
    wrong = results_of("rms_norm", {**copied(call), "round_before_weight": False})
    assert judge(OPERATORS["rms_norm"], call, wrong, exact=True).check == "exact"
