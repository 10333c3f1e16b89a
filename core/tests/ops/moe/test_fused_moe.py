import pytest
import torch
from torch.testing import assert_close

import isolith
from isolith import Make
from isolith.materials.experts import moe_layer, quantised_experts, shared_expert
from isolith.ops.moe import fused_moe, grouped_gemm, moe_permute


@pytest.fixture(autouse=True)
def _references_only():
    pins = dict.fromkeys(isolith.OPERATORS, "reference")
    with isolith.override(kernels=pins):
        yield


def layer64(tokens=9, seed="layer", **sizes):
    return moe_layer(Make(torch.float64, seed=seed), tokens, **sizes)


def token_by_token(x, topk_idx, topk_weights, w13, w2, limit=0.0):
    """The definition, one token and one slot at a time."""
    y = torch.zeros_like(x)
    for token, experts in enumerate(topk_idx.tolist()):
        for slot, expert in enumerate(experts):
            gate, up = (w13[expert] @ x[token]).chunk(2)
            if limit:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            y[token] += topk_weights[token, slot] * (w2[expert] @ (torch.nn.functional.silu(gate) * up))
    return y


@pytest.mark.parametrize("limit", [0.0, 0.5])
def test_layer_is_the_weighted_sum_of_its_experts(limit):
    given = layer64()
    assert_close(fused_moe(**given, swiglu_limit=limit), token_by_token(**given, limit=limit))


@pytest.mark.parametrize("limit", [0.0, 0.5])
def test_shared_expert_is_added_and_clamped(limit):
    make = Make(torch.float64, seed="shared")
    given, shared = moe_layer(make, 5), shared_expert(make)
    one = torch.ones(5, 1, dtype=torch.float64)
    first_expert = torch.zeros(5, 1, dtype=torch.int32)
    alone = token_by_token(
        given["x"],
        first_expert,
        one,
        shared["shared_w13"][None],
        shared["shared_w2"][None],
        limit,
    )
    both = fused_moe(**given, **shared, swiglu_limit=limit)
    assert_close(both, token_by_token(**given, limit=limit) + alone)


def test_renumbered_experts_give_the_same_layer():
    given = layer64()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    place = order.argsort().int()
    renumbered = {
        **given,
        "topk_idx": place[given["topk_idx"].long()],
        "w13": given["w13"][order],
        "w2": given["w2"][order],
    }
    assert_close(fused_moe(**renumbered), fused_moe(**given))


def test_token_does_not_depend_on_its_neighbours():
    given = layer64()
    tokenwise = ("x", "topk_idx", "topk_weights")
    alone = fused_moe(**{**given, **{name: given[name][4:5] for name in tokenwise}})
    assert_close(alone, fused_moe(**given)[4:5])


def test_repeated_expert_is_added_twice():
    given = layer64(k=2)
    given["topk_idx"] = torch.full_like(given["topk_idx"], 3)
    once = {**given, "topk_idx": given["topk_idx"][:, :1], "topk_weights": given["topk_weights"].sum(1, keepdim=True)}
    assert_close(fused_moe(**given), fused_moe(**once))


def test_weight_moves_across_the_down_projection_where_nothing_is_quantised():
    given = layer64()
    assert_close(fused_moe(**given), fused_moe(**given, weight_before_down=False))


def test_weight_inside_the_quantisation_changes_codes():
    make = Make(torch.float32, seed="codes")
    given = {**moe_layer(make, 5, 160, 96), **quantised_experts(make, "e4m3_float32", 160, 96, 8)}
    given["scale_format"] = "float32"
    assert not torch.equal(fused_moe(**given), fused_moe(**given, weight_before_down=False))


@pytest.mark.parametrize("kind", ["e4m3", "e2m1", "int8"])
def test_quantised_layer_stays_near_the_weight_only_one(kind):
    make = Make(torch.float64, seed="near")
    given = {**moe_layer(make, 9, 160, 96), **quantised_experts(make, kind, 160, 96, 8)}
    exact = fused_moe(**given, act_quant="none")
    # Two roundings of activations to three bits of mantissa: each is at most one part in 16.
    assert (fused_moe(**given) - exact).norm() < exact.norm() / 16


def test_alignment_changes_no_row_of_the_grouped_product():
    make = Make(torch.float64, seed="alignment")
    given = moe_layer(make, 9)
    products = []
    for alignment in (1, 16):
        rows, _, counts, _, _, where, _ = moe_permute(given["x"], given["topk_idx"], 8, alignment)
        products.append(grouped_gemm(rows, given["w13"], counts, alignment, out_dtype="float64")[where.long()])
    assert_close(*products)
