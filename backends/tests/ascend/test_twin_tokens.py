"""Norms, rotary, hyper-connections, routers and routing as the vendor documents them, by hand."""

import math

import pytest
import torch
from torch import tensor


def test_rms_norm_gives_the_reciprocal_root_in_float32(call):
    y, rstd = call("npu::npu_rms_norm", input=tensor([[3.0, 4.0]]), gamma=tensor([1.0, 2.0]), epsilon=0.0)
    assert torch.allclose(y, tensor([[3.0, 8.0]]) / math.sqrt(12.5))
    assert rstd.shape == (1, 1)


def test_rms_norm_refuses_a_float32_gamma_beside_float16(call):
    with pytest.raises(RuntimeError, match="gamma is"):
        call("npu::npu_rms_norm", input=torch.ones(1, 2).half(), gamma=torch.ones(2))


@pytest.mark.parametrize(
    ("mode", "y"),
    [("half", [-3.0, -4.0, 1.0, 2.0]), ("interleave", [-2.0, 1.0, -4.0, 3.0])],
    ids=["half", "interleave"],
)
def test_rotary_mul_by_a_quarter_turn(call, mode, y):
    x = tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    cos, sin = torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4)
    assert call("npu::npu_rotary_mul", input=x, r1=cos, r2=sin, rotary_mode=mode).flatten().tolist() == y


@pytest.mark.parametrize(
    ("x", "table", "mode"),
    [
        ((5, 7, 3, 4), (5, 7, 1, 4), "interleave"),
        ((5, 1, 3, 896), (5, 1, 1, 896), "half"),
        ((5, 1, 1000, 4), (5, 1, 1, 4), "half"),
        ((5, 7, 4), (5, 7, 4), "interleave"),
    ],
    ids=["angles_by_batch", "D", "heads", "angles_by_head"],
)
def test_rotary_mul_refuses_layouts_and_sizes_before_a5(call, x, table, mode):
    given = {"input": torch.zeros(x), "r1": torch.zeros(table), "r2": torch.zeros(table), "rotary_mode": mode}
    call("npu::npu_rotary_mul", chip="a5", **given)
    with pytest.raises(RuntimeError, match="r1"):
        call("npu::npu_rotary_mul", **given)


def test_rotary_mul_takes_angles_along_a_long_sequence(call):
    given = {"input": torch.ones(1200, 1, 3, 4), "r1": torch.ones(1200, 1, 1, 4), "r2": torch.zeros(1200, 1, 1, 4)}
    assert call("npu::npu_rotary_mul", **given, rotary_mode="interleave").unique().tolist() == [1.0]


def test_finalize_wants_as_many_bins_as_a_token_has_experts(call):
    with pytest.raises(RuntimeError, match="1 experts, 2 of them for a token"):
        finalized(call, expanded_permuted_rows=ROWS.view(1, 4, 1), drop_pad_mode=3)


def test_partial_rotary_writes_the_tail_in_place(call):
    x = tensor([9.0, 8.0, 1.0, 2.0]).view(1, 1, 1, 4)
    table = {"r1": torch.zeros(1, 1, 1, 2), "r2": torch.ones(1, 1, 1, 2)}
    name = "_C_ascend::inplace_partial_rotary_mul"
    assert call(name, x=x, rotary_mode="interleave", partial_slice=[2, 4], **table) is None
    assert x.flatten().tolist() == [9.0, 8.0, -2.0, 1.0]


@pytest.mark.parametrize("wrong", [{"rotary_mode": "half"}, {"partial_slice": [0, 2]}], ids=["mode", "head first"])
def test_partial_rotary_refuses_what_it_does_not_do(call, wrong):
    given = {"rotary_mode": "interleave", "partial_slice": [2, 4]} | wrong
    table = torch.zeros(1, 1, 1, 2)
    with pytest.raises(RuntimeError, match=next(iter(wrong))):
        call("custom::inplace_partial_rotary_mul", x=torch.zeros(1, 1, 1, 4), r1=table, r2=table, **given)


def streams(**changed):
    given = {"x": torch.ones(1, 4, 4096).bfloat16(), "hc_fn": torch.zeros(24, 4 * 4096), "hc_scale": torch.ones(3)}
    sizes = {"hc_mult": 4, "hc_sinkhorn_iters": 20, "norm_eps": 1e-6, "hc_eps": 1e-6}
    return given | {"hc_base": torch.zeros(24)} | sizes | changed


def test_hc_pre_of_nothing_but_its_base(call):
    x = torch.arange(4.0).view(1, 4, 1).expand(1, 4, 4096).bfloat16()
    y, post, comb = call("_C_ascend::npu_hc_pre_v2", **streams(x=x))
    assert y[0, 0].item() == 3.0  # half of 0 + 1 + 2 + 3
    assert post.tolist() == [[1.0] * 4]
    assert torch.allclose(comb, torch.full((1, 4, 4), 0.25), atol=1e-5)


def test_hc_pre_multiplies_in_hf32(call):
    fn = torch.zeros(24, 4 * 4096)
    fn[4] = 2.0**-14 * (1 + 2.0**-11)  # is cut to 2**-14, so that the sum is 1
    post = call("_C_ascend::npu_hc_pre_v2", **streams(hc_fn=fn, norm_eps=0.0))[1]
    assert post[0, 0].item() == pytest.approx(2 / (1 + math.exp(-1.0)), rel=1e-6)


@pytest.mark.parametrize("wrong", [{"hc_mult": 2}, {"hc_sinkhorn_iters": 10}], ids=["streams", "iterations"])
def test_hc_pre_is_made_for_four_streams_and_twenty_iterations(call, wrong):
    with pytest.raises(RuntimeError, match=next(iter(wrong))):
        call("_C_ascend::npu_hc_pre_v2", **streams(**wrong))


def test_hc_post_takes_columns_of_comb(call):
    comb = torch.zeros(1, 4, 4)
    comb[0, 3, 1] = 1.0  # stream 3 goes to stream 1
    residual = torch.arange(1.0, 5.0).view(1, 4, 1)
    post = tensor([[1.0, 0.0, 0.0, 0.0]])
    out = call("_C_ascend::npu_hc_post", x=tensor([[10.0]]), residual=residual, post=post, comb=comb)
    assert out.flatten().tolist() == [10.0, 4.0, 0.0, 0.0]


def test_mhc_post_takes_the_residual_first(call):
    given = {"x": torch.ones(1, 4, 16), "h_res": torch.zeros(1, 4, 4), "h_out": torch.full((1, 16), 5.0)}
    out = call("npu::npu_mhc_post", chip="a5", h_post=tensor([[1.0, 2.0, 0.0, 0.0]]), **given)
    assert out[0, :, 0].tolist() == [5.0, 10.0, 0.0, 0.0]


LOGITS = tensor([[0.0, 1.0, 1.0, -2.0]])


def test_gate_breaks_ties_toward_the_lower_expert_and_sorts(call):
    _, chosen, _ = call("npu::npu_moe_gating_top_k", x=LOGITS, k=3, norm_type=1)
    assert chosen.tolist() == [[1, 2, 0]]
    assert chosen.dtype == torch.int32


def test_bias_selects_and_does_not_weigh(call):
    bias = tensor([0.0, 0.0, 0.0, 9.0])
    y, chosen, _ = call("npu::npu_moe_gating_top_k", x=LOGITS, k=2, norm_type=1, bias=bias, routed_scaling_factor=2.0)
    scores = LOGITS.sigmoid()[0, [3, 1]]
    assert chosen.tolist() == [[3, 1]]
    assert torch.allclose(y[0], 2 * scores / scores.sum())


def test_softmax_weights_are_not_divided(call):
    y, _, _ = call("npu::npu_moe_gating_top_k", x=LOGITS, k=1, norm_type=0, routed_scaling_factor=2.0)
    assert torch.allclose(y, 2 * LOGITS.softmax(-1)[:, 1:2])


def test_torch_npu_takes_norm_type_2_for_sigmoid(call):
    one = call("npu::npu_moe_gating_top_k", x=LOGITS, k=3, norm_type=2)[0]
    assert torch.equal(one, call("npu::npu_moe_gating_top_k", x=LOGITS, k=3, norm_type=1)[0])


def test_hash_gate_takes_norm_type_2_for_the_root_of_softplus(call):
    _, _, out = call("_C_ascend::moe_gating_top_k_hash", x=LOGITS, k=1, norm_type=2, out_flag=True)
    assert torch.allclose(out, LOGITS.exp().log1p().sqrt())


def test_scores_are_not_given_unless_asked_for(call):
    assert call("npu::npu_moe_gating_top_k", x=LOGITS, k=1, norm_type=1)[2].isnan().all()


def test_groups_are_chosen_by_their_best_or_by_their_best_two(call):
    x = tensor([[5.0, -9.0, -9.0, 4.0, 4.0, -9.0]])
    given = {"x": x, "k": 1, "k_group": 1, "group_count": 2, "norm_type": 1}
    best = [call("npu::npu_moe_gating_top_k", group_select_mode=mode, **given)[1].item() for mode in (0, 1)]
    assert best == [0, 3]


def test_table_of_experts_ignores_the_bias_and_minus_one_reads_no_expert(call):
    table = tensor([[3, 0], [1, 2]], dtype=torch.int32)
    given = {"input_ids": tensor([1, -1]), "tid2eid": table, "bias": tensor([0.0, 0.0, 0.0, 9.0])}
    y, chosen, _ = call("_C_ascend::moe_gating_top_k_hash", x=LOGITS.repeat(2, 1), k=2, norm_type=2, **given)
    assert chosen[0].tolist() == [1, 2]
    assert (chosen[1] < 0).all()
    assert y[1].isnan().all()


def test_hash_gate_takes_int64_ids_and_an_int32_table_alone(call):
    table = torch.zeros(2, 1, dtype=torch.int32)
    for wrong in ({"input_ids": tensor([0], dtype=torch.int32)}, {"tid2eid": table.long()}):
        given = {"input_ids": tensor([0]), "tid2eid": table} | wrong
        with pytest.raises(RuntimeError, match=next(iter(wrong))):
            call("_C_ascend::moe_gating_top_k_hash", x=LOGITS, k=1, **given)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"x": torch.zeros(1, 2049)}, "2049 experts"),
        ({"renorm": 1}, "renorm"),
        ({"bias": torch.zeros(4).half()}, "bias"),
        ({"x": torch.zeros(1, 4), "group_count": 2}, "2 experts"),
        ({"k": 5}, "k is 5"),
    ],
    ids=["experts", "renorm", "bias dtype", "small groups", "k"],
)
def test_gate_refuses(call, wrong, says):
    with pytest.raises(RuntimeError, match=says):
        call("npu::npu_moe_gating_top_k", **{"x": LOGITS, "k": 1, "norm_type": 1} | wrong)


X = torch.arange(1.0, 4.0).view(3, 1)
EXPERTS = tensor([[2, 0], [0, 1], [2, 2]], dtype=torch.int32)
ROUTED = {"x": X, "expert_idx": EXPERTS, "expert_num": 3, "expert_tokens_num_flag": True}


def route(call, **more):
    return call("npu::npu_moe_init_routing_v2", **ROUTED | more)


def test_routing_is_stable_and_says_where_each_slot_went(call):
    rows, places, counts, _ = route(call, expert_tokens_num_type=1)
    assert rows.flatten().tolist() == [1.0, 2.0, 2.0, 1.0, 3.0, 3.0]
    assert places.tolist() == [3, 0, 1, 2, 4, 5]
    assert counts.tolist() == [2, 1, 3]


def test_routing_says_where_each_row_came_from(call):
    assert route(call, row_idx_type=1)[1].tolist() == [1, 2, 3, 0, 4, 5]


def test_counts_are_cumulated_unless_asked_for(call):
    assert route(call)[2].tolist() == [2, 3, 6]


def test_pairs_list_the_experts_that_have_tokens_and_nothing_behind(call):
    pairs = route(call, expert_tokens_num_type=2, active_expert_range=[1, 2])[2]
    assert pairs[0].tolist() == [1, 1]
    assert (pairs[1:] < 0).all()


def test_range_of_experts_leaves_garbage_behind_its_rows(call):
    rows, places, counts, _ = route(call, active_expert_range=[0, 2], expert_tokens_num_type=1)
    assert rows[:3].flatten().tolist() == [1.0, 2.0, 2.0]
    assert rows[3:].isnan().all()
    assert places.tolist() == [-1, 0, 1, 2, -1, -1]
    assert counts.tolist() == [2, 1]


def test_scatter_index_behind_the_active_rows_is_never_written(call):
    places = route(call, active_expert_range=[0, 2], row_idx_type=1)[1]
    assert places[:3].tolist() == [1, 2, 3]
    assert (places[3:] < -1).all()


def test_routing_cuts_at_active_num(call):
    assert route(call, active_num=2)[0].flatten().tolist() == [1.0, 2.0]


def test_bins_are_filled_with_zero_and_what_is_dropped_is_minus_one(call):
    given = {"drop_pad_mode": 1, "expert_capacity": 2, "expert_tokens_num_type": 1}
    rows, places, counts, _ = route(call, **given)
    assert rows.squeeze(-1).tolist() == [[1.0, 2.0], [2.0, 0.0], [1.0, 3.0]]
    assert places.tolist() == [4, 0, 1, 2, 5, -1]
    assert counts.tolist() == [2, 1, 3]


def test_scales_go_with_their_rows(call):
    assert route(call, scale=tensor([0.1, 0.2, 0.3]))[3].tolist() == pytest.approx([0.1, 0.2, 0.2, 0.1, 0.3, 0.3])


def test_routing_quantises_rows(call):
    rows, _, _, scale = route(call, x=tensor([[127.0, 2.5], [0.0, 0.0], [-254.0, 3.0]]), quant_mode=1)
    assert rows[0].tolist() == [127, 2]
    assert rows[-1].tolist() == [-127, 2]  # 1.5 to even
    assert scale[[0, 1, 5]].tolist() == [1.0, 0.0, 2.0]


def test_310p_always_cumulates(call):
    given = {"chip": "310p", "x": X.half(), "expert_tokens_num_type": 1}
    assert route(call, **given)[2].tolist() == [2, 3, 6]


def test_routing_needs_the_number_of_experts(call):
    with pytest.raises(RuntimeError, match="expert_num is -1"):
        route(call, expert_num=-1)


def test_permute_and_unpermute(call):
    x = X.bfloat16()
    rows, places = call("npu::npu_moe_token_permute", tokens=x, indices=EXPERTS)
    assert places.tolist() == [3, 0, 1, 2, 4, 5]
    given = {"permuted_tokens": rows, "sorted_indices": places, "probs": torch.full((3, 2), 0.5).bfloat16()}
    assert torch.equal(call("npu::npu_moe_token_unpermute", **given), x)


def test_unpermute_reads_what_is_not_its_own_for_a_negative_index(call):
    given = {"permuted_tokens": X.bfloat16(), "sorted_indices": tensor([0, -1], dtype=torch.int32)}
    out = call("npu::npu_moe_token_unpermute", probs=tensor([[1.0, 0.0]]).bfloat16(), **given)
    assert out.isnan().all()  # 0 times NaN


ROWS = tensor([[1.0], [2.0], [3.0], [4.0]])
INDEX = tensor([0, 1, 2, 3], dtype=torch.int32)


def finalized(call, **given):
    nothing = dict.fromkeys(("skip1", "skip2", "bias", "scales", "export_for_source_row"))
    base = {"expanded_permuted_rows": ROWS, "expanded_src_to_dst_row": INDEX, "scales": tensor([[1.0, 10.0]] * 2)}
    return call("npu::npu_moe_finalize_routing", **nothing | base | given).flatten().tolist()


def test_finalize_reads_its_index_by_slots_first_unless_told(call):
    assert finalized(call) == [31.0, 42.0]
    assert finalized(call, drop_pad_mode=2) == [21.0, 43.0]


def test_finalize_takes_minus_one_for_zero_in_bins_alone(call):
    index = tensor([0, -1, 2, 3], dtype=torch.int32)
    bins = {"expanded_permuted_rows": ROWS.view(2, 2, 1), "expanded_src_to_dst_row": index, "drop_pad_mode": 3}
    assert finalized(call, **bins) == [1.0, 43.0]
    assert math.isnan(finalized(call, expanded_src_to_dst_row=index, drop_pad_mode=2)[0])


def test_finalize_adds_the_bias_of_a_dropped_slot(call):
    index = tensor([0, -1, 2, 3], dtype=torch.int32)
    bins = {"expanded_permuted_rows": ROWS.view(2, 2, 1), "expanded_src_to_dst_row": index, "drop_pad_mode": 3}
    export = tensor([[0, 1], [0, 0]], dtype=torch.int32)
    assert finalized(call, **bins, bias=tensor([[0.0], [5.0]]), export_for_source_row=export) == [51.0, 43.0]


def test_finalize_adds_what_skips_the_experts(call):
    assert finalized(call, skip1=tensor([[100.0], [200.0]])) == [131.0, 242.0]
    with pytest.raises(RuntimeError, match="skip2 needs skip1"):
        finalized(call, skip2=tensor([[100.0], [200.0]]))


def test_finalize_wants_scales_of_the_rows_dtype(call):
    with pytest.raises(RuntimeError, match="scales is"):
        finalized(call, scales=tensor([[1.0, 1.0]] * 2).bfloat16())
