"""Facts of grouped_output_proj that no sample states."""

import pytest
import torch

from isolith import Make
from isolith.ops.attention.grouped_output_proj import grouped_output_proj, made_weights
from isolith.ops.quant.quant_linear import quant_linear

DOUBLE = torch.float64


def test_groups_are_contiguous_ranges_of_heads():
    make = Make(DOUBLE, seed=1)
    x, weights = make.normal(3, 8, 6), made_weights(make, "float float", 4, 5, 12, 7)
    y = torch.zeros(3, 7, dtype=DOUBLE)
    for group in range(4):
        o = torch.cat((x[:, 2 * group], x[:, 2 * group + 1]), dim=-1)
        y += o @ weights["wo_a"][group].T @ weights["wo_b"][:, 5 * group : 5 * group + 5].T
    torch.testing.assert_close(grouped_output_proj(x, **weights), y, rtol=1e-12, atol=1e-12)


def test_middle_is_rounded_to_the_dtype_of_x():
    wo_a, wo_b = torch.tensor([[[1.0], [1.0]]]), torch.tensor([[1.0, -1.0]])
    wo_a[0, 0] += 2.0**-9  # lost in bfloat16
    assert grouped_output_proj(torch.ones(1, 1, 1, dtype=torch.bfloat16), wo_a, wo_b).item() == 0.0


@pytest.mark.parametrize("act_quant", ["none", "fp8", "int8", "auto"])
def test_first_step_is_a_quant_linear_for_each_group(act_quant):
    make = Make(DOUBLE, seed=2)
    x, weights = make.normal(3, 4, 32), made_weights(make, "fp8 float", 2, 24, 64, 48)
    weights["wo_b"] = torch.eye(48, dtype=DOUBLE)
    parts = [
        quant_linear(
            x[:, 2 * a : 2 * a + 2].flatten(1),
            weights["wo_a"][a],
            weights["wo_a_scale"][a],
            act_quant=act_quant,
            out_dtype="float64",
        )
        for a in range(2)
    ]
    y = grouped_output_proj(x, **weights, act_quant_a=act_quant)
    torch.testing.assert_close(y, torch.cat(parts, dim=-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("act_quant", ["none", "fp8", "int8", "auto"])
def test_second_step_is_a_quant_linear(act_quant):
    make = Make(DOUBLE, seed=3)
    x, weights = make.normal(3, 4, 32), made_weights(make, "float fp8", 1, 128, 128, 48)
    weights["wo_a"] = torch.eye(128, dtype=DOUBLE)[None]
    wanted = quant_linear(
        x.flatten(1), weights["wo_b"], weights["wo_b_scale"], act_quant=act_quant, out_dtype="float64"
    )
    y = grouped_output_proj(x, **weights, act_quant_b=act_quant)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)


def test_activations_of_the_first_step_stay_unless_asked():
    make = Make(DOUBLE, seed=4)
    x, weights = make.normal(3, 4, 32), made_weights(make, "fp8 float", 2, 24, 64, 48)
    none, quantised = (grouped_output_proj(x, **weights, **rule) for rule in ({}, {"act_quant_a": "auto"}))
    assert not torch.equal(none, quantised)


def test_activations_of_the_second_step_are_quantised_unless_told_not_to():
    make = Make(DOUBLE, seed=5)
    x, weights = make.normal(3, 4, 32), made_weights(make, "float fp8", 2, 32, 64, 48)
    auto, none = (grouped_output_proj(x, **weights, **rule) for rule in ({}, {"act_quant_b": "none"}))
    assert not torch.equal(auto, none)


def test_no_tokens_give_no_rows():
    weights = made_weights(Make(seed=6), "fp8 fp8", 2, 128, 64, 48)
    assert grouped_output_proj(torch.zeros(0, 4, 32), **weights).shape == (0, 48)


@pytest.mark.parametrize("rules", [{}, {"act_group": 64, "scale_format": "float32"}], ids=["defaults", "rules"])
def test_rules_and_blocks_reach_both_steps(rules):
    make = Make(DOUBLE, seed=7)
    x, weights = make.normal(3, 4, 48), made_weights(make, "fp8 fp8", 2, 64, 96, 40, block=32)
    x *= torch.exp2(torch.arange(48) // 16)
    rules = {**rules, "block_n": 32, "block_k": 32}
    steps = {**rules, "act_quant": "fp8", "out_dtype": "float64"}
    parts = [
        quant_linear(x[:, 2 * a : 2 * a + 2].flatten(1), weights["wo_a"][a], weights["wo_a_scale"][a], **steps)
        for a in range(2)
    ]
    wanted = quant_linear(torch.cat(parts, dim=-1), weights["wo_b"], weights["wo_b_scale"], **steps)
    y = grouped_output_proj(x, **weights, **rules, act_quant_a="fp8")
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)


def test_result_has_the_dtype_of_x():
    make = Make(torch.float16, seed=8)
    assert (
        grouped_output_proj(make.normal(3, 4, 32), **made_weights(make, "fp8 fp8", 2, 128, 64, 48)).dtype == make.dtype
    )
