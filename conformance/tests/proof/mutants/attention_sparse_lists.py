"""Wrong sparse_attn: lists and tables."""

from mutation import mutant

OP = "sparse_attn"
VALID = "valid = (slots >= 0) & (slots < cache.shape[0] * cache.shape[1])"

LISTS = [
    mutant(OP, "length_ignored", ("numerics.lists", "if length is not None:", "if False:")),
    mutant(OP, "length_one_more", ("numerics.lists", "< length[:, None]", "<= length[:, None]")),
    mutant(OP, "length_of_the_first_token", ("numerics.lists", "< length[:, None]", "< length[:1, None]")),
    mutant(
        OP,
        "length_counts_valid_columns",
        ("numerics.lists", "torch.arange(indices.shape[1], device=indices.device) < ", "valid.cumsum(1) - 1 < "),
    ),
    mutant(
        OP,
        "length_negative_is_all",
        (
            "numerics.lists",
            "torch.arange(indices.shape[1], device=indices.device) < length[:, None]",
            "(length[:, None] < 0) | (torch.arange(indices.shape[1]) < length[:, None])",
        ),
    ),
    mutant(
        OP,
        "length_0_is_all",
        ("numerics.lists", "< length[:, None]", "< torch.where(length == 0, 2**30, length)[:, None]"),
    ),
    mutant(OP, "extra_length_ignored", ("numerics.lists", "extra_indices, extra_topk_length,", "extra_indices, None,")),
    mutant(
        OP,
        "first_length_for_both",
        ("numerics.lists", "extra_indices, extra_topk_length,", "extra_indices, topk_length,"),
    ),
    mutant(
        OP,
        "second_pool_ignored",
        ("numerics.lists", "if extra_kv_cache is not None and extra_indices is not None:", "if False:"),
    ),
    mutant(
        OP,
        "second_list_on_the_first_pool",
        (
            "numerics.lists",
            "read_entries(extra_kv_cache, slots, kv.dtype)",
            "read_entries(kv_cache, slots.clamp(max=kv_cache.shape[0] * kv_cache.shape[1] - 1), kv.dtype)",
        ),
    ),
    mutant(
        OP,
        "first_table_for_both",
        (
            "numerics.lists",
            "extra_topk_length, extra_block_table, sequence)",
            "extra_topk_length, block_table, sequence)",
        ),
    ),
    mutant(
        OP,
        "first_table_where_the_second_is_missing",
        (
            "numerics.lists",
            "extra_topk_length, extra_block_table, sequence)",
            "extra_topk_length, block_table if extra_block_table is None else extra_block_table, sequence)",
        ),
    ),
    mutant(
        OP,
        "first_list_ignored_where_there_is_a_second",
        (
            "numerics.lists",
            "kv, valid = read_entries(kv_cache, slots, widen(q.dtype)), slots >= 0",
            "slots = slots if extra_indices is None else slots.clamp(max=-1)\n"
            "    kv, valid = read_entries(kv_cache, slots, widen(q.dtype)), slots >="
            " 0",
        ),
    ),
    mutant(
        OP,
        "behind_the_pool_is_the_last",
        (
            "numerics.lists",
            VALID,
            "slots = slots.clamp(max=cache.shape[0] * cache.shape[1] - 1)\n    valid = slots >= 0",
        ),
    ),
    mutant(
        OP,
        "behind_the_pool_wraps",
        (
            "numerics.lists",
            VALID,
            "slots = torch.where(slots < 0, slots, slots % max(cache.shape[0] * cache.shape[1],"
            " 1))\n    valid = slots >= 0",
        ),
    ),
    mutant(OP, "pool_one_shorter", ("numerics.lists", VALID, VALID.replace("slots <", "slots + 1 <"))),
    mutant(OP, "pool_of_one_block", ("numerics.lists", VALID, VALID.replace("cache.shape[0] * ", "1 * "))),
    mutant(
        OP,
        "minus_1_is_entry_0",
        ("numerics.lists", VALID, "slots = torch.where(slots == -1, 0, slots)\n    " + VALID),
        row="S13",
    ),
    mutant(
        OP,
        "only_minus_1_is_invalid",
        (
            "numerics.lists",
            VALID,
            "slots = torch.where(slots < -1, slots.abs() % max(cache.shape[0] * cache.shape[1], 1), slots)\n    "
            + VALID,
        ),
    ),
    mutant(
        OP,
        "first_minus_1_ends_the_list",
        (
            "numerics.lists",
            "return torch.where(valid, slots, -1)",
            "valid &= (slots >= 0).cumprod(1).bool()\n    return torch.where(valid, slots, -1)",
        ),
    ),
    mutant(
        OP,
        "listed_twice_counts_once",
        (
            "numerics.lists",
            "return torch.where(valid, slots, -1)",
            "valid &= ~(slots[:, :, None] == slots[:, None, :]).tril(-1).any(-1)\n"
            "    return torch.where(valid, slots, -1)",
        ),
    ),
    mutant(OP, "entry_0_is_invalid", ("numerics.lists", VALID, VALID.replace("slots >= 0", "slots > 0"))),
    mutant(
        OP,
        "indices_in_16_bits",
        ("numerics.lists", "slots = indices.long()", "slots = torch.where(indices >= 0, indices.long() % 65536, -1)"),
    ),
    mutant(
        OP,
        "slots_of_items_in_16_bits",
        (
            "numerics.pages",
            "block * block_size + items % block_size, -1)",
            "(block * block_size + items % block_size) % 65536, -1)",
        ),
    ),
    mutant(
        OP,
        "list_of_the_first_token",
        ("numerics.lists", "slots = indices.long()", "slots = indices[:1].expand_as(indices).long()"),
    ),
]

TABLES = [
    mutant(
        OP,
        "table_of_the_first_sequence",
        ("numerics.lists", "sequence[:, None], indices", "sequence[:, None] * 0, indices"),
        row="I6",
    ),
    mutant(
        OP,
        "pages_of_16",
        ("numerics.pages", "items.div(block_size, rounding_mode", "items.div(16, rounding_mode"),
        row="I6",
    ),
    mutant(
        OP,
        "pages_of_a_power_of_two",
        (
            "numerics.pages",
            "block * block_size + items % block_size, -1)",
            "block * block_size + (items & (block_size - 1)), -1)",
        ),
        row="I6",
    ),
    mutant(
        OP,
        "blocks_a_power_of_two_apart",
        (
            "numerics.pages",
            "block * block_size + items % block_size, -1)",
            "block * (1 << (block_size - 1).bit_length()) + items % block_size, -1)",
        ),
        row="I6",
    ),
    mutant(
        OP,
        "offset_in_the_page_missing",
        ("numerics.pages", "block * block_size + items % block_size, -1)", "block * block_size, -1)"),
        row="I6",
    ),
    mutant(
        OP,
        "behind_the_table_is_its_last_block",
        ("numerics.pages", "(items >= 0) & (column < width) & (block >= 0)", "(items >= 0) & (block >= 0)"),
    ),
    mutant(
        OP,
        "behind_the_table_wraps",
        ("numerics.pages", "column.clamp(0, width - 1)", "(column % width)"),
        ("numerics.pages", "(items >= 0) & (column < width) & (block >= 0)", "(items >= 0) & (block >= 0)"),
    ),
    mutant(
        OP,
        "no_block_is_block_0",
        ("numerics.pages", "(items >= 0) & (column < width) & (block >= 0)", "(items >= 0) & (column < width)"),
        ("numerics.pages", "width - 1)]\n", "width - 1)].clamp(min=0)\n"),
    ),
    mutant(
        OP,
        "no_block_is_computed_with",
        ("numerics.pages", "(items >= 0) & (column < width) & (block >= 0)", "(items >= 0) & (column < width)"),
        equivalent="-1 * block_size + an offset below block_size is negative, and so is invalid"
        " whatever the block size",
    ),
    mutant(
        OP,
        "negative_items_in_the_last_page",
        ("numerics.pages", "(items >= 0) & (column < width) & (block >= 0)", "(column < width) & (block >= 0)"),
    ),
    mutant(
        OP,
        "first_token_of_a_sequence_to_the_one_before",
        ("numerics.ragged", "token, right=True)", "token, right=False)"),
    ),
    mutant(
        OP,
        "empty_sequences_skipped",
        (
            "numerics.ragged",
            "return torch.searchsorted(cu_seqlens[1:].long().contiguous(), token, right=True)",
            "ends = cu_seqlens[1:][cu_seqlens.diff() > 0]\n"
            "    return torch.searchsorted(ends.long().contiguous(), token, right=True)",
        ),
    ),
    mutant(
        OP,
        "nan_of_unread_entries_shows",
        (
            "numerics.pages",
            "return torch.where((slots >= 0)[..., None], values, torch.zeros((), dtype=dtype,"
            " device=cache.device)).contiguous()",
            "return (values * (slots >= 0)[..., None]).contiguous()",
        ),
        row="S1",
    ),
    mutant(
        OP,
        "float_pages_taken_as_contiguous",
        (
            "numerics.pages",
            "values = cache[block, row].to(dtype)",
            "values = torch.as_strided(cache, cache.shape, (cache.shape[1] * cache.shape[2],"
            " cache.shape[2], 1))[block, row].to(dtype)",
        ),
    ),
]

MUTANTS = LISTS + TABLES
