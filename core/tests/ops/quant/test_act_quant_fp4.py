"""Facts of act_quant_fp4 that no sample states."""

import pytest
import torch

from isolith import Make
from isolith.numerics.codes import decode, spread_groups
from isolith.ops.quant.act_quant_fp4 import act_quant_fp4, without_negative_zeros


def values_of(q, scale):
    return decode(q, torch.float64) * spread_groups(scale.double(), 2 * q.shape[-1], 32)


def raw(tensor):
    return tensor.view(torch.uint8).tolist()


def quantised(values):
    """The values of a pair group whose scale is 1."""
    q, _ = act_quant_fp4(torch.tensor(values), group_size=len(values))
    return decode(q, torch.float32).tolist()


def test_halves_round_to_the_golden_values():
    assert quantised([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]) == [0, 1, 1, 2, 2, 4, 4, 6]


@pytest.mark.parametrize("power", [-120, -8, 0, 5, 120])
@pytest.mark.parametrize(("step", "wanted"), [(-1, 0), (0, 0), (1, 1)], ids=["below", "at", "above"])
def test_scale_steps_up_one_ulp_above_six(power, step, wanted):
    edge = torch.tensor([6.0 * 2.0**power, 0.0])
    toward = torch.tensor([6.0 * 2.0 ** (power + step), 0.0])
    _, scale = act_quant_fp4(torch.nextafter(edge, toward), group_size=2)
    assert scale.float().item() == 2.0 ** (power + wanted)


def test_zeros_have_the_scale_of_the_floor():
    assert act_quant_fp4(torch.zeros(32))[1].float().item() == 2.0**-126


def test_floor_raises_the_scale():
    assert act_quant_fp4(torch.full((32,), 1e-6), amax_floor=1e-4)[1].float().item() == 2.0**-15


def test_sign_of_a_value_that_rounds_to_zero_is_kept():
    q, _ = act_quant_fp4(torch.tensor([-0.1, 6.0]), group_size=2)
    assert q.tolist() == [0x78]


def test_even_column_is_the_low_nibble():
    q, _ = act_quant_fp4(torch.tensor([1.0, 6.0]), group_size=2)
    assert q.tolist() == [0x72]


def test_quantising_twice_changes_no_value():
    once = values_of(*act_quant_fp4(Make(seed=2).normal(64, 128)))
    assert torch.equal(values_of(*act_quant_fp4(once)), once)


def test_codes_are_equal_for_float32_and_float64():
    x = Make(seed=3).normal(16, 256)
    assert list(map(raw, act_quant_fp4(x))) == list(map(raw, act_quant_fp4(x.double())))


def test_no_value_is_further_than_half_the_widest_step():
    x = Make(seed=4).normal(64, 128)
    q, scale = act_quant_fp4(x)
    assert bool(((values_of(q, scale) - x.double()).abs() <= spread_groups(scale.double(), 128, 32)).all())


def test_samples_without_negative_zeros_have_no_code_eight():
    q, _ = act_quant_fp4(without_negative_zeros(Make(seed=5).normal(256, 128)))
    assert not ((q & 0xF) == 8).any() | ((q >> 4) == 8).any()
