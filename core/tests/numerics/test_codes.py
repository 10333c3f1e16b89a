"""Number formats against rules written another way."""

import math

import pytest
import torch

from isolith import ArgumentError, Make
from isolith.numerics import codes

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def exact(x):
    return [float(value) for value in x]


@pytest.mark.parametrize("exponent", [-126, -40, -1, 0, 1, 60, 126])
@pytest.mark.parametrize("mantissa", [1.0, 1.0 + 2**-23, 1.5, 2.0 - 2**-23])
def test_ceil_power_of_two_is_the_least_power_not_below(exponent, mantissa):
    ratio = mantissa * 2.0**exponent
    assert codes.ceil_power_of_two(torch.tensor([ratio])).item() == 2.0 ** math.ceil(math.log2(ratio))


def test_ceil_power_of_two_steps_up_one_ulp_above_a_power():
    above = torch.nextafter(torch.tensor([8.0]), torch.tensor([9.0]))
    assert codes.ceil_power_of_two(above).item() == 16.0


def test_ceil_power_of_two_takes_a_strided_tensor():
    ratios = torch.tensor([[3.0, 9.0], [5.0, 1.0]])
    assert codes.ceil_power_of_two(ratios.T).tolist() == [[4.0, 8.0], [16.0, 1.0]]


def test_e2m1_halves_go_to_the_even_code():
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert exact(codes.decode_e2m1(codes.encode_e2m1(halves), torch.float32)) == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


def test_e2m1_beside_a_half_goes_to_the_nearer_value():
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    above = codes.encode_e2m1(torch.nextafter(halves, halves + 1))
    below = codes.encode_e2m1(torch.nextafter(halves, halves - 1))
    assert [above.tolist(), below.tolist()] == [[1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6]]


def test_e2m1_nearest_value_is_chosen_for_random_input():
    x = Make(seed=1).uniform(4096, low=-6.0, high=6.0)
    distance = (x[:, None].abs() - torch.tensor(VALUES)).abs()
    assert torch.equal((codes.decode_e2m1(codes.encode_e2m1(x), torch.float32) - x).abs(), distance.amin(-1))


def test_e2m1_sign_of_zero_is_kept():
    assert codes.encode_e2m1(torch.tensor([-0.0, -0.1, 0.0, 0.1])).tolist() == [8, 8, 0, 0]


def test_e2m1_beyond_six_saturates():
    assert codes.encode_e2m1(torch.tensor([7.0, -1e9, torch.inf])).tolist() == [7, 15, 7]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_e2m1_every_code_means_its_value(dtype):
    every = torch.arange(16, dtype=torch.uint8)
    assert exact(codes.decode_e2m1(every, dtype)) == VALUES + [-value for value in VALUES]


def test_even_column_is_the_low_nibble():
    assert codes.pack_nibbles(torch.tensor([[0x1, 0x2, 0xF, 0x0]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]


def test_every_byte_survives_unpacking_and_packing():
    every = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    assert torch.equal(codes.pack_nibbles(codes.unpack_nibbles(every)), every)


def test_decode_of_e4m3_is_exact_in_float32():
    every = torch.arange(127, dtype=torch.uint8)
    fields = [(int(b) >> 3, int(b) & 7) for b in every]
    wanted = [(1 + m / 8) * 2.0 ** (e - 7) if e else m * 2.0**-9 for e, m in fields]
    assert exact(codes.decode(every.view(torch.float8_e4m3fn), torch.float32)) == wanted


def test_scale_reaches_short_blocks_at_both_ends():
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    spread = codes.spread_scale(scale, 3, 5, 2, 4)
    assert spread.tolist() == [[1, 1, 1, 1, 2], [1, 1, 1, 1, 2], [3, 3, 3, 3, 4]]


def test_scale_spreads_over_leading_axes():
    scale = torch.arange(8.0).reshape(2, 2, 2)
    wanted = torch.stack([codes.spread_scale(part, 3, 5, 2, 4) for part in scale])
    assert torch.equal(codes.spread_scale(scale, 3, 5, 2, 4), wanted)


def test_e8m0_scale_spreads_as_its_value():
    scale = torch.tensor([[0, 1, 127, 254]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert codes.spread_scale(scale, 1, 4, 1, 1).tolist() == [[2.0**-127, 2.0**-126, 1.0, 2.0**127]]


def test_amax_of_a_short_last_group_is_of_what_it_has():
    assert codes.amax_of_groups(torch.tensor([1.0, -5.0, 2.0, -3.0, 0.5]), 2).tolist() == [5.0, 3.0, 0.5]


def test_amax_of_no_columns_has_no_groups():
    assert codes.amax_of_groups(torch.zeros(3, 0), 2).shape == (3, 0)


def test_amax_is_float32_for_float64():
    assert codes.amax_of_groups(torch.zeros(2, 4, dtype=torch.float64), 2).dtype == torch.float32


def test_group_scales_spread_over_their_columns():
    assert codes.spread_groups(torch.tensor([[1.0, 2.0]]), 5, 3).tolist() == [[1, 1, 1, 2, 2]]


def test_floor_that_leads_to_a_subnormal_scale_is_refused():
    with pytest.raises(ArgumentError) as caught:
        codes.check_amax_floor("op", 5 * 2.0**-126, codes.E2M1_MAX)
    assert str(caught.value) == f"op: amax_floor must be at least 6*2^-126; got {5 * 2.0**-126}."


def test_least_floor_is_taken():
    codes.check_amax_floor("op", 6 * 2.0**-126, codes.E2M1_MAX)
