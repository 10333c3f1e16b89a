"""Wrong dispatch and combination: counts, segments, maps, carried rows; weights, dropped slots, sums."""

from mutation import mutant

LEGAL = "legal = (expert >= 0) & (expert < experts)"
DROPPED = "expert = torch.where(legal, expert, experts)  # dropped pairs sort behind all others"
COUNTS = "counts = counted.scatter_add(0, expert, torch.ones_like(expert))[:experts]"
PADDED = "padded = (counts + alignment - 1) // alignment * alignment"
START = "start = padded.cumsum(0) - padded"
FIRST = "first = counts.cumsum(0) - counts  #"
ORDER = "order = expert.argsort(stable=True)"
REVERSED = "order = expert.numel() - 1 - expert.flip(0).argsort(stable=True)"
BY_SLOT = (
    "by_slot = torch.arange(pairs).view(tokens, k).T.flatten()\n"
    "    order = by_slot[expert[by_slot].argsort(stable=True)]"
)
POSITION = "position = torch.where(sorted_expert < experts, position, total)"
TO_PAIR = "pos_to_pair = nothing.scatter(0, position, order)[:total]"
TO_EXPERT = "pos_to_expert = nothing.scatter(0, position, sorted_expert)[:total]"
TO_POS = "pair_to_pos = torch.empty_like(position).scatter(0, order, position).view(tokens, k)"
ROWS = "rows = rows_of(x, pos_to_pair, k)"
SCALES = "rows_of(x_scale, pos_to_pair, k)"
MAPS = "maps = (counts, start + counts, pos_to_pair, pair_to_pos, pos_to_expert)"
MOST = "most: int = torch.sym_min(experts, pairs)"
TOKEN = "token = pos_to_pair.clamp(min=0) // k"
CARRIED = "torch.where((pos_to_pair >= 0)[:, None], x[token],"
UNPADDED = "return (pairs + most * (alignment - 1)) // alignment * alignment"
SORTED = "sorted_expert = expert[order]"


# Rows of floats that a device has arithmetic for.
WIDE = "x.is_floating_point() and x.itemsize > 1"


def tail_of_columns(tile):
    """Rows whose last columns, fewer than a tile, are not copied."""
    kept = f"torch.arange(x.shape[1]) < x.shape[1] // {tile} * {tile}"
    return f"{ROWS}\n    rows = torch.where({kept}, rows, torch.zeros((), dtype=x.dtype))"


PERMUTE = [
    ("counts_with_dropped_pairs", "P1", DROPPED, DROPPED.replace("legal, expert, experts", "legal, expert, 0")),
    ("dropped_pairs_go_to_the_last_expert", "P1", DROPPED, DROPPED.replace("expert, experts)", "expert, experts - 1)")),
    ("last_expert_dropped", "P2", LEGAL, LEGAL.replace("< experts", "< max(experts - 1, 1)")),
    ("first_expert_dropped", "P2", LEGAL, LEGAL.replace(">= 0", ">= min(1, experts - 1)")),
    ("experts_in_7_bits", "P9", LEGAL, f"expert = torch.where(expert >= 128, expert % 128, expert)\n    {LEGAL}"),
    ("experts_in_8_bits", "P9", LEGAL, f"expert = torch.where(expert >= 256, expert % 256, expert)\n    {LEGAL}"),
    ("counts_in_8_bits", "P9", MAPS, MAPS.replace("(counts,", "(counts % 256,")),
    ("counts_in_16_bits", "P9", MAPS, MAPS.replace("(counts,", "(counts % 65536,")),
    ("counts_in_15_bits", "P9", MAPS, MAPS.replace("(counts,", "(counts % 32768,")),
    (
        "counts_of_distinct_tokens",
        "RT11",
        MAPS,
        MAPS.replace("(counts,", "(torch.tensor([int((topk_idx == e).any(1).sum()) for e in range(experts)]),"),
    ),
    ("counts_padded", "P1", MAPS, MAPS.replace("(counts,", "(padded,")),
    ("counts_cumulated", "P1", MAPS, MAPS.replace("(counts,", "(counts.cumsum(0),")),
    ("offsets_are_starts", "P1", MAPS, MAPS.replace("start + counts", "start")),
    ("offsets_are_padded_ends", "P1", MAPS, MAPS.replace("start + counts", "start + padded")),
    ("offsets_without_alignment", "P1", MAPS, MAPS.replace("start + counts", "counts.cumsum(0)")),
    ("offsets_in_16_bits", "P9", MAPS, MAPS.replace("start + counts", "(start + counts) % 65536")),
    ("offsets_zero_where_empty", "P2", MAPS, MAPS.replace("start + counts", "(start + counts) * (counts > 0)")),
    ("starts_inclusive", "P1", START, "start = (padded.cumsum(0)).clamp(max=max(pairs, 1) - 1)"),
    ("starts_without_alignment", "P1", START, "start = counts.cumsum(0) - counts"),
    (
        "starts_of_padded_sums_rounded_once",
        "P1",
        START,
        "start = (counts.cumsum(0) - counts + alignment - 1) // alignment * alignment",
    ),
    ("alignment_rounds_down", "P7", PADDED, PADDED.replace("counts + alignment - 1", "counts")),
    ("alignment_always_adds_a_block", "P1", PADDED, PADDED.replace("alignment - 1)", "alignment)")),
    ("alignment_one_too_small", "P1", PADDED, PADDED.replace("alignment - 1", "max(alignment - 2, 0)")),
    ("empty_expert_gets_a_block", "P2", PADDED, PADDED.replace("(counts +", "(counts.clamp(min=1) +")),
    ("alignment_at_most_16", "P1", PADDED, f"alignment = min(alignment, 16)\n    {PADDED}"),
    ("order_reversed_within_an_expert", "P5", ORDER, REVERSED),
    ("order_by_slot_first", "P5", ORDER, BY_SLOT),
    ("order_swaps_neighbours", "P5", ORDER, "order = (expert * 2 * pairs + (torch.arange(pairs) ^ 1)).argsort()"),
    (
        "order_unstable_beyond_16",
        "P5",
        ORDER,
        f"{ORDER}\n    order = order if pairs <= 512 else (expert * pairs - torch.arange(pairs)).argsort()",
    ),
    ("experts_descending", "P1", ORDER, "order = (experts - expert).argsort(stable=True)"),
    ("expert_of_a_row_not_marked", "P4", MAPS, f"pos_to_expert = pos_to_expert.clamp(min=0)\n    {MAPS}"),
    (
        "padding_has_its_segment_s_expert",
        "P4",
        MAPS,
        f"pos_to_expert = torch.where(pos_to_expert < 0, pos_to_expert.cummax(0).values, pos_to_expert)\n    {MAPS}",
    ),
    ("padding_has_pair_0", "P4", MAPS, f"pos_to_pair = pos_to_pair.clamp(min=0)\n    {MAPS}"),
    (
        "padding_has_pair_of_no_one",
        "P4",
        MAPS,
        f"pos_to_pair = torch.where(pos_to_pair < 0, tokens * k, pos_to_pair)\n    {MAPS}",
    ),
    ("pairs_are_tokens", "", MAPS, MAPS.replace("pos_to_pair,", "pos_to_pair.div(k, rounding_mode='floor'),")),
    (
        "pairs_are_slot_major",
        "",
        MAPS,
        MAPS.replace("pos_to_pair,", "torch.where(pos_to_pair < 0, -1, pos_to_pair % k * tokens + pos_to_pair // k),"),
    ),
    ("pairs_in_16_bits", "P9", MAPS, MAPS.replace("pos_to_pair,", "pos_to_pair.short(),")),
    ("positions_in_16_bits", "P9", MAPS, MAPS.replace("pair_to_pos,", "pair_to_pos.short(),")),
    ("dropped_pair_at_row_0", "P4", MAPS, f"pair_to_pos = pair_to_pos.clamp(min=0)\n    {MAPS}"),
    ("dropped_pair_behind_the_last_row", "P4", MAPS, f"pair_to_pos = pair_to_pos % max(total, 1)\n    {MAPS}"),
    ("map_not_inverted", "", TO_POS, "pair_to_pos = position.view(tokens, k)"),
    ("last_pair_lost", "P7", POSITION, f"{POSITION}\n    position[-1:] = total"),
    ("last_partial_block_of_pairs_lost", "P7", POSITION, f"{POSITION}\n    position[pairs // 32 * 32 :] = total"),
    ("two_pairs_in_one_row", "P8", POSITION, f"{POSITION}\n    position[1:2] = position[:1]"),
    (
        "a_repeated_expert_runs_once",
        "RT11",
        LEGAL,
        f"earlier = (topk_idx[:, :, None] == topk_idx[:, None, :]).tril(-1).any(2).flatten()\n    {LEGAL} & ~earlier",
    ),
    ("rows_of_pairs", "", TOKEN, "token = pos_to_pair.clamp(min=0) % max(x.shape[0], 1)"),
    ("rows_of_the_next_token", "", TOKEN, f"{TOKEN[:8]}({TOKEN[8:]} + 1) % max(x.shape[0], 1)"),
    ("rows_not_written_in_the_last_block", "C5", ROWS, f"{ROWS}\n    rows[total // 8 * 8 :] = 0"),
    (
        "last_token_s_row_zero",
        "C5",
        ROWS,
        f"{ROWS}\n    rows = torch.where((pos_to_pair // k == tokens - 1)[:, None], rows[:1], rows)",
    ),
    ("columns_beyond_4s_lost", "G14", ROWS, tail_of_columns(4)),
    ("columns_beyond_8s_lost", "G14", ROWS, tail_of_columns(8)),
    ("columns_beyond_2s_lost", "G14", ROWS, tail_of_columns(2)),
    ("rows_through_float16", "", ROWS, f"x = x.half().to(x.dtype) if x.dtype == torch.float32 else x\n    {ROWS}"),
    (
        "rows_flush_subnormals",
        "",
        ROWS,
        f"x = x.masked_fill(x.abs() < torch.finfo(x.dtype).tiny, 0) if {WIDE} else x\n    {ROWS}",
    ),
    (
        "rows_lose_the_sign_of_zero",
        "",
        ROWS,
        f"x = x + 0 if {WIDE} else x\n    {ROWS}",
    ),
    ("rows_saturate", "", ROWS, f"x = x.nan_to_num() if {WIDE} else x\n    {ROWS}"),
    ("scales_not_permuted", "", SCALES, "x_scale[torch.arange(total) % max(tokens, 1)]"),
    ("scales_of_pairs", "", SCALES, "x_scale[pos_to_pair.clamp(min=0) % max(tokens, 1)]"),
    ("scales_of_the_first_group", "Q1", SCALES, f"{SCALES}[:, :1].expand(-1, x_scale.shape[1]).contiguous()"),
    ("scales_reversed", "Q1", SCALES, f"{SCALES}[:, list(reversed(range(x_scale.shape[1])))]"),
    (
        "scales_as_powers_of_two",
        "",
        SCALES,
        f"{SCALES}.float().abs().log2().ceil().exp2().to(x_scale.dtype)",
    ),
    (
        "scale_in_place_of_none",
        "",
        "row_scale = x.new_empty(0) if x_scale is None else rows_of",
        "row_scale = x.new_ones(total, 1) if x_scale is None else rows_of",
    ),
    ("rows_for_every_expert", "", MOST, "most = experts"),
    ("rows_for_live_pairs_alone", "", UNPADDED, "return pairs if alignment == 1 else pairs // alignment * alignment"),
    ("rows_rounded_up", "", UNPADDED, UNPADDED.replace("(alignment - 1))", "(alignment - 1) + alignment - 1)")),
]

VALUES = "values = rows[pair_to_pos.clamp(min=0).long()].to(widen(rows.dtype))"
WEIGHTED = "values = values * topk_weights.to(values.dtype)[..., None]"
WEIGHTS = "topk_weights.to(values.dtype)[..., None]"
SKIPPED = "return values.masked_fill((pair_to_pos < 0)[..., None], 0.0)"
LIVE = "    live = terms(rows, pair_to_pos, topk_weights)\n    y = torch.zeros((pair_to_pos"
ADDED = "y = y + live[:, slot]\n    if residual is not None:"
SLOTS = "for slot in range(pair_to_pos.shape[1]):"
RESIDUAL = "y = y + residual.to(y.dtype)\n    return y.to(rows.dtype)\n\n\ndef terms"
RETURN = "return y.to(rows.dtype)\n\n\ndef terms"
ROUNDED_RESIDUAL = RESIDUAL.replace("residual.to(y.dtype)", "residual.to(rows.dtype).to(y.dtype)")
TRUNCATED = "(y.float().view(torch.int32) & {}).view(torch.float32).to(rows.dtype)"
MASK_OF = "(-65536 if rows.dtype == torch.bfloat16 else -8192 if rows.dtype == torch.float16 else -1)"

UNPERMUTE = [
    ("weights_ignored", "C1", WEIGHTS, "1.0"),
    ("weights_twice", "C1", WEIGHTS, f"{WEIGHTS}**2"),
    ("weights_of_the_first_slot", "C1", WEIGHTS, "topk_weights.to(values.dtype)[:, :1, None]"),
    ("weights_of_the_token_before", "C1", WEIGHTS, "topk_weights.to(values.dtype).roll(1, 0)[..., None]"),
    ("weights_in_reversed_slots", "C1", WEIGHTS, "topk_weights.to(values.dtype).flip(1)[..., None]"),
    ("weights_normalized", "C1", WEIGHTS, f"{WEIGHTS} / topk_weights.sum(1)[:, None, None].to(values.dtype)"),
    ("weights_without_sign", "C1", WEIGHTS, f"{WEIGHTS}.abs()"),
    ("weights_in_bfloat16", "C1", WEIGHTS, f"{WEIGHTS}.bfloat16().to(values.dtype)"),
    ("weights_in_the_dtype_of_rows", "C1", WEIGHTS, f"{WEIGHTS}.to(rows.dtype).to(values.dtype)"),
    ("products_rounded", "G5", WEIGHTED, f"{WEIGHTED}.to(rows.dtype).to(values.dtype)"),
    ("rows_in_tf32", "G8", VALUES, f"{VALUES}\n    values = values.float().half().to(values.dtype)"),
    (
        "sum_in_the_dtype_of_rows",
        "G5",
        ADDED,
        ADDED.replace("live[:, slot]", "live[:, slot]\n        y = y.to(rows.dtype).to(live.dtype)"),
    ),
    ("sum_rounded_before_the_residual", "G5", RESIDUAL, RESIDUAL.replace("y + ", "y.to(rows.dtype).to(y.dtype) + ")),
    ("residual_rounded_to_rows", "G5", RESIDUAL, ROUNDED_RESIDUAL),
    ("residual_ignored", "RT13", RESIDUAL, RESIDUAL.replace("y + residual.to(y.dtype)", "y")),
    ("residual_twice", "RT13", RESIDUAL, RESIDUAL.replace("y + residual", "y + 2 * residual")),
    (
        "residual_weighted",
        "RT13",
        RESIDUAL,
        RESIDUAL.replace(
            "residual.to(y.dtype)",
            "residual.to(y.dtype) * (1 if topk_weights is None else topk_weights.to(y.dtype).nansum(1)[:, None])",
        ),
    ),
    (
        "residual_where_a_slot_is_live_alone",
        "RT13",
        RESIDUAL,
        RESIDUAL.replace("residual.to(y.dtype)", "residual.to(y.dtype) * (pair_to_pos >= 0).any(1)[:, None]"),
    ),
    ("residual_of_the_token_before", "RT13", RESIDUAL, RESIDUAL.replace("residual.to", "residual.roll(1, 0).to")),
    ("dropped_slot_adds_row_0", "C4", SKIPPED, "return values"),
    ("dropped_slot_times_0", "C4", SKIPPED, "return values * (pair_to_pos >= 0)[..., None]"),
    (
        "dropped_slot_ends_the_token",
        "C4",
        SKIPPED,
        "return values.masked_fill((pair_to_pos < 0).cumsum(1).bool()[..., None], 0.0)",
    ),
    (
        "dropped_slot_drops_the_token",
        "C4",
        SKIPPED,
        "return values.masked_fill((pair_to_pos < 0).any(1)[:, None, None], 0.0)",
    ),
    ("row_0_taken_for_none", "C4", SKIPPED, SKIPPED.replace("< 0", "<= 0")),
    ("last_slot_unread", "RT7", SLOTS, "for slot in range(max(pair_to_pos.shape[1] - 1, 1)):"),
    ("first_slot_unread", "RT7", SLOTS, "for slot in range(min(1, pair_to_pos.shape[1] - 1), pair_to_pos.shape[1]):"),
    ("first_slot_alone", "RT7", SLOTS, "for slot in range(1):"),
    ("slots_beyond_6_unread", "RT7", SLOTS, "for slot in range(min(pair_to_pos.shape[1], 6)):"),
    ("mean_of_slots", "C1", ADDED, ADDED.replace("live[:, slot]", "live[:, slot] / live.shape[1]")),
    (
        "mean_of_live_slots",
        "C1",
        ADDED,
        ADDED.replace("live[:, slot]", "live[:, slot] / (pair_to_pos >= 0).sum(1).clamp(min=1)[:, None]"),
    ),
    ("slot_overwrites", "C6", ADDED, ADDED.replace("y + live", "live")),
    (
        "rows_in_pair_order",
        "",
        VALUES,
        VALUES.replace(
            "pair_to_pos.clamp(min=0).long()",
            "torch.arange(pair_to_pos.numel()).view(pair_to_pos.shape).clamp(max=rows.shape[0] - 1)",
        ),
    ),
    (
        "next_row",
        "",
        VALUES,
        VALUES.replace("pair_to_pos.clamp(min=0).long()", "(pair_to_pos.clamp(min=0).long() + 1) % rows.shape[0]"),
    ),
    ("positions_in_15_bits", "P9", VALUES, VALUES.replace(".long()", ".long().remainder(32768)")),
    ("positions_in_16_bits", "P9", VALUES, VALUES.replace(".long()", ".long().remainder(65536)")),
    ("last_token_unwritten", "C5", RETURN, RETURN.replace("return", "y[-1:] = 0\n    return")),
    (
        "last_token_as_the_one_before",
        "C5",
        RETURN,
        RETURN.replace("return", "y[-1:] = y[-2:-1] if len(y) > 1 else 0\n    return"),
    ),
    (
        "last_partial_block_of_tokens_unwritten",
        "C5",
        RETURN,
        RETURN.replace("return", "y[len(y) // 8 * 8 :] = 0\n    return"),
    ),
    *(
        (
            f"columns_of_the_last_{tile}_unwritten",
            "G14",
            RETURN,
            RETURN.replace("return", f"y[:, y.shape[1] // {tile} * {tile} :] = 0\n    return"),
        )
        for tile in (2, 8, 32)
    ),
    ("truncated", "G7", RETURN, RETURN.replace("y.to(rows.dtype)", TRUNCATED.format(MASK_OF))),
    ("rounded_through_bfloat16", "G7", RETURN, RETURN.replace("y.to(rows.dtype)", "y.bfloat16().to(rows.dtype)")),
    (
        "overflow_saturates",
        "",
        RETURN,
        RETURN.replace("y.to(", "y.clamp(torch.finfo(rows.dtype).min, torch.finfo(rows.dtype).max).to("),
    ),
    (
        "no_rows_forget_the_residual",
        "P11",
        LIVE,
        LIVE.replace("    live", "    residual = residual if rows.shape[0] else None\n    live", 1),
    ),
]


def in_room(old, new):
    """An edit, and another one that keeps what it misplaces within the rows that there are."""
    room = (POSITION, f"{POSITION}.clamp(max=total)")
    return [(old, f"{new}\n    position = position.clamp(max=total)")] if old == POSITION else [(old, new), room]


MUTANTS = [
    *(mutant("moe_permute", name, *in_room(old, new), row=row) for name, row, old, new in PERMUTE),
    *(mutant("moe_unpermute", name, (old, new), row=row) for name, row, old, new in UNPERMUTE),
]
