"""Wrong quantisations of activations to e2m1 and to int8."""

from mutation import mutant

CODES = "numerics.codes"
SCALE4 = "scale = ceil_power_of_two(amax_of_groups(wide, group_size).clamp(min=amax_floor) / E2M1_MAX)"
INPUT4 = "    wide = x.contiguous().to(torch.float32)\n    scale = ceil"
CODES4 = "codes = encode_e2m1(wide / spread_groups(scale, x.shape[-1], group_size))"
STORE4 = "return pack_nibbles(codes), scale.to(torch.float8_e8m0fnu)"
TIE = "code += (magnitude >= middle) if lower % 2 else (magnitude > middle)"
PACK = "return codes[..., 0::2] | (codes[..., 1::2] << 4)"
SIGN = "return code | (torch.signbit(x).to(torch.uint8) << 3)"


def fp4(name, *edit, **about):
    return mutant("act_quant_fp4", name, edit, **about)


FP4 = [
    fp4("largest_4", SCALE4, SCALE4.replace("E2M1_MAX", "4.0"), row="Q3"),
    fp4("largest_7", SCALE4, SCALE4.replace("E2M1_MAX", "7.0"), row="Q3"),
    fp4("largest_8", SCALE4, SCALE4.replace("E2M1_MAX", "8.0"), row="Q3"),
    fp4(
        "scale_of_amax_binade",
        SCALE4,
        "scale = (amax_of_groups(wide, group_size).clamp(min=amax_floor).view(torch.int32) & "
        "0x7F800000).view(torch.float32) / 4",
    ),
    fp4("scale_not_a_power", SCALE4, "scale = amax_of_groups(wide, group_size).clamp(min=amax_floor) / E2M1_MAX"),
    fp4("floor_of_deepgemm_always", SCALE4, SCALE4.replace("amax_floor", "1e-4")),
    fp4("floor_is_the_default", SCALE4, SCALE4.replace("amax_floor", "6 * 2.0**-126")),
    fp4("floor_added", SCALE4, SCALE4.replace(".clamp(min=amax_floor)", ".add(amax_floor)")),
    fp4("floor_missing", SCALE4, SCALE4.replace(".clamp(min=amax_floor)", ""), row="Q6"),
    fp4(
        "scale_of_zero_group_is_1",
        STORE4,
        "scale = torch.where(amax_of_groups(wide, group_size) == 0, 1.0, scale)\n    " + STORE4,
    ),
    fp4("scale_inverted", STORE4, STORE4.replace("scale.to", "(1 / scale).to")),
    fp4("scale_doubled", STORE4, STORE4.replace("scale.to", "(2 * scale).to")),
    fp4("multiplied_by_the_scale", CODES4, CODES4.replace("wide /", "wide *")),
    fp4(
        "quotient_in_float16",
        CODES4,
        CODES4.replace("encode_e2m1(", "encode_e2m1(1.0 * (").replace("group_size))", "group_size)).half().float())"),
    ),
    fp4(
        "quotient_in_bfloat16",
        CODES4,
        CODES4.replace("encode_e2m1(", "encode_e2m1(1.0 * (").replace(
            "group_size))", "group_size)).bfloat16().float())"
        ),
    ),
    fp4("ties_toward_zero", CODES, TIE, "code += magnitude > middle"),
    fp4("ties_away_from_zero", CODES, TIE, "code += magnitude >= middle"),
    fp4("ties_to_the_odd_code", CODES, TIE, "code += (magnitude > middle) if lower % 2 else (magnitude >= middle)"),
    fp4("rounded_toward_zero", CODES, TIE, "code += magnitude >= high"),
    fp4("rounded_up", CODES, TIE, "code += magnitude > low"),
    fp4("middle_is_geometric", CODES, "middle = (low + high) / 2", "middle = (low * high) ** 0.5"),
    fp4(
        "no_code_of_a_half",
        CODES,
        TIE,
        "code += (magnitude >= 0.5) if lower < 2 else (magnitude >= middle) if lower % 2 else (magnitude > middle)",
        row="Q9",
    ),
    fp4("no_code_of_6", CODES, TIE, TIE + "\n    code = code.clamp(max=6)", row="Q9"),
    fp4("wraps_beyond_6", CODES4, CODES4 + "\n    codes = torch.where(codes & 7 == 7, codes & 8, codes)"),
    fp4(
        "codes_of_twos_complement",
        CODES,
        SIGN,
        "return torch.where(torch.signbit(x), (16 - code) & 15, code)",
        row="Q9",
    ),
    fp4("sign_lost", CODES, SIGN, "return code"),
    fp4("sign_inverted", CODES, SIGN, SIGN.replace("torch.signbit(x)", "(~torch.signbit(x) & (code > 0))")),
    fp4("sign_in_the_low_bit", CODES, SIGN, "return (code << 1) | torch.signbit(x).to(torch.uint8)"),
    fp4("nibbles_swapped", CODES, PACK, "return codes[..., 1::2] | (codes[..., 0::2] << 4)", row="Q8"),
    fp4(
        "halves_packed",
        CODES,
        PACK,
        "half = codes.shape[-1] // 2\n    return codes[..., :half] | (codes[..., half:] << 4)",
        row="Q8",
    ),
    fp4("sign_of_the_high_nibble_lost", CODES, PACK, "return codes[..., 0::2] | ((codes[..., 1::2] & 7) << 4)"),
    fp4(
        "high_nibble_added_to_signed_low",
        CODES,
        PACK,
        "low = codes[..., 0::2].to(torch.int8)\n"
        "    return (torch.where(low > 7, low - 16, low) | (codes[..., 1::2] << 4).to(torch.int8)).view(torch.uint8)",
    ),
    fp4("even_columns_only", CODES, PACK, "return codes[..., 0::2] | (codes[..., 0::2] << 4)"),
    fp4(
        "group_of_32",
        INPUT4,
        "    group_size = 32\n" + INPUT4,
    ),
    fp4("input_narrow", INPUT4, INPUT4.replace("contiguous()", "contiguous().bfloat16()")),
    fp4("input_in_float16", INPUT4, INPUT4.replace("contiguous()", "contiguous().half()")),
    fp4(
        "strides_ignored",
        INPUT4,
        INPUT4.replace("x.contiguous()", "x.as_strided(x.shape, torch.empty(x.shape).stride())"),
    ),
    fp4("last_row_not_written", CODES4, "wide[-1:] = 0\n    " + CODES4, row="X3"),
    fp4("beyond_6_saturates_late", CODES4, CODES4.replace("wide /", "0.999 * wide /")),
]

SMOOTH = "return wide if smooth is None else wide * smooth.to(torch.float32)"
SCALE1 = "scale = amax_of_rows(values, amax_floor) / INT8_MAX"
QUOTIENT1 = "return codes(values / scale[..., None]), scale[..., None]"
ROUND1 = "return quotient.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)"
AMAX1 = "return torch.nn.functional.pad(values.abs(), (0, 1)).amax(-1).clamp(min=amax_floor)"


def int8(name, old, new, **about):
    return mutant("act_quant_int8", name, (old, new), **about)


INT8 = [
    int8("smooth_ignored", SMOOTH, "return wide"),
    int8("smooth_divides", SMOOTH, SMOOTH.replace("wide *", "wide /")),
    int8("smooth_without_sign", SMOOTH, SMOOTH.replace("torch.float32)", "torch.float32).abs()")),
    int8("smooth_of_the_next_column", SMOOTH, SMOOTH.replace("smooth.to", "smooth.roll(-1).to")),
    int8("smooth_narrow", SMOOTH, SMOOTH.replace("smooth.to", "smooth.to(x.dtype).to")),
    int8(
        "smoothed_narrow",
        SMOOTH,
        SMOOTH.replace("wide * smooth.to(torch.float32)", "(wide * smooth.to(torch.float32)).to(x.dtype).float()"),
    ),
    int8("amax_before_smooth", SCALE1, SCALE1.replace("values,", "x.contiguous().float(),")),
    int8("smooth_in_the_amax_only", QUOTIENT1, QUOTIENT1.replace("values /", "x.contiguous().float() /")),
    int8("largest_128", SCALE1, SCALE1.replace("INT8_MAX", "128.0"), row="Q3"),
    int8("largest_127_and_a_half", SCALE1, SCALE1.replace("INT8_MAX", "127.5"), row="Q3"),
    int8("largest_126", SCALE1, SCALE1.replace("INT8_MAX", "126.0"), row="Q3"),
    int8("largest_255_of_the_span", SCALE1, "scale = (values.amax(-1) - values.amin(-1)).clamp(min=amax_floor) / 255"),
    int8("scale_is_a_power_of_two", SCALE1, SCALE1 + "\n    scale = torch.exp2(scale.log2().ceil())"),
    int8("scale_narrow", SCALE1, SCALE1 + "\n    scale = scale.bfloat16().float()"),
    int8("scale_in_float16", SCALE1, SCALE1 + "\n    scale = scale.half().float()"),
    int8(
        "stored_scale_narrow",
        QUOTIENT1,
        QUOTIENT1.replace(", scale[..., None]", ", scale[..., None].bfloat16().float()"),
    ),
    int8("scale_inverted", QUOTIENT1, QUOTIENT1.replace(", scale[..., None]", ", 1 / scale[..., None]")),
    int8("scale_is_amax", QUOTIENT1, QUOTIENT1.replace(", scale[..., None]", ", 127 * scale[..., None]")),
    int8("scale_of_the_first_row", QUOTIENT1, QUOTIENT1.replace("scale[..., None])", "scale[..., None][:1])")),
    int8(
        "scale_of_all_rows",
        AMAX1,
        "amax = torch.nn.functional.pad(values.abs(), (0, 1)).amax(-1).clamp(min=amax_floor)\n"
        "    return amax.clamp(min=float(amax.max())) if amax.numel() else amax",
        row="Q1",
    ),
    int8("amax_without_sign", AMAX1, AMAX1.replace("values.abs()", "values")),
    int8(
        "amax_without_the_last_column",
        AMAX1,
        AMAX1.replace("values.abs()", "values[..., : max(values.shape[-1] - 1, 1)].abs()"),
    ),
    int8("amax_of_1024_columns", AMAX1, AMAX1.replace("values.abs()", "values[..., :1024].abs()")),
    int8("floor_ignored", AMAX1, AMAX1.replace("amax_floor)", "1e-30)")),
    int8("floor_is_the_default", AMAX1, AMAX1.replace("amax_floor)", "1e-10)")),
    int8("floor_missing", AMAX1, AMAX1.replace(".clamp(min=amax_floor)", ""), row="Q6"),
    int8("floor_of_the_scale", SCALE1, "scale = (amax_of_rows(values, 1e-30) / INT8_MAX).clamp(min=amax_floor)"),
    int8("floor_added", AMAX1, AMAX1.replace(".clamp(min=amax_floor)", ".add(amax_floor)")),
    int8("floor_of_1e_5", AMAX1, AMAX1.replace("amax_floor)", "max(amax_floor, 1e-5))")),
    int8("rounded_toward_zero", ROUND1, ROUND1.replace("round", "trunc"), row="G7"),
    int8("rounded_down", ROUND1, ROUND1.replace("round", "floor")),
    int8(
        "ties_away_from_zero",
        ROUND1,
        "return ((quotient.abs() + 0.5).floor() * quotient.sign()).clamp(-INT8_MAX, INT8_MAX).to(torch.int8)",
    ),
    int8("ties_up", ROUND1, ROUND1.replace("quotient.round()", "(quotient + 0.5).floor()")),
    int8(
        "ties_toward_zero",
        ROUND1,
        "return ((quotient.abs() - 0.5).ceil() * quotient.sign()).clamp(-INT8_MAX, INT8_MAX).to(torch.int8)",
    ),
    int8(
        "clamped_at_minus_128",
        ROUND1,
        ROUND1.replace("-INT8_MAX", "-128"),
        equivalent="amax / scale is at most 127 * (1 + 2^-23), which rounds to 127, and every other quotient is less",
    ),
    int8(
        "not_clamped",
        ROUND1,
        ROUND1.replace(".clamp(-INT8_MAX, INT8_MAX)", ""),
        equivalent="amax / scale is at most 127 * (1 + 2^-23), which rounds to 127, and every other quotient is less",
    ),
    int8("clamped_at_126", ROUND1, ROUND1.replace("INT8_MAX)", "126)")),
    mutant(
        "act_quant_int8",
        "minus_128_for_minus_127",
        (SCALE1, SCALE1.replace("INT8_MAX", "128.0")),
        (ROUND1, ROUND1.replace("-INT8_MAX", "-128")),
        row="Q10",
    ),
    int8("unsigned_codes", ROUND1, "return (quotient.round() + 128).clamp(0, 255).to(torch.uint8).view(torch.int8)"),
    int8("sign_lost", ROUND1, ROUND1.replace("quotient", "quotient.abs()")),
    int8(
        "quotient_narrow",
        QUOTIENT1,
        QUOTIENT1.replace("values / scale[..., None]", "(values / scale[..., None]).to(x.dtype).float()"),
    ),
    int8(
        "quotient_in_bfloat16",
        QUOTIENT1,
        QUOTIENT1.replace("values / scale[..., None]", "(values / scale[..., None]).bfloat16().float()"),
    ),
    int8(
        "quotient_in_float16",
        QUOTIENT1,
        QUOTIENT1.replace("values / scale[..., None]", "(values / scale[..., None]).half().float()"),
    ),
    int8(
        "reciprocal_of_12_bits",
        QUOTIENT1,
        QUOTIENT1.replace(
            "values / scale[..., None]",
            "values * ((1 / scale[..., None]).view(torch.int32) & -4096).view(torch.float32)",
        ),
    ),
    int8("zero_point", QUOTIENT1, "values = values - values.mean(-1, True)\n    " + QUOTIENT1),
    int8(
        "strides_ignored",
        "    wide = x.contiguous()",
        "    wide = x.as_strided(x.shape, torch.empty(x.shape).stride())",
    ),
    int8("last_row_not_written", QUOTIENT1, "values = values.clone()\n    values[-1:] = 0\n    " + QUOTIENT1, row="X3"),
]

MUTANTS = [*FP4, *INT8]
