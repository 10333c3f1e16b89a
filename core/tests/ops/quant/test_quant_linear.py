"""Facts of quant_linear that no sample states."""

import pytest
import torch

from isolith import Make
from isolith.ops.quant.act_quant_fp8 import act_quant_fp8
from isolith.ops.quant.act_quant_int8 import act_quant_int8
from isolith.ops.quant.block_dequant import block_dequant
from isolith.ops.quant.quant_linear import made_weight, quant_linear

DOUBLE = {"out_dtype": "float64"}
KINDS = pytest.mark.parametrize("kind", ["fp8", "fp4", "int8"])


def values_of(weight, block_n=128, block_k=128):
    """A weight of `made_weight` as float64."""
    blocks = {torch.uint8: (1, 32), torch.int8: (1, weight["weight"].shape[-1])}
    block = blocks.get(weight["weight"].dtype, (block_n, block_k))
    return block_dequant(weight["weight"], weight["weight_scale"], *block, out_dtype="float64")


@KINDS
def test_weight_only_is_the_product_with_the_dequantised_weight(kind):
    make = Make(torch.bfloat16, seed=1)
    x, weight = make.normal(3, 160), made_weight(make, kind, 140, 160, scale="float32")
    y = quant_linear(x, **weight, act_quant="none", **DOUBLE)
    torch.testing.assert_close(y, x.double() @ values_of(weight).T, rtol=1e-12, atol=1e-12)


@KINDS
def test_auto_equals_quantised_x_with_its_scale(kind):
    make = Make(seed=2)
    x, weight = make.normal(3, 160), made_weight(make, kind, 24, 160)
    q, scale = act_quant_int8(x) if kind == "int8" else act_quant_fp8(x)
    assert torch.equal(quant_linear(x, **weight, **DOUBLE), quant_linear(q, **weight, x_scale=scale, **DOUBLE))


@KINDS
def test_auto_quantises_the_activations(kind):
    make = Make(seed=3)
    x, weight = make.normal(3, 160), made_weight(make, kind, 24, 160)
    assert not torch.equal(quant_linear(x, **weight, **DOUBLE), quant_linear(x, **weight, act_quant="none", **DOUBLE))


def test_auto_leaves_activations_of_a_float_weight():
    make = Make(seed=4)
    x, weight = make.normal(3, 160), made_weight(make, "float", 24, 160)
    assert torch.equal(quant_linear(x, **weight), quant_linear(x, **weight, act_quant="none"))


@pytest.mark.parametrize("rule", [{"act_group": 32}, {"scale_format": "float32"}], ids=["group", "scale_format"])
def test_rules_of_the_activations_reach_them(rule):
    make = Make(seed=5)
    x, weight = make.normal(3, 160, std=3.0), made_weight(make, "fp8", 24, 160)
    x[:, :32] *= 64
    q, scale = act_quant_fp8(x, rule.get("act_group", 128), rule.get("scale_format", "ue8m0"))
    given = {"x_scale": scale, "act_group": rule.get("act_group", 128)}
    assert torch.equal(quant_linear(x, **weight, **rule, **DOUBLE), quant_linear(q, **weight, **given, **DOUBLE))


def test_scales_of_one_value_give_one_output_whatever_their_dtype():
    make = Make(seed=6)
    x, weight = make.normal(3, 200), made_weight(make, "fp8", 150, 200)
    single = {**weight, "weight_scale": weight["weight_scale"].float()}
    assert torch.equal(quant_linear(x, **weight), quant_linear(x, **single))


def test_int8_dot_is_the_integer_dot():
    make = Make(seed=7)
    x, w = (make.integers(-127, 128, rows, 512, dtype=torch.int8) for rows in (3, 5))
    one = {"x_scale": torch.ones(3, 1), "weight_scale": torch.ones(5, 1)}
    assert torch.equal(quant_linear(x, w, **one, **DOUBLE).long(), x.long() @ w.long().T)


def test_float64_activations_and_float32_ones_meet_the_weight_as_the_same_codes():
    make = Make(seed=8)
    x, weight = make.normal(3, 160), made_weight(make, "fp8", 24, 160)
    assert torch.equal(quant_linear(x, **weight, **DOUBLE), quant_linear(x.double(), **weight, **DOUBLE))


@pytest.mark.parametrize("kind", ["float", "fp8", "fp4", "int8"])
def test_no_columns_give_zeros(kind):
    weight = {"weight": torch.ones(3, 0)} if kind == "float" else made_weight(Make(seed=9), kind, 3, 0)
    assert quant_linear(torch.ones(2, 0), **weight).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(("block_n", "block_k"), [(128, 128), (32, 32), (24, 40)], ids=["v3", "v41", "unequal"])
@pytest.mark.parametrize("act_group", [128, 32])
def test_product_of_values_with_their_own_blocks_and_groups(block_n, block_k, act_group):
    make = Make(seed=10)
    weight = made_weight(make, "fp8", 140, 200, block_n, block_k, scale="float32")
    x = make.normal(3, 200) * torch.exp2(torch.arange(200) // 32).float()
    q, scale = act_quant_fp8(x, act_group)
    wanted = block_dequant(q, scale, 1, act_group, "float64") @ values_of(weight, block_n, block_k).T
    y = quant_linear(x, **weight, act_group=act_group, block_n=block_n, block_k=block_k, **DOUBLE)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)


def test_square_weight_is_used_transposed():
    make = Make(torch.float64, seed=11)
    x, weight = make.normal(3, 8), make.normal(8, 8)
    torch.testing.assert_close(quant_linear(x, weight, **DOUBLE), torch.einsum("tk,nk->tn", x, weight))


def test_row_does_not_depend_on_the_others():
    make = Make(seed=9)
    x, weight = make.normal(5, 160), made_weight(make, "fp8", 24, 160)
    torch.testing.assert_close(quant_linear(x, **weight, **DOUBLE)[2:3], quant_linear(x[2:3], **weight, **DOUBLE))
