"""Codes of quantised outputs: the nearest, or beside a boundary the neighbour."""

import pytest
import torch

import isolith
from isolith import OPERATORS, Make
from isolith.numerics.codes import amax_of_groups, spread_groups
from isolith_conformance.family import evaluate
from isolith_conformance.judge import judge

SCALES = {"ue8m0": {"scale_format": "ue8m0"}, "float32": {"scale_format": "float32"}}


def rows(dtype, seed=0, *shape):
    return Make(dtype, seed=seed).normal(*(shape or (16, 1024)))


def quantised(name, x, **how):
    call = OPERATORS[name].arguments(x, **how)
    return call, evaluate(OPERATORS[name], OPERATORS[name].reference, call)


def said(name, call, results, exact=False):
    return judge(OPERATORS[name], call, results, exact=exact).check


def moved(codes, place, by):
    """Codes with one bit pattern changed."""
    changed = codes.clone()
    changed.view(torch.uint8).reshape(-1)[place] += by
    return changed


@pytest.mark.parametrize("name", ["act_quant_fp8", "act_quant_int8", "act_quant_fp4"])
def test_a_code_one_off_fails(name):
    call, (codes, scale) = quantised(name, rows(torch.float32))
    place = int((codes.view(torch.uint8).reshape(-1) & 7 == 3).nonzero()[0])
    assert said(name, call, [moved(codes, place, 1), scale]) == "codes"


@pytest.mark.parametrize("how", SCALES.values(), ids=SCALES)
def test_e4m3_codes_cut_toward_zero_fail(how):
    call, (codes, scale) = quantised("act_quant_fp8", rows(torch.float32), **how)
    quotient = call["x"] / spread_groups(scale.float(), 1024, 128)
    cut = torch.where(codes.float().abs() > quotient.abs(), codes.view(torch.uint8) - 1, codes.view(torch.uint8))
    assert said("act_quant_fp8", call, [cut.view(torch.float8_e4m3fn), scale]) == "codes"


def test_a_code_without_saturation_fails():
    call, (codes, scale) = quantised("act_quant_fp8", rows(torch.float32), scale_format="float32")
    largest = (codes.float() == 448).reshape(-1).nonzero()[0]
    assert said("act_quant_fp8", call, [moved(codes, int(largest), 1), scale]) == "codes"


def test_the_code_of_minus_128_fails():
    call, (codes, scale) = quantised("act_quant_int8", -rows(torch.float32).abs())
    codes[codes == -127] = -128
    assert said("act_quant_int8", call, [codes, scale]) == "codes"


def test_swapped_nibbles_fail():
    call, (codes, scale) = quantised("act_quant_fp4", rows(torch.bfloat16))
    assert said("act_quant_fp4", call, [codes >> 4 | codes << 4, scale]) == "codes"


def test_the_sign_of_a_zero_code_does_not_matter():
    call, (codes, scale) = quantised("act_quant_fp4", torch.tensor([[6.0, -0.01]]), group_size=2)
    assert [said("act_quant_fp4", call, [codes & mask, scale]) for mask in (0xFF, 0x7F)] == ["", ""]


def test_a_scale_two_units_off_fails():
    call, (codes, scale) = quantised("act_quant_int8", rows(torch.float32))
    wrong = (scale.view(torch.int32) + 2).view(torch.float32)
    assert said("act_quant_int8", call, [codes, wrong]) == "scales"


def test_a_scale_one_unit_off_passes():
    call, (codes, scale) = quantised("act_quant_int8", rows(torch.float32))
    near = (scale.view(torch.int32) + 1).view(torch.float32)
    assert said("act_quant_int8", call, [codes, near]) == ""


def test_an_e8m0_scale_one_step_off_fails():
    call, (codes, scale) = quantised("act_quant_fp8", rows(torch.float32))
    wrong = (scale.view(torch.uint8) + 1).view(torch.float8_e8m0fnu)
    assert said("act_quant_fp8", call, [codes, wrong]) == "scales"


def halves():
    """Two quotients exactly on a boundary, 8.5 and 9.5, beside the largest."""
    return torch.tensor([[127.0, 8.5, 9.5]]) * 3


def test_beside_a_boundary_either_code_passes():
    call, (_, scale) = quantised("act_quant_int8", halves())
    others = [torch.tensor([[127, eight, nine]], dtype=torch.int8) for eight in (8, 9) for nine in (9, 10)]
    assert [said("act_quant_int8", call, [each, scale]) for each in others] == ["", "", "", ""]


def test_beside_a_boundary_another_code_than_its_two_fails():
    call, (_, scale) = quantised("act_quant_int8", halves())
    wrong = torch.tensor([[127, 10, 10]], dtype=torch.int8)
    assert said("act_quant_int8", call, [wrong, scale]) == "codes"


def test_on_a_boundary_of_an_e8m0_scale_the_even_code_is_due():
    x = torch.tensor([[448.0, 17.0, 19.0]])  # 17 and 19 lie between 16, 18 and 20
    call, (codes, scale) = quantised("act_quant_fp8", x)
    place = int((codes.float()[0] == 16).nonzero()[0])
    assert said("act_quant_fp8", call, [moved(codes, place, 1), scale]) == "codes"


@pytest.mark.parametrize("name", ["act_quant_fp8", "act_quant_int8", "act_quant_fp4"])
def test_halves_go_to_the_even_code(name):
    made = OPERATORS[name].samples(Make(torch.float32, seed=name))
    x = next(sample for sample in made if sample.name == "codes_and_ties").arguments["x"]
    how = {} if name == "act_quant_int8" else {"group_size": x.shape[-1]}
    call, results = quantised(name, x, **how)
    assert said(name, call, results, exact=True) == ""


def test_in_exact_mode_no_code_is_free():
    call, (_, scale) = quantised("act_quant_int8", halves())
    wrong = torch.tensor([[127, 9, 10]], dtype=torch.int8)
    assert said("act_quant_int8", call, [wrong, scale], exact=True) == "codes"


def test_a_group_with_nan_is_free_and_its_neighbour_is_not():
    x = rows(torch.float32, 1, 1, 256)
    x[0, 3] = torch.nan
    call, (codes, scale) = quantised("act_quant_fp8", x)
    assert [said("act_quant_fp8", call, [moved(codes, place, 1), scale]) for place in (5, 133)] == ["", "codes"]


def combinations(x, largest, group):
    """Scales and quotients as kernels make them: divided, or times inverses."""
    wide = x.float()
    amax = amax_of_groups(wide, group).clamp(min=1e-4)
    inverse = torch.tensor(1 / largest, dtype=torch.float32)
    for scale in (amax / largest, amax * inverse):
        for quotient in (
            wide / spread_groups(scale, x.shape[-1], group),
            wide * spread_groups(1 / scale, x.shape[-1], group),
            wide * spread_groups(largest / amax, x.shape[-1], group),
        ):
            yield quotient, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_every_way_to_an_e4m3_code_passes(dtype, seed):
    x = rows(dtype, seed, 3, 200)
    call = isolith.act_quant_fp8.arguments(x, scale_format="float32")
    ways = [
        [quotient.clamp(-448, 448).to(torch.float8_e4m3fn), scale] for quotient, scale in combinations(x, 448.0, 128)
    ]
    assert [said("act_quant_fp8", call, way) for way in ways] == [""] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_every_way_to_an_int8_code_passes(dtype, seed):
    x = rows(dtype, seed, 8, 130)
    call = isolith.act_quant_int8.arguments(x, amax_floor=1e-4)
    ways = [
        [quotient.round().clamp(-127, 127).to(torch.int8), scale] for quotient, scale in combinations(x, 127.0, 130)
    ]
    assert [said("act_quant_int8", call, way) for way in ways] == [""] * 6
