"""Facts of act_quant_fp8 that no sample states."""

import pytest
import torch

from isolith import Make
from isolith.numerics.codes import spread_groups
from isolith.ops.quant.act_quant_fp8 import act_quant_fp8, by_inverse_amax, by_inverse_scale, by_inverses

FORMATS = pytest.mark.parametrize("scale_format", ["ue8m0", "float32"])


def values_of(q, scale, group_size):
    return q.double() * spread_groups(scale.double(), q.shape[-1], group_size)


def raw(tensor):
    return tensor.view(torch.uint8).tolist()


def exponent(amax, **rules):
    return act_quant_fp8(torch.tensor([amax]), **rules)[1].float().log2().item()


@pytest.mark.parametrize(("amax", "wanted"), [(1.0, -8), (448.0, 0), (449.0, 1), (0.05, -13), (3e-5, -22), (0.0, -22)])
def test_scale_exponent_is_the_golden_one(amax, wanted):
    assert exponent(amax) == wanted


def test_floor_on_the_scale_is_a_floor_of_amax():
    assert exponent(3e-5, amax_floor=448 * 2.0**-13) == -13


@pytest.mark.parametrize("power", [-30, -10, 0, 10, 100])
def test_one_ulp_above_448_doubles_the_scale(power):
    edge = torch.tensor([448.0 * 2.0**power])
    above = torch.nextafter(edge, torch.tensor([torch.inf]))
    scales = [act_quant_fp8(x, amax_floor=1e-30)[1].float().item() for x in (edge, above)]
    assert scales == [2.0**power, 2.0 ** (power + 1)]


@pytest.mark.parametrize("power", [-30, -10, 0, 10, 100])
def test_one_ulp_below_448_has_the_scale_of_448(power):
    edge = torch.tensor([448.0 * 2.0**power])
    below = torch.nextafter(edge, torch.tensor([0.0]))
    assert act_quant_fp8(below, amax_floor=1e-30)[1].float().item() == 2.0**power


def test_zeros_have_code_zero_and_the_scale_of_the_floor():
    q, scale = act_quant_fp8(torch.zeros(2, 128), scale_format="float32")
    assert (q.float().abs().sum().item(), scale.flatten().tolist()) == (0.0, [(torch.tensor(1e-4) / 448).item()] * 2)


def test_short_last_group_equals_the_group_padded_with_zeros():
    x = Make(seed=1).normal(3, 200)
    q, scale = act_quant_fp8(torch.nn.functional.pad(x, (0, 56)))
    short_q, short_scale = act_quant_fp8(x)
    assert (raw(short_q), raw(short_scale)) == (raw(q[:, :200].contiguous()), raw(scale))


@FORMATS
def test_codes_are_equal_for_float32_and_float64(scale_format):
    x = Make(seed=2).normal(16, 300)
    given = [list(map(raw, act_quant_fp8(y, scale_format=scale_format))) for y in (x, x.double())]
    assert given[0] == given[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantising_twice_changes_no_value(dtype):
    x = Make(dtype, seed=3).normal(64, 256, std=5.0)
    once = values_of(*act_quant_fp8(x, 64), 64)
    twice = values_of(*act_quant_fp8(once.to(dtype), 64), 64)
    assert torch.equal(once, twice)


def test_error_is_at_most_half_an_ulp_times_the_scale():
    x = Make(seed=4).normal(64, 256, std=5.0)
    q, scale = act_quant_fp8(x)
    each = spread_groups(scale.double(), 256, 128)
    ulp = torch.exp2((x.double().abs() / each).clamp(min=2.0**-6).log2().floor() - 3)
    assert bool(((values_of(q, scale, 128) - x.double()).abs() <= ulp / 2 * each).all())


@FORMATS
def test_no_code_is_nan_where_the_quotient_passes_448(scale_format):
    x = Make(seed=5).normal(512, 32, std=100.0)
    q, _ = act_quant_fp8(x, 32, scale_format=scale_format)
    assert bool(q.float().isfinite().all())


def test_largest_element_has_a_code_in_the_top_octave():
    q, _ = act_quant_fp8(Make(seed=6).normal(512, 64), 64)
    assert q.float().abs().amax(-1).min().item() >= 224


def test_nan_stays_in_its_group():
    x = Make(seed=7).normal(2, 256)
    clean = act_quant_fp8(x)[0].float()
    x[0, 5] = torch.nan
    assert torch.equal(act_quant_fp8(x)[0].float().flatten()[128:], clean.flatten()[128:])


def test_inverses_of_448_and_of_the_scale_give_the_same_power_of_two_codes():
    x = Make(torch.bfloat16, seed=8).normal(64, 512)
    assert list(map(raw, by_inverses(x))) == list(map(raw, act_quant_fp8(x)))


@pytest.mark.parametrize("variant", [by_inverses, by_inverse_scale, by_inverse_amax])
def test_legal_roundings_move_a_float32_scale_one_ulp_and_a_code_by_one(variant):
    x = Make(torch.bfloat16, seed=9).normal(64, 512)
    (q, scale), (moved, other) = (f(x, scale_format="float32") for f in (act_quant_fp8, variant))
    assert int((scale.view(torch.int32) - other.view(torch.int32)).abs().max()) <= 1
    assert int((q.view(torch.int8).int() - moved.view(torch.int8).int()).abs().max()) <= 1
