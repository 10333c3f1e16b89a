"""Wrong grouped_output_proj."""

from mutation import mutant

OP = "grouped_output_proj"
GROUPED = "return x.reshape(tokens, wo_a.shape[0], heads // wo_a.shape[0] * head_dim)"
FIRST = "u = first_step(x, wo_a, wo_a_scale, act_quant_a, act_group, scale_format, block_n, block_k).to(x.dtype)\n"
RULES = (
    "rules = (act_group, scale_format, block_n, block_k, dtype_name(x.dtype))\n"
    "    return quant_linear(u.flatten(1), wo_b, wo_b_scale, None, act_quant_b,"
    " *rules)\n\n\ndef first_step"
)
QUANTISED = "codes, scale = quantised(o, resolve_act_quant(act_quant_a, wo_a), act_group, scale_format)"
VALUES = "values = dequantise_activation(codes, scale, act_group, wide)\n    return torch"
PRODUCT = 'return torch.einsum("tak,ark->tar", values, dequantise_weight(wo_a, wo_a_scale, block_n, block_k, wide))'
LINEAR = "ops.quant.quant_linear"
SCALED = "numerics.scaled_matmul"
CODES = "numerics.codes"
STORE = (
    "y = values @ dequantise_weight(weight, weight_scale, block_n, block_k, wide).T\n"
    "    return y.to(FLOAT_NAMES[out_dtype])"
)

GROUPS = [
    mutant(
        OP,
        "heads_of_a_group_apart",
        (
            GROUPED,
            "return x.reshape(tokens, heads // wo_a.shape[0], wo_a.shape[0], head_dim).transpose(1,"
            " 2).reshape(tokens, wo_a.shape[0], -1)",
        ),
        row="S12",
    ),
    mutant(
        OP,
        "channels_before_heads",
        (
            GROUPED,
            "return x.reshape(tokens, wo_a.shape[0], heads // wo_a.shape[0], head_dim).mT.reshape(tokens,"
            " wo_a.shape[0], -1)",
        ),
        row="S12",
    ),
    mutant(OP, "groups_reversed", (GROUPED, GROUPED + ".flip(1)"), row="S12"),
    mutant(
        OP, "first_group_for_all", (PRODUCT, PRODUCT.replace("values,", "values[:, :1].expand_as(values),")), row="S12"
    ),
    mutant(
        OP,
        "weight_of_the_first_group",
        (PRODUCT, PRODUCT.replace("wide))", "wide)[:1].expand(len(wo_a), -1, -1))")),
        row="S12",
    ),
    mutant(OP, "ranks_before_groups", (RULES, RULES.replace("u.flatten(1)", "u.mT.flatten(1)")), row="S12"),
    mutant(
        OP,
        "last_group_dropped",
        (
            FIRST,
            FIRST + "    u[:, 1:] = u[:, 1:] * (torch.arange(1, len(wo_a)) < max(len(wo_a) - 1, 1))[None, :, None]\n",
        ),
    ),
    mutant(
        OP,
        "transposed_where_square",
        (
            PRODUCT,
            PRODUCT.replace(
                "values, dequantise_weight(wo_a, wo_a_scale, block_n, block_k, wide)",
                "values, (lambda w: w.mT if w.shape[1] == w.shape[2] else w)(dequantise_weight(wo_a,"
                " wo_a_scale, block_n, block_k, wide))",
            ),
        ),
        row="G3",
    ),
    mutant(
        OP,
        "wo_b_transposed_where_square",
        (
            LINEAR,
            STORE,
            STORE.replace(
                "y = values @ dequantise_weight(weight, weight_scale, block_n, block_k, wide).T",
                "weights = dequantise_weight(weight, weight_scale, block_n, block_k, wide)\n"
                "    y = values @ (weights if weights.shape[0] == weights.shape[1] else weights.T)",
            ),
        ),
        row="G3",
    ),
    mutant(
        OP,
        "strides_of_x_ignored",
        (
            "o, wide = grouped(x, wo_a), widen(x.dtype)",
            "o, wide = grouped(x if x.is_contiguous() else torch.as_strided(x, x.shape,"
            " (x.shape[1] * x.shape[2], x.shape[2], 1)), wo_a), widen(x.dtype)",
        ),
    ),
    mutant(OP, "last_rank_dropped", (FIRST, FIRST + "    u[..., -1] = 0\n"), row="G1"),
    mutant(
        OP, "ranks_beyond_64_dropped", (FIRST, FIRST + "    u[..., max(u.shape[-1] // 64 * 64, 64) :] = 0\n"), row="G1"
    ),
    mutant(
        OP,
        "last_channels_dropped",
        (
            PRODUCT,
            PRODUCT.replace(
                "values,", "values * (torch.arange(values.shape[-1]) < max(values.shape[-1] // 32 * 32, 1)),"
            ),
        ),
        row="G1",
    ),
]

STEPS = [
    mutant(
        OP,
        "between_in_e4m3",
        (FIRST, FIRST.replace(".to(x.dtype)", ".clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)")),
    ),
    mutant(OP, "between_in_bfloat16", (FIRST, FIRST.replace(".to(x.dtype)", ".to(torch.bfloat16).to(x.dtype)"))),
    mutant(
        OP,
        "between_truncated",
        (
            FIRST,
            FIRST.replace("u = first", "u = (first").replace(
                "block_k).to",
                "block_k).contiguous().view(torch.int32) & {torch.bfloat16: -65536, torch.float16:"
                " -8192}.get(x.dtype, -256)).view(torch.float32).to",
            ),
        ),
        row="G7",
    ),
    mutant(
        OP,
        "output_truncated",
        (
            LINEAR,
            STORE,
            STORE.replace(
                "    return y",
                '    y = (y.contiguous().view(torch.int32) & {"bfloat16": -65536, "float16":'
                " -8192}.get(out_dtype, -256)).view(torch.float32)\n"
                "    return y",
            ),
        ),
        row="G7",
    ),
    mutant(
        OP,
        "accumulator_in_bfloat16",
        (
            LINEAR,
            STORE,
            "weights = dequantise_weight(weight, weight_scale, block_n, block_k, wide)\n"
            "    y = torch.zeros((*values.shape[:-1], len(weights)), dtype=torch.bfloat16)\n"
            "    for part, column in zip(values.split(64, -1), weights.split(64, 1)):\n"
            "        y = (y.float() + part @ column.T).to(torch.bfloat16)\n"
            "    return y.to(FLOAT_NAMES[out_dtype])",
        ),
        row="G5",
    ),
    mutant(
        OP,
        "splits_in_bfloat16",
        (
            PRODUCT,
            "weights = dequantise_weight(wo_a, wo_a_scale, block_n, block_k, wide)\n"
            "    parts = zip(values.tensor_split(8, -1), weights.tensor_split(8, -1))\n"
            '    return sum(torch.einsum("tak,ark->tar", *part).to(torch.bfloat16).to(wide)'
            " for part in parts)",
        ),
        row="G5",
    ),
    mutant(
        OP,
        "products_in_bfloat16",
        (PRODUCT, PRODUCT.replace("values,", "values.to(torch.bfloat16).to(wide),")),
        row="G8",
    ),
    mutant(
        OP,
        "tensor_float_32",
        (PRODUCT, PRODUCT.replace("values,", "((values.contiguous().view(torch.int32) + 4096) & -8192).view(wide),")),
        row="G8",
    ),
    mutant(OP, "relu_between", (FIRST, FIRST.replace(".to(x.dtype)", ".relu().to(x.dtype)"))),
]

KINDS = [
    mutant(OP, "act_quant_a_none", (QUANTISED, QUANTISED.replace("resolve_act_quant(act_quant_a, wo_a)", '"none"'))),
    mutant(OP, "act_quant_a_auto", (QUANTISED, QUANTISED.replace("act_quant_a,", '"auto",'))),
    mutant(OP, "act_quant_b_for_a", (FIRST, FIRST.replace("act_quant_a", "act_quant_b"))),
    mutant(OP, "act_quant_b_none", (RULES, RULES.replace("act_quant_b", '"none"'))),
    mutant(OP, "act_quant_b_auto", (RULES, RULES.replace("act_quant_b", '"auto"'))),
    mutant(OP, "act_quant_b_by_wo_a", (RULES, RULES.replace("act_quant_b", "resolve_act_quant(act_quant_b, wo_a)"))),
    mutant(
        OP, "act_group_of_128", (FIRST, FIRST.replace("act_group", "128")), (RULES, RULES.replace("(act_group", "(128"))
    ),
    mutant(OP, "act_group_of_128_in_the_second", (RULES, RULES.replace("(act_group", "(128"))),
    mutant(OP, "act_group_is_the_row", (FIRST, FIRST.replace("act_group", "2**14")), row="Q1"),
    mutant(
        OP,
        "scale_format_ignored",
        (FIRST, FIRST.replace("scale_format", '"ue8m0"')),
        (RULES, RULES.replace("scale_format", '"ue8m0"')),
    ),
    mutant(
        OP,
        "scale_format_float32",
        (FIRST, FIRST.replace("scale_format", '"float32"')),
        (RULES, RULES.replace("scale_format", '"float32"')),
    ),
    mutant(
        OP,
        "block_n_of_128",
        (FIRST, FIRST.replace("block_n", "128")),
        (RULES, RULES.replace("block_n", "128")),
        row="Q1",
    ),
    mutant(
        OP,
        "block_k_of_128",
        (FIRST, FIRST.replace("block_k", "128")),
        (RULES, RULES.replace("block_k", "128")),
        row="Q1",
    ),
    mutant(
        OP,
        "scale_blocks_of_wo_a_swapped",
        (
            PRODUCT,
            PRODUCT.replace(
                "wo_a_scale, block_n, block_k",
                "wo_a_scale if wo_a_scale is None else wo_a_scale.float().flatten(1).unflatten(1,"
                " (wo_a_scale.shape[2], -1)).mT, block_n, block_k",
            ),
        ),
        row="Q1",
    ),
    mutant(OP, "scale_of_wo_a_ignored", (PRODUCT, PRODUCT.replace("wo_a_scale", "None")), row="Q1"),
    mutant(
        OP,
        "scale_of_wo_a_of_the_first_group",
        (
            PRODUCT,
            PRODUCT.replace(
                "wo_a_scale", "wo_a_scale if wo_a_scale is None else wo_a_scale.float()[:1].expand(len(wo_a), -1, -1)"
            ),
        ),
        row="Q1",
    ),
    mutant(
        OP,
        "scale_of_wo_a_reversed_in_rows",
        (PRODUCT, PRODUCT.replace("wo_a_scale", "wo_a_scale if wo_a_scale is None else wo_a_scale.float().flip(1)")),
        row="Q1",
    ),
    mutant(
        OP,
        "scale_of_wo_a_reversed_in_columns",
        (PRODUCT, PRODUCT.replace("wo_a_scale", "wo_a_scale if wo_a_scale is None else wo_a_scale.float().flip(2)")),
        row="Q1",
    ),
    mutant(
        OP,
        "scale_of_wo_b_ignored",
        (
            RULES,
            RULES.replace(
                "wo_b_scale", "None if wo_b_scale is None else torch.ones_like(wo_b_scale, dtype=torch.float32)"
            ),
        ),
        row="Q1",
    ),
    mutant(
        OP,
        "scale_of_wo_b_reversed_in_rows",
        (RULES, RULES.replace("wo_b_scale", "None if wo_b_scale is None else wo_b_scale.float().flip(0)")),
        row="Q1",
    ),
    mutant(
        OP,
        "scale_of_wo_b_reversed_in_columns",
        (RULES, RULES.replace("wo_b_scale", "None if wo_b_scale is None else wo_b_scale.float().flip(1)")),
        row="Q1",
    ),
    mutant(
        OP,
        "int8_scale_shared_by_groups",
        (
            QUANTISED,
            QUANTISED.replace(
                "quantised(o,", 'quantised(o.flatten(1) if resolve_act_quant(act_quant_a, wo_a) == "int8" else o,'
            )
            + "\n    if scale is not None and codes.dim() == 2:\n"
            "        codes, scale = codes.reshape(o.shape), scale[:, None].expand(-1,"
            " o.shape[1], -1)",
        ),
        row="Q1",
    ),
    mutant(
        OP,
        "fp8_groups_across_groups_of_heads",
        (
            QUANTISED,
            "kind = resolve_act_quant(act_quant_a, wo_a)\n"
            '    codes, scale = quantised(o.flatten(1) if kind == "fp8" else o, kind,'
            ' act_group, scale_format)\n    if kind == "fp8":\n'
            "        codes, scale, act_group = codes.reshape(o.shape), scale.float().repeat_interleave(act_group,"
            " -1)[:, : o[0].numel()].reshape(o.shape), 1",
        ),
        row="Q1",
    ),
    mutant(OP, "scale_of_activations_ignored", (VALUES, VALUES.replace("scale,", "None,")), row="Q1"),
    mutant(
        OP,
        "nibbles_swapped",
        (CODES, "torch.stack((packed & 0xF, packed >> 4), dim=-1)", "torch.stack((packed >> 4, packed & 0xF), dim=-1)"),
        row="Q8",
    ),
    mutant(OP, "e2m1_without_sign", (CODES, "return table[codes.long()]", "return table[codes.long() & 7]"), row="Q9"),
    mutant(
        OP,
        "minus_128_of_int8_is_minus_127",
        (
            SCALED,
            "values = decode(weight, dtype)\n",
            "values = decode(weight, dtype)\n"
            "    values = values.clamp(min=-127) if weight.dtype == torch.int8 else values\n",
        ),
        row="Q10",
    ),
    mutant(
        OP,
        "fp4_groups_of_64",
        (SCALED, "FP4_GROUP = 32\n", "FP4_GROUP = 32\nWRONG = 64\n"),
        (SCALED, "return 1, FP4_GROUP", "return 1, WRONG"),
        row="Q1",
    ),
    mutant(
        OP,
        "small_scales_are_0",
        (
            CODES,
            "wide = scale.repeat_interleave(block_k, dim=-1)[..., :columns]",
            "scale = torch.where(scale < 2.0**-5, 0.0, scale)\n"
            "    wide = scale.repeat_interleave(block_k, dim=-1)[..., :columns]",
        ),
        row="Q12",
    ),
]

MUTANTS = GROUPS + STEPS + KINDS
