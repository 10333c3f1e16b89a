"""Facts of rope that no sample states."""

import math

import pytest
import torch

from isolith import ArgumentError, Make, rope_frequencies, rope_tables
from isolith.ops.rotary.rope import rope

DOUBLE = torch.float64
STYLES = [
    pytest.param({"interleaved": True, "rope_first": False}, id="v4"),
    pytest.param({"interleaved": False, "rope_first": True}, id="v32_indexer"),
    pytest.param({"interleaved": False, "rope_first": False}, id="half_split_last"),
    pytest.param({"interleaved": True, "rope_first": True}, id="interleaved_first"),
]
TABLES = [
    pytest.param(rope_frequencies(64, 10000.0), id="main"),
    pytest.param(rope_frequencies(64, 160000.0, factor=16.0, original_length=65536), id="compress"),
]
ANGLE = 0.5
COS, SIN = torch.tensor([[1.0], [ANGLE]]).cos(), torch.tensor([[0.0], [ANGLE]]).sin()


def turned(x, **style):
    """One pair of x [head_dim] turned by ANGLE."""
    return rope(torch.tensor([x], dtype=DOUBLE), torch.tensor([1]), COS.double(), SIN.double(), **style)[0].tolist()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("frequencies", TABLES)
def test_inverse_undoes_forward(style, frequencies):
    cos_table, sin_table = rope_tables(frequencies, 4096)
    make = Make(DOUBLE, seed=1)
    x, positions = make.normal(8, 3, 96), make.integers(0, 4096, 8)
    there = rope(x, positions, cos_table, sin_table, **style)
    back = rope(there, positions, cos_table, sin_table, inverse=True, **style)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("style", STYLES)
def test_position_0_changes_nothing(style):
    cos_table, sin_table = rope_tables(rope_frequencies(64, 10000.0), 2)
    x = Make(torch.bfloat16, seed=2).normal(8, 3, 96)
    assert torch.equal(rope(x, torch.zeros(8, dtype=torch.int32), cos_table, sin_table, **style), x)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("frequencies", TABLES)
def test_score_depends_on_the_distance_alone(style, frequencies):
    # Angles in float64, since rounded ones do not add up.
    angle = torch.arange(300, dtype=DOUBLE)[:, None] * frequencies.double()
    make = Make(DOUBLE, seed=3)
    q, k = make.normal(1, 96), make.normal(1, 96)

    def score(p, s):
        at = [rope(v, torch.tensor([i]), angle.cos(), angle.sin(), **style) for v, i in ((q, p), (k, s))]
        return (at[0] * at[1]).sum()

    torch.testing.assert_close(score(257, 250), score(12, 5), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("style", STYLES)
def test_other_dims_keep_their_bits(style):
    cos_table, sin_table = rope_tables(rope_frequencies(8, 10000.0), 16)
    other = slice(8, 12) if style["rope_first"] else slice(0, 4)
    x = Make(torch.bfloat16, seed=4).normal(2, 12)
    x[0, other] = torch.tensor([-0.0, float("nan"), float("-inf"), 2.0**-130], dtype=torch.bfloat16)
    y = rope(x, torch.tensor([3, 15]), cos_table, sin_table, **style)
    assert torch.equal(y[:, other].contiguous().view(torch.int16), x[:, other].contiguous().view(torch.int16))


def test_interleaved_pairs_are_neighbours_among_the_last_dims():
    cos_table, sin_table = torch.zeros(1, 2), torch.ones(1, 2)
    y = rope(torch.tensor([[9.0, 1.0, 2.0, 3.0, 4.0]]), torch.tensor([0]), cos_table, sin_table)
    assert y.tolist() == [[9.0, -2.0, 1.0, -4.0, 3.0]]


def test_half_split_pairs_are_half_the_rotated_dims_apart():
    cos_table, sin_table = torch.zeros(1, 2), torch.ones(1, 2)
    y = rope(torch.tensor([[9.0, 1.0, 2.0, 3.0, 4.0]]), torch.tensor([0]), cos_table, sin_table, interleaved=False)
    assert y.tolist() == [[9.0, -3.0, -4.0, 1.0, 2.0]]


def test_rope_first_turns_the_first_dims():
    cos_table, sin_table = torch.zeros(1, 2), torch.ones(1, 2)
    y = rope(torch.tensor([[1.0, 2.0, 3.0, 4.0, 9.0]]), torch.tensor([0]), cos_table, sin_table, rope_first=True)
    assert y.tolist() == [[-2.0, 1.0, -4.0, 3.0, 9.0]]


def test_styles_agree_when_dims_are_reordered():
    cos_table, sin_table = rope_tables(rope_frequencies(64, 10000.0), 64)
    make = Make(seed=5)
    x, positions = make.normal(8, 2, 64), make.integers(0, 64, 8)
    order = torch.arange(64).view(32, 2).T.flatten()
    expected = rope(x, positions, cos_table, sin_table)[..., order]
    assert torch.equal(rope(x[..., order], positions, cos_table, sin_table, interleaved=False), expected)


def test_turn_is_anticlockwise():
    assert turned([1.0, 0.0]) == pytest.approx([math.cos(ANGLE), math.sin(ANGLE)])


def test_inverse_turn_is_clockwise():
    assert turned([1.0, 0.0], inverse=True) == pytest.approx([math.cos(ANGLE), -math.sin(ANGLE)])


def test_token_near_position_1e6_takes_its_row():
    frequency = rope_frequencies(64, 10000.0)[1:2]
    cos_table, sin_table = rope_tables(frequency, 1_000_004)
    y = rope(torch.tensor([[1.0, 0.0]]), torch.tensor([1_000_003]), cos_table, sin_table)
    assert torch.equal(y, torch.stack((cos_table[1_000_003], sin_table[1_000_003]), dim=-1))


@pytest.mark.parametrize(
    ("x", "cos", "sin", "expected"),
    [([255 / 128, 0.0], 1.003, 0.0, [2.0, 0.0]), ([0.0, 255 / 128], 0.0, 1.003, [-2.0, 0.0])],
    ids=["cos", "sin"],
)
def test_tables_are_not_rounded_to_bfloat16(x, cos, sin, expected):
    # bfloat16(1.003) is 1, which would leave 255/128 as it is.
    narrow = torch.tensor([x], dtype=torch.bfloat16)
    y = rope(narrow, torch.tensor([0]), torch.tensor([[cos]]), torch.tensor([[sin]]))
    assert y.tolist() == [expected]


def test_two_axes_equal_one_head():
    cos_table, sin_table = rope_tables(rope_frequencies(64, 10000.0), 64)
    make = Make(torch.bfloat16, seed=6)
    x, positions = make.normal(8, 96), make.integers(0, 64, 8)
    expected = rope(x[:, None], positions, cos_table, sin_table)[:, 0]
    assert torch.equal(rope(x, positions, cos_table, sin_table), expected)


def test_position_of_an_empty_table_is_refused():
    with pytest.raises(ArgumentError, match="below length = 0; got 0"):
        rope(torch.ones(1, 2), torch.tensor([0]), torch.ones(0, 1), torch.ones(0, 1))


def test_narrow_rows_are_turned_in_float32_and_rounded_once():
    cos_table, sin_table = rope_tables(rope_frequencies(64, 10000.0), 64)
    make = Make(torch.bfloat16, seed=7)
    x, positions = make.normal(8, 2, 96), make.integers(0, 64, 8)
    wide = rope(x.float(), positions, cos_table, sin_table)
    assert torch.equal(rope(x, positions, cos_table, sin_table), wide.bfloat16())
