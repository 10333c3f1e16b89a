"""Routers, dispatch, products and combination of the twin, by hand."""

import math

import pytest
import torch

from isolith_backends.cambricon.vendor.library import functions
from isolith_backends.cambricon.vendor.profile import Profile

IDS = [[5, 1], [5, 7], [0, 4]]


def logits_of_softplus(scores):
    """Logits whose sqrt(softplus) are these."""
    return (torch.tensor(scores).square().exp() - 1).log()


def test_softplus_weights_are_renormalised(tmo):
    weights, experts = tmo.moe_softplus_topk(logits_of_softplus([[1.0, 3.0, 2.0]]), 2, route_scale=10.0)
    assert (experts.tolist(), weights[0].tolist()) == ([[1, 2]], pytest.approx([6.0, 4.0]))


def test_bias_chooses_and_does_not_weigh(tmo):
    bias = torch.tensor([10.0, 0.0, 0.0])
    weights, experts = tmo.moe_softplus_topk(logits_of_softplus([[1.0, 3.0, 2.0]]), 2, bias=bias)
    assert (experts.tolist(), weights[0].tolist()) == ([[0, 1]], pytest.approx([0.25, 0.75]))


def test_scores_of_zero_give_nan(tmo):
    weights, _ = tmo.moe_softplus_topk(torch.full((1, 4), -200.0), 2)
    assert weights.isnan().all()


def test_hash_takes_the_experts_of_the_table(tmo, int32):
    table = int32([[0, 0], [2, 0]])
    weights, experts = tmo.moe_softplus_topk(logits_of_softplus([[1.0, 5.0, 3.0]]), 2, int32([1]), table)
    assert (experts.tolist(), weights[0].tolist()) == ([[2, 0]], pytest.approx([0.75, 0.25]))


def test_a_table_without_ids_is_refused(tmo, int32):
    with pytest.raises(RuntimeError, match="tid2eid needs input_ids"):
        tmo.moe_softplus_topk(torch.zeros(1, 3), 2, tid2eid=int32([[0, 1]]))


def test_ids_without_a_table_are_not_used(tmo, int32):
    _, experts = tmo.moe_softplus_topk(logits_of_softplus([[1.0, 3.0]]), 1, input_ids=int32([77]))
    assert experts.tolist() == [[1]]


def test_an_int64_table_is_refused(tmo, int32):
    with pytest.raises(RuntimeError, match="tid2eid must be one of"):
        tmo.moe_softplus_topk(torch.zeros(1, 3), 2, int32([0]), torch.zeros(1, 2, dtype=torch.int64))


GROUPED = torch.tensor([[0.6, 0.1, 0.5, 0.45]]).logit()


def test_a_biased_group_is_worth_its_two_best(tmo):
    _, experts = tmo.moe_sigmoid_topk(GROUPED, 2, True, 2, 1, score_bias=torch.zeros(4))
    assert experts.tolist() == [[2, 3]]


def test_an_unbiased_group_is_worth_its_best(tmo):
    weights, experts = tmo.moe_sigmoid_topk(GROUPED, 2, True, 2, 1)
    assert (experts.tolist(), weights[0].tolist()) == ([[0, 1]], pytest.approx([6 / 7, 1 / 7]))


def test_mask_does_not_act_on_groups(tmo):
    mask = torch.tensor([[0.0, 1, 1, 1]])
    grouped = tmo.moe_sigmoid_topk(GROUPED, 1, False, 2, 1, mask)[1]
    assert (grouped.tolist(), tmo.moe_sigmoid_topk(GROUPED, 1, mask=mask)[1].tolist()) == ([[0]], [[2]])


def test_sigmoid_logit_divides_by_all_experts(tmo):
    weights, _ = tmo.moe_sigmoid_topk(GROUPED, 1, normalize=True, normed_by="sigmoid_logit")
    assert weights.item() == pytest.approx(0.6 / 1.65)


def test_softmax_masks_groups_with_zero_not_with_infinity(tmo):
    logits, bias = torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([1.0, -9.0, 0.5, 0.5])
    _, experts = tmo.moe_softmax_topk(logits, 2, num_expert_group=2, topk_group=1, score_bias=bias)
    assert experts.tolist() == [[0, 2]]


@pytest.mark.parametrize(("ties", "expert"), [("lowest", 0), ("highest", 3)])
def test_ties_go_as_the_profile_says(ties, expert):
    tmo = functions(Profile(ties=ties))
    assert tmo["moe_softplus_topk"](torch.zeros(1, 4), 1)[1].item() == expert


def test_gen_idx_gives_exclusive_sums_with_a_leading_zero(tmo, int32):
    _, _, count, cusum = tmo.moe_gen_idx(int32(IDS), 8)
    assert (count.tolist(), cusum.tolist()) == ([1, 1, 0, 0, 1, 2, 0, 1], [0, 1, 2, 2, 2, 3, 5, 5, 6])


def test_gen_idx_gives_tokens_and_the_inverse_permutation(tmo, int32):
    expand, combine, _, _, order = tmo.moe_gen_idx(int32(IDS), 8, True)
    assert expand.tolist() == (order // 2).tolist()
    assert order[combine.long()].tolist() == list(range(6))


def test_order_within_an_expert_is_not_that_of_tokens(tmo, int32):
    assert tmo.moe_gen_idx(int32(IDS), 8)[0].tolist() == [2, 0, 2, 1, 0, 1]


@pytest.mark.parametrize("expert", [-1, 8])
def test_an_expert_outside_is_refused(tmo, int32, expert):
    with pytest.raises(RuntimeError, match=r"must lie in \[0, 8\)"):
        tmo.moe_gen_idx(int32([[expert]]), 8)


def test_expanded_rows_of_a_rank_come_first_and_the_rest_is_undefined(tmo, int32):
    x, cusum = torch.arange(3.0)[:, None], int32([0, 1, 2, 2, 2, 3, 5, 5, 6])
    rows = tmo.moe_expand_input(x, int32([2, 0, 2, 0, 1, 1]), cusum, 4, 4)[:, 0]
    assert (rows[:4].tolist(), rows[4:].isnan().tolist()) == ([2.0, 0.0, 1.0, 1.0], [True, True])


def test_combine_leaves_other_ranks_rows_out(tmo, int32):
    rows = torch.tensor([[10.0], [20.0], [30.0], [40.0], [math.nan], [math.nan]])
    cusum, combine = int32([0, 1, 2, 2, 2, 3, 5, 5, 6]), int32([3, 1, 4, 5, 0, 2])
    weights = torch.tensor([[0.5, 9.0], [1.0, 2.0], [9.0, 0.1]])
    y = tmo.moe_combine_result(rows, weights, combine, torch.ones(3, 1), cusum, 4, 4)
    assert y[:, 0].tolist() == pytest.approx([11.0, 111.0, 2.0])


def test_combine_refuses_a_bias(tmo, int32):
    with pytest.raises(RuntimeError, match="bias must be None"):
        tmo.moe_combine_result(torch.ones(1, 1), torch.ones(1, 1), int32([0]), None, None, 0, 0, torch.ones(1))


def test_group_gemm_leaves_rows_behind_the_groups_undefined(tmo, int32):
    y = tmo.group_gemm(torch.ones(3, 2), torch.ones(2, 1, 2), int32([0, 2]), None, None, None, None, 3)
    assert (y[:2, 0].tolist(), y[2].isnan().item()) == ([2.0, 2.0], True)


def test_group_gemm_gathers_by_the_offset(tmo, int32):
    a, b = torch.arange(3.0)[:, None], torch.ones(1, 1, 1)
    y = tmo.group_gemm(a, b, int32([2]), int32([0, 2, 1]), None, None, None, 2, idx_offset=int32([1]))
    assert y[:2, 0].tolist() == [2.0, 1.0]


def test_group_gemm_refuses_a_maximum_that_is_too_small(tmo, int32):
    with pytest.raises(RuntimeError, match="max_in_group_list says 1"):
        tmo.group_gemm(torch.ones(2, 1), torch.ones(1, 1, 1), int32([2]), None, None, None, None, 1)


def test_group_lists_are_int32(tmo):
    with pytest.raises(RuntimeError, match="group_list must be one of"):
        tmo.group_gemm(torch.ones(2, 1), torch.ones(1, 1, 1), torch.tensor([2]), None, None, None, None, 2)


def test_scales_of_a_gathered_product_are_in_expanded_order(tmo, int32):
    a, b = torch.tensor([[1], [2]], dtype=torch.int8), torch.ones(1, 1, 1, dtype=torch.int8)
    scales = torch.tensor([10.0, 100.0, 1000.0])
    given = (int32([3]), int32([1, 0, 1]), None, None, None, scales, torch.ones(1, 1), torch.half, 3)
    assert tmo.smooth_quant_group_gemm(a, b, *given)[:, 0].tolist() == [20.0, 100.0, 2000.0]


def test_fp8_scales_of_rows_are_transposed(tmo_fp8, int32):
    a, b = torch.ones(2, 256).to(torch.float8_e4m3fn), torch.ones(1, 128, 256).to(torch.float8_e4m3fn)
    a_scale, b_scale = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[[1.0, 0.5]]])
    given = (int32([2]), None, None, None, None, a_scale, b_scale, torch.half, 2)
    assert tmo_fp8.smooth_quant_group_gemm(a, b, *given)[:, 0].tolist() == [128.0, 512.0]


def test_scaled_matmul_gives_half_or_bfloat16(tmo):
    codes, scale = torch.ones(1, 4, dtype=torch.int8), torch.ones(1)
    with pytest.raises(RuntimeError, match="must be half or bfloat16"):
        tmo.scaled_matmul(codes, codes, scale, scale, torch.float32)


def test_clamp_of_the_gate_is_above_alone(tmo):
    x = torch.tensor([[20.0, -20.0, 20.0, -20.0]])
    y = tmo.moe_active(x, "silu", True, swiglu_limit=10)
    sigmoid = 1 / (1 + math.exp(-10))
    assert y[0].tolist() == pytest.approx([100 * sigmoid, 200 / (1 + math.exp(20))])


def test_a_fractional_limit_is_refused(tmo):
    with pytest.raises(RuntimeError, match="swiglu_limit must be int"):
        tmo.moe_active(torch.ones(1, 4), "silu", True, swiglu_limit=10.0)


def test_a_limit_of_256_is_refused(tmo):
    with pytest.raises(RuntimeError, match=r"must lie in \[0, 256\)"):
        tmo.moe_active(torch.ones(1, 4), "silu", True, swiglu_limit=256)


def test_output_may_be_a_view_of_the_input(tmo):
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    tmo.moe_active(x, "silu", True, x[:, :2])
    assert x[0].tolist() == pytest.approx([3 / (1 + math.exp(-1)), 8 / (1 + math.exp(-2)), 3, 4])


def test_day0_has_no_clamp(day0):
    with pytest.raises(TypeError):
        day0.moe_active(torch.ones(1, 4), "silu", True, None, None, None, 0, 0, swiglu_limit=10)


def test_smooth_multiplies_and_rounds_to_even(tmo):
    codes, scale = tmo.scaled_quantize(torch.tensor([[127.0, 1.25, 1.75]]), torch.tensor([1.0, 2.0, 2.0]))
    assert (codes.tolist(), scale.tolist()) == ([[127, 2, 4]], [1.0])


def test_codes_of_a_row_of_zeros_are_undefined(tmo):
    codes, scale = tmo.scaled_quantize(torch.zeros(1, 2))
    assert (codes.tolist(), scale.tolist()) == ([[-128, -128]], [0.0])


def test_moe_quantize_smooths_by_expert_and_leaves_the_rest_undefined(tmo, int32):
    x, smooth = torch.full((2, 1), 127.0), torch.tensor([[1.0], [2.0]])
    given = {"token_count": int32([0, 1]), "gather_index": int32([0, 1, 0]), "gather_index_start_position": int32([2])}
    codes, scale = tmo.moe_quantize(x, smooth, **given)
    assert (codes[0].item(), scale[0].item(), scale[1:].isnan().tolist()) == (127, 2.0, [True, True])


def test_quantised_silu_has_no_clamp(tmo):
    _, scale = tmo.moe_quantize(torch.tensor([[100.0, 100.0]]), torch.ones(1), act_mode="silu", is_gated=True)
    assert scale.item() == pytest.approx(10000 / 127)


def test_gating_is_of_float32_weights(tmo):
    with pytest.raises(RuntimeError, match="weight must be one of"):
        tmo.moe_cast_gating(torch.ones(1, 4, dtype=torch.half), torch.ones(2, 4, dtype=torch.half))


def test_gating_takes_512_experts(tmo):
    with pytest.raises(RuntimeError, match="at most 512, but are 513"):
        tmo.moe_cast_gating(torch.ones(1, 4, dtype=torch.half), torch.ones(513, 4))
