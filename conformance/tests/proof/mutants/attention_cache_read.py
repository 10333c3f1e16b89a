"""Wrong kv_cache_read."""

from mutation import mutant

PAGES = "numerics.pages"
CODES = "numerics.codes"
VIEWS_FLAT = "flat = cache.view(cache.shape[0], block_size * layout.entry)"
APART = "return data, flat[:, split:].unflatten(1, (block_size, layout.scale_bytes))"
READ = "kv_cache_read"
SAFE = (
    "return torch.where((slots >= 0)[..., None], values, torch.zeros((), dtype=dtype,"
    " device=cache.device)).contiguous()"
)
FACTOR = "* factor[..., None]"
VALUES = "parts = [values.flatten(-2).to(dtype)]"
ROPE_READ = "rope = data[..., layout.data_bytes - 2 * ROPE :].contiguous().view(torch.bfloat16)"
WIDTH = "factor = scales[..., :width].contiguous().view(layout.scale_dtype)"
SLOT = "slot = slots.long().clamp(min=0)\n    block, row = slot // cache.shape[1], slot % cache.shape[1]"

MUTANTS = [
    mutant(READ, "negative_slot_is_entry_0", (PAGES, SAFE, "return values.contiguous()"), row="C4"),
    mutant(
        READ, "negative_slot_times_0", (PAGES, SAFE, "return (values * (slots >= 0)[..., None]).contiguous()"), row="C4"
    ),
    mutant(
        READ,
        "negative_slot_is_nan",
        (PAGES, SAFE, SAFE.replace("torch.zeros((), dtype=dtype, device=cache.device)", "torch.nan")),
        row="C4",
    ),
    mutant(READ, "only_minus_1_is_negative", (PAGES, SAFE, SAFE.replace("slots >= 0", "slots != -1")), row="C4"),
    mutant(READ, "slot_0_is_none", (PAGES, SAFE, SAFE.replace("slots >= 0", "slots > 0")), row="C4"),
    mutant(
        READ,
        "pages_of_64",
        (
            PAGES,
            SLOT,
            "slot = slots.long().clamp(min=0)\n"
            "    block, row = (slot // 64).clamp(max=cache.shape[0] - 1), (slot % 64).clamp(max=cache.shape[1]"
            " - 1)",
        ),
        row="I6",
    ),
    mutant(
        READ,
        "pages_column_first",
        (
            PAGES,
            SLOT,
            SLOT.replace(
                "slot // cache.shape[1], slot % cache.shape[1]",
                "slot % cache.shape[0], slot // cache.shape[0] % cache.shape[1]",
            ),
        ),
        row="I6",
    ),
    mutant(
        READ,
        "slots_in_8_bits",
        (PAGES, SLOT, SLOT.replace("slots.long()", "torch.where(slots < 0, slots, slots % 256).long()")),
        row="P9",
    ),
    mutant(
        READ,
        "slots_in_16_bits",
        (PAGES, SLOT, SLOT.replace("slots.long()", "torch.where(slots < 0, slots, slots % 65536).long()")),
        row="P9",
    ),
    mutant(
        READ,
        "slots_in_signed_16_bits",
        (PAGES, SLOT, SLOT.replace("slots.long()", "slots.to(torch.int16).long()")),
        row="P9",
    ),
    mutant(
        READ,
        "slots_flattened_column_first",
        (
            PAGES,
            SLOT,
            SLOT.replace(
                "slots.long()",
                "(slots if slots.dim() < 2 or slots.is_contiguous() else slots.mT.reshape(slots.shape)).long()",
            ),
        ),
    ),
    mutant(READ, "scale_ignored", (PAGES, FACTOR, "* torch.ones_like(factor)[..., None]"), row="I9"),
    mutant(READ, "scale_of_the_first_group", (PAGES, FACTOR, "* factor[..., :1, None]"), row="Q1"),
    mutant(READ, "scale_of_the_group_before", (PAGES, FACTOR, "* factor.roll(1, -1)[..., None]"), row="Q1"),
    mutant(
        READ,
        "scale_by_residue",
        (
            PAGES,
            "unflatten(-1, (layout.scales, layout.group)) * factor[..., None]",
            "unflatten(-1, (layout.group, layout.scales)) * factor[..., None, :]",
        ),
        row="Q1",
    ),
    mutant(READ, "scale_inverted", (PAGES, FACTOR, "/ factor[..., None]"), row="Q1"),
    mutant(
        READ,
        "scale_of_another_entry",
        (PAGES, "scales[block, row], layout", "scales[block, row * 0], layout"),
        row="I9",
    ),
    mutant(
        READ, "scale_rounded_to_a_power_of_two", (PAGES, FACTOR, "* factor.log2().round().exp2()[..., None]"), row="Q1"
    ),
    mutant(READ, "scale_in_bfloat16", (PAGES, FACTOR, "* factor.to(torch.bfloat16).to(factor.dtype)[..., None]")),
    mutant(
        READ,
        "scale_of_ue8m0_by_a_shift_of_128",
        (PAGES, FACTOR, "* (factor / 2 if layout.scale_dtype == E8M0 else factor)[..., None]"),
    ),
    mutant(
        READ,
        "scales_of_ue8m0_from_the_second_byte",
        (PAGES, WIDTH, "scales = scales.roll(-1, -1) if layout.entry == 584 else scales\n    " + WIDTH),
    ),
    mutant(
        READ,
        "scales_in_the_first_bytes",
        (
            PAGES,
            APART,
            "apart = block_size * layout.scale_bytes\n"
            "        return flat[:, apart:].unflatten(1, (block_size, layout.data_bytes)),"
            " flat[:, :apart].unflatten(1, (block_size, layout.scale_bytes))",
        ),
    ),
    mutant(
        READ,
        "scales_in_each_entry",
        (PAGES, APART, "return cache[..., : layout.data_bytes], cache[..., layout.data_bytes :]"),
    ),
    mutant(
        READ,
        "scales_transposed",
        (PAGES, APART, "return data, flat[:, split:].unflatten(1, (layout.scale_bytes, block_size)).mT"),
    ),
    mutant(
        READ,
        "padding_of_pages_ignored",
        (
            PAGES,
            VIEWS_FLAT,
            "cache = torch.as_strided(cache, cache.shape, (block_size * layout.entry,"
            " layout.entry, 1)) if cache.stride(0) > block_size * layout.entry else cache\n"
            "    " + VIEWS_FLAT,
        ),
    ),
    mutant(
        READ,
        "padding_of_pages_of_floats_ignored",
        (
            PAGES,
            "values = cache[block, row].to(dtype)",
            "values = torch.as_strided(cache, cache.shape, (cache.shape[1] * cache.shape[2],"
            " cache.shape[2], 1))[block, row].to(dtype)",
        ),
    ),
    mutant(
        READ,
        "codes_as_e5m2",
        (PAGES, "codes.contiguous().view(torch.float8_e4m3fn)", "codes.contiguous().view(torch.float8_e5m2)"),
        row="Q3",
    ),
    mutant(
        READ,
        "codes_as_e4m3fnuz",
        (PAGES, "codes.contiguous().view(torch.float8_e4m3fn)", "codes.contiguous().view(torch.float8_e4m3fnuz)"),
        row="Q3",
    ),
    mutant(
        READ,
        "codes_as_int8",
        (PAGES, "codes.contiguous().view(torch.float8_e4m3fn)", "codes.contiguous().view(torch.int8)"),
        row="Q3",
    ),
    mutant(
        READ,
        "subnormal_codes_are_0",
        (
            PAGES,
            VALUES,
            "parts = [torch.where((codes.view(torch.uint8) & 0x78 == 0) if layout.entry"
            " != 68 else torch.zeros((), dtype=torch.bool), 0.0, values.flatten(-2)).to(dtype)]",
        ),
        row="Q9",
    ),
    mutant(
        READ,
        "nibbles_swapped",
        (CODES, "torch.stack((packed & 0xF, packed >> 4), dim=-1)", "torch.stack((packed >> 4, packed & 0xF), dim=-1)"),
        row="Q8",
    ),
    mutant(
        READ,
        "nibbles_in_halves",
        (CODES, "torch.stack((packed & 0xF, packed >> 4), dim=-1)", "torch.stack((packed & 0xF, packed >> 4), dim=-2)"),
        row="Q8",
    ),
    mutant(
        READ,
        "e2m1_half_is_0",
        (CODES, "table = torch.tensor((*E2M1_VALUES,", "table = torch.tensor((0.0, 0.0, *E2M1_VALUES[2:],"),
        row="Q9",
    ),
    mutant(
        READ,
        "e2m1_5_for_6",
        (CODES, "table = torch.tensor((*E2M1_VALUES,", "table = torch.tensor((*E2M1_VALUES[:7], 5.0,"),
        row="Q9",
    ),
    mutant(
        READ, "e2m1_without_sign", (CODES, "return table[codes.long()]", "return table[codes.long() & 7]"), row="Q9"
    ),
    mutant(READ, "rope_missing", (PAGES, ROPE_READ, ROPE_READ + "\n        rope = torch.zeros_like(rope)")),
    mutant(READ, "rope_scaled", (PAGES, ROPE_READ, ROPE_READ + "\n        rope = rope * factor[..., -1:]")),
    mutant(READ, "rope_as_float16", (PAGES, ROPE_READ, ROPE_READ.replace("torch.bfloat16", "torch.float16"))),
    mutant(
        READ,
        "rope_first",
        (PAGES, "return torch.cat(parts, dim=-1)", "return torch.cat(parts[::-1], dim=-1)"),
        row="O4",
    ),
    mutant(
        READ,
        "rope_in_e4m3",
        (PAGES, ROPE_READ, ROPE_READ + "\n        rope = rope.to(torch.float8_e4m3fn).to(torch.bfloat16)"),
    ),
    mutant(
        READ,
        "rope_of_656_behind_the_codes",
        (
            PAGES,
            ROPE_READ,
            ROPE_READ.replace("layout.data_bytes - 2 * ROPE :", "layout.code_bytes : layout.code_bytes + 2 * ROPE"),
        ),
    ),
    mutant(
        READ, "product_in_bfloat16", (PAGES, VALUES, VALUES.replace("flatten(-2)", "flatten(-2).to(torch.bfloat16)"))
    ),
    mutant(
        READ, "product_in_e4m3", (PAGES, VALUES, VALUES.replace("flatten(-2)", "flatten(-2).to(torch.float8_e4m3fn)"))
    ),
    mutant(
        READ,
        "product_truncated",
        (
            PAGES,
            VALUES,
            "values = values.flatten(-2)\n    values = (values.float().contiguous().view(torch.int32)"
            " & {torch.bfloat16: -65536, torch.float16: -8192}.get(dtype, -256)).view(torch.float32)\n"
            "    parts = [values.to(dtype)]",
        ),
        row="G7",
    ),
    mutant(
        READ,
        "floats_through_bfloat16",
        (PAGES, "values = cache[block, row].to(dtype)", "values = cache[block, row].to(torch.bfloat16).to(dtype)"),
    ),
    mutant(
        READ,
        "out_dtype_ignored",
        (
            "return read_entries(cache, slot_mapping, FLOAT_NAMES[out_dtype])",
            "return read_entries(cache, slot_mapping, torch.bfloat16)",
        ),
    ),
]
