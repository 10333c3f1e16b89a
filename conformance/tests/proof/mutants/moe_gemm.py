"""Wrong grouped products: segments, experts, tails, scales, codes, precision."""

from mutation import mutant

LOOP = "for expert, count in enumerate(expert_counts.tolist()):\n        if count:\n"
YIELD = "yield expert, slice(start, start + count) if x.dim() == 2 else (expert, slice(0, count))"
ADVANCE = "start += -(-count // alignment) * alignment"
PRODUCT = "y[rows] = values[rows] @ dequantise_weight(weight[expert], scale, block_n, block_k, wide).T"
MATRIX = "dequantise_weight(weight[expert], scale, block_n, block_k, wide)"
SCALE = "scale = None if weight_scale is None else weight_scale[expert]\n        y[rows] = values"
RETURN = "return y.to(FLOAT_NAMES[out_dtype])\n\n\ndef segments"
TRUNCATED = (
    "(y.float().view(torch.int32) & {'bfloat16': -65536, 'float16': -8192}.get(out_dtype, -1))"
    ".view(torch.float32).to(FLOAT_NAMES[out_dtype])"
)
SATURATED = "y.clamp(min=-(most := torch.finfo(FLOAT_NAMES[out_dtype]).max), max=most).to(FLOAT_NAMES[out_dtype])"
# Rows of the weights as if every expert's first one stood at a multiple of 16.
PADDED_STRIDE = (
    "weight.flatten(0, 1)[(torch.arange(weight.shape[1]) + expert * -(-weight.shape[1] // 16) * 16)"
    " % (len(weight) * weight.shape[1])]"
)
TF32 = "(({}.float().contiguous().view(torch.int32) + 4096 & -8192).view(torch.float32).to(wide))"
E4M3 = (
    "(({0} / (scale := torch.nn.functional.pad({0}.abs(), (0, 1)).amax(-1, keepdim=True).clamp(min=1e-30) / 448))"
    ".float().to(torch.float8_e4m3fn).to(wide) * scale)"
)
# The sum plus 32768, and the scales, of int8 codes on both sides.
INT8_SUM = "a @ b.T if x.dtype != torch.int8 else (((x[rows].double() @ weight[expert].double().T).to(wide) + 32768)"
INT8_SCALES = "x_scale[rows].to(wide) * scale.T.to(wide)"
# The scale of an element found by the other side's block.
SWAPPED = (
    "a @ (b if scale is None or weight.dtype != torch.float8_e4m3fn else weight[expert].to(wide) * scale.to(wide)"
    "[(torch.arange(b.shape[0]) // block_k).clamp(max=scale.shape[0] - 1)]"
    "[:, (torch.arange(b.shape[1]) // block_n).clamp(max=scale.shape[1] - 1)]).T"
)


def product(text):
    """The product of `a`, an expert's rows, and `b`, its matrix, computed otherwise."""
    return PRODUCT, f"a, b = values[rows], {MATRIX}\n        y[rows] = {text}"


def chunks(step, rounded):
    """Partial sums over `step` columns, the total rounded after each one."""
    return product(
        "values.new_zeros(())\n"
        f"        for k in range(0, x.shape[-1], {step}):\n"
        f"            y[rows] = {rounded.format(f'y[rows] + a[..., k : k + {step}] @ b[:, k : k + {step}].T')}"
    )


def tail(text):
    """Part of an expert's rows of y left at zero."""
    return PRODUCT, f"{PRODUCT}\n        y[rows]{text} = 0"


def output(text):
    return RETURN, RETURN.replace("y.to(FLOAT_NAMES[out_dtype])", text)


OWN = [
    # Where segments are.
    (
        "empty_experts_shift_the_weights",
        "P2",
        LOOP,
        LOOP.replace("enumerate(expert_counts.tolist())", "enumerate(c for c in expert_counts.tolist() if c)"),
    ),
    ("segments_reversed", "P1", YIELD, YIELD.replace("yield expert,", "yield len(expert_counts) - 1 - expert,")),
    ("next_expert_s_weight", "P1", YIELD, YIELD.replace("yield expert,", "yield (expert + 1) % len(expert_counts),")),
    ("first_expert_s_weight", "P1", YIELD, YIELD.replace("yield expert,", "yield 0,")),
    (
        "last_expert_not_run",
        "P2",
        LOOP,
        LOOP.replace("if count:", "if count and expert < max(len(expert_counts) - 1, 1):"),
    ),
    ("one_row_experts_not_run", "P2", LOOP, LOOP.replace("if count:", "if count > 1:")),
    ("alignment_ignored", "P1", ADVANCE, "start += count"),
    ("alignment_rounds_down", "P1", ADVANCE, "start += max(count // alignment, 1) * alignment if count else 0"),
    (
        "alignment_always_adds_a_block",
        "P1",
        ADVANCE,
        "start = min(start + (count // alignment + 1) * alignment, x.shape[0] - 1) if alignment > 1 else start + count",
    ),
    (
        "alignment_of_empty_experts",
        "P2",
        ADVANCE,
        "start = min(start + max(-(-count // alignment), 1) * alignment, x.shape[0] - 1)",
    ),
    (
        "alignment_of_odd_counts_alone",
        "P1",
        ADVANCE,
        "start = -(-(start + count) // alignment) * alignment if count % 2 else start + count",
    ),
    (
        "alignment_at_most_64",
        "P1",
        ADVANCE,
        ADVANCE.replace(
            "alignment",
            "min(alignment, 64)",
        ),
    ),
    ("starts_in_8_bits", "P9", ADVANCE, f"{ADVANCE}\n        start %= 256"),
    ("counts_in_8_bits", "P9", LOOP, LOOP.replace("if count:", "count %= 256\n        if count:")),
    ("counts_are_ends", "P1", YIELD, YIELD.replace("start + count)", "max(count, start + 1))")),
    (
        "last_row_of_a_segment_lost",
        "P7",
        YIELD,
        YIELD.replace("start + count)", "start + max(count - 1, 1))").replace("(0, count)", "(0, max(count - 1, 1))"),
    ),
    ("rows_beyond_16s_lost", "P7", *tail("[..., (values[rows].shape[-2] // 16 * 16 or 1) :, :]")),
    ("rows_beyond_4s_lost", "P7", *tail("[..., (values[rows].shape[-2] // 4 * 4 or 1) :, :]")),
    ("rows_beyond_128_lost", "P7", *tail("[..., 128:, :]")),
    ("rows_beyond_256_lost", "P7", *tail("[..., 256:, :]")),
    ("rows_of_no_segment_leak", "RT10", *product("a @ b.T + 0 * values.sum()")),
    (
        "every_expert_s_weight_masked",
        "RT10",
        PRODUCT,
        f"{PRODUCT}\n        y[rows] += sum(0 * w.to(wide).sum() for w in weight)",
    ),
    ("masked_rows_of_the_first_expert", "G12", YIELD, YIELD.replace("(expert, slice", "(0, slice")),
    ("masked_rows_one_fewer", "G12", YIELD, YIELD.replace("slice(0, count)", "slice(0, max(count - 1, 1))")),
    (
        "masked_rows_at_aligned_counts_alone",
        "G12",
        YIELD,
        YIELD.replace("slice(0, count)", "slice(0, count // alignment * alignment)"),
    ),
    ("masked_rows_beyond_4_lost", "G12", YIELD, YIELD.replace("slice(0, count)", "slice(0, min(count, 4))")),
    # Tails of the product.
    ("weight_transposed_where_square", "G3", *product("a @ (b if b.shape[0] == b.shape[1] else b.T)")),
    ("last_input_lost", "G1", *product("a[..., :-1] @ b[:, :-1].T")),
    ("first_input_lost", "G1", *product("a[..., 1:] @ b[:, 1:].T")),
    *(
        (
            f"inputs_beyond_{t}s_lost",
            "G1",
            *product(f"a[..., : a.shape[-1] // {t} * {t}] @ b[:, : a.shape[-1] // {t} * {t}].T"),
        )
        for t in (4, 16, 32, 64, 128)
    ),
    (
        "inputs_of_the_last_tile_twice",
        "G9",
        *product("a @ b.T + a[..., a.shape[-1] // 64 * 64 :] @ b[:, a.shape[-1] // 64 * 64 :].T"),
    ),
    ("tail_of_inputs_wraps", "G1", *product("a @ b.T + a[..., : -a.shape[-1] % 8] @ b[:, : -a.shape[-1] % 8].T")),
    *((f"outputs_beyond_{t}s_lost", "G14", *tail(f"[..., weight.shape[1] // {t} * {t} :]")) for t in (2, 8, 16, 128)),
    ("outputs_beyond_128_lost", "G14", *tail("[..., 128:]")),
    ("stride_of_experts_padded", "G4", PRODUCT, PRODUCT.replace("weight[expert]", PADDED_STRIDE)),
    (
        "no_inputs_leave_garbage",
        "C6",
        RETURN,
        RETURN.replace("return", "y = y if x.shape[-1] else y + float('nan')\n    return"),
    ),
    ("starts_from_stale_output", "C6", *product("a @ b.T + 1")),
    # Precision.
    ("sum_in_bfloat16_every_16", "G5", *chunks(16, "({}).bfloat16().to(wide)")),
    ("sum_in_bfloat16_every_128", "G5", *chunks(128, "({}).bfloat16().to(wide)")),
    ("sum_in_float16_every_32", "G5", *chunks(32, "({}).half().to(wide)")),
    ("partial_sums_in_bfloat16", "G5", *chunks(256, "y[rows] + ({} - y[rows]).bfloat16().to(wide)")),
    ("sum_of_13_bits", "G5", *chunks(32, "(({}).float().view(torch.int32) & -1024).view(torch.float32).to(wide)")),
    (
        "sum_of_13_bits_in_the_end_alone",
        "G5",
        *product("((a @ b.T).float().view(torch.int32) & -1024).view(torch.float32).to(wide)"),
    ),
    ("products_in_tf32", "G8", *product(f"{TF32.format('a')} @ {TF32.format('b')}.T")),
    ("inputs_in_bfloat16", "G8", *product("a.bfloat16().to(wide) @ b.T")),
    ("weights_in_bfloat16", "G8", *product("a @ b.bfloat16().to(wide).T")),
    ("inputs_in_e4m3", "G8", *product(f"{E4M3.format('a')} @ b.T")),
    ("weights_in_e4m3", "G8", *product(f"a @ {E4M3.format('b')}.T")),
    ("compensated_twice", "G9", *product("2 * (a @ b.T)")),
    ("truncated", "G7", *output(TRUNCATED)),
    ("rounded_through_bfloat16", "G7", *output("y.bfloat16().to(FLOAT_NAMES[out_dtype])")),
    ("rounded_through_float16", "G7", *output("y.half().to(FLOAT_NAMES[out_dtype])")),
    ("overflow_saturates", "", *output(SATURATED)),
    ("int8_sum_in_16_bits", "P9", *product(f"{INT8_SUM} % 65536 - 32768) * {INT8_SCALES}")),
    ("int8_scales_in_bfloat16", "G5", *product(f"{INT8_SUM} - 32768) * ({INT8_SCALES}).bfloat16().to(wide)")),
    # Scales of the weights.
    ("weight_scale_of_the_first_expert", "P1", SCALE, SCALE.replace("weight_scale[expert]", "weight_scale[0]")),
    (
        "weight_scale_of_the_next_expert",
        "P1",
        SCALE,
        SCALE.replace("weight_scale[expert]", "weight_scale[(expert + 1) % len(weight_scale)]"),
    ),
    ("blocks_swapped", "Q1", *product(SWAPPED)),
]

SPREAD = "spread_scale(scale, values.shape[-2], values.shape[-1], rows, columns).to(dtype)"
BLOCKS = "rows, columns = blocks_of(weight, block_n, block_k)\n    return values"
GROUP = "group = max(x.shape[-1], 1) if x.dtype == torch.int8 else act_group"
GROUPS = "spread_groups(x_scale.to(dtype), x.shape[-1], group)"

SCALED = [
    ("weight_scale_ignored", "Q1", f"values * {SPREAD}", "values"),
    ("weight_scale_divides", "Q1", f"values * {SPREAD}", f"values / {SPREAD}"),
    ("weight_scale_of_the_first_row", "Q1", "spread_scale(scale,", "spread_scale(scale[:1].expand(scale.shape),"),
    ("weight_scale_of_the_first_column", "Q1", "spread_scale(scale,", "spread_scale(scale[:, :1].expand(scale.shape),"),
    ("weight_scale_transposed", "Q1", "spread_scale(scale,", "spread_scale(scale.T.reshape(scale.shape),"),
    ("weight_scale_of_the_row_before", "Q1", "spread_scale(scale,", "spread_scale(scale.float().roll(1, 0),"),
    ("weight_scale_of_the_column_before", "Q1", "spread_scale(scale,", "spread_scale(scale.float().roll(1, 1),"),
    ("weight_scale_as_powers_of_two", "Q1", SPREAD, f"{SPREAD}.log2().ceil().exp2()"),
    ("weight_scale_in_bfloat16", "Q1", SPREAD, SPREAD.replace(".to(dtype)", ".to(torch.bfloat16).to(dtype)")),
    ("weight_scale_flushed_below_2_to_the_minus_100", "Q12", SPREAD, f"{SPREAD}.where({SPREAD} > 2**-100, 0)"),
    (
        "weight_scale_of_exponent_127_off_by_one",
        "Q3",
        SPREAD,
        f"{SPREAD} * (2 if scale.dtype == torch.float8_e8m0fnu else 1)",
    ),
    ("weights_dequantised_to_bfloat16", "Q1", f"values * {SPREAD}", f"(values * {SPREAD}).bfloat16().to(dtype)"),
    ("blocks_of_128_always", "Q1", BLOCKS, BLOCKS.replace("block_n, block_k", "128, 128")),
    ("blocks_of_128_rows_always", "Q1", BLOCKS, BLOCKS.replace("block_n,", "128,")),
    ("blocks_of_128_columns_always", "Q1", BLOCKS, BLOCKS.replace("block_k)", "128)")),
    ("fp4_blocks_of_64", "Q1", "return 1, FP4_GROUP", "return 1, 64"),
    ("fp4_blocks_of_2_rows", "Q1", "return 1, FP4_GROUP", "return 2, FP4_GROUP"),
    (
        "int8_scale_of_the_first_row",
        "Q1",
        "return (1, max(weight.shape[-1], 1)) if",
        "return (weight.shape[-2], max(weight.shape[-1], 1)) if",
    ),
    ("x_scale_ignored", "Q1", f"values * {GROUPS}", "values"),
    ("x_scale_divides", "Q1", f"values * {GROUPS}", f"values / {GROUPS}"),
    (
        "x_scale_of_the_first_group",
        "Q1",
        GROUPS,
        GROUPS.replace("(dtype)", "(dtype)[..., :1]").replace(", group)", ", x.shape[-1])"),
    ),
    ("x_scale_groups_of_128_always", "Q1", GROUP, GROUP.replace("else act_group", "else 128")),
    ("x_scale_groups_one_wider", "Q1", GROUP, GROUP.replace("else act_group", "else act_group + 1")),
    ("x_scale_of_the_group_before", "Q1", GROUPS, GROUPS.replace("(dtype)", "(dtype).roll(1, -1)")),
    ("x_scale_of_the_row_before", "Q1", GROUPS, GROUPS.replace("(dtype)", "(dtype).roll(1, -2)")),
    ("x_scale_of_the_first_row", "Q1", GROUPS, GROUPS.replace("(dtype)", "(dtype)[..., :1, :].expand(x_scale.shape)")),
    ("x_scale_in_bfloat16", "Q1", GROUPS, GROUPS.replace("(dtype)", "(torch.bfloat16).to(dtype)")),
    ("x_scale_as_powers_of_two", "Q1", GROUPS, GROUPS.replace("(dtype)", "(dtype).log2().ceil().exp2()")),
    (
        "x_scale_below_2_to_the_minus_14_flushed",
        "Q12",
        GROUPS,
        GROUPS.replace("x_scale.to(dtype)", "x_scale.to(dtype) * (x_scale.to(dtype) > 2**-14)"),
    ),
]

DECODED = "decode_e2m1(unpack_nibbles(q), dtype) if q.dtype == torch.uint8 else q.to(dtype)"
VALUES = "E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)"
OTHER = "q.to(dtype)"
FP8 = "q.dtype == torch.float8_e4m3fn"

CODES = [
    ("fp4_nibbles_swapped", "Q8", "(packed & 0xF, packed >> 4)", "(packed >> 4, packed & 0xF)"),
    ("fp4_nibbles_in_halves", "Q8", "dim=-1).flatten(-2)", "dim=-2).flatten(-2)"),
    ("fp4_subnormal_flushed", "Q9", VALUES, VALUES.replace("0.5", "0.0")),
    ("fp4_subnormal_a_quarter", "Q9", VALUES, VALUES.replace("0.5", "0.25")),
    ("fp4_largest_is_8", "Q9", VALUES, VALUES.replace("6.0", "8.0")),
    ("fp4_5_for_6", "Q9", VALUES, VALUES.replace("6.0", "5.0")),
    ("fp4_without_sign", "Q9", "*(-value for value", "*(value for value"),
    ("fp4_twos_complement", "Q9", "*(-value for value in E2M1_VALUES)", "*(-value for value in E2M1_VALUES[::-1])"),
    ("fp4_sign_in_the_low_bit", "Q9", "table[codes.long()]", "table[(codes.long() & 1) << 3 | codes.long() >> 1]"),
    ("fp4_as_integers", "Q9", "table[codes.long()]", "((codes.long() ^ 8) - 8).to(dtype)"),
    (
        "int8_minus_128_as_minus_127",
        "Q10",
        DECODED,
        DECODED.replace(OTHER, f"{OTHER}.clamp(min=-127 if q.dtype == torch.int8 else -1e38)"),
    ),
    (
        "int8_without_sign",
        "Q10",
        DECODED,
        DECODED.replace(OTHER, f"({OTHER} % 256 if q.dtype == torch.int8 else {OTHER})"),
    ),
    ("fp8_largest_is_240", "Q3", DECODED, DECODED.replace(OTHER, f"({OTHER}.clamp(-240, 240) if {FP8} else {OTHER})")),
    ("fp8_fnuz", "Q3", DECODED, DECODED.replace(OTHER, f"({OTHER} / 2 if {FP8} else {OTHER})")),
    ("fp8_e5m2", "Q3", DECODED, DECODED.replace(OTHER, f"(q.view(torch.float8_e5m2).to(dtype) if {FP8} else {OTHER})")),
    (
        "fp8_subnormals_flushed",
        "Q12",
        DECODED,
        DECODED.replace(OTHER, f"({OTHER} * ({OTHER}.abs() >= 2**-6) if {FP8} else {OTHER})"),
    ),
]

MUTANTS = [
    *(mutant("grouped_gemm", name, (old, new), row=row) for name, row, old, new in OWN),
    *(mutant("grouped_gemm", name, ("numerics.scaled_matmul", old, new), row=row) for name, row, old, new in SCALED),
    *(mutant("grouped_gemm", name, ("numerics.codes", old, new), row=row) for name, row, old, new in CODES),
    mutant(
        "grouped_gemm",
        "masked_rows_all_computed",
        (YIELD, YIELD.replace("slice(0, count)", "slice(0, x.shape[1])")),
        row="G12",
        equivalent="rows outside every segment are unspecified, and what they hold is read by no other row",
    ),
]
