"""Norms, rotary embedding and hyper-connections of the twin, by hand."""

import pytest
import torch

NORM = (None, None, None, None, 0.0, False)


def test_norm_gives_a_bare_tensor_when_nothing_else_is_asked_for(tmo):
    y = tmo.fused_rms_norm(torch.tensor([[3.0, 4.0]]), *NORM)
    assert y[0].tolist() == pytest.approx([3 / 12.5**0.5, 4 / 12.5**0.5])


def test_norm_gives_the_sum_behind_the_output(tmo):
    x, residual = torch.ones(1, 2), torch.full((1, 2), 2.0)
    y, kept = tmo.fused_rms_norm(x, residual, None, None, torch.tensor([1.0, 1.0]), 0.0, True)
    assert (y.tolist(), kept.tolist()) == ([[1.0, 1.0]], [[4.0, 4.0]])


def test_storing_the_sum_needs_one(tmo):
    with pytest.raises(RuntimeError, match="needs bias or residual"):
        tmo.fused_rms_norm(torch.ones(1, 2), None, None, None, None, 0.0, True)


def test_quantised_norm_multiplies_by_smooth(tmo):
    codes, scale = tmo.fused_rms_norm(
        torch.ones(1, 2), *NORM, quant_scale=torch.tensor([127.0, 2.0]), dynamic_quant=True
    )
    assert (codes.tolist(), scale.tolist()) == ([[127, 2]], [1.0])


def test_sum_scale_and_normed_rows_follow_the_codes_in_this_order(tmo):
    x, smooth = torch.full((1, 2), 2.0), torch.full((2,), 127.0)
    results = tmo.fused_rms_norm(x, x, None, None, None, 0.0, True, smooth, None, True, True)
    assert [result.tolist() for result in results] == [[[127, 127]], [[4.0, 4.0]], [1.0], [[1.0, 1.0]]]


def test_weights_have_the_dtype_of_the_rows(tmo):
    with pytest.raises(RuntimeError, match="gamma must be one of"):
        tmo.fused_rms_norm(torch.ones(1, 2, dtype=torch.half), None, torch.ones(2), *NORM[2:])


def test_layer_norm_adds_to_gamma(tmo):
    y = tmo.fused_layer_norm(torch.tensor([[1.0, 3.0]]), None, torch.ones(2), *NORM[2:], gamma_add_coef=1.0)
    assert y.tolist() == [[-2.0, 2.0]]


SIN, COS = torch.tensor([[9.0, 9.0], [1.0, 1.0]]), torch.tensor([[9.0, 9.0], [0.0, 0.0]])


def rotated(tmo, x, *options, sin=SIN, cos=COS, **more):
    return tmo.apply_rotary(torch.tensor(x), sin, cos, *options, **more)


def test_sin_comes_first_and_pairs_turn(tmo, int32):
    y = rotated(tmo, [[[2.0, 3.0, 7.0]]], int32([1]), None, True, True, False, 1)
    assert y.tolist() == [[[-3.0, 2.0, 7.0]]]


def test_inverse_turns_back(tmo, int32):
    y = rotated(tmo, [[[2.0, 3.0]]], int32([1]), None, True, True, False, 1, is_inverse=True)
    assert y.tolist() == [[[3.0, -2.0]]]


def test_a_table_that_is_not_repeated_gives_something_else(tmo, int32):
    sin, cos = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert rotated(tmo, [[[2.0, 3.0]]], int32([0]), None, True, True, False, 1, sin=sin, cos=cos).tolist() == [
        [[-3.0, 3.0]]
    ]


def test_halves_turn_when_not_interleaved(tmo, int32):
    sin, cos = torch.ones(1, 4), torch.zeros(1, 4)
    y = rotated(tmo, [[[1.0, 2.0, 3.0, 4.0]]], int32([0]), None, False, True, False, 1, sin=sin, cos=cos)
    assert y.tolist() == [[[-3.0, -4.0, 1.0, 2.0]]]


def test_a_slice_is_written_in_place(tmo, int32):
    x = torch.tensor([[[8.0, 2.0, 3.0]]])
    tmo.apply_rotary(x[..., 1:], SIN, COS, int32([1]), None, True, True, False, 1)
    assert x.tolist() == [[[8.0, -3.0, 2.0]]]


def test_without_positions_every_sequence_begins_at_zero(tmo, int32):
    sin, cos = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    x = [[[1.0, 0.0]]] * 3
    y = rotated(tmo, x, None, int32([0, 2, 3]), True, False, False, 2, sin=sin, cos=cos)
    assert y[:, 0].tolist() == [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]


def test_positions_of_sequences_are_their_starts(tmo, int32):
    sin, cos = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    y = rotated(tmo, [[[1.0, 0.0]]], int32([1]), int32([0, 1]), True, False, False, 1, sin=sin, cos=cos)
    assert y.tolist() == [[[0.0, 1.0]]]


def test_heads_have_at_most_256_dimensions(tmo, int32):
    with pytest.raises(RuntimeError, match="head_size must lie in"):
        tmo.apply_rotary(torch.ones(1, 1, 512), SIN, COS, int32([0]), None, True, True, False, 1)


def test_tables_have_the_dtype_of_the_input(tmo, int32):
    with pytest.raises(RuntimeError, match="sin_cache must be one of"):
        tmo.apply_rotary(torch.ones(1, 1, 2, dtype=torch.bfloat16), SIN, COS, int32([0]), None, True, True, False, 1)


def test_day0_has_no_inverse(day0, int32):
    with pytest.raises(TypeError):
        day0.apply_rotary(torch.ones(1, 1, 2), SIN, COS, int32([0]), None, True, True, False, 1, None, True)


def test_lanes_are_pre_post_comb(tmo):
    mixes = torch.zeros(1, 24)
    mixes[0, :4], mixes[0, 4:8] = 100.0, -100.0
    pre, post, comb = tmo.hc_split_sinkhorn(mixes, torch.ones(3), torch.zeros(24), eps=0.0)
    assert (pre.tolist(), post.tolist()) == ([[1.0] * 4], [[0.0] * 4])
    assert comb.flatten().tolist() == pytest.approx([0.25] * 16)


def test_columns_are_normalised_last(tmo):
    mixes = torch.zeros(1, 24)
    mixes[0, 8:12] = torch.tensor([2.0, 0.0, 0.0, 0.0])
    _, _, comb = tmo.hc_split_sinkhorn(mixes, torch.ones(3), torch.zeros(24), sinkhorn_iter=1, eps=0.0)
    rows = torch.tensor([2.0, 0.0, 0.0, 0.0]).softmax(0)
    assert comb[0, :, 0].tolist() == pytest.approx(
        [(rows[0] / (rows[0] + 0.75)).item()] + [(0.25 / (rows[0] + 0.75)).item()] * 3
    )


def test_pre_scale_multiplies_before_the_scales(tmo):
    _, post, _ = tmo.hc_split_sinkhorn(torch.ones(1, 24), torch.ones(3), torch.zeros(24), pre_scale=torch.zeros(1))
    assert post.tolist() == [[1.0] * 4]


@pytest.mark.parametrize(("shape", "limit"), [((1, 4, 4104), "4096"), ((1, 9, 8), "8")], ids=["hidden", "streams"])
def test_sum_of_streams_has_limits(tmo, shape, limit):
    with pytest.raises(RuntimeError, match=f"at most {limit}"):
        tmo.fused_mul_reduce_sum(torch.ones(shape, dtype=torch.half), torch.ones(shape[:2]))


def test_sum_of_streams(tmo):
    y = tmo.fused_mul_reduce_sum(torch.tensor([[[1.0], [2.0]]]).half(), torch.tensor([[3.0, 4.0]]))
    assert y.tolist() == [[11.0]]


def post_of(tmo, hidden, compute_rms=False):
    comb = torch.zeros(1, 4, 4)
    comb[0, 0, 1] = 2.0
    streams = torch.ones(1, 4, hidden, dtype=torch.bfloat16)
    return tmo.fused_mhc_post(
        streams[:, 0].contiguous(), streams, torch.tensor([[3.0, 0, 0, 0]]), comb, compute_rms, 0.0, None, None
    )


def test_streams_mix_over_the_first_index(tmo):
    assert post_of(tmo, 8)[0, :, 0].tolist() == [3.0, 2.0, 0.0, 0.0]


def test_rms_is_over_all_streams_of_the_output(tmo):
    assert post_of(tmo, 8, True)[1].item() == pytest.approx((13 / 4) ** -0.5)


def test_hidden_is_at_most_7168(tmo):
    with pytest.raises(RuntimeError, match="at most 7168"):
        post_of(tmo, 7176)


def test_day0_takes_a_hidden_size_of_4096_alone(day0):
    with pytest.raises(RuntimeError, match="must be 4096, but is 7168"):
        post_of(day0, 7168)
