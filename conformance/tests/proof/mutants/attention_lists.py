"""Wrong window_indices and compress_indices."""

from mutation import mutant

WINDOW = "window_indices"
COMPRESS = "compress_indices"
LISTED = "listed = (last - window + 1).clamp(min=0) + torch.arange(window, device=positions.device)"
VISIBLE = "visible = (positions.long() + 1) // ratio\n    entry = torch"
LAST = "last = positions.long()[:, None]\n    listed = (last"

MUTANTS = [
    mutant(WINDOW, "window_one_more", (LISTED, LISTED.replace("window + 1)", "window)")), row="S2"),
    mutant(WINDOW, "window_one_less", (LISTED, LISTED.replace("window + 1)", "window + 2)")), row="S2"),
    mutant(WINDOW, "not_the_token_itself", ("listed <= last", "listed < last"), row="S1"),
    mutant(WINDOW, "next_token_too", ("listed <= last", "listed <= last + 1"), row="S1"),
    mutant(WINDOW, "negative_positions_listed", (LISTED, LISTED.replace(".clamp(min=0)", ""))),
    mutant(
        WINDOW,
        "minus_1_first",
        ("torch.where(listed <= last, listed, -1)", "torch.where(listed <= last, listed, -1).sort(1).values"),
    ),
    mutant(
        WINDOW,
        "descending",
        (
            "torch.where(listed <= last, listed, -1)",
            "torch.where(listed <= last, listed, -1).sort(1, descending=True).values",
        ),
    ),
    mutant(
        WINDOW,
        "slots_of_a_ring",
        ("torch.where(listed <= last, listed, -1)", "torch.where(listed <= last, listed % window, -1)"),
    ),
    mutant(WINDOW, "tail_is_0", ("listed, -1)", "listed, 0)"), row="P4"),
    mutant(
        WINDOW,
        "positions_in_16_bits",
        (LAST, LAST.replace("positions.long()", "positions.to(torch.int16).long()")),
        row="P9",
    ),
    mutant(
        WINDOW,
        "positions_in_bfloat16",
        (LAST, LAST.replace("positions.long()", "positions.to(torch.bfloat16).long()")),
        row="O3",
    ),
    mutant(
        WINDOW,
        "positions_count_from_the_first",
        (LAST, LAST.replace("positions.long()", "(positions - positions[:1]).abs().long()")),
        row="X4",
    ),
    mutant(WINDOW, "int64_list", (".to(torch.int32)", ".to(torch.int64)")),
    mutant(COMPRESS, "entry_late", (VISIBLE, "visible = positions.long() // ratio\n    entry = torch"), row="I4"),
    mutant(
        COMPRESS, "entry_early", (VISIBLE, "visible = (positions.long() + ratio) // ratio\n    entry = torch"), row="I4"
    ),
    mutant(
        COMPRESS,
        "one_position_late",
        (VISIBLE, "visible = (positions.long() + 2) // ratio\n    entry = torch"),
        row="K5",
    ),
    mutant(COMPRESS, "entry_one_more", ("entry < visible", "entry <= visible"), row="S1"),
    mutant(COMPRESS, "ratio_ignored", (VISIBLE, "visible = positions.long() + 1\n    entry = torch"), row="I4"),
    mutant(
        COMPRESS,
        "ratio_a_power_of_two",
        (VISIBLE, "visible = (positions.long() + 1) >> (ratio.bit_length() - 1)\n    entry = torch"),
        row="I4",
    ),
    mutant(COMPRESS, "tail_is_0", ("entry, -1)", "entry, 0)"), row="P4"),
    mutant(
        COMPRESS,
        "tail_is_what_stands_there",
        ("torch.where(entry < visible[:, None], entry, -1)", "entry.expand(len(visible), -1)"),
        row="P4",
    ),
    mutant(
        COMPRESS,
        "positions_in_16_bits",
        (VISIBLE, VISIBLE.replace("positions.long()", "positions.to(torch.int16).long()")),
        row="P9",
    ),
    mutant(
        COMPRESS,
        "division_by_a_rounded_inverse",
        (
            VISIBLE,
            "visible = ((positions.float() + 1) * torch.tensor(1 / ratio, dtype=torch.float16).float()).long()"
            "\n    entry = torch",
        ),
    ),
    mutant(
        COMPRESS,
        "visible_in_bfloat16",
        ("entry < visible[:, None]", "entry < visible.to(torch.bfloat16).long()[:, None]"),
    ),
    mutant(
        COMPRESS,
        "newest_first",
        (
            "torch.where(entry < visible[:, None], entry, -1)",
            "torch.where(entry < visible[:, None], visible[:, None] - 1 - entry, -1)",
        ),
    ),
    mutant(
        COMPRESS,
        "visible_of_the_last_token",
        (VISIBLE, VISIBLE.replace("\n", "\n    visible = visible[-1:].expand_as(visible)\n")),
        row="X4",
    ),
    mutant(
        COMPRESS,
        "entries_beyond_4096_dropped",
        ("entry < visible[:, None]", "(entry < visible[:, None]) & (entry < 4096)"),
        row="G1",
    ),
]
