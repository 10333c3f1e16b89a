"""Wrong kv_compress: which entries are emitted, and the state between calls."""

from mutation import mutant

OP = "kv_compress"
WRITE = "windows.write_rows(state_cache, state_block_table, sequence, position, rows)"
GATHERED = "torch.where((token >= 0)[..., None], rows[token.clamp(min=0)], read_entries(state, slot, rows.dtype))"
STORE = "return torch.where(entries.emitted[:, None], result, 0.0), entries.cu_entries.to(torch.int32)"
WINDOWS = "numerics.windows"
COUNTS = "counts = (start + cu_seqlens.long().diff()) // ratio - first"
FIRST = "first = start // ratio\n    counts"
EXISTS = "exists = entries.emitted[:, None] & (position >= 0)"
TOKEN = "token = torch.where(exists & (position >= start), cu_seqlens.long()[sequence] + position - start, -1)"
EARLIER = "earlier = torch.where(exists & (position < start), position, -1)"
POSITION = "position = (entries.window[:, None] - (windows - 1)) * ratio + offset\n    start"
KEPT = "kept = order[(sorted_slots >= 0) & (sorted_slots != follower)]"
PUT = "state[slots[kept] // state.shape[1], slots[kept] % state.shape[1]] = rows[kept].to(state.dtype)"

EMISSION = [
    mutant(
        OP,
        "partial_window_emitted",
        (
            WINDOWS,
            COUNTS,
            COUNTS.replace("// ratio - first", ".neg().floor_divide(ratio).neg() - first").replace(
                "(start + cu_seqlens.long().diff()).", "(start + cu_seqlens.long().diff())."
            ),
        ),
        row="K6",
    ),
    mutant(
        OP,
        "emitted_a_token_late",
        (
            WINDOWS,
            COUNTS,
            "first = (start - 1).clamp(min=0) // ratio\n"
            "    counts = (start + cu_seqlens.long().diff() - 1).clamp(min=0) // ratio"
            " - first",
        ),
        row="K5",
    ),
    mutant(
        OP,
        "emitted_a_token_early",
        (
            WINDOWS,
            COUNTS,
            "first = (start + (start > 0)) // ratio\n"
            "    counts = (start + cu_seqlens.long().diff() + 1) // ratio - first\n"
            "    counts = torch.minimum(counts, cu_seqlens.long().diff())",
        ),
        row="K5",
    ),
    mutant(OP, "windows_begin_at_start_pos", (WINDOWS, COUNTS, "counts = cu_seqlens.long().diff() // ratio"), row="K5"),
    mutant(OP, "windows_of_the_call", (WINDOWS, FIRST, "first = start * 0 // ratio\n    counts"), row="K5"),
    mutant(
        OP,
        "counts_exclusive_one_off",
        (
            WINDOWS,
            "cu_entries = torch.nn.functional.pad(counts.cumsum(0), (1, 0))",
            "cu_entries = torch.nn.functional.pad(counts.cumsum(0).sub(counts[:1]), (1, 0))",
        ),
        row="P1",
    ),
    mutant(
        OP,
        "window_counted_from_0",
        (WINDOWS, "first[sequence] + row - cu_entries[sequence], 0)", "row - cu_entries[sequence], 0)"),
    ),
    mutant(
        OP,
        "window_not_counted_within_a_sequence",
        (WINDOWS, "first[sequence] + row - cu_entries[sequence], 0)", "first[sequence], 0)"),
    ),
    mutant(
        OP,
        "sequences_without_an_entry_not_skipped",
        (WINDOWS, "cu_entries[1:].contiguous(), row, right=True)", "cu_entries[1:].contiguous(), row, right=False)"),
        row="P2",
    ),
    mutant(
        OP,
        "last_entry_not_emitted",
        (WINDOWS, "emitted = row < cu_entries[-1]", "emitted = row < cu_entries[-1] - (row > 6).long()"),
        row="P7",
    ),
    mutant(
        OP,
        "cu_entries_of_the_history_too",
        (
            STORE,
            STORE.replace(
                "entries.cu_entries.to",
                "torch.nn.functional.pad(((start_pos + cu_seqlens.diff()) // ratio).cumsum(0), (1, 0)).to",
            ),
        ),
    ),
]

STATE = [
    mutant(OP, "state_not_written", (WRITE, "pass"), row="D1"),
    mutant(
        OP,
        "state_written_before_it_is_read",
        ("token, slot = windows.sources(", f"{WRITE}\n    token, slot = windows.sources("),
        row="D1",
    ),
    mutant(
        OP,
        "state_read_where_there_is_a_row",
        (
            WINDOWS,
            TOKEN,
            TOKEN.replace(
                "position >= start)",
                "position >= start) & (slots_of_items(block_table, sequence, position, state.shape[1]) < 0)",
            ),
        ),
        (WINDOWS, EARLIER, "earlier = torch.where(exists, position, -1)"),
        row="D1",
    ),
    mutant(OP, "state_not_read", (WINDOWS, EARLIER, EARLIER.replace("position < start", "position < 0")), row="D1"),
    mutant(
        OP, "first_token_of_the_call_missing", (WINDOWS, TOKEN, TOKEN.replace("position >= start", "position > start"))
    ),
    mutant(
        OP,
        "first_token_from_the_state",
        (WINDOWS, TOKEN, TOKEN.replace("position >= start", "position > start")),
        (WINDOWS, EARLIER, EARLIER.replace("position < start", "position <= start")),
        row="D1",
    ),
    mutant(
        OP,
        "tokens_of_the_sequence_before",
        (
            WINDOWS,
            TOKEN,
            TOKEN.replace(
                "exists & (position >= start)", "exists & (cu_seqlens.long()[sequence] + position - start >= 0)"
            ),
        ),
        row="X4",
    ),
    mutant(
        OP,
        "token_of_the_first_sequence",
        (WINDOWS, TOKEN, TOKEN.replace("cu_seqlens.long()[sequence] + ", "")),
        row="X4",
    ),
    mutant(
        OP,
        "negative_positions_exist",
        (WINDOWS, EXISTS, "exists = entries.emitted[:, None]"),
        equivalent="a position below 0 is below every start_pos, so no token is taken for it,"
        " and slots_of_items gives no slot for it",
    ),
    mutant(
        OP,
        "start_0_reads_the_state",
        (
            WINDOWS,
            EXISTS,
            "position = torch.where((position < 0) & (start == 0), position % max(ratio, 1), position)\n    " + EXISTS,
        ),
        (
            WINDOWS,
            EARLIER,
            EARLIER.replace(
                "position < start",
                "(position < start) | (offset < ratio) & (start == 0) & (entries.window[:, None] == 0)",
            ),
        ),
        (
            WINDOWS,
            TOKEN,
            TOKEN.replace(
                "position >= start",
                "(position >= start) & ~((offset < ratio) & (windows > 1) & (start == 0)"
                " & (entries.window[:, None] == 0))",
            ),
        ),
        row="D3",
    ),
    mutant(
        OP,
        "state_of_the_first_sequence",
        (
            WINDOWS,
            "return token, slots_of_items(block_table, sequence, earlier",
            "return token, slots_of_items(block_table, sequence * 0, earlier",
        ),
        row="X4",
    ),
    mutant(
        OP,
        "state_in_a_ring_of_ratio_rows",
        (
            WINDOWS,
            POSITION,
            "position = (entries.window[:, None] - (windows - 1)) * ratio + offset\n"
            "    state_position = position % ratio\n"
            "    start",
        ),
        (
            WINDOWS,
            "sequence, earlier, state.shape[1])",
            "sequence, torch.where(earlier < 0, -1, state_position), state.shape[1])",
        ),
        row="D1",
    ),
    mutant(
        OP,
        "window_before_by_one_token",
        (
            WINDOWS,
            POSITION,
            POSITION.replace("* ratio + offset", "* ratio + offset - (windows - 1) * (offset < ratio)"),
        ),
        row="K1",
    ),
    mutant(
        OP,
        "window_after",
        (WINDOWS, POSITION, POSITION.replace("- (windows - 1)) * ratio", "- (windows - 1)) * ratio + (ratio > 64)")),
        row="K1",
    ),
    mutant(
        OP,
        "first_of_a_ring_stays",
        (
            WINDOWS,
            KEPT,
            "leader = torch.cat((slots.new_full((1,), -1), sorted_slots[:-1]))[: len(slots)]\n"
            "    kept = order[(sorted_slots >= 0) & (sorted_slots != leader)]",
        ),
        row="D1",
    ),
    mutant(
        OP,
        "row_without_a_block_to_the_last",
        (
            WINDOWS,
            KEPT,
            "kept = order[sorted_slots != follower] if bool((slots < 0).any()) else order[(sorted_slots"
            " >= 0) & (sorted_slots != follower)]",
        ),
        row="D1",
    ),
    mutant(
        OP,
        "row_without_a_block_to_block_0",
        (
            WINDOWS,
            PUT,
            PUT.replace(
                "state[slots[kept]",
                "lost = position[(slots < 0)] % state.shape[1]\n"
                "    state[lost * 0, lost] = rows[slots < 0].to(state.dtype)\n"
                "    state[slots[kept]",
            ),
        ),
        row="D1",
    ),
    mutant(
        OP,
        "only_unfinished_windows_written",
        (
            WRITE,
            "ends = (start_pos + cu_seqlens.diff())[sequence]\n"
            "    part = position >= ends // ratio * ratio\n"
            "    windows.write_rows(state_cache, state_block_table, sequence[part], position[part],"
            " rows[part])",
        ),
        row="D1",
    ),
    mutant(
        OP,
        "last_token_not_written",
        (WRITE, "windows.write_rows(state_cache, state_block_table, sequence[:-1], position[:-1], rows[:-1])"),
        row="C5",
    ),
    mutant(OP, "state_in_bfloat16", (WINDOWS, PUT, PUT.replace("rows[kept]", "rows[kept].to(torch.bfloat16)"))),
    mutant(OP, "state_halves_swapped", (WRITE, WRITE.replace("rows)", "rows.roll(rows.shape[1] // 2, 1))"))),
    mutant(
        OP,
        "state_in_the_row_before",
        (WINDOWS, PUT, PUT.replace("% state.shape[1]]", "% state.shape[1] - 1]")),
        row="D1",
    ),
    mutant(OP, "state_of_all_read_as_written_here", (GATHERED, "rows[token.clamp(min=0)]"), row="D1"),
    mutant(
        OP,
        "nan_of_the_state_shows",
        (
            GATHERED,
            "torch.where((token >= 0)[..., None], rows[token.clamp(min=0)], 0.0) + state[slot.clamp(min=0)"
            " // max(state.shape[1], 1), slot.clamp(min=0) % max(state.shape[1], 1)].to(rows.dtype)"
            " * ((slot >= 0) & (token < 0))[..., None]",
        ),
        row="D1",
    ),
    mutant(
        OP,
        "padded_pages_taken_as_contiguous",
        (
            WINDOWS,
            PUT,
            "state = torch.as_strided(state, state.shape, (state.shape[1] * state.shape[2], state.shape[2], 1))\n    "
            + PUT,
        ),
    ),
]

MUTANTS = EMISSION + STATE
