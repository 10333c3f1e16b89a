"""Wrong quantisations of activations: what e4m3 and e2m1 share, and e4m3."""

from mutation import mutant

CODES = "numerics.codes"
AMAX = ".amax(-1)"
PADDED = "padded = torch.nn.functional.pad(x.to(torch.float32).abs(), (0, groups * group_size - x.shape[-1]))"
GROUPED = "padded.reshape(*x.shape[:-1], groups, group_size).amax(-1)"
SPREAD = "return scale.repeat_interleave(group_size, dim=-1)[..., :columns]"
CEILING = "return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)"


def of_groups(name, old, new, **about):
    """The same mistake in both quantisations by groups."""
    return [mutant(operator, name, (CODES, old, new), **about) for operator in ("act_quant_fp8", "act_quant_fp4")]


GROUPS = [
    *of_groups("amax_without_sign", PADDED, PADDED.replace(".abs()", "")),
    *of_groups("amax_of_negatives", PADDED, PADDED.replace("x.to(torch.float32).abs()", "-x.to(torch.float32)")),
    *of_groups("mean_for_amax", GROUPED, GROUPED.replace("amax", "mean")),
    *of_groups(
        "root_mean_square_for_amax",
        GROUPED,
        "padded.reshape(*x.shape[:-1], groups, group_size).square().mean(-1).sqrt()",
    ),
    *of_groups("amax_of_the_row", GROUPED, GROUPED + ".amax(-1, True).expand(*x.shape[:-1], groups)", row="Q1"),
    *of_groups(
        "amax_of_the_tensor",
        GROUPED,
        "padded.reshape(*x.shape[:-1], groups, group_size).amax(-1).clamp(min=padded.max() if x.numel() else 0)",
    ),
    *of_groups(
        "amax_of_the_first_half_of_a_group",
        GROUPED,
        "padded.reshape(*x.shape[:-1], groups, group_size)[..., : max(group_size // 2, 1)].amax(-1)",
    ),
    *of_groups(
        "last_of_a_group_not_looked_at",
        GROUPED,
        "padded.reshape(*x.shape[:-1], groups, group_size)[..., : max(group_size - 1, 1)].amax(-1)",
    ),
    *of_groups("groups_interleaved", GROUPED, "padded.reshape(*x.shape[:-1], group_size, groups).amax(-2)", row="Q1"),
    *of_groups(
        "amax_across_rows",
        GROUPED,
        "(lambda g: g.amax(0, True).expand(g.shape) if g.numel() else g)(padded.reshape(*x.shape[:-1], "
        "groups, group_size).amax(-1))",
        row="Q1",
    ),
    *of_groups("amax_narrow", PADDED, PADDED.replace("x.to(torch.float32)", "x.to(torch.bfloat16).to(torch.float32)")),
    *of_groups("scale_of_the_next_group", SPREAD, "scale = scale.roll(-1, -1)\n    " + SPREAD),
    *of_groups("scale_interleaved", SPREAD, "return scale.repeat(*[1] * (scale.dim() - 1), group_size)[..., :columns]"),
    *of_groups("scale_of_the_first_group", SPREAD, "scale = scale[..., :1].expand(scale.shape)\n    " + SPREAD),
    *of_groups("scale_of_the_first_row", SPREAD, "scale = scale[:1].expand(scale.shape)\n    " + SPREAD),
    *of_groups("power_of_two_below", CEILING, "return (bits & 0x7F800000).view(torch.float32)"),
    *of_groups("power_of_two_above", CEILING, "return ((bits + 0x800000) & 0x7F800000).view(torch.float32)"),
    *of_groups("power_of_two_nearest", CEILING, "return ((bits + 0x400000) & 0x7F800000).view(torch.float32)"),
    *of_groups("power_of_two_by_log2", CEILING, "return torch.exp2(torch.ceil(torch.log2(ratio)))"),
    *of_groups(
        "power_of_two_of_a_narrow_ratio",
        CEILING,
        "bits = ratio.contiguous().bfloat16().float().view(torch.int32)\n    " + CEILING,
    ),
    *of_groups(
        "power_of_two_of_10_bits", CEILING, "return (((bits & -8192) + 0x7FFFFF) & 0x7F800000).view(torch.float32)"
    ),
    *of_groups(
        "power_of_two_of_20_bits", CEILING, "return (((bits & -8) + 0x7FFFFF) & 0x7F800000).view(torch.float32)"
    ),
]

SCALE8 = "scale = amax_of_groups(wide, group_size).clamp(min=amax_floor) / E4M3_MAX\n    if"
QUOTIENT8 = "return codes(wide / spread_groups(scale, x.shape[-1], group_size)), scale.to("
CLAMPED8 = "return quotient.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)"
INPUT8 = (
    "    wide = x.contiguous().to(torch.float32)\n"
    "    scale = amax_of_groups(wide, group_size).clamp(min=amax_floor) / E4M3_MAX\n    if"
)
RULE8 = '    if scale_format == "ue8m0":\n        scale = ceil_power_of_two(scale)\n'


def fp8(name, old, new, **about):
    return mutant("act_quant_fp8", name, (old, new), **about)


FP8 = [
    fp8("largest_240", SCALE8, SCALE8.replace("E4M3_MAX", "240.0"), row="Q3"),
    fp8("largest_57344", SCALE8, SCALE8.replace("E4M3_MAX", "57344.0"), row="Q3"),
    fp8("largest_256", SCALE8, SCALE8.replace("E4M3_MAX", "256.0"), row="Q3"),
    fp8("largest_447", SCALE8, SCALE8.replace("E4M3_MAX", "447.0"), row="Q3"),
    fp8("largest_480", SCALE8, SCALE8.replace("E4M3_MAX", "480.0"), row="Q3"),
    fp8("clamped_at_240", CLAMPED8, CLAMPED8.replace("-E4M3_MAX, E4M3_MAX", "-240, 240")),
    fp8("clamped_above_only", CLAMPED8, CLAMPED8.replace("-E4M3_MAX", "0")),
    mutant(
        "act_quant_fp8",
        "not_clamped",
        (CLAMPED8, "return quotient.to(torch.float8_e4m3fn)"),
        row="Q4",
        equivalent="amax / scale is at most 448 * (1 + 2^-23), which rounds to 448, and every other quotient is less",
    ),
    mutant(
        "act_quant_fp8",
        "power_of_two_below_and_not_clamped",
        (CODES, CEILING, "return (bits & 0x7F800000).view(torch.float32)"),
        (CLAMPED8, "return quotient.to(torch.float8_e4m3fn)"),
        row="Q4",
    ),
    fp8("floor_ignored", SCALE8, SCALE8.replace(".clamp(min=amax_floor)", ".clamp(min=448 * 2.0**-126)")),
    fp8("floor_missing", SCALE8, SCALE8.replace(".clamp(min=amax_floor)", ""), row="Q6"),
    fp8("floor_is_the_default", SCALE8, SCALE8.replace("amax_floor", "1e-4")),
    fp8(
        "floor_of_the_scale",
        SCALE8,
        "scale = (amax_of_groups(wide, group_size) / E4M3_MAX).clamp(min=amax_floor)\n    if",
    ),
    fp8("floor_added", SCALE8, SCALE8.replace(".clamp(min=amax_floor)", ".add(amax_floor)")),
    fp8(
        "floor_behind_the_power",
        RULE8,
        "    scale = amax_of_groups(wide, group_size).clamp(min=2.0**-100) / E4M3_MAX\n"
        + RULE8
        + "    scale = scale.clamp(min=amax_floor / E4M3_MAX)\n",
    ),
    fp8(
        "scale_of_zero_group_is_1",
        SCALE8,
        SCALE8.replace("    if", "    scale = torch.where(amax_of_groups(wide, group_size) == 0, 1.0, scale)\n    if"),
    ),
    fp8("always_a_power_of_two", RULE8, RULE8.replace('scale_format == "ue8m0"', "True")),
    fp8("never_a_power_of_two", RULE8, RULE8.replace('scale_format == "ue8m0"', "False")),
    fp8(
        "codes_of_the_unrounded_scale",
        RULE8,
        "    plain = scale\n" + RULE8 + "    scale, plain = plain, scale\n"
        "    return codes(wide / spread_groups(scale, x.shape[-1], group_size)), "
        "plain.to(SCALE_FORMATS[scale_format])\n",
    ),
    fp8("scale_inverted", QUOTIENT8, QUOTIENT8.replace("scale.to(", "(1 / scale).to(")),
    fp8("scale_doubled", QUOTIENT8, QUOTIENT8.replace("scale.to(", "(2 * scale).to(")),
    fp8("scale_narrow", SCALE8, SCALE8.replace("E4M3_MAX\n", "E4M3_MAX\n    scale = scale.bfloat16().float()\n")),
    fp8("stored_scale_narrow", QUOTIENT8, QUOTIENT8.replace("scale.to(", "scale.bfloat16().to(")),
    fp8("multiplied_by_the_scale", QUOTIENT8, QUOTIENT8.replace("wide /", "wide *")),
    fp8("input_narrow", INPUT8, INPUT8.replace("x.contiguous()", "x.contiguous().bfloat16()")),
    fp8("input_in_float16", INPUT8, INPUT8.replace("x.contiguous()", "x.contiguous().half()")),
    fp8(
        "quotient_narrow",
        QUOTIENT8,
        QUOTIENT8.replace(
            "wide / spread_groups(scale, x.shape[-1], group_size)",
            "(wide / spread_groups(scale, x.shape[-1], group_size)).to(x.dtype).float()",
        ),
    ),
    fp8(
        "quotient_in_bfloat16",
        QUOTIENT8,
        QUOTIENT8.replace(
            "wide / spread_groups(scale, x.shape[-1], group_size)",
            "(wide / spread_groups(scale, x.shape[-1], group_size)).bfloat16().float()",
        ),
    ),
    fp8(
        "quotient_in_float16",
        QUOTIENT8,
        QUOTIENT8.replace(
            "wide / spread_groups(scale, x.shape[-1], group_size)",
            "(wide / spread_groups(scale, x.shape[-1], group_size)).half().float()",
        ),
    ),
    fp8(
        "rounded_toward_zero",
        CLAMPED8,
        "q = quotient.clamp(-E4M3_MAX, E4M3_MAX)\n"
        "    step = torch.exp2(q.abs().clamp(min=2.0**-6).log2().floor() - 3)\n"
        "    return ((q / step).trunc() * step).to(torch.float8_e4m3fn)",
        row="G7",
    ),
    fp8(
        "rounded_up",
        CLAMPED8,
        "q = quotient.clamp(-E4M3_MAX, E4M3_MAX)\n"
        "    step = torch.exp2(q.abs().clamp(min=2.0**-6).log2().floor() - 3)\n"
        "    return ((q / step).ceil() * step).to(torch.float8_e4m3fn)",
    ),
    fp8(
        "ties_away_from_zero",
        CLAMPED8,
        "q = quotient.clamp(-E4M3_MAX, E4M3_MAX)\n"
        "    step = torch.exp2(q.abs().clamp(min=2.0**-6).log2().floor() - 3)\n"
        "    return (((q.abs() / step) + 0.5).floor() * step * q.sign()).to(torch.float8_e4m3fn)",
    ),
    fp8(
        "ties_toward_zero",
        CLAMPED8,
        "q = quotient.clamp(-E4M3_MAX, E4M3_MAX)\n"
        "    step = torch.exp2(q.abs().clamp(min=2.0**-6).log2().floor() - 3)\n"
        "    return (((q.abs() / step) - 0.5).ceil() * step * q.sign()).to(torch.float8_e4m3fn)",
    ),
    fp8(
        "subnormal_codes_flushed",
        CLAMPED8,
        "quotient = torch.where(quotient.abs() < 2.0**-6, 0.0, quotient)\n    " + CLAMPED8,
    ),
    fp8("e5m2_grid", CLAMPED8, "quotient = quotient.to(torch.float8_e5m2).float()\n    " + CLAMPED8),
    fp8(
        "e4m3fnuz_codes",
        CLAMPED8,
        CLAMPED8.replace(
            ".to(torch.float8_e4m3fn)", ".clamp(-240, 240).to(torch.float8_e4m3fnuz).view(torch.float8_e4m3fn)"
        ),
    ),
    fp8("sign_lost", CLAMPED8, "quotient = quotient.abs()\n    " + CLAMPED8),
    fp8(
        "short_last_group_as_zero",
        QUOTIENT8,
        "wide[..., x.shape[-1] // group_size * group_size :] = 0\n    " + QUOTIENT8,
    ),
    mutant(
        "act_quant_fp8",
        "short_last_group_joins_the_one_before",
        (
            CODES,
            SPREAD,
            "full = max(columns // group_size, 1)\n"
            "    scale = torch.cat((scale[..., :full], scale[..., full - 1 : full].expand(*scale.shape[:-1], "
            "scale.shape[-1] - full)), -1)\n    " + SPREAD,
        ),
    ),
    mutant(
        "act_quant_fp8",
        "short_last_group_padded_with_ones",
        (CODES, PADDED, PADDED.replace("x.shape[-1]))", "x.shape[-1]), value=100.0)")),
    ),
    fp8(
        "group_of_128",
        INPUT8,
        "    group_size = 128\n" + INPUT8,
    ),
    fp8(
        "strides_ignored",
        INPUT8,
        INPUT8.replace("x.contiguous()", "x.as_strided(x.shape, torch.empty(x.shape).stride())"),
    ),
    fp8("last_row_not_written", QUOTIENT8, "wide[-1:] = 0\n    " + QUOTIENT8, row="X3"),
    fp8("scale_format_ignored_in_dtype", QUOTIENT8 + "SCALE_FORMATS[scale_format])", QUOTIENT8 + "torch.float32)"),
]

MUTANTS = [*GROUPS, *FP8]
