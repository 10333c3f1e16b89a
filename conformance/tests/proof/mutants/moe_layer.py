"""Wrong mixture-of-experts layers: how the parts are put together, and parts that go wrong inside."""

from mutation import mutant

FIRST = "codes, scale = quantised(x, w13, act_quant, act_group, scale_format)"
PERMUTE = "moe_permute(codes, topk_idx, w13.shape[0], 1, scale)"
UP = "hidden = gemm(rows, w13, counts, 1, None if scale is None else row_scale, w13_scale, *blocks)"
WEIGHT = "row_weight = weight_of_rows(topk_weights, pos_to_pair) if weight_before_down else None"
SECOND = "codes, scale = quantised(swiglu(hidden, swiglu_limit, row_weight), w2, act_quant, act_group, scale_format)"
DOWN = "down = gemm(codes, w2, counts, 1, scale, w2_scale, *blocks)"
SHARED = "if shared_w13 is not None and shared_w2 is not None:\n        hidden"
SHARED_UP = "hidden = quant_linear(x, shared_w13, shared_w13_scale, None, *how)"
SHARED_DOWN = "residual = quant_linear(swiglu(hidden, swiglu_limit), shared_w2, shared_w2_scale, None, *how)"
RETURN = "return moe_unpermute(down, pair_to_pos, None if weight_before_down else topk_weights, residual).to(x.dtype)"
COMBINED = RETURN[len("return ") : -len(".to(x.dtype)")]
HOW = "act_quant, act_group, scale_format, block_n, block_k, between = how"
KIND = "kind = resolve_act_quant(act_quant, weight)"
FP8 = "return act_quant_fp8(x, act_group, scale_format)"
INT8 = "return act_quant_int8(x) if"
OF_ROWS = "topk_weights.flatten()[pos_to_pair.clamp(min=0)], 0.0)"
IN_BFLOAT16 = "{}.to(torch.bfloat16).to(x.dtype if x.dtype == torch.float64 else torch.float32)"
TRUNCATED = (
    "({}.float().view(torch.int32) & {{torch.bfloat16: -65536, torch.float16: -8192}}.get(x.dtype, -1))"
    ".view(torch.float32).to(x.dtype)"
)
WEIGHTED_UP = (
    "if row_weight is not None:\n"
    "        gates, ups = hidden.chunk(2, -1)\n"
    "        hidden, row_weight = torch.cat((gates, ups * row_weight[:, None]), -1), None"
)
ADDED_AFTER = (
    "if residual is not None and x.dtype != torch.float64:\n"
    "        weights = None if weight_before_down else topk_weights\n"
    "        return moe_unpermute(down, pair_to_pos, weights).to(x.dtype) + residual.to(x.dtype)\n"
    "    "
)
WHOLE_FP8 = (
    "x = x.to(torch.float32)\n"
    "        scale = torch.exp2((x.abs().amax().clamp(min=1e-4) / 448).log2().ceil())\n"
    "        groups = -(-x.shape[-1] // act_group)\n"
    "        return (x / scale).to(torch.float8_e4m3fn), scale.expand(*x.shape[:-1], groups).contiguous()"
)
WHOLE_INT8 = (
    "if kind == 'int8':\n"
    "        scale = x.float().abs().amax().clamp(min=1e-10) / 127\n"
    "        return (x.float() / scale).round().to(torch.int8), scale.expand(*x.shape[:-1], 1).contiguous()\n"
    "    "
)
OWN_INT8 = (
    "if kind == 'int8':\n"
    "        scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / {}\n"
    "        return (x.float() / scale).{}.to(torch.int8), scale\n"
    "    "
)
UNWEIGHTED = (
    "activated = swiglu(hidden, swiglu_limit, None if weight_before_down else row_weight)\n"
    "    codes, scale = quantised(activated, w2, act_quant, act_group, scale_format)\n"
    "    "
)
WEIGHTED_DOWN = "\n    down = down if row_weight is None else down * row_weight[:, None]"
INNER_TAIL = (
    "inner = hidden.shape[-1] // 2\n"
    "    hidden = hidden.masked_fill(torch.arange(2 * inner) % max(inner, 1) >= inner // 16 * 16, 0)"
)
SEGMENT_TAILS = (
    "parts = down.split([*counts.tolist(), len(down) - int(counts.sum())])\n"
    "    down = torch.cat([torch.cat((part[:128], 0 * part[128:])) for part in parts])"
)
COMBINED_NARROW = (
    "if x.dtype != torch.float64:\n"
    "        y, weights = torch.zeros_like(x), None if weight_before_down else topk_weights\n"
    "        for slot in range(topk_idx.shape[1]):\n"
    "            weight = None if weights is None else weights[:, slot : slot + 1].contiguous()\n"
    "            y = moe_unpermute(down.to(x.dtype), pair_to_pos[:, slot : slot + 1].contiguous(), weight, y)\n"
    "        return y if residual is None else y + residual.to(x.dtype)\n"
    "    "
)
MATRIX = "dequantise_weight(weight[expert], scale, block_n, block_k, wide)"
TRANSPOSED = f"(b if (b := {MATRIX}).shape[0] == b.shape[1] else b.T)"


def before(line, first):
    return line, f"{first}\n    {line}"


def after(line, then):
    return line, f"{line}\n    {then}"


LAYER = [
    # Order of the parts, what each is given.
    ("weight_never", "C1", WEIGHT, "row_weight = None"),
    ("weight_always_before_down", "", WEIGHT, "row_weight = weight_of_rows(topk_weights, pos_to_pair)"),
    (
        "weight_before_up",
        "",
        *after(
            WEIGHT, "hidden = hidden if row_weight is None else hidden * row_weight[:, None]\n    row_weight = None"
        ),
    ),
    ("weight_squared", "C1", OF_ROWS, OF_ROWS.replace("topk_weights", "topk_weights.square()")),
    (
        "weight_of_the_slot_alone",
        "C1",
        OF_ROWS,
        OF_ROWS.replace("topk_weights.flatten()", "topk_weights[:1].expand(topk_weights.shape).flatten()"),
    ),
    ("weight_of_the_row", "C1", OF_ROWS, OF_ROWS.replace("pos_to_pair.clamp(min=0)", "torch.arange(len(pos_to_pair))")),
    (
        "weight_in_bfloat16",
        "C1",
        OF_ROWS,
        OF_ROWS.replace("topk_weights", "topk_weights.bfloat16().to(topk_weights.dtype)"),
    ),
    (
        "weight_normalized",
        "C1",
        OF_ROWS,
        OF_ROWS.replace("topk_weights", "(topk_weights / topk_weights.sum(1, keepdim=True))"),
    ),
    (
        "weight_after_down_always",
        "",
        "if weight_before_down else None\n    codes",
        "if False else None\n    weight_before_down = False\n    codes",
    ),
    ("weight_before_down_always", "", HOW, f"{HOW}\n    weight_before_down = True"),
    ("weight_after_down_not_at_all", "C1", "None if weight_before_down else topk_weights", "None"),
    ("weight_on_both_sides", "C1", "None if weight_before_down else topk_weights", "topk_weights"),
    ("gate_and_up_swapped", "A1", *after(UP, "hidden = hidden.roll(hidden.shape[-1] // 2, -1)")),
    (
        "gate_and_up_interleaved",
        "A7",
        *after(UP, "hidden = hidden.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)"),
    ),
    ("limit_ignored", "A2", "swiglu(hidden, swiglu_limit, row_weight)", "swiglu(hidden, 0.0, row_weight)"),
    ("limit_is_10", "A2", *before(FIRST, "swiglu_limit = 10.0 if swiglu_limit else 0.0")),
    ("limit_is_at_least_10", "A2", *before(FIRST, "swiglu_limit = max(swiglu_limit, 10.0)")),
    (
        "limit_of_the_shared_expert_ignored",
        "A2",
        SHARED_DOWN,
        SHARED_DOWN.replace("swiglu(hidden, swiglu_limit)", "swiglu(hidden)"),
    ),
    ("limit_after_the_weight", "A5", *before(SECOND, WEIGHTED_UP)),
    ("shared_expert_missing", "RT13", SHARED, SHARED.replace("if shared_w13", "if False and shared_w13")),
    ("shared_expert_twice", "RT13", *before(RETURN, "residual = None if residual is None else 2 * residual")),
    (
        "shared_expert_weighted",
        "RT13",
        *before(RETURN, "residual = None if residual is None else residual * topk_weights.nansum(1, keepdim=True)"),
    ),
    (
        "shared_expert_scaled_by_one_slot_more",
        "RT13",
        *before(RETURN, "residual = None if residual is None else residual / (topk_idx.shape[1] + 1)"),
    ),
    (
        "shared_expert_where_routed_alone",
        "RT13",
        *before(RETURN, "residual = None if residual is None else residual * (topk_idx >= 0).any(1, keepdim=True)"),
    ),
    (
        "shared_expert_of_the_token_before",
        "RT13",
        *before(RETURN, "residual = None if residual is None else residual.roll(1, 0)"),
    ),
    ("shared_expert_rounded_and_added_after", "G5", RETURN, ADDED_AFTER + RETURN),
    ("shared_gate_and_up_swapped", "A1", *after(SHARED_UP, "    hidden = hidden.roll(hidden.shape[-1] // 2, -1)")),
    (
        "shared_scales_swapped_for_ones",
        "Q1",
        SHARED_UP,
        SHARED_UP.replace(
            "x, shared_w13, shared_w13_scale",
            "x, shared_w13, None if shared_w13_scale is None else torch.ones_like(shared_w13_scale.float())",
        ),
    ),
    (
        "shared_down_scales_ignored",
        "Q1",
        SHARED_DOWN,
        SHARED_DOWN.replace(
            "shared_w2, shared_w2_scale",
            "shared_w2, None if shared_w2_scale is None else torch.ones_like(shared_w2_scale.float())",
        ),
    ),
    # Quantisation of activations.
    ("never_quantised", "Q1", KIND, 'kind = "none"'),
    (
        "auto_is_fp8",
        "Q1",
        KIND,
        KIND.replace(
            "act_quant, weight)",
            "act_quant, weight)\n    kind = 'fp8' if act_quant == 'auto' and kind != 'none' else kind",
        ),
    ),
    (
        "auto_is_int8",
        "Q1",
        KIND,
        KIND.replace(
            "act_quant, weight)",
            "act_quant, weight)\n    kind = 'int8' if act_quant == 'auto' and kind != 'none' else kind",
        ),
    ),
    ("act_quant_ignored", "Q1", *after(HOW, "act_quant = 'auto'\n    how = (act_quant, *how[1:])")),
    ("act_quant_of_shared_is_auto", "Q1", *after(HOW, "how = ('auto', *how[1:])")),
    ("act_quant_of_shared_is_none", "Q1", *after(HOW, "how = ('none', *how[1:])")),
    ("down_quantised_as_up", "Q1", SECOND, SECOND.replace("w2, act_quant", "w13, act_quant")),
    ("up_quantised_as_down", "Q1", FIRST, FIRST.replace("w13, act_quant", "w2, act_quant")),
    (
        "shared_quantised_as_routed",
        "Q1",
        SHARED,
        SHARED.replace(":\n", ":\n        how = (resolve_act_quant(act_quant, w13), *how[1:])\n"),
    ),
    ("up_not_quantised", "Q1", FIRST, FIRST.replace("act_quant,", "'none',")),
    ("down_not_quantised", "Q1", SECOND, SECOND.replace("act_quant,", "'none',")),
    ("act_group_128", "Q1", FP8, FP8.replace("act_group", "128")),
    ("act_group_128_everywhere", "Q1", *after(HOW, "act_group = 128\n    how = (how[0], 128, *how[2:])")),
    ("act_group_of_shared_128", "Q1", *after(HOW, "how = (how[0], 128, *how[2:])")),
    ("act_group_32_everywhere", "Q1", *after(HOW, "act_group = 32\n    how = (how[0], 32, *how[2:])")),
    ("scale_format_ue8m0", "Q1", FP8, FP8.replace("scale_format", "'ue8m0'")),
    ("scale_format_float32", "Q1", FP8, FP8.replace("scale_format", "'float32'")),
    ("scale_format_of_shared_ue8m0", "Q1", *after(HOW, "how = (*how[:2], 'ue8m0', *how[3:])")),
    ("scale_of_the_whole_tensor", "Q1", FP8, WHOLE_FP8),
    ("int8_scale_of_the_whole_tensor", "Q1", INT8, WHOLE_INT8 + INT8),
    ("int8_truncates", "G7", INT8, OWN_INT8.format(127, "trunc()") + INT8),
    ("int8_scale_of_128", "Q3", INT8, OWN_INT8.format(128, "round().clamp(-128, 127)") + INT8),
    (
        "intermediate_not_scaled",
        "Q1",
        DOWN,
        DOWN.replace("scale, w2_scale", "None if scale is None else torch.ones_like(scale.float()), w2_scale"),
    ),
    ("scales_of_rows_not_permuted", "Q1", UP, UP.replace("row_scale", "scale[torch.arange(len(rows)) % len(scale)]")),
    ("weight_multiplies_after_the_quantisation", "C1", DOWN, f"{UNWEIGHTED}{DOWN}{WEIGHTED_DOWN}"),
    (
        "blocks_swapped",
        "Q1",
        "blocks = (act_group, block_n, block_k, between)",
        "blocks = (act_group, block_k, block_n, between)",
    ),
    (
        "blocks_of_128",
        "Q1",
        "blocks = (act_group, block_n, block_k, between)",
        "blocks = (act_group, 128, 128, between)",
    ),
    ("blocks_of_shared_128", "Q1", *after(HOW, "how = (*how[:3], 128, 128, how[5])")),
    # Routing inside.
    ("dropped_slots_go_to_expert_0", "C4", PERMUTE, PERMUTE.replace("topk_idx", "topk_idx.clamp(min=0)")),
    ("dropped_slots_go_to_the_last_expert", "C4", PERMUTE, PERMUTE.replace("topk_idx", "topk_idx % w13.shape[0]")),
    (
        "repeated_expert_runs_once",
        "RT11",
        PERMUTE,
        PERMUTE.replace(
            "topk_idx", "topk_idx.masked_fill((topk_idx[:, :, None] == topk_idx[:, None, :]).tril(-1).any(2), -1)"
        ),
    ),
    (
        "last_slot_not_run",
        "RT7",
        PERMUTE,
        PERMUTE.replace(
            "topk_idx", "topk_idx.index_fill(1, torch.arange(max(topk_idx.shape[1] - 1, 1), topk_idx.shape[1]), -1)"
        ),
    ),
    (
        "last_expert_not_run",
        "P2",
        PERMUTE,
        PERMUTE.replace("topk_idx", "topk_idx.masked_fill(topk_idx == w13.shape[0] - 1, -1)"),
    ),
    (
        "experts_beyond_capacity_dropped",
        "P7",
        PERMUTE,
        PERMUTE.replace(
            "topk_idx", "topk_idx.masked_fill((torch.arange(topk_idx.numel()) >= 256).view(topk_idx.shape), -1)"
        ),
    ),
    (
        "zero_weights_taken_for_ones",
        "C1",
        OF_ROWS,
        OF_ROWS.replace("topk_weights", "topk_weights.where(topk_weights != 0, 1.0)"),
    ),
    ("nan_weight_of_a_dropped_slot_spreads", "C4", *before(RETURN, "down = down + 0 * topk_weights.sum()")),
    (
        "weights_of_unused_experts_read",
        "RT10",
        *before(RETURN, "down = down + 0 * (w2.float().sum() if w2.is_floating_point() else 0)"),
    ),
    ("last_token_unwritten", "C5", RETURN, f"y = {COMBINED}.to(x.dtype)\n    y[-1:] = 0\n    return y"),
    (
        "columns_beyond_16s_unwritten",
        "G14",
        RETURN,
        f"y = {COMBINED}.to(x.dtype)\n    y[:, y.shape[1] // 16 * 16 :] = 0\n    return y",
    ),
    ("inner_columns_beyond_16s_lost", "G1", *before(SECOND, INNER_TAIL)),
    (
        "input_columns_beyond_16s_lost",
        "G1",
        *before(FIRST, "x = x.masked_fill(torch.arange(x.shape[1]) >= x.shape[1] // 16 * 16, 0)"),
    ),
    ("rows_of_a_segment_beyond_128_lost", "P7", *before(RETURN, SEGMENT_TAILS)),
    # Precision.
    ("combined_in_the_dtype_of_x", "G5", RETURN, COMBINED_NARROW + RETURN),
    ("products_in_bfloat16", "G5", *after(UP, f"hidden = {IN_BFLOAT16.format('hidden')}")),
    ("down_in_bfloat16", "G5", *after(DOWN, f"down = {IN_BFLOAT16.format('down')}")),
    (
        "intermediate_in_e4m3",
        "G8",
        *before(SECOND, "hidden = hidden.clamp(-448, 448).to(torch.float8_e4m3fn).to(hidden.dtype)"),
    ),
    (
        "activation_in_e4m3",
        "G8",
        SECOND,
        SECOND.replace("row_weight)", "row_weight).clamp(-448, 448).to(torch.float8_e4m3fn).to(hidden.dtype)"),
    ),
    ("truncated", "G7", RETURN, f"return {TRUNCATED.format(COMBINED)}"),
]

SIGMOID = "y = gate * torch.sigmoid(gate) * up\n"
CLAMPS = "gate.clamp(max=limit), up.clamp(-limit, limit)"
SKIPPED = "return values.masked_fill((pair_to_pos < 0)[..., None], 0.0)"
PARTS = [
    ("gelu_tanh", "A6", "swiglu", SIGMOID, "y = torch.nn.functional.gelu(gate, approximate='tanh') * up\n"),
    ("sigmoid_in_bfloat16", "A9", "swiglu", SIGMOID, "y = gate * torch.sigmoid(gate).bfloat16().to(gate.dtype) * up\n"),
    ("gate_clamped_on_both_sides", "A3", "swiglu", CLAMPS, "gate.clamp(-limit, limit), up.clamp(-limit, limit)"),
    ("up_clamped_above_alone", "A4", "swiglu", CLAMPS, "gate.clamp(max=limit), up.clamp(max=limit)"),
    ("gate_clamp_missing", "A2", "swiglu", CLAMPS, "gate, up.clamp(-limit, limit)"),
    ("dropped_slots_add_row_0", "C4", "moe_unpermute", SKIPPED, "return values"),
    (
        "empty_experts_shift_the_weights",
        "P2",
        "grouped_gemm",
        "enumerate(expert_counts.tolist()):\n        if count:\n",
        "enumerate(c for c in expert_counts.tolist() if c):\n        if count:\n",
    ),
    (
        "pairs_are_slot_major",
        "P1",
        "moe_permute",
        "token = pos_to_pair.clamp(min=0) // k",
        "token = pos_to_pair.clamp(min=0) % max(x.shape[0], 1)",
    ),
    ("weights_transposed_where_square", "G3", "grouped_gemm", f"{MATRIX}.T\n    return", f"{TRANSPOSED}\n    return"),
]

MUTANTS = [
    *(mutant("fused_moe", name, (old, new), row=row) for name, row, old, new in LAYER),
    *(mutant("fused_moe", name, (f"ops.moe.{part}", old, new), row=row) for name, row, part, old, new in PARTS),
]
