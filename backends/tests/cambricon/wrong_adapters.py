"""Adapters that fall into a trap of tmo: each one change of what a call is given, found by the samples of a kernel.

Run as a program it prints, as JSON, what the judge says of the first sample that shows each; the twin takes the one
place that torch has for a device, so that tests run it in a process of its own.
"""

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

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
    "groups_transposed": ("grouped_output_proj", "batch_matmul", "bfloat16", on("a", lambda a: a.flip(0).contiguous())),
}


def what_shows(name: str) -> Iterator[str]:
    """The problems of the samples that a wrong adapter takes, "" for none."""
    from isolith import OPERATORS, Make, plugins
    from isolith_backends.vendor_calls import VendorCall
    from isolith_conformance.judge import expect

    operator_name, function, dtype, change = WRONG[name]
    operator = OPERATORS[operator_name]
    (row,) = (row for row in plugins.discover() if row.name == "cambricon")
    found, _ = plugins.kernels_of(plugins.load(row).backend)
    kernel = found[operator_name][0]
    right = VendorCall.__call__

    def call(self: VendorCall, **given: Any) -> Any:
        return right(self, **(change(given) if self.names == (f"torch_mlu_ops:{function}",) else given))

    for sample in operator.samples(Make(getattr(torch, dtype), seed=f"{operator_name}-{dtype}")):
        arguments = operator.arguments(**sample.arguments)
        refused = kernel.requires.why_not(arguments) or (kernel.why_not and kernel.why_not(**arguments))
        if refused or ({"invariants", "slow", "model"} & set(sample.tags) and operator_name != "lightning_indexer"):
            continue
        due = expect(operator, arguments, "exact" in sample.tags, tuple(operator.declared))
        given = {key: v.to("mlu") if isinstance(v, torch.Tensor) else v for key, v in arguments.items()}
        VendorCall.__call__ = call
        try:
            made = kernel.fn(**given)
        except Exception as error:  # the vendor's call may raise anything
            yield f"{sample.name}: raises {type(error).__name__}: {error}"
            continue
        finally:
            VendorCall.__call__ = right
        outputs = () if made is None else (made,) if isinstance(made, torch.Tensor) else made
        results = [result.cpu() for result in (*outputs, *(given[key] for key in operator.mutates))]
        problem = due.verdict_on(results).problem
        yield "" if problem is None else f"{sample.name}: {problem}"


def main(names: list[str]) -> None:
    """Print what shows each wrong adapter, "" where nothing does."""
    import isolith_backends.cambricon.twin  # noqa: F401  # makes the device

    print(json.dumps({name: next(filter(None, what_shows(name)), "") for name in names or WRONG}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
