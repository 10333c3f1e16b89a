"""Facts of block_dequant that no sample states."""

import torch

from isolith import Make
from isolith.ops.quant.act_quant_fp4 import act_quant_fp4
from isolith.ops.quant.act_quant_fp8 import act_quant_fp8
from isolith.ops.quant.act_quant_int8 import act_quant_int8
from isolith.ops.quant.block_dequant import block_dequant

BLOCKS = {"block_n": 32, "block_k": 48}


def codes(make, *shape):
    return make.normal(*shape, std=16.0).to(torch.float8_e4m3fn)


def test_every_element_has_the_scale_of_its_block():
    make = Make(seed=1)
    q, scale = codes(make, 70, 100), make.uniform(3, 3)
    wanted = [[q[n, k].item() * scale[n // 32, k // 48].item() for k in range(100)] for n in range(70)]
    assert block_dequant(q, scale, **BLOCKS, out_dtype="float64").tolist() == wanted


def test_scales_of_one_value_give_one_output_whatever_their_dtype():
    make = Make(seed=2)
    q, scale = codes(make, 70, 100), torch.exp2(make.integers(-9, 3, 3, 3).float())
    single, power = (block_dequant(q, s, **BLOCKS) for s in (scale, scale.to(torch.float8_e8m0fnu)))
    assert torch.equal(single, power)


def test_power_of_two_scales_are_exact_in_bfloat16():
    make = Make(seed=3)
    q, scale = codes(make, 70, 100), torch.exp2(make.integers(-100, 100, 3, 3).float())
    half, double = (block_dequant(q, scale, **BLOCKS, out_dtype=name) for name in ("bfloat16", "float64"))
    assert torch.equal(half.double(), double)


def test_activations_of_fp8_come_back_within_a_sixteenth():
    x = Make(seed=4).uniform(5, 200, low=1.0, high=2.0)
    q, scale = act_quant_fp8(x)
    torch.testing.assert_close(block_dequant(q, scale, 1, 128, "float32"), x, rtol=1 / 16, atol=0)


def test_activations_of_fp4_come_back_within_a_quarter():
    x = Make(seed=5).uniform(5, 64, low=1.0, high=2.0)
    q, scale = act_quant_fp4(x)
    torch.testing.assert_close(block_dequant(q, scale, 1, 32, "float32"), x, rtol=0.25, atol=0)


def test_activations_of_int8_come_back_within_half_a_scale():
    x = Make(seed=6).normal(5, 64)
    q, scale = act_quant_int8(x)
    error = (block_dequant(q, scale, 1, 64, "float64") - x.double()).abs()
    assert bool((error <= 0.5000001 * scale.double()).all())


def test_blocks_of_packed_codes_count_codes_not_bytes():
    q = torch.full((1, 4), 0x22, dtype=torch.uint8)  # 1.0 eight times
    assert block_dequant(q, torch.tensor([[1.0, 2.0]]), 1, 4, "float32").tolist() == [[1.0] * 4 + [2.0] * 4]


def test_factors_are_not_rounded_before_the_product():
    make = Make(seed=7)
    q, scale = codes(make, 70, 100), make.uniform(3, 3)
    single, half = (block_dequant(q, scale, **BLOCKS, out_dtype=name) for name in ("float32", "bfloat16"))
    assert torch.equal(half, single.bfloat16())
