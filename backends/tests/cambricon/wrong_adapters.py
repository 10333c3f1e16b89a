"""Adapters that fall into a trap of tmo: each one change, found on the twin by the calls of a kernel.

`trials.py` applies one at a time: to what a call of tmo is given or gives back, to a part of an adapter, to an argument
that an adapter would overlook, or to a refusal that it would not make.
"""

import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from isolith.numerics.pages import read_entries, slots_of_items
from isolith_backends.cambricon.cache import WRITE
from isolith_backends.cambricon.quant import SCALED_QUANTIZE

Given = dict[str, Any]


def put(**values: Any) -> Callable[[Given], Given]:
    """Other values for some arguments."""
    return lambda given: given | values


def on(name: str, change: Callable[[Any], Any]) -> Callable[[Given], Given]:
    """A function of one argument."""
    return lambda given: given | {name: None if given.get(name) is None else change(given[name])}


def exchanged(first: str, second: str) -> Callable[[Given], Given]:
    """Two arguments the other way round."""
    return lambda given: given | {first: given[second], second: given[first]}


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16).to(tensor.dtype)


def other_repeat(table: torch.Tensor) -> torch.Tensor:
    """c0 c0 c1 c1 .. -> c0 c1 .. c0 c1 .."""
    return torch.cat((table[..., ::2], table[..., ::2]), dim=-1).contiguous()


def halves_exchanged(x: torch.Tensor) -> torch.Tensor:
    return torch.cat(tuple(reversed(x.chunk(2, dim=-1))), dim=-1).contiguous()


WRONG = {
    # what is wrong: operator, tmo's function, dtype, change
    "epsilon": ("rms_norm", "fused_rms_norm", "bfloat16", put(eps=1e-5)),
    "gamma_rounded": ("rms_norm", "fused_rms_norm", "bfloat16", on("gamma", rounded)),
    "gamma_left_out": ("rms_norm", "fused_rms_norm", "bfloat16", put(gamma=None)),
    "cos_before_sin": ("rope", "apply_rotary", "bfloat16", exchanged("sin_cache", "cos_cache")),
    "tables_rounded": (
        "rope",
        "apply_rotary",
        "bfloat16",
        lambda g: on("sin_cache", rounded)(on("cos_cache", rounded)(g)),
    ),
    "tables_tiled": ("rope", "apply_rotary", "bfloat16", on("sin_cache", other_repeat)),
    "halves_as_neighbours": ("rope", "apply_rotary", "bfloat16", put(interleaved=True)),
    "neighbours_as_halves": ("rope", "apply_rotary", "bfloat16", put(interleaved=False)),
    "forward_for_inverse": ("rope", "apply_rotary", "bfloat16", on("sin_cache", torch.abs)),
    "positions_of_zero": ("rope", "apply_rotary", "bfloat16", on("position_ids", torch.zeros_like)),
    "hadamard_unscaled": ("hadamard", "matmul", "bfloat16", put(alpha=1.0)),
    "mixes_not_normalised": ("hc_pre", "hc_split_sinkhorn", "bfloat16", put(pre_scale=None)),
    "nineteen_iterations": ("hc_pre", "hc_split_sinkhorn", "bfloat16", put(sinkhorn_iter=19)),
    "another_eps_of_sinkhorn": ("hc_pre", "hc_split_sinkhorn", "bfloat16", put(eps=1e-3)),
    "base_left_out": ("hc_pre", "hc_split_sinkhorn", "bfloat16", on("hc_base", torch.zeros_like)),
    "comb_transposed": ("hc_post", "fused_mhc_post", "bfloat16", on("comb", lambda c: c.mT.contiguous())),
    "post_rounded": ("hc_post", "fused_mhc_post", "bfloat16", on("post", rounded)),
    "bias_left_out": ("moe_gate", "moe_softplus_topk", "float32", put(bias=None)),
    "scale_left_out": ("moe_gate", "moe_softplus_topk", "float32", put(route_scale=1.0)),
    "no_groups": ("moe_gate", "moe_sigmoid_topk", "float32", put(num_expert_group=-1)),
    "one_group_more": ("moe_gate", "moe_sigmoid_topk", "float32", on("topk_group", lambda n: n + (n > 0))),
    "normalised_twice": ("moe_gate", "moe_sigmoid_topk", "float32", put(normalize=True)),
    "table_ignored": ("moe_hash_gate", "moe_softplus_topk", "float32", put(tid2eid=None, input_ids=None)),
    "table_reversed": (
        "moe_hash_gate",
        "moe_softplus_topk",
        "float32",
        on("tid2eid", lambda t: t.flip(1).contiguous()),
    ),
    "first_row_of_the_table": ("moe_hash_gate", "moe_softplus_topk", "float32", on("input_ids", torch.zeros_like)),
    "dropped_pairs_counted": (
        "moe_unpermute",
        "moe_combine_result",
        "bfloat16",
        on("gather_ids", lambda i: i.clamp(max=0)),
    ),
    "residual_left_out": ("moe_unpermute", "moe_combine_result", "bfloat16", put(residual=None)),
    "weights_left_out": ("moe_unpermute", "moe_combine_result", "bfloat16", on("reduce_weight", torch.ones_like)),
    "up_before_gate": ("swiglu", "moe_active", "bfloat16", on("input", halves_exchanged)),
    "no_clamp": ("swiglu", "moe_active", "bfloat16", put(swiglu_limit=0)),
    "clamp_of_one_more": (
        "swiglu",
        "moe_active",
        "bfloat16",
        lambda g: g | {"swiglu_limit": g.get("swiglu_limit", 0) + 1},
    ),
    "sums_as_counts": ("grouped_gemm", "group_gemm", "bfloat16", on("group_list", lambda c: c.cumsum(0).int())),
    "counts_shifted": ("grouped_gemm", "group_gemm", "bfloat16", on("group_list", lambda c: c.roll(1))),
    "scales_of_rows_left_out": ("grouped_gemm", "smooth_quant_group_gemm", "bfloat16", on("a_scale", torch.ones_like)),
    "scales_of_columns_reversed": (
        *("grouped_gemm", "smooth_quant_group_gemm", "bfloat16"),
        on("b_scale", lambda s: s.flip(1).contiguous()),
    ),
    "minus_one_as_an_expert": (
        "fused_moe",
        "moe_gen_idx",
        "bfloat16",
        on("expert_id", lambda i: i - (i == i.max()).int()),
    ),
    "sums_without_the_zero": ("fused_moe", "moe_combine_result", "bfloat16", on("cusum_token_count", lambda c: c[1:])),
    "rows_in_token_order": ("fused_moe", "moe_expand_input", "bfloat16", on("gather_idx", lambda i: i.sort().values)),
    "places_as_rows": ("fused_moe", "moe_combine_result", "bfloat16", on("gather_ids", lambda i: i.sort().values)),
    "smooth_left_out": ("act_quant_int8", "scaled_quantize", "bfloat16", put(scale=None)),
    "scale_of_row_left_out": ("quant_linear", "scaled_matmul", "bfloat16", on("a_scale", torch.ones_like)),
    "slots_off_by_one": ("kv_cache_write", "reshape_paged_cache", "bfloat16", on("slot_mapping", lambda s: s - 1)),
    "skipped_rows_in_slot_0": (
        *("kv_cache_write", "reshape_paged_cache", "bfloat16"),
        on("slot_mapping", lambda s: s.clamp(min=0)),
    ),
    "direction_forgotten": ("kv_cache_read", "reshape_paged_cache", "bfloat16", put(direction=False)),
    "one_key_less": (
        "sparse_attn",
        "single_query_cached_kv_attn",
        "bfloat16",
        on("context_lens", lambda n: (n - 1).clamp(min=1)),
    ),
    "a_window_beside_the_table": ("sparse_attn", "single_query_cached_kv_attn", "bfloat16", put(windows_size_left=3)),
    "sink_left_out": ("sparse_attn", "single_query_cached_kv_attn", "bfloat16", put(sink=None)),
    "scale_of_attention": ("hybrid_attention", "single_query_cached_kv_attn", "bfloat16", put(softmax_scale=1.0)),
    "whole_table_counted": (
        *("hybrid_attention", "single_query_cached_kv_attn", "bfloat16"),
        lambda g: g | {"context_lens": torch.full_like(g["context_lens"], g["block_tables"].shape[1])},
    ),
    "lengths_after_compression": (
        *("lightning_indexer", "masked_indexer_select_paged_kv", "bfloat16"),
        lambda g: g | {"k_context_lens": g["k_context_lens"] // g["compress_ratio"]},
    ),
    "physical_slots": (
        *("lightning_indexer", "masked_indexer_select_paged_kv", "bfloat16"),
        lambda g: g | {"kv_cache_block_table": g["kv_cache_block_table"].flip(1).contiguous()},
    ),
    "int64_rows_of_the_table": ("moe_hash_gate", "moe_softplus_topk", "float32", on("tid2eid", torch.Tensor.long)),
    "int64_positions": ("rope", "apply_rotary", "bfloat16", on("position_ids", torch.Tensor.long)),
    "sum_over_all_experts": (
        *("moe_gate", "moe_sigmoid_topk", "float32"),
        put(normalize=True, normed_by="sigmoid_logit"),
    ),
    "matrix_in_another_order": ("hadamard", "matmul", "bfloat16", on("b", lambda m: m.flip(0))),
    "norm_of_the_output_asked_for": ("hc_post", "fused_mhc_post", "bfloat16", put(compute_rms=True)),
    "gathered_twice": (
        *("fused_moe", "group_gemm", "bfloat16"),
        lambda g: g | {"expand_idx": torch.arange(len(g["a"]), dtype=torch.int32, device=g["a"].device) // 2},
    ),
    "one_row_promised": ("grouped_gemm", "group_gemm", "bfloat16", put(max_in_group_list=1)),
    "rows_of_no_expert_read": ("fused_moe", "moe_combine_result", "bfloat16", on("expert_size", lambda n: n + 1)),
    "weights_after_down_left_out": (
        *("fused_moe", "moe_combine_result", "bfloat16"),
        on("reduce_weight", torch.ones_like),
    ),
    "no_factor_for_rows": ("fused_moe", "moe_quantize", "bfloat16", put(smooth=None)),
    "gated_in_the_quantisation": ("fused_moe", "moe_quantize", "bfloat16", put(is_gated=True)),
    "weight_as_columns": ("quant_linear", "matmul", "bfloat16", put(trans_b=False)),
    "dtype_of_the_product": ("quant_linear", "scaled_matmul", "bfloat16", put(output_dtype=torch.float16)),
    "pages_of_gpus": (
        *("kv_cache_write", "reshape_paged_cache", "bfloat16"),
        on("k_cache", lambda c: c.transpose(1, 2).contiguous()),
    ),
    "pages_of_two_entries": (
        *("sparse_attn", "single_query_cached_kv_attn", "bfloat16"),
        on("k_cache", lambda c: c.reshape(-1, 1, 2 - len(c) % 2, c.shape[-1])),
    ),
    "one_list_for_all_tokens": (
        *("sparse_attn", "single_query_cached_kv_attn", "bfloat16"),
        on("block_tables", lambda t: t[:1].expand_as(t).contiguous()),
    ),
    "a_window_to_the_right": (
        "sparse_attn",
        "single_query_cached_kv_attn",
        "bfloat16",
        put(windows_size_right=0),
    ),
    "a_maximum_below_the_lengths": ("sparse_attn", "single_query_cached_kv_attn", "bfloat16", put(max_context_len=1)),
    # The logarithm of a call with a sink is not to be merged.
    "a_sink_in_every_call": (
        *("hybrid_attention", "single_query_cached_kv_attn", "bfloat16"),
        lambda g: g | {"sink": torch.zeros(g["q"].shape[2], device=g["q"].device)},
    ),
    "latents_of_zero": (
        *("mla_attention", "single_query_cached_kv_attn", "bfloat16"),
        on("block_tables", torch.zeros_like),
    ),
    "rounded_scores": ("lightning_indexer", "masked_indexer_select_paged_kv", "float16", put(is_score_float=False)),
    "weights_without_a_sign": (
        *("lightning_indexer", "masked_indexer_select_paged_kv", "bfloat16"),
        on("weights", torch.abs),
    ),
    "short_state_table": (
        *("kv_compress", "fused_compress_single_kv", "float32"),
        on("state_bt", lambda t: t[:, :1].contiguous()),
    ),
    "ape_twice": ("kv_compress", "fused_compress_single_kv", "float32", on("ape", torch.ones_like)),
    "scores_before_values": ("kv_compress", "fused_compress_single_kv", "float32", exchanged("kv", "score")),
    "token_within_a_window": ("kv_compress", "fused_compress_single_kv", "float32", on("position", lambda p: p - 1)),
    "one_slot_for_all": ("kv_compress", "fused_compress_single_kv", "float32", on("slot_mapping", torch.zeros_like)),
    "turned_in_the_call": ("kv_compress", "fused_compress_single_kv", "float32", on("cos", torch.zeros_like)),
    "projections_of_bfloat16": (
        *("kv_compress", "fused_compress_single_kv", "float32"),
        lambda g: on("kv", rounded)(on("score", rounded)(g)),
    ),
    "eps_of_entries": ("kv_compress", "fused_compress_single_kv", "float32", put(eps=1e-3)),
    "entries_not_scaled": ("kv_compress", "matmul", "float32", put(alpha=1.0)),
    "row_without_a_block_in_slot_0": (
        *("kv_compress", "reshape_paged_cache", "float32"),
        on("slot_mapping", lambda s: s.clamp(min=0)),
    ),
    "groups_transposed": ("grouped_output_proj", "batch_matmul", "bfloat16", on("a", lambda a: a.flip(0).contiguous())),
}


def keys_where_the_table_says(k_cache: torch.Tensor, block_table: torch.Tensor, entries: int) -> Any:
    """Keys of block 0 for entries without a block."""
    return k_cache[:, None].contiguous(), block_table.clamp(min=0)


def every_row(state: torch.Tensor, table: torch.Tensor, sequence: Any, position: Any, rows: torch.Tensor) -> None:
    """Every token's row into its slot, those that others follow in a ring too."""
    slots = slots_of_items(table, sequence, position, state.shape[1])
    WRITE(k=rows[:, None], v=None, k_cache=state[:, None], v_cache=None, slot_mapping=slots.int())


def rows_without_a_mask(rows: torch.Tensor, state: torch.Tensor, token: torch.Tensor, slot: torch.Tensor) -> Any:
    """Rows before the first window with the score 0."""
    return torch.where((token >= 0)[..., None], rows[token.clamp(min=0)], read_entries(state, slot, rows.dtype))


def bare_codes(x: torch.Tensor, smooth: torch.Tensor | None, amax_floor: float = 0.0) -> Any:
    """What scaled_quantize gives, rows of zeros and all."""
    given = dict.fromkeys(("zero", "scale_ub")) | {"quant_type": torch.int8, "quant_mode": "dynamic_per_token"}
    given |= {"act_mode": "none", "active_coef": 1.0, "is_gated": False}
    codes, scale = SCALED_QUANTIZE(x=x.contiguous(), scale=None if smooth is None else smooth.float(), **given)
    return codes, scale.reshape(-1, 1)


REPLACED = {
    # what is wrong: operator, dtype, part of the adapter, what stands in its place
    "no_epsilon": ("moe_gate", "float32", "routing.with_epsilon", lambda right: lambda weights, *_: weights),
    "no_floor": ("moe_gate", "float32", "routing.SUM_FLOOR", lambda right: 0.0),
    "limit_cut_to_a_whole": (
        *("swiglu", "bfloat16", "moe.activated"),
        lambda right: lambda x, limit: right(x, float(int(limit))),
    ),
    "no_way_above_4096": ("hc_pre", "bfloat16", "residual.MOST_HIDDEN_SUMMED", lambda right: 1 << 30),
    "rows_of_zeros_as_they_come": ("act_quant_int8", "bfloat16", "quant.int8_rows", lambda right: bare_codes),
    "block_0_for_none": (
        "lightning_indexer",
        "bfloat16",
        "indexer.keys_of_sequences",
        lambda _: keys_where_the_table_says,
    ),
    "every_row_of_a_ring": ("kv_compress", "float32", "compressor.keep", lambda _: every_row),
    "rows_before_the_first": ("kv_compress", "float32", "compressor.gathered", lambda _: rows_without_a_mask),
    "turned_at_the_windows_end": (
        *("kv_compress", "float32", "compressor.rope"),
        lambda right: types.SimpleNamespace(fn=lambda x, position, *tables: right.fn(x, position + 1, *tables)),
    ),
}
IGNORED = {
    # what is wrong: operator, dtype, what the kernel takes its arguments for
    "first_lanes_turned": ("rope", "bfloat16", put(rope_first=True)),
    "last_lanes_turned": ("rope", "bfloat16", put(rope_first=False)),
    "inverse_forgotten": ("rope", "bfloat16", put(inverse=False)),
    "mask_forgotten": ("moe_gate", "float32", put(mask=None)),
    "shared_expert_forgotten": ("fused_moe", "bfloat16", put(shared_w13=None, shared_w2=None)),
    "second_pool_forgotten": ("sparse_attn", "bfloat16", put(extra_kv_cache=None)),
    "state_taken_for_empty": ("kv_compress", "float32", on("start_pos", torch.zeros_like)),
}
GIVEN_BACK = {
    # what is wrong: operator, tmo's function, dtype, change of its results
    "tails_read": (
        *("lightning_indexer", "masked_indexer_select_paged_kv", "bfloat16"),
        lambda found: (found[0], torch.full_like(found[1], found[0].shape[-1])),
    ),
    "sums_from_the_first_expert": (
        *("fused_moe", "moe_gen_idx", "bfloat16"),
        lambda found: [*found[:3], found[3] - found[2][0]],
    ),
    "token_numbers_as_places": (
        *("fused_moe", "moe_gen_idx", "bfloat16"),
        lambda found: [found[0], found[0], *found[2:]],
    ),
}
TAKEN = {
    # what is wrong: operator, dtype, words of a refusal that is not made
    "groups_of_softmax": ("moe_gate", "float32", "gives the experts of other groups"),
    "groups_of_softplus": ("moe_gate", "float32", "knows no groups"),
    "sums_of_softplus_kept": ("moe_gate", "float32", "always divides by the sum"),
    "two_streams": ("hc_post", "bfloat16", "takes 4 streams"),
    "eight_heads_of_the_indexer": ("lightning_indexer", "bfloat16", "takes 32 or 64"),
    "pages_with_gaps": ("kv_cache_write", "bfloat16", "takes pools without gaps"),
    "pools_of_bytes": ("kv_cache_write", "bfloat16", "cache is uint8"),
    "another_compressor": ("kv_compress", "float32", "fused_compress_single_kv takes"),
    "float32_of_codes": ("quant_linear", "bfloat16", "gives bfloat16 or float16"),
    "floats_by_codes": ("quant_linear", "bfloat16", "takes int8 beside"),
    "fp8_of_an_older_card": ("quant_linear", "bfloat16", "is fp8; capability 5.0"),
}
DAY0 = {
    # as WRONG, with the day-0 release
    "lengths_before_compression": (
        *("lightning_indexer", "masked_indexer_select_paged_kv", "bfloat16"),
        lambda g: g | {"k_context_lens": g["k_context_lens"] * g["compress_ratio"]},
    ),
    "day0_forward_for_inverse": ("rope", "apply_rotary", "bfloat16", on("sin_cache", torch.abs)),
    "day0_cos_before_sin": ("rope", "apply_rotary", "bfloat16", exchanged("sin_cache", "cos_cache")),
    "day0_sink_left_out": ("sparse_attn", "single_query_cached_kv_attn", "bfloat16", put(learnable_sink=None)),
    "day0_token_within_a_window": (
        *("kv_compress", "fused_compress_single_kv", "float32"),
        on("position", lambda p: p - 1),
    ),
    "day0_states_exchanged": (
        *("kv_compress", "fused_compress_single_kv", "float32"),
        exchanged("kv_state", "score_state"),
    ),
    "day0_one_state_for_all": (
        *("kv_compress", "fused_compress_single_kv", "float32"),
        on("state_ids", torch.zeros_like),
    ),
}
REPLACED_DAY0 = {
    "day0_no_clamp": ("swiglu", "bfloat16", "moe.activated", lambda right: lambda x, limit: right(x, 0.0)),
    "dynamic_before_out": (
        *("rms_norm", "bfloat16", "norm.FUSED_RMS_NORM"),
        lambda right: replace(right, by_place=(*right.by_place[:-2], *right.by_place[:-3:-1])),
    ),
}
TAKEN_DAY0 = {"hidden_of_another_model": ("hc_post", "bfloat16", "of this release takes 4096")}
CARD6 = {
    # as WRONG, on a card with fp8
    "scales_of_rows_not_transposed": (
        *("grouped_gemm", "smooth_quant_group_gemm", "bfloat16"),
        on("a_scale", lambda s: s.t().contiguous()),
    ),
    "scales_of_rows_transposed": (
        "quant_linear",
        "scaled_matmul",
        "bfloat16",
        on("a_scale", lambda s: s.t().contiguous()),
    ),
}
