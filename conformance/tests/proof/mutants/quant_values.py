"""Wrong values of quantised codes, where they are the result and where they are multiplied."""

from mutation import mutant

CODES = "numerics.codes"
UNPACK = "return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)"
TABLE = "table = torch.tensor((*E2M1_VALUES, *(-value for value in E2M1_VALUES)), dtype=dtype, device=codes.device)"
ENTRY = "return table[codes.long()]"
DECODE = "return decode_e2m1(unpack_nibbles(q), dtype) if q.dtype == torch.uint8 else q.to(dtype)"
E8M0 = "scale = scale.to(torch.float32)  # exact, and every device can index it"
WIDE_K = "wide = scale.repeat_interleave(block_k, dim=-1)[..., :columns]"
WIDE_N = "return wide.repeat_interleave(block_n, dim=-2)[..., :rows, :]"
# A block beyond the last reads the last.
CLAMPED = (
    (CODES, WIDE_K, "wide = scale[..., (torch.arange(columns) // block_k).clamp(max=scale.shape[-1] - 1)]"),
    (CODES, WIDE_N, "return wide[..., (torch.arange(rows) // block_n).clamp(max=scale.shape[-2] - 1), :]"),
)


def of_both(name, *edits, **about):
    """The same mistake where codes become values, in block_dequant and in quant_linear."""
    return [mutant(operator, name, *edits, **about) for operator in ("block_dequant", "quant_linear")]


VALUES = [
    *of_both(
        "nibbles_swapped",
        (CODES, UNPACK, UNPACK.replace("packed & 0xF, packed >> 4", "packed >> 4, packed & 0xF")),
        row="Q8",
    ),
    *of_both("nibbles_in_halves", (CODES, UNPACK, "return torch.cat((packed & 0xF, packed >> 4), dim=-1)"), row="Q8"),
    *of_both("low_nibble_twice", (CODES, UNPACK, UNPACK.replace("packed >> 4", "packed & 0xF"))),
    *of_both(
        "high_nibble_shifted_with_its_sign",
        (CODES, UNPACK, UNPACK.replace("packed >> 4", "(packed.view(torch.int8) >> 4).view(torch.uint8) & 0x7")),
    ),
    *of_both("no_e2m1_sign", (CODES, TABLE, TABLE.replace("-value", "value"))),
    *of_both(
        "e2m1_of_twos_complement",
        (CODES, TABLE, TABLE.replace("-value for value in E2M1_VALUES", "-value for value in reversed(E2M1_VALUES)")),
        row="Q9",
    ),
    *of_both(
        "e2m1_half_is_a_quarter",
        (CODES, TABLE, TABLE.replace("*E2M1_VALUES", "0.0, 0.25, *E2M1_VALUES[2:]", 1)),
        row="Q9",
    ),
    *of_both("e2m1_half_is_zero", (CODES, TABLE, TABLE + "\n    table[1] = table[9] = 0"), row="Q9"),
    *of_both("e2m1_six_is_five", (CODES, TABLE, TABLE + "\n    table[7], table[15] = 5, -5"), row="Q9"),
    *of_both("e2m1_six_is_eight", (CODES, TABLE, TABLE + "\n    table[7], table[15] = 8, -8"), row="Q9"),
    *of_both("e2m1_negative_zero_is_six", (CODES, TABLE, TABLE + "\n    table[8] = -6"), row="Q9"),
    *of_both(
        "e2m1_codes_are_integers", (CODES, ENTRY, "return torch.where(codes > 7, 8.0 - codes, 1.0 * codes).to(dtype)")
    ),
    *of_both(
        "e4m3_as_e4m3fnuz",
        (
            CODES,
            DECODE,
            DECODE.replace(
                "else q.to(dtype)",
                "else (q.view(torch.float8_e4m3fnuz) if q.dtype == torch.float8_e4m3fn else q).to(dtype)",
            ),
        ),
    ),
    *of_both(
        "e4m3_as_e5m2",
        (
            CODES,
            DECODE,
            DECODE.replace(
                "else q.to(dtype)",
                "else (q.view(torch.float8_e5m2) if q.dtype == torch.float8_e4m3fn else q).to(dtype)",
            ),
        ),
    ),
    *of_both(
        "e4m3_subnormals_flushed",
        (
            CODES,
            DECODE,
            "q = q if q.dtype != torch.float8_e4m3fn else torch.where(q.float().abs() < 2.0**-6, 0.0, q.float())\n    "
            + DECODE,
        ),
    ),
    *of_both(
        "int8_is_unsigned",
        (CODES, DECODE, "q = q.to(torch.int16) & 255 if q.dtype == torch.int8 else q\n    " + DECODE),
    ),
    *of_both(
        "minus_128_is_minus_127",
        (CODES, DECODE, "q = q.clamp(min=-127) if q.dtype == torch.int8 else q\n    " + DECODE),
        row="Q10",
    ),
    *of_both(
        "minus_128_is_128",
        (CODES, DECODE, "q = q.to(torch.int16).where(q != -128, 128) if q.dtype == torch.int8 else q\n    " + DECODE),
        row="Q10",
    ),
    *of_both("e8m0_bias_of_128", (CODES, E8M0, "scale = scale.to(torch.float32) / 2")),
    *of_both("e8m0_bias_of_126", (CODES, E8M0, "scale = scale.to(torch.float32) * 2")),
    *of_both("e8m0_as_a_number", (CODES, E8M0, "scale = scale.view(torch.uint8).to(torch.float32)")),
    *of_both(
        "e8m0_is_a_fixed_point",
        (CODES, E8M0, "scale = (scale.view(torch.uint8).to(torch.float32) - 127).exp2().clamp(min=2.0**-7)"),
    ),
    *of_both(
        "float32_scale_is_a_power_of_two",
        (
            CODES,
            WIDE_K,
            "if scale.dtype == torch.float32:\n        scale = torch.exp2(scale.abs().log2().round())\n    " + WIDE_K,
        ),
    ),
    *of_both(
        "float32_scale_narrow",
        (CODES, WIDE_K, "if scale.dtype == torch.float32:\n        scale = scale.bfloat16().float()\n    " + WIDE_K),
    ),
    *of_both(
        "float32_scale_in_float16",
        (CODES, WIDE_K, "if scale.dtype == torch.float32:\n        scale = scale.half().float()\n    " + WIDE_K),
        row="Q12",
    ),
    *of_both(
        "float32_scale_inverted",
        (CODES, WIDE_K, "scale = 1 / scale if scale.dtype == torch.float32 else scale\n    " + WIDE_K),
    ),
    *of_both("scale_inverted", (CODES, WIDE_K, "scale = 1 / scale\n    " + WIDE_K)),
    *of_both("scale_ignored", (CODES, WIDE_K, "scale = torch.ones_like(scale)\n    " + WIDE_K)),
    *of_both(
        "scale_of_the_tensor",
        (CODES, WIDE_K, "scale = scale[..., :1, :1].expand(scale.shape)\n    " + WIDE_K),
        row="Q1",
    ),
    *of_both(
        "scale_of_the_first_column",
        (CODES, WIDE_K, "scale = scale[..., :1].expand(scale.shape)\n    " + WIDE_K),
        row="Q1",
    ),
    *of_both(
        "scale_of_the_first_row",
        (CODES, WIDE_K, "scale = scale[..., :1, :].expand(scale.shape)\n    " + WIDE_K),
        row="Q1",
    ),
    *of_both(
        "scale_transposed",
        (CODES, WIDE_K, "scale = scale.mT if scale.shape[-1] == scale.shape[-2] else scale\n    " + WIDE_K),
        row="Q1",
    ),
    *of_both(
        "scale_columnwise_in_memory", (CODES, WIDE_K, "scale = scale.mT.reshape(scale.shape)\n    " + WIDE_K), row="Q1"
    ),
    *of_both(
        "scale_of_the_next_row",
        (CODES, WIDE_K, "scale = scale.roll(-1, -2) if scale.numel() else scale\n    " + WIDE_K),
    ),
    *of_both("scale_of_the_next_column", (CODES, WIDE_K, "scale = scale.roll(-1, -1)\n    " + WIDE_K)),
    *of_both(
        "blocks_of_rows_interleaved",
        (CODES, WIDE_N, "return wide.repeat(*[1] * (wide.dim() - 2), block_n, 1)[..., :rows, :]"),
    ),
    *of_both(
        "blocks_of_columns_interleaved",
        (CODES, WIDE_K, "wide = scale.repeat(*[1] * (scale.dim() - 1), block_k)[..., :columns]"),
    ),
    *of_both(
        "last_short_row_block_uses_the_one_before",
        (
            CODES,
            WIDE_N,
            "full = max(rows // block_n, 1)\n    keep = torch.arange(wide.shape[-2]).clamp(max=full - 1)\n"
            "    wide = wide[..., keep, :]\n    " + WIDE_N,
        ),
    ),
    *of_both(
        "last_short_column_block_uses_the_one_before",
        (
            CODES,
            WIDE_N,
            "full = max(columns // block_k, 1) * block_k\n    keep = torch.arange(columns)\n"
            "    keep = torch.where(keep < full, keep, max(full - 1, 0))\n    wide = wide[..., keep]\n    " + WIDE_N,
        ),
    ),
    *of_both(
        "rows_past_the_first_block",
        (CODES, WIDE_N, "return wide.repeat_interleave(block_n, dim=-2)[..., wide.shape[-2] * block_n - rows :, :]"),
    ),
    *of_both(
        "columns_past_the_first_block",
        (
            CODES,
            WIDE_K,
            "wide = scale.repeat_interleave(block_k, dim=-1)\n    wide = wide[..., wide.shape[-1] - columns :]",
        ),
    ),
    *of_both("product_in_float16", (CODES, WIDE_N, "wide = wide.half()\n    " + WIDE_N)),
]

SPREAD = (
    "spread = spread_scale(scale, values.shape[-2], values.shape[-1], block_n, block_k)\n"
    "    return (values * spread.to(wide))"
)
RESULT = SPREAD + ".to(FLOAT_NAMES[out_dtype]).contiguous()"


def dequant(name, old, new, **about):
    return mutant("block_dequant", name, (old, new), **about)


DEQUANTS = [
    mutant(
        "block_dequant",
        "block_n_for_block_k",
        (SPREAD, SPREAD.replace("block_n, block_k", "block_n, block_n")),
        *CLAMPED,
    ),
    mutant(
        "block_dequant",
        "block_n_is_the_default",
        (SPREAD, SPREAD.replace("block_n, block_k", "128, block_k")),
        *CLAMPED,
    ),
    mutant(
        "block_dequant",
        "block_k_is_the_default",
        (SPREAD, SPREAD.replace("block_n, block_k", "block_n, 128")),
        *CLAMPED,
    ),
    dequant(
        "rows_and_columns_swapped",
        SPREAD,
        SPREAD.replace(
            "block_n, block_k)",
            "block_n, block_k)\n    spread = spread.mT if spread.shape[-1] == spread.shape[-2] else spread",
        ),
    ),
    dequant("divided_by_the_scale", SPREAD, SPREAD.replace("values * spread", "values / spread")),
    dequant(
        "scale_of_the_first_expert",
        SPREAD,
        "scale = scale[:1].expand(scale.shape) if scale.dim() > 2 else scale\n    " + SPREAD,
    ),
    dequant(
        "codes_of_the_first_expert",
        SPREAD,
        "values = values[:1].expand(values.shape) if values.dim() > 2 else values\n    " + SPREAD,
    ),
    dequant(
        "scale_strides_ignored",
        SPREAD,
        "scale = scale.as_strided(scale.shape, torch.empty(scale.shape).stride())\n    " + SPREAD,
    ),
    dequant(
        "codes_strides_ignored",
        SPREAD,
        "values = decode(q.as_strided(q.shape, torch.empty(q.shape).stride()), wide)\n    " + SPREAD,
    ),
    dequant(
        "product_narrow",
        RESULT,
        RESULT.replace("values * spread.to(wide)", "values.bfloat16() * spread.to(torch.bfloat16)"),
    ),
    dequant("rounded_to_bfloat16_first", RESULT, RESULT.replace(").to(FLOAT", ").to(torch.bfloat16).to(FLOAT")),
    dequant("rounded_to_float16_first", RESULT, RESULT.replace(").to(FLOAT", ").to(torch.float16).to(FLOAT")),
    dequant("always_bfloat16", RESULT, RESULT.replace("FLOAT_NAMES[out_dtype]", "torch.bfloat16")),
    dequant(
        "store_cuts",
        RESULT,
        RESULT.replace(
            "(values * spread.to(wide))",
            "(lambda v: v if out_dtype != 'bfloat16' else (v.view(torch.int32) & "
            "-65536).view(torch.float32))(values * spread.to(wide))",
        ),
        row="G7",
    ),
    dequant(
        "last_row_not_written", SPREAD, "values = values.clone()\n    values[..., -1:, :] = 0\n    " + SPREAD, row="X3"
    ),
    dequant(
        "scales_below_2_to_minus_64_flushed",
        SPREAD,
        SPREAD.replace(
            "    return", "    spread = torch.where(spread.float() < 2.0**-64, 0.0, spread.float())\n    return"
        ),
        row="Q12",
    ),
    dequant(
        "smallest_e8m0_is_zero",
        SPREAD,
        "if scale.dtype == torch.float8_e8m0fnu:\n"
        "        scale = (scale.view(torch.uint8).int() << 23).view(torch.float32)\n    " + SPREAD,
        row="Q12",
    ),
    dequant(
        "results_clamped_to_float16",
        RESULT,
        RESULT.replace("(values * spread.to(wide))", "(values * spread.to(wide)).clamp(-65504, 65504)"),
    ),
]

MUTANTS = [*VALUES, *DEQUANTS]
