"""Frequencies and tables of rotary angles: golden values, YaRN's bounds, and how angles are rounded."""

import math

import pytest
import torch

from isolith import rope_frequencies, rope_tables

COMPRESS = {"theta": 160000.0, "factor": 16.0, "original_length": 65536}


def plain(dims, theta):
    return torch.tensor([theta ** (-2 * i / dims) for i in range(dims // 2)], dtype=torch.float64)


def assert_near(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=2e-7, atol=0)


def test_compress_table_has_the_golden_frequencies():
    frequency = rope_frequencies(64, **COMPRESS)
    golden = [1.0, 0.6876560, 3.6355386e-3, 2.2656250e-3, 2.9697778e-4, 5.3723127e-6, 5.6805290e-7]
    assert_near(frequency[[0, 1, 15, 16, 20, 25, 31]], golden)


def test_main_table_has_the_golden_frequencies():
    assert_near(rope_frequencies(64, 10000.0)[[1, 15, 31]], [0.7498942, 1.3335214e-2, 1.3335214e-4])


def test_v4_leaves_pairs_up_to_15_alone():
    expected = plain(64, 160000.0)[:16].float()
    torch.testing.assert_close(rope_frequencies(64, **COMPRESS)[:16], expected, rtol=2e-7, atol=0)


def test_v4_divides_pairs_from_25_by_the_factor():
    expected = (plain(64, 160000.0)[25:] / 16).float()
    torch.testing.assert_close(rope_frequencies(64, **COMPRESS)[25:], expected, rtol=2e-7, atol=0)


def test_v4_blends_every_pair_between_15_and_25():
    ratio = rope_frequencies(64, **COMPRESS)[16:25].double() / plain(64, 160000.0)[16:25]
    expected = 1 - torch.arange(1, 10, dtype=torch.float64) / 10 * (1 - 1 / 16)
    torch.testing.assert_close(ratio, expected, rtol=1e-6, atol=0)


def test_v3_blends_pairs_between_10_and_23():
    ratio = rope_frequencies(64, 10000.0, factor=40.0, original_length=4096).double() / plain(64, 10000.0)
    expected = 1 - ((torch.arange(32, dtype=torch.float64) - 10) / 13).clamp(0, 1) * (1 - 1 / 40)
    torch.testing.assert_close(ratio, expected, rtol=1e-6, atol=0)


def test_upper_bound_is_held_below_dims_and_not_below_pairs():
    # c(1) = 12.2 of 8 pairs, so high is 13: a bound of 7 would make the ramp steeper.
    ratio = rope_frequencies(16, 10.0, factor=2.0, original_length=210).double() / plain(16, 10.0)
    low, high = math.floor(16 * math.log(210 / (64 * math.pi)) / (2 * math.log(10))), 13
    expected = 1 - ((torch.arange(8, dtype=torch.float64) - low) / (high - low)).clamp(0, 1) / 2
    torch.testing.assert_close(ratio, expected, rtol=1e-6, atol=0)


def test_lower_bound_is_not_below_0():
    ratio = rope_frequencies(64, 10000.0, factor=4.0, original_length=64).double() / plain(64, 10000.0)
    high = math.ceil(64 * math.log(64 / (2 * math.pi)) / (2 * math.log(10000)))
    expected = 1 - (torch.arange(32, dtype=torch.float64) / high).clamp(0, 1) * 0.75
    torch.testing.assert_close(ratio, expected, rtol=1e-6, atol=0)


def test_equal_bounds_give_a_step_and_no_nan():
    frequency = rope_frequencies(64, 10000.0, factor=4.0, original_length=6)
    expected = torch.cat((plain(64, 10000.0)[:1], plain(64, 10000.0)[1:] / 4)).float()
    torch.testing.assert_close(frequency, expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize(("factor", "original_length"), [(1.0, 65536), (16.0, 0)], ids=["factor_1", "no_length"])
def test_yarn_is_left_out_without_a_factor_or_a_length(factor, original_length):
    frequency = rope_frequencies(64, 160000.0, factor=factor, original_length=original_length)
    assert torch.equal(frequency, rope_frequencies(64, 160000.0))


@pytest.mark.parametrize("table", [0, 1], ids=["cos", "sin"])
def test_amplitude_is_1_under_yarn(table):
    extreme = rope_tables(rope_frequencies(64, **COMPRESS), 4096)[table].abs().amax()
    assert 0.999999 < extreme <= 1


def test_row_0_is_the_identity():
    cos_table, sin_table = rope_tables(rope_frequencies(64, **COMPRESS), 1)
    assert torch.equal(cos_table, torch.ones(1, 32))
    assert torch.equal(sin_table, torch.zeros(1, 32))


@pytest.mark.parametrize(("table", "function"), [(0, math.cos), (1, math.sin)], ids=["cos", "sin"])
def test_angle_is_rounded_to_float32_near_position_1e6(table, function):
    frequency = rope_frequencies(64, 10000.0)[1:2]
    position = 1_000_003
    angle = (torch.tensor([position], dtype=torch.float64) * frequency.double()).float().item()
    actual = rope_tables(frequency, position + 1)[table][position]
    torch.testing.assert_close(actual, torch.tensor([function(angle)], dtype=torch.float32), rtol=1e-6, atol=1e-7)


def test_exact_angle_near_position_1e6_is_another():
    frequency, position = rope_frequencies(64, 10000.0)[1:2], 1_000_003
    exact = position * 10000.0 ** (-2 / 64)
    actual = rope_tables(frequency, position + 1)[0][position]
    assert abs(actual.item() - math.cos(exact)) > 1e-3


def test_tables_have_one_column_a_pair_in_float32():
    cos_table, sin_table = rope_tables(rope_frequencies(64, 10000.0).double(), 5)
    assert [(table.shape, table.dtype) for table in (cos_table, sin_table)] == [((5, 32), torch.float32)] * 2
