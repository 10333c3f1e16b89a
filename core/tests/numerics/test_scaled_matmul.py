"""Values of quantised weights and activations against loops over their elements."""

import pytest
import torch

from isolith import ArgumentError, Make
from isolith.numerics import scaled_matmul as shared

DOUBLE = torch.float64


def e8m0(*values):
    return torch.tensor(values).to(torch.float8_e8m0fnu)


def test_e4m3_weight_takes_the_scale_of_its_block():
    weight = torch.ones(3, 5).to(torch.float8_e4m3fn)
    values = shared.dequantise_weight(weight, torch.tensor([[1.0, 2.0], [3.0, 5.0]]), 2, 4, DOUBLE)
    assert values.tolist() == [[1, 1, 1, 1, 2], [1, 1, 1, 1, 2], [3, 3, 3, 3, 5]]


def test_e2m1_weight_takes_the_scale_of_32_columns_whatever_the_blocks():
    weight = torch.full((1, 32), 0x22, dtype=torch.uint8)  # code 2 twice: 1.0
    values = shared.dequantise_weight(weight, e8m0([2.0, 8.0]), 128, 128, DOUBLE)
    assert values[0].tolist() == [2.0] * 32 + [8.0] * 32


def test_int8_weight_takes_the_scale_of_its_row_whatever_the_blocks():
    weight = torch.tensor([[1, -128], [3, 127]], dtype=torch.int8)
    values = shared.dequantise_weight(weight, torch.tensor([[0.5], [2.0]]), 128, 1, DOUBLE)
    assert values.tolist() == [[0.5, -64.0], [6.0, 254.0]]


def test_experts_are_dequantised_each_with_its_own_scale():
    make = Make(seed=1)
    weight = make.normal(3, 5, 7).to(torch.float8_e4m3fn)
    scale = make.uniform(3, 3, 2)
    each = torch.stack([shared.dequantise_weight(weight[e], scale[e], 2, 4, DOUBLE) for e in range(3)])
    assert torch.equal(shared.dequantise_weight(weight, scale, 2, 4, DOUBLE), each)


def test_int8_activations_have_one_scale_a_row():
    x = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int8)
    values = shared.dequantise_activation(x, torch.tensor([[2.0], [10.0]]), 1, DOUBLE)
    assert values.tolist() == [[2, 4, 6], [40, 50, 60]]


def test_e4m3_activations_have_one_scale_a_group():
    values = shared.dequantise_activation(torch.ones(1, 5).to(torch.float8_e4m3fn), e8m0([1.0, 2.0, 4.0]), 2, DOUBLE)
    assert values.tolist() == [[1, 1, 2, 2, 4]]


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        (torch.bfloat16, "none"),
        (torch.float32, "none"),
        (torch.float8_e4m3fn, "fp8"),
        (torch.uint8, "fp8"),
        (torch.int8, "int8"),
    ],
)
def test_auto_follows_the_kind_of_the_weight(dtype, wanted):
    assert shared.resolve_act_quant("auto", torch.empty(2, 2, dtype=dtype)) == wanted


def test_scale_of_packed_weights_counts_their_codes():
    weight = torch.empty(4, 6, 48, dtype=torch.uint8)
    assert shared.scale_shape(weight, 128, 128) == (4, 6, 3)


def test_scale_shape_is_told_by_its_argument_name():
    weight = torch.empty(2, 130, 64).to(torch.float8_e4m3fn)
    with pytest.raises(ArgumentError) as caught:
        shared.check_weight_kind("op", weight, torch.ones(2, 1, 1), 128, 128, 64, "w13")
    assert str(caught.value) == "op: w13_scale must be [2, 2, 1] for float8_e4m3fn w13; got shape (2, 1, 1)."
