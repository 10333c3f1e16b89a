"""Attention, caches and latent prologues of the twin, by hand."""

import math

import pytest
import torch


def attention(tmo, int32, keys, length, q=(1.0,), left=-1, longest=-1, dtype=torch.float32, size=1, **changed):
    cache = torch.tensor(keys, dtype=dtype).view(-1, 1, size, 1)
    tables = torch.arange(cache.shape[0], dtype=torch.int32)[None]
    query = torch.tensor(q, dtype=dtype).view(1, 1, -1, 1)
    given = {"v_cache": None, "out": None, "block_tables": tables, "sink": None, "return_lse": False, "head_size_v": 1}
    given |= changed
    cut = {name: given.pop(name) for name in ("v_cache", "out", "block_tables")}
    tail = (None, None, None, longest, left, -1, 0.0)
    return tmo.single_query_cached_kv_attn(query, cache, *cut.values(), int32([length]), *tail, **given)


def test_values_are_keys_and_nothing_behind_the_length_is_read(tmo, int32):
    assert attention(tmo, int32, [1.0, 3.0, math.nan], 2).item() == 2.0


def test_a_window_keeps_one_more_than_its_left(tmo, int32):
    assert attention(tmo, int32, [1.0, 3.0, 5.0], 3, left=1).item() == 4.0


def test_a_maximum_that_is_too_small_is_believed(tmo, int32):
    assert attention(tmo, int32, [1.0, 3.0, 8.0], 3, longest=2).item() == 2.0


def test_sink_is_in_the_denominator_alone(tmo, int32):
    sink = torch.tensor([math.log(2.0)])
    assert attention(tmo, int32, [4.0, 8.0], 2, sink=sink).item() == pytest.approx(3.0)


def test_lse_is_of_natural_logarithms(tmo, int32):
    _, lse = attention(tmo, int32, [4.0, 8.0], 2, return_lse=True)
    assert (lse.shape, lse.item()) == ((1, 1, 1), pytest.approx(math.log(2.0)))


def test_lse_of_a_call_with_a_sink_is_undefined(tmo, int32):
    assert attention(tmo, int32, [4.0], 1, sink=torch.zeros(1), return_lse=True)[1].isnan().all()


def test_a_row_without_keys_gives_zero_and_minus_infinity(tmo, int32):
    out, lse = attention(tmo, int32, [math.nan], 0, return_lse=True)
    assert (out.item(), lse.item()) == (0.0, -math.inf)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 128), (torch.bfloat16, 256)])
def test_heads_of_a_call_have_a_limit(tmo, int32, dtype, most):
    with pytest.raises(RuntimeError, match=f"must be at most {most}, but is 257"):
        attention(tmo, int32, [1.0], 1, q=(1.0,) * 257, dtype=dtype)


def test_blocks_have_sizes_of_a_list(tmo, int32):
    with pytest.raises(RuntimeError, match="block_size must be one of"):
        attention(tmo, int32, [1.0] * 3, 1, size=3)


def test_width_of_values_must_be_known(tmo, int32):
    with pytest.raises(RuntimeError, match="need out or head_size_v"):
        attention(tmo, int32, [1.0], 1, head_size_v=-1)


def test_a_table_entry_outside_the_cache_is_an_error(tmo, int32):
    with pytest.raises(RuntimeError, match="block_tables must lie in"):
        attention(tmo, int32, [1.0], 1, block_tables=int32([[-1]]))


def test_output_has_the_dtype_of_the_query(tmo, int32):
    assert attention(tmo, int32, [1.0], 1).dtype == torch.float32


def test_neighbouring_heads_share_keys(tmo, int32):
    cache, q = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), torch.ones(1, 1, 4, 1)
    tail = (None, None, None, -1, -1, -1, 1.0)
    out = tmo.single_query_cached_kv_attn(q, cache, cache, None, int32([[0]]), int32([1]), *tail)
    assert out.flatten().tolist() == [1.0, 1.0, 2.0, 2.0]


def test_parts_merge_by_their_lse(tmo):
    out, lse = torch.tensor([[[[0.0]]]]), torch.tensor([[[0.0]]])
    tmo.update_out_and_lse(out, lse, torch.tensor([[[[4.0]]]]), torch.tensor([[[math.log(3.0)]]]))
    assert (out.item(), lse.item()) == (pytest.approx(3.0), pytest.approx(math.log(4.0)))


def two_pools(tmo, int32, out, sink, **more):
    q, cache, table = torch.ones(1, 1, 1, 1), torch.tensor([2.0, 6.0]).view(2, 1, 1, 1), int32([[0]])
    head = (q, cache, cache, out, table, int32([[1]]), None, int32([1]), int32([1]), None, None, None, None, sink)
    return tmo.sliding_window_compress_attention(*head, 0.0, 1, 1, **more)


def test_two_pools_make_one_softmax_without_a_sink(tmo, int32):
    assert two_pools(tmo, int32, torch.zeros(1, 1, 1, 1), None).item() == pytest.approx(4.0)


def test_two_pools_with_a_sink_are_undefined(tmo, int32):
    assert two_pools(tmo, int32, torch.zeros(1, 1, 1, 1), torch.zeros(1)).isnan().all()


def test_two_pools_need_an_output_or_its_width(tmo, int32):
    with pytest.raises(RuntimeError, match="cannot make an output of head_size -1"):
        two_pools(tmo, int32, None, None)


def flash(tmo, int32, keys, queries, out=None, causal=True, **more):
    k = torch.tensor(keys).half().view(-1, 1, 1)
    q = torch.zeros(queries, 1, 1).half()
    bounds = (int32([0, queries]), int32([0, len(keys)]))
    return tmo.flash_attention(q, k, k, out, *bounds, None, None, queries, len(keys), 1.0, causal, **more)


def test_dense_attention_is_causal(tmo, int32):
    assert flash(tmo, int32, [2.0, 4.0], 2).flatten().tolist() == [2.0, 3.0]


def test_a_causal_mask_over_more_keys_is_not_simulated(tmo, int32):
    with pytest.raises(NotImplementedError, match="more_keys_than_queries"):
        flash(tmo, int32, [2.0, 4.0], 1)


def test_dense_output_may_not_be_the_query(tmo, int32):
    q, lens = torch.zeros(1, 1, 1).half(), int32([0, 1])
    with pytest.raises(RuntimeError, match="out must not be q"):
        tmo.flash_attention(q, q.clone(), q.clone(), q, lens, lens, None, None, 1, 1, 1.0, True)


def test_lse_of_packed_rows_is_by_head(tmo, int32):
    _, lse = flash(tmo, int32, [2.0, 4.0], 2, return_lse=True)
    assert lse.tolist() == [[0.0, pytest.approx(math.log(2.0))]]


def test_cache_is_by_head_before_offset(tmo, int32):
    cache = torch.zeros(2, 2, 2, 1)
    tmo.reshape_paged_cache(torch.tensor([[[1.0], [2.0]]]), None, cache, None, int32([3]))
    assert (cache[1, 0, 1].item(), cache[1, 1, 1].item(), cache.sum().item()) == (1.0, 2.0, 3.0)


def test_a_negative_slot_is_skipped(tmo, int32):
    cache = torch.zeros(1, 1, 2, 1)
    tmo.reshape_paged_cache(torch.ones(1, 1, 1), None, cache, None, int32([-1]))
    assert cache.sum().item() == 0.0


def test_direction_reads_into_the_rows(tmo, int32):
    rows = torch.zeros(1, 1, 1)
    tmo.reshape_paged_cache(rows, None, torch.tensor([3.0, 4.0]).view(1, 1, 2, 1), None, int32([1]), True)
    assert rows.item() == 4.0


def test_values_and_their_cache_go_together(tmo, int32):
    rows, cache = torch.ones(1, 1, 1), torch.zeros(1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="must be None together"):
        tmo.reshape_paged_cache(rows, rows, cache, None, int32([0]))


def test_slots_are_int32(tmo):
    with pytest.raises(RuntimeError, match="slot_mapping must be one of"):
        tmo.reshape_paged_cache(torch.ones(1, 1, 1), None, torch.zeros(1, 1, 1, 1), None, torch.zeros(1).long())


def test_contexts_are_read_one_after_another(tmo, int32):
    key, cache = torch.zeros(3, 1, 1), torch.arange(4.0).view(2, 1, 2, 1)
    tmo.reshape_from_cache(key, None, cache, None, int32([1, 2]), 2, block_tables=int32([[1], [0]]))
    assert key.flatten().tolist() == [2.0, 0.0, 1.0]


def test_quantised_cache_has_a_scale_for_each_token_and_head(tmo, int32):
    cache, scales = torch.zeros(1, 1, 2, 2, dtype=torch.int8), torch.zeros(1, 1, 2)
    tmo.quant_to_paged_cache(torch.tensor([[[254.0, -127.0]]]), None, cache, None, scales, None, int32([1]))
    assert (cache[0, 0, 1].tolist(), scales.flatten().tolist()) == ([127, -64], [0.0, 2.0])


def test_a_negative_slot_is_not_skipped_when_quantising(tmo, int32):
    cache, scales = torch.zeros(1, 1, 2, 1, dtype=torch.int8), torch.zeros(1, 1, 2)
    with pytest.raises(RuntimeError, match=r"must lie in \[0, 2\)"):
        tmo.quant_to_paged_cache(torch.ones(1, 1, 1), None, cache, None, scales, None, int32([-1]))


def test_quantised_cache_reads_back_by_token(tmo, int32):
    key, cache, scales = torch.zeros(1, 1, 1), torch.full((1, 1, 1, 1), 3, dtype=torch.int8), torch.full((1, 1, 1), 2.0)
    tmo.dequant_from_paged_cache(key, None, cache, None, scales, None, int32([1]), 1, None, int32([[0]]), 1)
    assert key.item() == 6.0


def prologue(tmo, int32, width=2, **changed):
    one = torch.ones(1, dtype=torch.bfloat16)
    given = {
        "input_q": torch.full((1, 1, 1), 3.0).bfloat16(),
        "gamma": one,
        "smooth_quant_scale": None,
        "weight_b": torch.tensor([[[1.0], [0.0], [1.0], [0.0]]]).bfloat16(),
        "weight_b_scale": None,
        "sin": torch.ones(1, width).bfloat16(),
        "cos": torch.zeros(1, width).bfloat16(),
        "position_id": int32([0]),
        "eps": 0.0,
        "store_norm": True,
    }
    return tmo.fused_mla_q_v2(**given | changed)


def test_heads_are_normed_and_turned_at_their_end(tmo, int32):
    q, norm = prologue(tmo, int32)
    assert (q.flatten().tolist(), norm.item()) == (
        [pytest.approx(2**0.5, rel=1e-2), 0.0, 0.0, pytest.approx(2**0.5, rel=1e-2)],
        1.0,
    )


def test_int8_weights_need_both_scales(tmo, int32):
    with pytest.raises(RuntimeError, match="needs smooth_quant_scale and weight_b_scale, both"):
        prologue(tmo, int32, weight_b=torch.ones(1, 4, 1, dtype=torch.int8), weight_b_scale=torch.ones(1, 4))


def latent(tmo, int32, cache, scale, **more):
    kv, half = torch.tensor([[[3.0, 5.0, 7.0]]]).half(), torch.ones(1, 2).half()
    tmo.fused_mla_kv(kv, half, half * 0, int32([0]), half[0, :1], cache, scale, int32([1]), eps=0.0, **more)


def test_latent_is_normed_its_tail_turned_and_the_row_stored(tmo, int32):
    cache = torch.zeros(1, 1, 2, 3).half()
    latent(tmo, int32, cache, None, quant_mode="none")
    assert cache[0, 0].tolist() == [[0.0, 0.0, 0.0], [1.0, -7.0, 5.0]]


def test_a_cache_without_scales_is_not_quantised_by_the_default_mode(tmo, int32):
    with pytest.raises(RuntimeError, match="quant_mode must be one of"):
        latent(tmo, int32, torch.zeros(1, 1, 2, 3).half(), None)
