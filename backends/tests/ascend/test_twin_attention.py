"""The compressor, the indexers and the attention operators as the vendor documents them, by hand."""

import math

import pytest
import torch
from torch import tensor


def ints(*values):
    return tensor(values, dtype=torch.int32)


RATIO, D, H = 4, 128, 1024


def compress(call, x, state, start=0, name="_C_ascend::compressor", **more):
    """Request 0 alone, of the indexer's kind: two halves of 128 channels, norm weight one, no rotation."""
    tokens = x.shape[0]
    rows = min(tokens, tokens // RATIO + 1)
    wkv, wgate = torch.zeros(2 * D, H), torch.zeros(2 * D, H)
    wkv[:, 0], wgate[:, 1] = 1.0, 1.0  # kv is x's first channel, the score its second
    given = {
        "wkv": wkv.bfloat16(),
        "wgate": wgate.bfloat16(),
        "ape": torch.zeros(RATIO, 2 * D),
        "norm_weight": torch.ones(D).bfloat16(),
        "rope_sin": torch.zeros(rows, 64),
        "rope_cos": torch.ones(rows, 64),
        "state_block_table": ints([1, 2, 3]),
        "cu_seqlens": ints(0, tokens),
        "start_pos": ints(start),
        "seqused": None,
    }
    sizes = {"rope_head_dim": 64, "cmp_ratio": RATIO, "coff": 2, "rotary_mode": 2, "cache_mode": 1, "norm_eps": 0.0}
    return call(name, x=x, state_cache=state, **given | sizes | more)


def tokens(kv, scores=None):
    x = torch.zeros(len(kv), H)
    x[:, 0] = tensor(kv)
    if scores is not None:
        x[:, 1] = tensor(scores)
    return x.bfloat16()


def states():
    return torch.zeros(4, 8, 4 * D)


def test_every_token_is_stored_with_ape_in_its_score(call):
    state, ape = states(), torch.arange(4.0).view(4, 1).expand(4, 2 * D).contiguous()
    compress(call, tokens([1.0, 2.0], [10.0, 20.0]), state, start=7, ape=ape)
    assert state[1, 7, [0, D, 2 * D, 3 * D]].tolist() == [1.0, 1.0, 13.0, 13.0]  # position 7, ape[3]
    assert state[2, 0, [0, 2 * D]].tolist() == [2.0, 20.0]  # position 8, ape[0]


def test_rows_that_no_window_closes_are_padding(call):
    out = compress(call, tokens([1.0] * 5), states())
    assert out.isnan().any(1).tolist() == [False, True]
    assert compress(call, tokens([1.0]), states(), start=2).isnan().all()


def test_first_window_has_nothing_before_it(call):
    assert compress(call, tokens([3.0] * 4), states())[0].tolist() == [1.0] * D  # normalised


def test_window_overlaps_the_one_before_it_by_the_first_half(call):
    state = states()
    compress(call, tokens([2.0] * 4, [0.0] * 4), state)
    x = tokens([0.0] * 4, [math.log(3.0)] * 4)
    wide = torch.zeros(2 * D, H)
    wide[0, 0] = wide[D, 0] = 1.0  # channel 0 alone is not zero
    wide[1, 2] = wide[D + 1, 2] = 1.0
    state[1, :4, 1:D] = 0.0
    x[:, 2] = 1.0
    out = compress(call, x, state, start=4, wkv=wide.bfloat16(), norm_eps=1e-12)
    before, now = 2.0 / 4, 3.0 / 4  # softmax over 1 + 1 + 1 + 1 and 3 + 3 + 3 + 3
    assert float(out[0, 1] / out[0, 0]) == pytest.approx(now / before, rel=0.02)


def test_block_0_is_not_written(call):
    state = states()
    compress(call, tokens([1.0] * 2), state, state_block_table=ints([0]))
    assert state.abs().sum() == 0


def test_unused_tail_is_neither_written_nor_compressed(call):
    state = states()
    out = compress(call, tokens([1.0] * 4), state, seqused=ints(3))
    assert out.isnan().all()
    assert (state[1, 2].abs().sum() > 0, state[1, 3].abs().sum()) == (True, 0)


def test_sin_comes_before_cos_and_turns_neighbours(call):
    swapped = {"rope_sin": torch.ones(2, 64), "rope_cos": torch.zeros(2, 64)}
    out = compress(call, tokens([3.0] * 4), states(), **swapped)[0, -64:]
    assert out[:4].tolist() == [-1.0, 1.0, -1.0, 1.0]


def test_extensions_differ_in_the_dtypes_of_norm_and_rope(call):
    with pytest.raises(RuntimeError, match="norm_weight"):
        compress(call, tokens([1.0] * 4), states(), name="custom::compressor")
    with pytest.raises(RuntimeError, match="norm_weight"):
        compress(call, tokens([1.0] * 4), states(), chip="a5")


@pytest.mark.parametrize(
    "wrong",
    [{"rotary_mode": 1}, {"cache_mode": 2}, {"rope_sin": torch.zeros(1, 64), "rope_cos": torch.ones(1, 64)}],
    ids=["rotary_mode", "cache_mode", "rope rows"],
)
def test_compressor_refuses(call, wrong):
    with pytest.raises(RuntimeError, match=next(iter(wrong))):
        compress(call, tokens([1.0] * 4), states(), **wrong)


def prepared(call, **more):
    """Two requests at 7 and 9 with one token each: the first closes a window."""
    table = torch.arange(16.0).view(16, 1).expand(16, 64)
    given = {"rope_cos": table, "rope_sin": -table, "cu_seqlens": ints(0, 1, 2), "start_pos": ints(7, 9)}
    sizes = {"kv_block_size": 128, "slot_mapping_format": 2, "compress_ratio": 4, "num_compressed_tokens": 2}
    tables = {"kv_block_table": ints([5], [6]), "num_reqs_actual": 2}
    return call("_C_ascend::compressor_metadata", **given | sizes | tables | more)


def test_metadata_of_rows_and_of_padding(call):
    cos, sin, slots = prepared(call)
    assert cos.shape == (2, 1, 1, 64)
    assert (cos[:, 0, 0, 0].tolist(), sin[:, 0, 0, 0].tolist()) == ([4.0, 1.0], [-4.0, 0.0])  # the window's first token
    assert slots.tolist() == [[5, 1], [-1, 127]]


def test_metadata_has_flat_slots_on_the_newest_chip(call):
    assert prepared(call, chip="a5", slot_mapping_format=1)[2].tolist() == [5 * 128 + 1, -1]


N, WIDE = 4, 512


def page_of(*values):
    """A page of 16 rows, which are constant."""
    page = torch.zeros(1, 16, 1, WIDE)
    page[0, : len(values), 0] = tensor(values).view(-1, 1)
    return page


class Attention:
    """One request with one token at position 7, window 4, values equal to positions, scores zero, no sink."""

    def __init__(self, call, **more):
        self.call = call
        pools = {
            "ori_kv": torch.cat((page_of(), page_of(*map(float, range(8))))).bfloat16(),
            "ori_block_table": ints([1]),
        }
        lengths = {"cu_seqlens_q": ints(0, 1), "seqused_kv": ints(8)}
        sinks = {"sinks": torch.full((N,), -1e4)}
        self.given = {"q": torch.zeros(1, N, WIDE).bfloat16(), **pools, **lengths, **sinks} | more

    def metadata(self, **more):
        given = {name: self.given[name] for name in ("cu_seqlens_q", "seqused_kv")}
        sizes = {"num_heads_q": N, "num_heads_kv": 1, "head_dim": WIDE, "batch_size": 1, "max_seqlen_q": 1}
        chosen = {"cmp_topk": 512 if "cmp_sparse_indices" in self.given else 0, "has_cmp_kv": "cmp_kv" in self.given}
        window = {"layout_q": "TND", "ori_win_left": 3, "max_seqlen_kv": 8, "cmp_ratio": self.given.get("cmp_ratio", 4)}
        return self.call("_C_ascend::npu_sparse_attn_sharedkv_metadata", **given | sizes | chosen | window | more)

    def out(self, metadata=None, **more):
        given = self.given | {"layout_q": "TND", "ori_win_left": 3, "softmax_scale": 1.0, **more}
        metadata = self.metadata() if metadata is None else metadata
        return self.call("_C_ascend::npu_sparse_attn_sharedkv", metadata=metadata, **given)[0]


CMP = {"cmp_kv": page_of(100.0, 200.0, 300.0).bfloat16(), "cmp_block_table": ints([0]), "cmp_ratio": 4}


def chosen(*values):
    indices = torch.full((1, 1, 512), -1, dtype=torch.int32)
    indices[0, 0, : len(values)] = tensor(values)
    return {**CMP, "cmp_sparse_indices": indices}


@pytest.mark.parametrize(
    ("more", "mean"),
    [({}, 5.5), (CMP, (22 + 300) / 6), (chosen(1, 2, -1), (22 + 200) / 5)],
    ids=["window", "and all that is closed", "and what was chosen of it"],
)
def test_one_softmax_over_window_and_compressed_rows(call, more, mean):
    assert Attention(call, **more).out()[0, 0, 0].item() == pytest.approx(mean, rel=4e-3)


def test_sink_takes_its_share_unscaled(call):
    one = Attention(call, sinks=torch.full((N,), math.log(4.0)))
    assert one.out()[0, 0, 0].item() == pytest.approx(5.5 / 2, rel=4e-3)


def test_queries_behind_the_last_request_are_not_written(call):
    one = Attention(call, q=torch.zeros(2, N, WIDE).bfloat16())
    assert one.out().isnan().flatten(1).all(1).tolist() == [False, True]


@pytest.mark.parametrize(
    "stale",
    [
        {"cu_seqlens_q": ints(0, 0)},
        {"seqused_kv": ints(7)},
        {"ori_win_left": 128},
        {"has_cmp_kv": True},
        {"cmp_topk": 512},
    ],
    ids=["queries", "keys", "window", "compressed rows", "chosen rows"],
)
def test_metadata_of_another_call_is_noticed(call, stale):
    one = Attention(call)
    with pytest.raises(RuntimeError, match=f"metadata has {next(iter(stale))}"):
        one.out(one.metadata(**stale))


def test_metadata_is_no_tensor_of_zeros(call):
    with pytest.raises(RuntimeError, match="was not made by"):
        Attention(call).out(torch.zeros(1024, dtype=torch.int32))


@pytest.mark.parametrize("name", ["sinks", "metadata"])
def test_what_the_schema_calls_optional_is_required(call, name):
    one = Attention(call)
    given = {"metadata": one.metadata(), "sinks": one.given["sinks"], name: None}
    call_of = {**one.given, **given, "layout_q": "TND", "ori_win_left": 3}
    with pytest.raises(RuntimeError, match=f"{name} must be provided"):
        call("_C_ascend::npu_sparse_attn_sharedkv", **call_of)


def test_pages_of_eight_rows_are_refused(call):
    with pytest.raises(RuntimeError, match="pages of 8 rows"):
        Attention(call, ori_kv=torch.zeros(2, 8, 1, WIDE).bfloat16()).out()


def indexed(call, lengths_q, count=4, **more):
    """Two requests of 2 and 1 queries over keys 0..3 and 0..1, whose products fall with the position."""
    key = torch.zeros(2, 16, 1, 128)
    key[:, :, 0, 0] = torch.arange(16, 0, -1).float()
    query = torch.zeros(3, 1, 128)
    query[:, :, 0] = 1.0
    given = {"key": key.bfloat16(), "query": query.bfloat16(), "weights": torch.ones(3, 1).bfloat16()}
    lengths = {
        "actual_seq_lengths_query": lengths_q,
        "actual_seq_lengths_key": ints(4, 2),
        "block_table": ints([0], [1]),
    }
    layouts = {"layout_query": "TND", "layout_key": "PA_BSND", "sparse_count": count}
    return call("npu::npu_lightning_indexer", **given | lengths | layouts | more)[0].squeeze(1).tolist()


def test_indexer_takes_ends_without_a_leading_zero(call):
    assert indexed(call, ints(2, 3), count=3) == [[0, 1, 2], [0, 1, 2], [0, 1, -1]]
    with pytest.raises(RuntimeError, match="3 requests, 2 lengths"):
        indexed(call, ints(0, 2, 3))


def test_masked_keys_fill_the_tail_before_minus_one(call):
    assert indexed(call, ints(2, 3)) == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, -1, -1]]
    # The first query is at position 2: key 3 is behind its causal limit and stands in the tail all the same.


def test_indexer_refuses_counts_between_its_two_ranges(call):
    with pytest.raises(RuntimeError, match="sparse_count is 2560"):
        indexed(call, ints(2, 3), count=2560)


def quantised(call, lengths, ratio=4, made_for=None):
    """One request of one query over compressed keys; lengths of keys are uncompressed."""
    key = torch.zeros(1, 16, 1, 128, dtype=torch.int8)
    key[0, :, 0, 0] = torch.arange(1, 17)
    given = {"query": torch.ones(1, 64, 128, dtype=torch.int8), "key": key}
    scales = {"query_dequant_scale": torch.ones(1, 64).half(), "key_dequant_scale": torch.ones(1, 16, 1).half()}
    common = {"actual_seq_lengths_query": ints(1), "actual_seq_lengths_key": ints(lengths)}
    layouts = {"layout_query": "TND", "layout_key": "PA_BSND", "sparse_count": 4, "cmp_ratio": ratio}
    modes = {"query_quant_mode": 0, "key_quant_mode": 0}
    sizes = {"num_heads_q": 64, "num_heads_k": 1, "head_dim": 128}
    due = common if made_for is None else common | {"actual_seq_lengths_key": ints(made_for)}
    metadata = call("_C_ascend::npu_vllm_quant_lightning_indexer_metadata", **due | layouts | modes | sizes)
    given |= {"weights": torch.ones(1, 64).half(), "block_table": ints([0]), "metadata": metadata}
    return call("_C_ascend::npu_vllm_quant_lightning_indexer", **given | scales | common | layouts | modes)[0].tolist()


def test_lengths_of_keys_are_divided_by_the_ratio(call):
    assert quantised(call, 11) == [[[0, 1, -1, -1]]]
    assert quantised(call, 40) == [[[6, 7, 8, 9]]]


def test_indexer_metadata_is_due_for_every_step(call):
    with pytest.raises(RuntimeError, match="another call"):
        quantised(call, 11, made_for=10)


def latent(call, indices, **more):
    """Two queries of one request over keys 0..3, whose values are their positions."""
    key = torch.zeros(1, 16, 1, WIDE)
    key[0, :, 0] = torch.arange(16.0).view(-1, 1)
    rope = {"query_rope": torch.zeros(2, 1, 64).bfloat16(), "key_rope": torch.zeros(1, 16, 1, 64).bfloat16()}
    given = {
        "query": torch.zeros(2, 1, WIDE).bfloat16(),
        "key": key.bfloat16(),
        "value": key.bfloat16(),
        "scale_value": 1.0,
    }
    lengths = {"actual_seq_lengths_query": ints(2), "actual_seq_lengths_kv": ints(4), "block_table": ints([0])}
    layouts = {"layout_query": "TND", "layout_kv": "PA_BSND", "attention_mode": 2}
    given |= rope | lengths | layouts | {"sparse_indices": ints(*indices).unsqueeze(1)}
    return call("npu::npu_sparse_flash_attention", **given | more)[0][:, 0, 0].tolist()


def test_indices_are_read_up_to_the_first_minus_one_and_masked_by_position(call):
    # Query 0 is at position 2: key 3 is masked. Query 1 stops at -1.
    assert latent(call, [[0, 2, 3], [1, -1, 3]]) == [1.0, 1.0]


def test_default_attention_mode_is_refused(call):
    with pytest.raises(RuntimeError, match="attention_mode is 0"):
        latent(call, [[0], [0]], attention_mode=0)
