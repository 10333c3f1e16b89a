"""Wrong kv_cache_write: where rows and bytes go."""

from mutation import mutant

WRITE = "kv_cache_write"
PAGES = "numerics.pages"
KEPT = (
    "kept = slots >= 0\n    slot = slots[kept].long()\n"
    "    block, row = slot // cache.shape[1], slot % cache.shape[1]\n"
    "    data_view"
)
SCALE_BYTES = "scale_bytes = scales[kept].contiguous().view(torch.uint8)"
PUT_SCALES = "scale_view[..., : scale_bytes.shape[-1]][block, row] = scale_bytes"
PUT_CODES = "data_view[..., : layout.code_bytes][block, row] = codes[kept].contiguous().view(torch.uint8)"
ROPE = "rope_bytes = rope[kept].to(torch.bfloat16).contiguous().view(torch.uint8)"
PUT_ROPE = "data_view[..., layout.data_bytes - 2 * ROPE :][block, row] = rope_bytes"
FLOATS = "cache[slot // cache.shape[1], slot % cache.shape[1]] = rows[kept].to(cache.dtype)"
VIEWS_FLAT = "flat = cache.view(cache.shape[0], block_size * layout.entry)"
APART = "return data, flat[:, split:].unflatten(1, (block_size, layout.scale_bytes))"

MUTANTS = [
    mutant(WRITE, "negative_slot_wraps", (PAGES, KEPT, KEPT.replace("slots >= 0", "slots >= -(2**30)")), row="C4"),
    mutant(
        WRITE,
        "negative_slot_is_0",
        (PAGES, KEPT, KEPT.replace("kept = slots >= 0", "slots = slots.clamp(min=0)\n    kept = slots >= 0")),
        row="C4",
    ),
    mutant(
        WRITE,
        "negative_slot_of_floats_wraps",
        (
            PAGES,
            "kept = slots >= 0\n    slot = slots[kept].long()\n    cache[",
            "kept = slots >= -(2**30)\n    slot = slots[kept].long() % (cache.shape[0] * cache.shape[1])\n    cache[",
        ),
        row="C4",
    ),
    mutant(WRITE, "slot_0_skipped", (PAGES, KEPT, KEPT.replace(">= 0", "> 0")), row="C4"),
    mutant(
        WRITE,
        "slot_0_of_floats_skipped",
        (
            PAGES,
            "kept = slots >= 0\n    slot = slots[kept].long()\n    cache[",
            "kept = slots > 0\n    slot = slots[kept].long()\n    cache[",
        ),
        row="C4",
    ),
    mutant(
        WRITE,
        "rows_not_compacted",
        (PAGES, PUT_CODES, PUT_CODES.replace("codes[kept]", "codes[: int(kept.sum())]")),
        row="C4",
    ),
    mutant(
        WRITE,
        "scales_not_compacted",
        (PAGES, SCALE_BYTES, SCALE_BYTES.replace("scales[kept]", "scales[: int(kept.sum())]")),
        row="C4",
    ),
    mutant(WRITE, "rope_not_compacted", (PAGES, ROPE, ROPE.replace("rope[kept]", "rope[: int(kept.sum())]")), row="C4"),
    mutant(
        WRITE,
        "last_row_not_written",
        (
            PAGES,
            KEPT,
            KEPT.replace(
                "kept = slots >= 0", "kept = (slots >= 0) & (torch.arange(len(slots)) < max(len(slots) - 1, 1))"
            ),
        ),
        row="C5",
    ),
    mutant(
        WRITE,
        "pages_of_64",
        (
            PAGES,
            KEPT,
            KEPT.replace(
                "slot // cache.shape[1], slot % cache.shape[1]",
                "(slot // 64).clamp(max=cache.shape[0] - 1), (slot % 64).clamp(max=cache.shape[1] - 1)",
            ),
        ),
        row="I6",
    ),
    mutant(
        WRITE,
        "pages_of_floats_column_first",
        (
            PAGES,
            FLOATS,
            "cache[slot % cache.shape[0], slot // cache.shape[0] % cache.shape[1]] = rows[kept].to(cache.dtype)",
        ),
        row="I6",
    ),
    mutant(
        WRITE,
        "page_of_floats_without_offset",
        (PAGES, FLOATS, "cache[slot // cache.shape[1], 0 * slot] = rows[kept].to(cache.dtype)"),
        row="I6",
    ),
    mutant(
        WRITE,
        "padded_pages_of_floats_taken_as_contiguous",
        (
            PAGES,
            FLOATS,
            "cache = torch.as_strided(cache, cache.shape, (cache.shape[1] * cache.shape[2], cache.shape[2], 1))\n    "
            + FLOATS,
        ),
    ),
    mutant(
        WRITE,
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
        WRITE,
        "scales_before_the_codes",
        (
            PAGES,
            APART,
            "apart = block_size * layout.scale_bytes\n"
            "        return flat[:, apart:].unflatten(1, (block_size, layout.data_bytes)),"
            " flat[:, :apart].unflatten(1, (block_size, layout.scale_bytes))",
        ),
    ),
    mutant(
        WRITE,
        "scales_in_each_entry",
        (PAGES, APART, "return cache[..., : layout.data_bytes], cache[..., layout.data_bytes :]"),
    ),
    mutant(
        WRITE,
        "scales_transposed",
        (PAGES, APART, "return data, flat[:, split:].unflatten(1, (layout.scale_bytes, block_size)).mT"),
    ),
    mutant(WRITE, "unused_scale_byte_cleared", (PAGES, PUT_SCALES, f"scale_view[block, row] = 0\n    {PUT_SCALES}")),
    mutant(WRITE, "other_entries_of_the_page_cleared", (PAGES, PUT_SCALES, f"scale_view[block] = 0\n    {PUT_SCALES}")),
    mutant(
        WRITE,
        "rope_before_the_codes_of_656",
        (
            PAGES,
            PUT_ROPE,
            PUT_ROPE.replace(
                "layout.data_bytes - 2 * ROPE :]",
                "layout.data_bytes - 2 * ROPE - 16 * (layout.entry == 656) : layout.data_bytes"
                " - 16 * (layout.entry == 656)]",
            ),
        ),
    ),
    mutant(WRITE, "rope_big_endian", (PAGES, ROPE, f"{ROPE}.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)")),
    mutant(
        WRITE,
        "float32_scales_big_endian",
        (
            PAGES,
            SCALE_BYTES,
            f"{SCALE_BYTES}\n    if scales.dtype == torch.float32:\n"
            f"        scale_bytes = scale_bytes.unflatten(-1, (-1, 4)).flip(-1).flatten(-2)",
        ),
    ),
    mutant(
        WRITE,
        "scales_reversed",
        (
            PAGES,
            SCALE_BYTES,
            "flipped = scales.to(torch.float32).flip(-1).to(scales.dtype)\n"
            "    scale_bytes = flipped[kept].contiguous().view(torch.uint8)",
        ),
    ),
]
