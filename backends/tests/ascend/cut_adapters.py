"""Adapters without one of their precautions: a text of the adapter's module, and what stands there instead.

`trials.py` compiles the module anew with the text replaced and runs the samples of the kernel on the twin; the judge
must find every one of them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cut:
    """An adapter with a text replaced.

    Args:
        name: What it no longer does.
        kernel: "operator.kernel" whose samples must show it.
        dtype: In which the samples are made.
        module: Of the backend, with the text exactly once.
        before: The text.
        after: What stands there instead.
        twin: The chip that shows it.
    """

    name: str
    kernel: str
    dtype: str
    module: str
    before: str
    after: str
    twin: str = "a3"


GATE = "moe_gate.moe_gate", "float32", "routing"
GEMM = "grouped_gemm.grouped_gemm", "bfloat16", "moe"
INT8 = "act_quant_int8.act_quant_int8", "bfloat16", "quant"
MLA = "mla_attention.mla_attention", "bfloat16", "attention"
COMPRESS = "kv_compress.kv_compress", "bfloat16", "cache"

CUTS = (
    Cut(
        "softmax_not_divided",
        *GATE,
        "weights = weights / (weights.sum(-1, keepdim=True) + SUM_FLOOR)",
        "pass",
    ),
    Cut("biased_scores_as_weights", *GATE, "weights = scores.gather(1, idx.long())", "pass"),
    Cut("float32_scales_give_bfloat16", *GEMM, "if arch() not in NARROW_SCALES:", "if True:"),
    Cut("sums_without_the_scale_of_rows", *GEMM, " * of_rows[:, None])", ")"),
    Cut("sums_without_the_scale_of_outputs", *GEMM, " * of_outputs[expert]", ""),
    Cut("scale_of_the_expert_before", *GEMM, "places[:, None] >= ends", "places[:, None] > ends"),
    Cut(
        "wide_rows_taken_apart_by_the_call",
        "grouped_output_proj.grouped_output_proj",
        "bfloat16",
        "projection",
        'if arch() != "5" and x.shape[1] * x.shape[2] >= ROW_BEHIND:',
        "if False:",
    ),
    Cut("zeros_divided_by_zero", *INT8, "torch.where(scale < least, at_floor, q.float())", "q.float()"),
    Cut("scale_of_zeros_is_zero", *INT8, "scale.clamp(min=least)", "scale"),
    Cut(
        "keys_behind_the_token_listed",
        "lightning_indexer.lightning_indexer",
        "bfloat16",
        "projection",
        "torch.where(seen <= position[:, None], seen, -1)",
        "seen",
    ),
    Cut(
        "token_that_sees_nothing_has_a_value",
        *MLA,
        "torch.where(valid.any(-1)[:, None, None], out.float(), 0.0)",
        "out.float()",
    ),
    Cut(
        "listed_positions_behind_the_token",
        *MLA,
        "torch.where(topk_indices <= position[:, None], topk_indices, -1)",
        "topk_indices",
    ),
    Cut("state_not_copied_back", *COMPRESS, "state_cache.copy_(state[1:])", "pass"),
    Cut(
        "block_of_minus_one_is_a_block",
        *COMPRESS,
        "state_block_table.clamp(min=-1) + 1",
        "state_block_table.clamp(min=0) + 1",
    ),
    Cut("table_as_wide_as_it_comes", *COMPRESS, "tokens // state.shape[1] + 1)", "0)"),
    Cut(
        "weight_beside_float16_as_it_comes",
        "rms_norm.rms_norm",
        "float16",
        "norm",
        "taken = x.float(), weight.float()",
        "taken = x, weight",
    ),
    Cut("clipped_where_there_is_no_kernel", "swiglu.swiglu", "bfloat16", "moe", "arch() in CLIPPED_ON and ", "", "a5"),
    Cut(
        "tiles_divided_by_zero",
        "act_quant_fp8.act_quant_fp8_in_float32",
        "bfloat16",
        "microscaling",
        "torch.where(is_below, at_floor.view(torch.uint8), q.view(torch.uint8))",
        "q.view(torch.uint8)",
        "a5",
    ),
    Cut(
        "scale_of_tiles_below_the_floor",
        "act_quant_fp8.act_quant_fp8_in_float32",
        "bfloat16",
        "microscaling",
        "scale.clamp(min=least)",
        "scale",
        "a5",
    ),
)
