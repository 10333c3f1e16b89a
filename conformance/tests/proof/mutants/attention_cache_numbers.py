"""Wrong kv_cache_write: codes, scales and roundings."""

from mutation import mutant

WRITE = "kv_cache_write"
PAGES = "numerics.pages"
FP8 = "ops.quant.act_quant_fp8"
FP4 = "ops.quant.act_quant_fp4"
CODES = "numerics.codes"
ROPE = "rope_bytes = rope[kept].to(torch.bfloat16).contiguous().view(torch.uint8)"
FLOATS = "cache[slot // cache.shape[1], slot % cache.shape[1]] = rows[kept].to(cache.dtype)"
FP8_SCALE = "scale = amax_of_groups(wide, group_size).clamp(min=amax_floor) / E4M3_MAX\n    if scale_format"
FP4_SCALE = "scale = ceil_power_of_two(amax_of_groups(wide, group_size).clamp(min=amax_floor) / E2M1_MAX)"
FP8_CODES = "return codes(wide / spread_groups(scale, x.shape[-1], group_size)), scale.to(SCALE_FORMATS[scale_format])"
CLAMPED = "return quotient.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)"
AMAX = "return padded.reshape(*x.shape[:-1], groups, group_size).amax(-1)"
QUANTISE_8 = (
    "codes, scale = act_quant_fp8(values, layout.group, scale_format, 1e-4 if amax_floor is None else amax_floor)"
)

MUTANTS = [
    mutant(
        WRITE,
        "rope_truncated",
        (
            PAGES,
            ROPE,
            "rope_bytes = (rope[kept].float().contiguous().view(torch.int32) >> 16)"
            ".to(torch.int16).contiguous().view(torch.uint8)",
        ),
        row="G7",
    ),
    mutant(WRITE, "rope_in_float16", (PAGES, ROPE, ROPE.replace("torch.bfloat16", "torch.float16"))),
    mutant(
        WRITE,
        "rope_through_float16",
        (PAGES, ROPE, ROPE.replace(".to(torch.bfloat16)", ".to(torch.float16).to(torch.bfloat16)")),
    ),
    mutant(
        WRITE,
        "rope_quantised",
        (PAGES, ROPE, ROPE.replace(".to(torch.bfloat16)", ".to(torch.float8_e4m3fn).to(torch.bfloat16)")),
    ),
    mutant(
        WRITE,
        "floats_truncated",
        (
            PAGES,
            FLOATS,
            FLOATS.replace(
                "rows[kept]", "(rows[kept].float().contiguous().view(torch.int32) & -65536).view(torch.float32)"
            ),
        ),
        row="G7",
    ),
    mutant(
        WRITE,
        "floats_rounded_to_bfloat16",
        (PAGES, FLOATS, FLOATS.replace("rows[kept]", "rows[kept].to(torch.bfloat16)")),
    ),
    mutant(WRITE, "scale_format_ignored", (QUANTISE_8, QUANTISE_8.replace("scale_format", '"ue8m0"'))),
    mutant(
        WRITE,
        "float32_scales_of_656_always",
        (QUANTISE_8, QUANTISE_8.replace("scale_format", 'scale_format if layout.entry == 584 else "float32"')),
    ),
    mutant(
        WRITE,
        "amax_floor_ignored",
        (QUANTISE_8, QUANTISE_8.replace("1e-4 if amax_floor is None else amax_floor", "1e-4")),
    ),
    mutant(
        WRITE,
        "amax_floor_of_68_ignored",
        ("E2M1_MAX * SMALLEST_SCALE if amax_floor is None else amax_floor", "E2M1_MAX * SMALLEST_SCALE"),
    ),
    mutant(
        WRITE,
        "amax_floor_of_68_is_1e_4",
        (
            "E2M1_MAX * SMALLEST_SCALE if amax_floor is None else amax_floor",
            "1e-4 if amax_floor is None else amax_floor",
        ),
    ),
    mutant(
        WRITE,
        "floor_of_the_scale",
        (
            FP8,
            FP8_SCALE,
            "scale = (amax_of_groups(wide, group_size) / E4M3_MAX).clamp(min=amax_floor)\n    if scale_format",
        ),
    ),
    mutant(
        WRITE,
        "floor_missing",
        (FP8, FP8_SCALE, FP8_SCALE.replace("clamp(min=amax_floor)", "clamp(min=448 * 2.0**-126)")),
        row="Q6",
    ),
    mutant(WRITE, "floor_added", (FP8, FP8_SCALE, FP8_SCALE.replace("clamp(min=amax_floor)", "add(amax_floor)"))),
    mutant(WRITE, "largest_of_240", (FP8, FP8_SCALE, FP8_SCALE.replace("E4M3_MAX", "240.0")), row="Q3"),
    mutant(WRITE, "largest_of_256", (FP8, FP8_SCALE, FP8_SCALE.replace("E4M3_MAX", "256.0")), row="Q3"),
    mutant(
        WRITE, "power_of_two_rounded_down", (CODES, "(bits + 0x7FFFFF) & 0x7F800000", "bits & 0x7F800000"), row="Q4"
    ),
    mutant(
        WRITE,
        "power_of_two_to_nearest",
        (CODES, "(bits + 0x7FFFFF) & 0x7F800000", "(bits + 0x400000) & 0x7F800000"),
        row="Q4",
    ),
    mutant(
        WRITE, "power_of_two_always_up", (CODES, "(bits + 0x7FFFFF) & 0x7F800000", "(bits + 0x800000) & 0x7F800000")
    ),
    mutant(WRITE, "powers_of_four", (CODES, "(bits + 0x7FFFFF) & 0x7F800000", "(bits + 0xFFFFFF) & 0x7F000000")),
    mutant(
        WRITE,
        "amax_of_the_row",
        (CODES, AMAX, AMAX + ".amax(-1, keepdim=True).expand(*x.shape[:-1], groups)"),
        row="Q1",
    ),
    mutant(
        WRITE,
        "amax_of_all_rows",
        (
            CODES,
            AMAX,
            "amax = padded.reshape(*x.shape[:-1], groups, group_size).amax(-1)\n"
            "    return amax.amax(0, keepdim=True).expand_as(amax).contiguous() if len(amax)"
            " else amax",
        ),
        row="Q1",
    ),
    mutant(
        WRITE, "largest_instead_of_magnitude", (CODES, "x.to(torch.float32).abs()", "x.to(torch.float32)"), row="Q1"
    ),
    mutant(WRITE, "amax_in_bfloat16", (CODES, AMAX, AMAX + ".to(torch.bfloat16).to(torch.float32)")),
    mutant(WRITE, "rms_for_amax", (CODES, AMAX, AMAX.replace(".amax(-1)", ".square().mean(-1).sqrt().mul(4)"))),
    mutant(
        WRITE,
        "codes_truncated",
        (
            FP8,
            CLAMPED,
            "clamped = quotient.clamp(-E4M3_MAX, E4M3_MAX)\n"
            "    step = torch.exp2(clamped.abs().clamp(min=2.0**-6).log2().floor() -"
            " 3)\n    return ((clamped / step).trunc() * step).to(torch.float8_e4m3fn)",
        ),
        row="G7",
    ),
    mutant(
        WRITE,
        "ties_of_codes_away_from_0",
        (
            FP8,
            CLAMPED,
            "clamped = quotient.clamp(-E4M3_MAX, E4M3_MAX)\n"
            "    step = torch.exp2(clamped.abs().clamp(min=2.0**-6).log2().floor() -"
            " 3)\n    return (torch.sign(clamped) * ((clamped.abs() / step) + 0.5).floor()"
            " * step).clamp(-448, 448).to(torch.float8_e4m3fn)",
        ),
        row="G7",
    ),
    mutant(
        WRITE,
        "subnormal_codes_are_0",
        (FP8, CLAMPED, "quotient = torch.where(quotient.abs() < 2.0**-6, 0.0, quotient)\n    " + CLAMPED),
    ),
    mutant(
        WRITE,
        "codes_through_bfloat16",
        (FP8, CLAMPED, CLAMPED.replace("quotient.", "quotient.to(torch.bfloat16).float().")),
    ),
    mutant(
        WRITE,
        "codes_in_e5m2",
        (
            FP8,
            CLAMPED,
            CLAMPED.replace(
                "to(torch.float8_e4m3fn)", "to(torch.float8_e5m2).view(torch.uint8).view(torch.float8_e4m3fn)"
            ),
        ),
        row="Q3",
    ),
    mutant(
        WRITE,
        "codes_not_divided",
        (FP8, FP8_CODES, FP8_CODES.replace("wide / spread_groups(scale, x.shape[-1], group_size)", "wide")),
    ),
    mutant(
        WRITE,
        "codes_of_the_neighbour_group",
        (FP8, FP8_CODES, FP8_CODES.replace("spread_groups(scale,", "spread_groups(scale.roll(1, -1),")),
        row="Q1",
    ),
    mutant(
        WRITE,
        "saturates_to_nan",
        (FP8, CLAMPED, "return torch.where(quotient.abs() >= 448, torch.nan, quotient).to(torch.float8_e4m3fn)"),
        row="Q4",
    ),
    mutant(
        WRITE,
        "nibbles_swapped",
        (CODES, "codes[..., 0::2] | (codes[..., 1::2] << 4)", "codes[..., 1::2] | (codes[..., 0::2] << 4)"),
        row="Q8",
    ),
    mutant(
        WRITE,
        "halves_in_nibbles",
        (
            CODES,
            "codes[..., 0::2] | (codes[..., 1::2] << 4)",
            "codes[..., : codes.shape[-1] // 2] | (codes[..., codes.shape[-1] // 2 :] << 4)",
        ),
        row="Q8",
    ),
    mutant(
        WRITE,
        "e2m1_ties_towards_0",
        (CODES, "(magnitude >= middle) if lower % 2 else (magnitude > middle)", "(magnitude > middle)"),
        row="Q9",
    ),
    mutant(
        WRITE,
        "e2m1_ties_away_from_0",
        (CODES, "(magnitude >= middle) if lower % 2 else (magnitude > middle)", "(magnitude >= middle)"),
        row="Q9",
    ),
    mutant(WRITE, "e2m1_truncated", (CODES, "middle = (low + high) / 2", "middle = high"), row="Q9"),
    mutant(
        WRITE,
        "e2m1_without_sign",
        (CODES, "return code | (torch.signbit(x).to(torch.uint8) << 3)", "return code"),
        row="Q9",
    ),
    mutant(WRITE, "e2m1_largest_of_4", (FP4, FP4_SCALE, FP4_SCALE.replace("E2M1_MAX", "4.0")), row="Q3"),
    mutant(WRITE, "e2m1_largest_of_8", (FP4, FP4_SCALE, FP4_SCALE.replace("E2M1_MAX", "8.0")), row="Q3"),
    mutant(
        WRITE,
        "group_of_584_is_128",
        (
            QUANTISE_8,
            "codes, scale = act_quant_fp8(values.contiguous(), 2 * layout.group if layout.entry"
            " == 584 else layout.group, scale_format, 1e-4 if amax_floor is None else"
            " amax_floor)\n        scale = scale.float().repeat_interleave(2, -1)[...,"
            " :7] if layout.entry == 584 else scale",
        ),
        row="Q1",
    ),
]
