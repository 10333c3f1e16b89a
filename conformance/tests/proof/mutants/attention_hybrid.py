"""Wrong hybrid_attention."""

from mutation import mutant

OP = "hybrid_attention"
CALL = """return sparse_attn(
        *(q, window_cache, near, softmax_scale, sink, None, window_block_table, cu_seqlens),
        *(compressed_cache, far, topk_length, compressed_block_table),"""
NEAR = "near = window_indices(position, window)"
VISIBLE = "visible = topk_indices < (position[:, None] + 1) // ratio"
HCA = "compress_indices(position, ratio, compressed_block_table.shape[1] * compressed_cache.shape[1])"
SELECTED = "return near, torch.where(visible, topk_indices, -1)"
OVERLAPPED = """entry = torch.where(near >= 0, near // max(ratio, 1), -2)
    near = torch.where((entry[:, :, None] == topk_indices[:, None, :]).any(-1), -1, near)
    """

MUTANTS = [
    mutant(OP, "window_one_more", (NEAR, NEAR.replace("window)", "window + 1)")), row="S2"),
    mutant(OP, "window_one_less", (NEAR, NEAR.replace("window)", "max(window - 1, 1))")), row="S2"),
    mutant(
        OP,
        "window_is_everything",
        (NEAR, NEAR.replace("window)", "int(position.max() if len(position) else 0) + 1)")),
        row="S2",
    ),
    mutant(OP, "window_sees_the_next_token", (NEAR, NEAR.replace("position", "position + 1")), row="S1"),
    mutant(
        OP,
        "window_without_the_token_itself",
        (
            NEAR,
            "near = torch.where(window_indices(position, window) == position[:, None],"
            " -1, window_indices(position, window))",
        ),
        row="S1",
    ),
    mutant(OP, "window_of_128", (NEAR, NEAR.replace("window)", "128)")), row="S2"),
    mutant(
        OP, "window_in_a_power_of_two", (NEAR, NEAR.replace("window)", "1 << (window - 1).bit_length())")), row="S2"
    ),
    mutant(
        OP,
        "start_pos_ignored",
        (
            "positions_of_tokens(cu_seqlens, start_pos, q.shape[0])",
            "positions_of_tokens(cu_seqlens, start_pos * 0, q.shape[0])",
        ),
    ),
    mutant(
        OP,
        "start_pos_of_the_first_sequence",
        (
            "positions_of_tokens(cu_seqlens, start_pos, q.shape[0])",
            "positions_of_tokens(cu_seqlens, start_pos[:1].expand_as(start_pos), q.shape[0])",
        ),
    ),
    mutant(
        OP,
        "position_of_the_last_token",
        (NEAR, "position = start_pos.long()[_] + cu_seqlens.diff()[_] - 1\n    " + NEAR),
        row="S1",
    ),
    mutant(OP, "position_in_the_batch", (NEAR, "position = position + cu_seqlens.long()[_]\n    " + NEAR)),
    mutant(OP, "selected_limit_on_the_position", (VISIBLE, "visible = topk_indices <= position[:, None]"), row="I4"),
    mutant(OP, "selected_one_entry_more", (VISIBLE, VISIBLE.replace("<", "<=")), row="S1"),
    mutant(
        OP, "selected_entry_late", (VISIBLE, VISIBLE.replace("(position[:, None] + 1)", "position[:, None]")), row="I4"
    ),
    mutant(OP, "selected_entry_early", (VISIBLE, VISIBLE.replace("+ 1)", "+ ratio)")), row="I4"),
    mutant(OP, "selected_not_limited", (SELECTED, "return near, topk_indices"), row="I4"),
    mutant(
        OP,
        "selected_limited_by_the_last_token",
        (VISIBLE, VISIBLE.replace("(position[:, None] + 1)", "(start_pos + cu_seqlens.diff())[_][:, None]")),
        row="I4",
    ),
    mutant(OP, "selected_ignored", ("if topk_indices is None:", "if True:")),
    mutant(
        OP,
        "selected_clamped_to_the_visible",
        (
            SELECTED,
            "return near, torch.where(visible, topk_indices, ((position[:, None] + 1)"
            " // ratio - 1).expand_as(topk_indices))",
        ),
    ),
    mutant(OP, "all_entry_late", (HCA, HCA.replace("position", "(position - 1).clamp(min=0)")), row="I4"),
    mutant(OP, "all_entry_early", (HCA, HCA.replace("(position", "(position + 1")), row="I4"),
    mutant(OP, "all_one_entry_more", (HCA, HCA.replace("(position", "(position + ratio")), row="I4"),
    mutant(
        OP,
        "all_limited_by_the_last_token",
        (HCA, HCA.replace("position", "(start_pos + cu_seqlens.diff())[_] - 1")),
        row="I4",
    ),
    mutant(OP, "all_but_the_newest_entry", (HCA, HCA.replace("(position", "((position - ratio).clamp(min=0)"))),
    mutant(
        OP,
        "all_of_one_page",
        (
            "return near, " + HCA,
            "far = " + HCA + "\n        return near, torch.where(far < compressed_cache.shape[1], far, -1)",
        ),
        row="I6",
    ),
    mutant(
        OP,
        "all_limited_as_by_ratio_4",
        (
            "return near, " + HCA,
            "far = " + HCA + "\n        return near, torch.where(far < (position[:, None] + 1) // 4, far, -1)",
        ),
        row="I4",
    ),
    mutant(
        OP,
        "far_ignored",
        (
            CALL,
            CALL.replace("*(compressed_cache, far, topk_length, compressed_block_table)", "*(None, None, None, None)"),
        ),
    ),
    mutant(
        OP, "near_ignored_where_there_is_far", (CALL, CALL.replace("near", "near if far is None else near * 0 - 1"))
    ),
    mutant(OP, "length_ignored", (CALL, CALL.replace("topk_length", "None"))),
    mutant(
        OP,
        "length_on_the_window",
        (CALL, CALL.replace("None", "topk_length").replace("topk_length, comp", "None, comp")),
    ),
    mutant(OP, "sink_missing", (CALL, CALL.replace("sink", "None")), row="S4"),
    mutant(OP, "sink_only_without_far", (CALL, CALL.replace("sink", "sink if far is None else None")), row="S4"),
    mutant(
        OP,
        "sink_twice_with_far",
        (CALL, CALL.replace("sink", "sink if far is None or sink is None else sink + 0.6931472")),
        row="S4",
    ),
    mutant(OP, "scale_missing", (CALL, CALL.replace("softmax_scale", "1.0")), row="S5"),
    mutant(
        OP,
        "table_of_the_window_for_both",
        (
            CALL,
            CALL.replace(
                "topk_length, compressed_block_table",
                "topk_length, None if far is None else window_block_table.clamp(max=compressed_cache.shape[0] - 1)",
            ),
        ),
    ),
    mutant(
        OP,
        "pools_swapped",
        (
            CALL,
            CALL.replace("near", "near if far is None else far").replace(
                "far, topk", "None if far is None else near, topk"
            ),
        ),
    ),
    mutant(OP, "token_in_a_selected_entry_counts_once", (SELECTED, OVERLAPPED + SELECTED)),
    mutant(
        OP, "ring_of_window_rows", (NEAR, f"{NEAR}\n    near = torch.where(near >= 0, near % window, -1)"), row="D1"
    ),
    mutant(
        OP,
        "window_lse_alone",
        (
            "*(compressed_cache, far, topk_length, compressed_block_table),\n    )\n\n\ndef lists",
            "*(compressed_cache, far, topk_length, compressed_block_table),\n"
            "    )[0], sparse_attn(q, window_cache, near, softmax_scale, sink, None,"
            " window_block_table, cu_seqlens)[1]\n"
            "\n\ndef lists",
        ),
    ),
    mutant(
        OP,
        "negative_window_positions_listed",
        ("ops.attention.window_indices", ".clamp(min=0)", ""),
        equivalent="a negative position is an invalid column, as -1 is, and the order of columns does not count",
    ),
]
