"""Adapters that fall into a trap of the vendor's documents: each one line of change, as it would stand in an adapter.

A trap is a change of what a call is given, or of what it gives back; those that are a line of the adapter itself stand
in cut_adapters.py. `trials.py` applies one at a time and runs the samples of a kernel on the twin; the judge must find
every one of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Given = dict[str, Any]


@dataclass(frozen=True)
class Wrong:
    """A wrong adapter.

    Args:
        name: What is wrong.
        kernel: "operator.kernel" whose samples must show it.
        call: The vendor's operator without its namespace.
        dtype: In which the samples are made.
        change: Gives the changed arguments; None for a change of the results.
        result: Gives the changed results.
        twin: The chip that shows it.
    """

    name: str
    kernel: str
    call: str
    dtype: str
    change: Callable[[Given], Given] | None = None
    result: Callable[[Any], Any] | None = None
    twin: str = "a3"


def put(**values: Any) -> Callable[[Given], Given]:
    """Other values for some arguments."""
    return lambda given: given | values


def without(*names: str) -> Callable[[Given], Given]:
    """The vendor's defaults for some arguments."""
    return lambda given: {name: value for name, value in given.items() if name not in names}


def on(name: str, change: Callable[[Any], Any]) -> Callable[[Given], Given]:
    """A function of one argument."""
    return lambda given: given | {name: None if given.get(name) is None else change(given[name])}


def on_each(name: str, change: Callable[[Any], Any]) -> Callable[[Given], Given]:
    """A function of every tensor in a list."""
    return lambda given: given | {name: None if given.get(name) is None else [change(part) for part in given[name]]}


def exchanged(first: str, second: str) -> Callable[[Given], Given]:
    """Two arguments the other way round."""
    return lambda given: given | {first: given[second], second: given[first]}


def all_of(*changes: Callable[[Given], Given]) -> Callable[[Given], Given]:
    """Changes one after the other."""

    def change(given: Given) -> Given:
        for step in changes:
            given = step(given)
        return given

    return change


def counts_of(ends: torch.Tensor) -> torch.Tensor:
    """Running sums -> counts."""
    return torch.cat((ends[:1], ends.diff()))


def with_zero(ends: torch.Tensor) -> torch.Tensor:
    """Running sums with the 0 in front, as other calls take them."""
    return torch.cat((torch.zeros_like(ends[:1]), ends[:-1]))


def half_order(angle: torch.Tensor) -> torch.Tensor:
    """c0 c0 c1 c1 .. -> c0 c1 .. c0 c1 .."""
    return torch.cat((angle[..., ::2], angle[..., ::2]), dim=-1)


def block_of_minus_one(pairs: torch.Tensor) -> torch.Tensor:
    """[1, -1] for rows to be skipped: only the flat place is checked, and this one is in block 0."""
    wrong = torch.stack((torch.ones_like(pairs[:, 0]), torch.full_like(pairs[:, 1], -1)), dim=1)
    return torch.where(pairs[:, :1] < 0, wrong, pairs)


def block_0_is_a_block(given: Given) -> Given:
    """The pool and the table as they come, not numbered from 1 on."""
    table = given["state_block_table"]
    return given | {"state_cache": given["state_cache"][1:], "state_block_table": (table - 1).clamp(min=0)}


def rows_without_expert_axis(given: Given) -> Given:
    return given | {"expanded_permuted_rows": given["expanded_permuted_rows"][:, 0], "drop_pad_mode": 2}


def dropped_pairs_read_the_last_row(given: Given) -> Given:
    """Rows behind the active ones hold what was there before, and 0 times it may be no number."""
    index, last = given["expanded_src_to_dst_row"], given["expanded_permuted_rows"].shape[0] - 1
    return given | {"expanded_src_to_dst_row": torch.where(index < 0, last, index)}


def without_transposed_scale(scale: torch.Tensor) -> torch.Tensor:
    """The same values, laid out as they are shown."""
    return scale.contiguous()


def tiles_in_reverse(scale: torch.Tensor) -> torch.Tensor:
    return scale.transpose(1, 2).flip(1, 2).transpose(1, 2)


def pairs_exchanged(scale: torch.Tensor) -> torch.Tensor:
    """The two scales of 64 elements the other way round."""
    return scale.flip(-1)


def rows_of_one_expert(given: Given) -> Given:
    return given | {"expanded_permuted_rows": given["expanded_permuted_rows"].transpose(0, 1).contiguous()}


def halves_exchanged(x: torch.Tensor) -> torch.Tensor:
    return torch.cat(tuple(reversed(x.chunk(2, dim=-1))), dim=-1)


def every_other(angle: torch.Tensor) -> torch.Tensor:
    return angle[..., ::2].contiguous()


def rolled(rows: torch.Tensor) -> torch.Tensor:
    return rows.roll(1, dims=0)


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16).to(tensor.dtype)


NORM = "rms_norm.rms_norm", "npu_rms_norm", "bfloat16"
IN_PLACE = "rope.rope", "inplace_partial_rotary_mul", "bfloat16"
OF_SLICE = "rope.rope_of_slice", "npu_rotary_mul", "bfloat16"
HC_PRE = "hc_pre.hc_pre", "npu_hc_pre_v2", "bfloat16"
HC_POST = "hc_post.hc_post", "npu_hc_post", "bfloat16"
GATE = "moe_gate.moe_gate_of_any_score", "moe_gating_top_k_hash", "float32"
GATE_OF_TORCH = "moe_gate.moe_gate", "npu_moe_gating_top_k", "float32"
HASH = "moe_hash_gate.moe_hash_gate", "moe_gating_top_k_hash", "float32"
PERMUTE = "moe_permute.moe_permute", "npu_moe_init_routing_v2", "bfloat16"
COMBINE = "moe_unpermute.moe_unpermute", "npu_moe_finalize_routing", "bfloat16"
SWIGLU = "swiglu.swiglu", "npu_swiglu", "bfloat16"
CLIPPED = "swiglu.swiglu", "npu_clipped_swiglu", "bfloat16"
GEMM = "grouped_gemm.grouped_gemm", "npu_grouped_matmul", "bfloat16"
LAYER = "fused_moe.fused_moe", "npu_moe_init_routing_v2", "bfloat16"
QUANT = "act_quant_int8.act_quant_int8", "npu_dynamic_quant", "bfloat16"
LINEAR = "quant_linear.quant_linear", "npu_quant_matmul", "bfloat16"
PAIRS = "kv_cache_write.kv_cache_write", "npu_scatter_nd_update_v2", "bfloat16"
SLOTS = "kv_cache_write.kv_cache_write_by_slot", "scatter_nd_update_asc", "bfloat16"
COMPRESS = "kv_compress.kv_compress", "compressor", "bfloat16"
INDEXER = "lightning_indexer.lightning_indexer", "npu_lightning_indexer", "bfloat16"
HYBRID = "hybrid_attention.hybrid_attention", "npu_sparse_attn_sharedkv", "bfloat16"
PREPARE = "hybrid_attention.hybrid_attention", "npu_sparse_attn_sharedkv_metadata", "bfloat16"
MLA = "mla_attention.mla_attention", "npu_sparse_flash_attention", "bfloat16"
PROJECT = "grouped_output_proj.grouped_output_proj", "npu_transpose_batchmatmul", "bfloat16"

COMBINE_OF_LAYER = "fused_moe.fused_moe", "npu_moe_finalize_routing", "bfloat16"
MX_QUANT = "act_quant_fp8.act_quant_fp8", "npu_dynamic_mx_quant", "bfloat16"
TILES = "act_quant_fp8.act_quant_fp8_in_float32", "npu_dynamic_block_quant", "bfloat16"
MX_LINEAR = "quant_linear.quant_linear_of_e4m3", "npu_quant_matmul", "bfloat16"
TILED_GEMM = "grouped_gemm.grouped_gemm_in_tiles", "npu_grouped_matmul", "bfloat16"
MX_GEMM = "grouped_gemm.grouped_gemm_of_e4m3", "npu_grouped_matmul", "bfloat16"

WRONG = (
    Wrong("epsilon_is_the_default", *NORM, without("epsilon")),
    Wrong("gamma_in_x_dtype", *NORM, on("gamma", rounded)),
    Wrong(
        "rstd_for_y", *NORM, None, lambda results: (results[1].expand_as(results[0]).to(results[0].dtype), results[0])
    ),
    Wrong("cos_and_sin_exchanged", *IN_PLACE, exchanged("r1", "r2")),
    Wrong("first_dimensions_rotated", *IN_PLACE, on("partial_slice", lambda ends: [0, ends[1] - ends[0]])),
    Wrong("angles_in_half_order", *IN_PLACE, all_of(on("r1", half_order), on("r2", half_order))),
    Wrong("angles_in_x_dtype", *IN_PLACE, all_of(on("r1", rounded), on("r2", rounded))),
    Wrong("sin_not_negated_for_the_inverse", *IN_PLACE, on("r2", torch.abs)),
    Wrong("rotary_mode_is_the_default", *OF_SLICE, without("rotary_mode")),
    Wrong("interleaved_always", *OF_SLICE, put(rotary_mode="interleave")),
    Wrong("comb_transposed_by_pre", *HC_PRE, None, lambda results: (*results[:2], results[2].mT.contiguous())),
    Wrong("scales_in_reverse", *HC_PRE, on("hc_scale", lambda scale: scale.flip(0))),
    Wrong("comb_transposed_by_post", *HC_POST, on("comb", lambda comb: comb.mT.contiguous())),
    Wrong("coefficients_in_bfloat16", *HC_POST, all_of(on("post", rounded), on("comb", rounded))),
    Wrong("sigmoid_for_root_of_softplus", *GATE, put(norm_type=1)),
    Wrong("norm_type_is_the_default", *GATE, without("norm_type")),
    Wrong("scaled_twice", *GATE, on("routed_scaling_factor", lambda scale: scale * scale)),
    Wrong("group_mode_is_the_default", *GATE, without("group_select_mode")),
    Wrong("group_mode_is_the_sum_always", *GATE, put(group_select_mode=1)),
    Wrong("no_bias", *GATE, put(bias=None)),
    Wrong("groups_off", *GATE, without("group_count", "k_group")),
    Wrong("all_groups_win", *GATE, lambda given: given | {"k_group": given["group_count"]}),
    Wrong("floor_of_the_sum", *GATE, put(eps=1e-6)),
    Wrong("scores_that_were_not_asked_for", *GATE, without("out_flag")),
    Wrong("root_of_softplus_asked_of_softmax", *GATE_OF_TORCH, put(norm_type=2)),
    Wrong("softmax_for_sigmoid", *GATE_OF_TORCH, put(norm_type=0)),
    Wrong("experts_by_score_not_by_table", *HASH, put(tid2eid=None, input_ids=None)),
    Wrong("ids_in_int32", *HASH, on("input_ids", lambda ids: ids.int())),
    Wrong("table_in_int64", *HASH, on("tid2eid", lambda table: table.long())),
    Wrong("running_sums_for_counts", *PERMUTE, without("expert_tokens_num_type")),
    Wrong("no_counts_asked_for", *PERMUTE, without("expert_tokens_num_flag")),
    Wrong("scatter_index", *PERMUTE, put(row_idx_type=1)),
    Wrong("every_expert_active", *PERMUTE, without("active_expert_range")),
    Wrong("counts_for_running_sums", *LAYER, put(expert_tokens_num_type=1)),
    Wrong("index_k_major", *COMBINE, put(drop_pad_mode=1)),
    Wrong("drop_pad_mode_is_the_default", *COMBINE, without("drop_pad_mode")),
    Wrong("minus_one_where_it_is_illegal", *COMBINE, rows_without_expert_axis),
    Wrong("weights_in_bfloat16", *COMBINE, on("scales", rounded)),
    Wrong("no_residual", *COMBINE, put(skip1=None)),
    Wrong("alpha_is_the_default", *CLIPPED, without("alpha")),
    Wrong("limit_is_the_default", *CLIPPED, without("limit")),
    Wrong("bias_is_the_default", *CLIPPED, without("bias")),
    Wrong("interleaved_is_the_default", *CLIPPED, without("interleaved")),
    Wrong("second_half_activated", *SWIGLU, on("input", halves_exchanged)),
    Wrong("counts_as_group_list", *GEMM, on("group_list", counts_of)),
    Wrong("running_sums_said_to_be_counts", *GEMM, put(group_list_type=1)),
    Wrong("group_list_in_int32", *GEMM, on("group_list", lambda ends: ends.int())),
    Wrong("weight_not_transposed", *GEMM, on_each("weight", lambda weight: weight.transpose(1, 2))),
    Wrong("no_scale_of_tokens", *GEMM, put(per_token_scale=None), twin="a5"),
    Wrong("scale_of_outputs_is_one", *GEMM, on_each("scale", torch.ones_like), twin="a5"),
    Wrong("smooth_left_out", *QUANT, put(smooth_scales=None)),
    Wrong("scale_is_amax", *QUANT, None, lambda results: (results[0], results[1] * 127)),
    Wrong("x2_not_transposed", *LINEAR, on("x2", lambda x2: x2.T)),
    Wrong("linear_without_scale_of_tokens", *LINEAR, put(pertoken_scale=None)),
    Wrong("minus_one_within_a_block", *PAIRS, on("indices", block_of_minus_one)),
    Wrong("offset_before_block", *PAIRS, on("indices", lambda pairs: pairs.flip(1))),
    Wrong("skipped_rows_to_slot_0", *SLOTS, on("indices", lambda slots: slots.clamp(min=0))),
    Wrong("sin_and_cos_exchanged", *COMPRESS, exchanged("rope_sin", "rope_cos")),
    Wrong("half_mode", *COMPRESS, put(rotary_mode=1)),
    Wrong("no_ape", *COMPRESS, on("ape", torch.zeros_like)),
    Wrong("block_0_is_a_block", *COMPRESS, block_0_is_a_block),
    Wrong("start_at_0", *COMPRESS, on("start_pos", torch.zeros_like)),
    Wrong("norm_in_float32", *COMPRESS, on("norm_weight", lambda weight: weight.float())),
    Wrong("query_sums_with_zero", *INDEXER, on("actual_seq_lengths_query", with_zero)),
    Wrong("key_lengths_without_this_call", *INDEXER, on("actual_seq_lengths_key", lambda lengths: lengths - 1)),
    Wrong("no_causality", *INDEXER, put(sparse_mode=0)),
    Wrong("window_one_too_wide", *HYBRID, on("ori_win_left", lambda left: left + 1)),
    Wrong("window_is_the_default", *HYBRID, without("ori_win_left")),
    Wrong("ratio_is_the_default", *HYBRID, without("cmp_ratio")),
    Wrong("scale_is_the_default", *HYBRID, without("softmax_scale")),
    Wrong("sink_of_0_for_none", *HYBRID, on("sinks", lambda sinks: sinks * (sinks > -1e4))),
    Wrong("no_sinks", *HYBRID, put(sinks=None)),
    Wrong("lengths_in_compressed_units", *HYBRID, on("seqused_kv", lambda lengths: lengths // 4)),
    Wrong("every_entry_instead_of_those_listed", *HYBRID, put(cmp_sparse_indices=None)),
    Wrong("layout_is_the_default", *HYBRID, without("layout_q")),
    Wrong("no_metadata", *HYBRID, put(metadata=None)),
    Wrong("metadata_of_another_window", *PREPARE, without("ori_win_left")),
    Wrong("metadata_of_another_ratio", *PREPARE, without("cmp_ratio")),
    Wrong("attention_mode_is_the_default", *MLA, without("attention_mode")),
    Wrong("minus_one_before_what_is_listed", *MLA, on("sparse_indices", lambda listed: listed.flip(2))),
    Wrong("flash_query_sums_with_zero", *MLA, on("actual_seq_lengths_query", with_zero)),
    Wrong("groups_before_tokens", *PROJECT, put(perm_y=[0, 1, 2])),
    Wrong("weights_of_groups_in_reverse", *PROJECT, on("weight", lambda weight: weight.flip(0))),
    Wrong("bias_in_bfloat16", *GATE, on("bias", lambda bias: bias.bfloat16())),
    Wrong("renormalisation_asked_of_the_call", *GATE_OF_TORCH, put(renorm=1)),
    Wrong("expert_num_is_the_default", *PERMUTE, without("expert_num")),
    Wrong("indices_in_int64", *PERMUTE, on("expert_idx", lambda idx: idx.long())),
    Wrong("scale_of_tokens_not_carried", *PERMUTE, put(scale=None)),
    Wrong("weights_in_another_dtype", *COMBINE, on("scales", lambda scales: scales.bfloat16())),
    Wrong("k_is_the_default", *COMBINE, put(scales=None)),
    Wrong("fewer_bins_than_a_token_has_experts", *COMBINE, rows_of_one_expert),
    Wrong("dropped_pairs_read_the_last_row", *COMBINE_OF_LAYER, dropped_pairs_read_the_last_row),
    Wrong("split_item_is_the_default", *GEMM, without("split_item")),
    Wrong("group_type_is_the_default", *GEMM, without("group_type")),
    Wrong("output_dtype_is_the_default", *GEMM, without("output_dtype")),
    Wrong("tables_of_half_the_width", *OF_SLICE, all_of(on("r1", every_other), on("r2", every_other))),
    Wrong("angles_of_the_entry_before", *COMPRESS, all_of(on("rope_sin", rolled), on("rope_cos", rolled))),
    Wrong("ring_instead_of_pages", *COMPRESS, put(cache_mode=2)),
    Wrong("coff_is_the_default", *COMPRESS, put(coff=1)),
    Wrong("sums_of_the_compressor_without_zero", *COMPRESS, on("cu_seqlens", lambda sums: sums[1:])),
    Wrong("sums_of_the_attention_without_zero", *HYBRID, on("cu_seqlens_q", lambda sums: sums[1:])),
    Wrong("layout_of_keys_is_the_default", *INDEXER, without("layout_key")),
    Wrong("count_is_the_default", *INDEXER, without("sparse_count")),
    Wrong("scale_rounded_down", *MX_QUANT, without("scale_alg", "max_low_bound"), twin="a5"),
    Wrong("four_bits_are_the_default", *MX_QUANT, without("dst_type"), twin="a5"),
    Wrong("blocks_of_32_are_the_default", *MX_QUANT, without("block_size"), twin="a5"),
    Wrong("no_floor_of_amax", *MX_QUANT, without("max_low_bound"), twin="a5"),
    Wrong("format_of_tiles_is_the_default", *TILES, without("dst_type"), twin="a5"),
    Wrong("dtype_of_scales_left_out", *MX_LINEAR, without("scale_dtype", "pertoken_scale_dtype"), twin="a5"),
    Wrong("group_sizes_left_out", *MX_LINEAR, without("group_sizes"), twin="a5"),
    Wrong("pairs_of_rows_exchanged", *MX_LINEAR, on("pertoken_scale", pairs_exchanged), twin="a5"),
    Wrong("pairs_of_weights_exchanged", *MX_GEMM, on_each("scale", pairs_exchanged), twin="a5"),
    Wrong("scale_not_transposed_as_the_weight", *MX_GEMM, on_each("scale", without_transposed_scale), twin="a5"),
    Wrong("scales_said_to_be_numbers", *MX_GEMM, without("scale_dtype"), twin="a5"),
    Wrong("e4m3_said_again", *MX_GEMM, put(x_dtype=24), twin="a5"),
    Wrong("scale_of_tiles_not_transposed", *TILED_GEMM, on_each("scale", without_transposed_scale), twin="a5"),
    Wrong("tiles_in_reverse", *TILED_GEMM, on_each("scale", tiles_in_reverse), twin="a5"),
    Wrong("tiles_said_to_be_powers", *TILED_GEMM, put(scale_dtype=293), twin="a5"),
    Wrong("mx_counts_as_group_list", *MX_GEMM, on("group_list", counts_of), twin="a5"),
)
