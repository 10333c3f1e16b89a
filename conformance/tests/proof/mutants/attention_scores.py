"""Wrong indexer_score."""

from mutation import mutant

SCORE = "indexer_score"
DOTS = 'dots = torch.einsum("thc,tsc->ths", dequantised(q, q_scale, dtype), keys).relu()\n'
SUM = 'scores = torch.einsum("ths,th->ts", dots, weights.to(dtype)) * softmax_scale\n'
STORE = "return torch.where(visible, scores, -torch.inf).to(FLOAT_NAMES[out_dtype])\n\n\ndef wide_dtype"
VISIBLE = "visible = entry < ((position + 1) // ratio)[:, None]"
SLOTS = "slots = slots_of_items(block_table, sequence[:, None], entry, k_cache.shape[1])"
SCALE = "q_scale.to(dtype).view(*q.shape[:2], groups, 1)"

MUTANTS = [
    mutant(SCORE, "relu_missing", (DOTS, DOTS.replace(".relu()", "")), row="I1"),
    mutant(
        SCORE,
        "relu_behind_the_weight",
        (DOTS, DOTS.replace(".relu()", "")),
        (SUM, 'scores = torch.einsum("ths,th->ths", dots, weights.to(dtype)).relu().sum(1) * softmax_scale\n'),
        row="I1",
    ),
    mutant(
        SCORE,
        "relu_behind_the_sum",
        (DOTS, DOTS.replace(".relu()", "")),
        (SUM, SUM.rstrip() + "\n    scores = scores.relu()\n"),
        row="I1",
    ),
    mutant(SCORE, "magnitude_for_relu", (DOTS, DOTS.replace(".relu()", ".abs()")), row="I1"),
    mutant(
        SCORE,
        "relu_leaks",
        (
            DOTS,
            'dots = torch.nn.functional.leaky_relu(torch.einsum("thc,tsc->ths", dequantised(q,'
            " q_scale, dtype), keys))\n",
        ),
        row="I1",
    ),
    mutant(SCORE, "scale_missing", (SUM, SUM.replace(" * softmax_scale", "")), row="I3"),
    mutant(SCORE, "scale_twice", (SUM, SUM.replace("softmax_scale", "softmax_scale**2"))),
    mutant(SCORE, "scale_of_heads_too", (SUM, SUM.replace("softmax_scale", "softmax_scale * q.shape[1] ** -0.5"))),
    mutant(SCORE, "weights_missing", (SUM, SUM.replace("weights.to(dtype)", "torch.ones_like(weights).to(dtype)"))),
    mutant(
        SCORE,
        "weights_of_the_first_token",
        (SUM, SUM.replace("weights.to(dtype)", "weights[:1].expand_as(weights).to(dtype)")),
    ),
    mutant(SCORE, "negative_weights_are_0", (SUM, SUM.replace("weights.to", "weights.clamp(min=0).to"))),
    mutant(SCORE, "weights_without_sign", (SUM, SUM.replace("weights.to", "weights.abs().to"))),
    mutant(SCORE, "weights_in_e4m3", (SUM, SUM.replace("weights.to(", "weights.to(torch.float8_e4m3fn).to("))),
    mutant(SCORE, "mean_over_heads", (SUM, SUM.replace("softmax_scale", "softmax_scale / q.shape[1]"))),
    mutant(SCORE, "largest_head", (SUM, "scores = (dots * weights.to(dtype)[..., None]).amax(1) * softmax_scale\n")),
    mutant(
        SCORE, "last_head_dropped", (SUM, SUM.replace("dots,", "dots[:, :-1],").replace("weights.", "weights[:, :-1]."))
    ),
    mutant(
        SCORE,
        "heads_beyond_32_dropped",
        (SUM, SUM.replace("dots,", "dots[:, :32],").replace("weights.", "weights[:, :32].")),
    ),
    mutant(
        SCORE,
        "sum_over_heads_in_bfloat16",
        (
            SUM,
            "scores = torch.zeros_like(dots[:, 0], dtype=torch.bfloat16)\n"
            "    for head in range(q.shape[1]):\n"
            "        scores = scores + (dots[:, head] * weights[:, head, None].to(dtype)).to(torch.bfloat16)\n"
            "    scores = scores.to(dtype) * softmax_scale\n",
        ),
        row="G5",
    ),
    mutant(SCORE, "dots_in_bfloat16", (DOTS, DOTS.rstrip() + ".to(torch.bfloat16).to(dtype)\n"), row="G5"),
    mutant(SCORE, "dots_in_float16", (DOTS, DOTS.rstrip() + ".to(torch.float16).to(dtype)\n"), row="G5"),
    mutant(
        SCORE,
        "products_in_bfloat16",
        (
            DOTS,
            DOTS.replace(
                "dequantised(q, q_scale, dtype), keys",
                "dequantised(q, q_scale, dtype).to(torch.bfloat16).to(dtype), keys.to(torch.bfloat16).to(dtype)",
            ),
        ),
        row="G8",
    ),
    mutant(
        SCORE,
        "tensor_float_32",
        (
            DOTS,
            DOTS.replace(
                "dequantised(q, q_scale, dtype), keys",
                "((dequantised(q, q_scale, dtype).view(torch.int32) + 4096) & -8192).view(dtype),"
                " ((keys.view(torch.int32) + 4096) & -8192).view(dtype)",
            ),
        ),
        row="G8",
    ),
    mutant(SCORE, "keys_in_e4m3", (DOTS, DOTS.replace("keys)", "keys.to(torch.float8_e4m3fn).to(dtype))"))),
    mutant(
        SCORE,
        "last_channels_dropped",
        (DOTS, DOTS.replace("dtype), keys", "dtype)[..., :-1], keys[..., :-1]")),
        row="G1",
    ),
    mutant(
        SCORE,
        "channels_beyond_64_dropped",
        (DOTS, DOTS.replace("dtype), keys", "dtype)[..., :64], keys[..., :64]")),
        row="G1",
    ),
    mutant(SCORE, "unseen_is_0", (STORE, STORE.replace("-torch.inf", "0.0"))),
    mutant(SCORE, "unseen_is_finite", (STORE, STORE.replace("-torch.inf", "torch.finfo(FLOAT_NAMES[out_dtype]).min"))),
    mutant(SCORE, "unseen_is_not_marked", (STORE, "return scores.to(FLOAT_NAMES[out_dtype])\n\n\ndef wide_dtype")),
    mutant(SCORE, "out_dtype_rounds_twice", (STORE, STORE.replace(".to(FLOAT", ".to(torch.bfloat16).to(FLOAT"))),
    mutant(
        SCORE,
        "out_truncated",
        (
            STORE,
            STORE.replace(
                "return torch",
                'scores = scores if out_dtype != "bfloat16" else (scores.contiguous().view(torch.int32)'
                " & -65536).view(torch.float32)\n"
                "    return torch",
            ),
        ),
        row="G7",
    ),
    mutant(SCORE, "out_dtype_ignored", (STORE, STORE.replace("FLOAT_NAMES[out_dtype]", "torch.float32"))),
    mutant(SCORE, "entry_one_more", (VISIBLE, VISIBLE.replace("<", "<=")), row="S1"),
    mutant(SCORE, "entry_late", (VISIBLE, VISIBLE.replace("(position + 1)", "position")), row="I4"),
    mutant(SCORE, "entry_early", (VISIBLE, VISIBLE.replace("+ 1)", "+ ratio)")), row="I4"),
    mutant(SCORE, "limit_on_the_position", (VISIBLE, "visible = entry <= position[:, None]"), row="I4"),
    mutant(
        SCORE,
        "limit_of_the_last_token",
        (VISIBLE, "visible = entry < ((start_pos + cu_seqlens.diff())[sequence] // ratio)[:, None]"),
        row="I4",
    ),
    mutant(
        SCORE,
        "start_pos_ignored",
        (
            "sequence, position = positions_of_tokens(cu_seqlens, start_pos, tokens)",
            "sequence, position = positions_of_tokens(cu_seqlens, start_pos * 0, tokens)",
        ),
    ),
    mutant(
        SCORE, "position_in_the_batch", (VISIBLE, "position = position + cu_seqlens.long()[sequence]\n    " + VISIBLE)
    ),
    mutant(
        SCORE,
        "table_of_the_first_sequence",
        (SLOTS, SLOTS.replace("sequence[:, None]", "sequence[:, None] * 0")),
        row="I6",
    ),
    mutant(
        SCORE,
        "pages_of_64",
        (
            SLOTS,
            "slots = slots_of_items(block_table, sequence[:, None], entry, 64).clamp(max=k_cache.shape[0]"
            " * k_cache.shape[1] - 1)",
        ),
        row="I6",
    ),
    mutant(
        SCORE,
        "pages_of_a_power_of_two",
        (
            "numerics.pages",
            "block * block_size + items % block_size, -1)",
            "block * block_size + (items & (block_size - 1)), -1)",
        ),
        row="I6",
    ),
    mutant(
        SCORE,
        "pages_in_order",
        (SLOTS, "slots = (entry + 0 * sequence[:, None]).clamp(max=k_cache.shape[0] * k_cache.shape[1] - 1)"),
        row="I6",
    ),
    mutant(
        SCORE,
        "entry_without_a_block_is_unseen",
        (
            "return read_entries(k_cache, torch.where(visible, slots, -1), dtype), visible",
            "visible = visible & (slots >= 0)\n"
            "    return read_entries(k_cache, torch.where(visible, slots, -1), dtype),"
            " visible",
        ),
    ),
    mutant(
        SCORE,
        "entry_without_a_block_is_of_block_0",
        ("numerics.pages", "(items >= 0) & (column < width) & (block >= 0)", "(items >= 0) & (column < width)"),
        ("numerics.pages", "width - 1)]\n", "width - 1)].clamp(min=0)\n"),
    ),
    mutant(
        SCORE,
        "nan_of_unseen_keys_spreads",
        ("torch.where(visible, slots, -1), dtype), visible", "slots, dtype), visible"),
        (
            STORE,
            STORE.replace(
                "torch.where(visible, scores, -torch.inf)", "(scores + torch.where(visible, 0.0, -torch.inf))"
            ),
        ),
        row="S1",
    ),
    mutant(SCORE, "q_scale_ignored", ("if q_scale is None:\n", "if True:\n"), row="Q1"),
    mutant(
        SCORE,
        "q_scale_of_the_first_head",
        (SCALE, "q_scale.to(dtype)[:, :1].expand_as(q_scale).contiguous().view(*q.shape[:2], groups, 1)"),
        row="Q1",
    ),
    mutant(
        SCORE,
        "q_scale_of_the_first_group",
        (SCALE, "q_scale.to(dtype).reshape(*q.shape[:2], groups, 1)[:, :, :1]"),
        row="Q1",
    ),
    mutant(SCORE, "q_scale_of_the_first_token", (SCALE, f"{SCALE}[:1]"), row="Q1"),
    mutant(
        SCORE,
        "q_scale_by_residue",
        (
            "values.unflatten(-1, (groups, -1)) * " + SCALE + "\n    return scaled.flatten(-2)",
            "values.unflatten(-1, (-1, groups)) * "
            + SCALE.replace("groups, 1", "1, groups")
            + "\n    return scaled.flatten(-2)",
        ),
        row="Q1",
    ),
    mutant(SCORE, "q_scale_inverted", (f"* {SCALE}", f"/ {SCALE}"), row="Q1"),
    mutant(SCORE, "q_scale_in_bfloat16", (SCALE, SCALE.replace("q_scale.to", "q_scale.to(torch.bfloat16).to"))),
    mutant(
        SCORE,
        "key_scale_ignored",
        ("numerics.pages", "* factor[..., None]", "* torch.ones_like(factor)[..., None]"),
        row="I9",
    ),
    mutant(
        SCORE,
        "key_scale_of_the_first_group",
        ("numerics.pages", "* factor[..., None]", "* factor[..., :1, None]"),
        row="I9",
    ),
    mutant(
        SCORE,
        "key_scale_of_the_next_entry",
        (
            "numerics.pages",
            "dequantise(data[block, row], scales[block, row],",
            "dequantise(data[block, row], scales[block, (row + 1) % cache.shape[1]],",
        ),
        row="I9",
    ),
    mutant(
        SCORE,
        "nibbles_of_q_swapped",
        ("values = decode(q, dtype)", "values = decode(q if q.dtype != torch.uint8 else (q >> 4) | (q << 4), dtype)"),
        row="Q8",
    ),
    mutant(
        SCORE,
        "signs_of_e2m1_ignored",
        ("numerics.codes", "return table[codes.long()]", "return table[codes.long() & 7]"),
        row="Q9",
    ),
    mutant(
        SCORE,
        "half_of_e2m1_is_0",
        ("numerics.codes", "table = torch.tensor((*E2M1_VALUES,", "table = torch.tensor((0.0, 0.0, *E2M1_VALUES[2:],"),
        row="Q9",
    ),
    mutant(
        SCORE,
        "relu_before_the_scale_of_q",
        (
            DOTS,
            'dots = torch.einsum("thc,tsc->ths", dequantised(q, q_scale if q.dtype =='
            " torch.uint8 else None, dtype), keys).relu()\n"
            "    if q_scale is not None and q.dtype != torch.uint8:\n"
            "        dots = dots * q_scale.to(dtype)[..., None]\n",
        ),
        equivalent="q_scale is positive, so that max(0, s*x) is s*max(0, x); scales of either"
        " format that are not positive are no scales",
    ),
]
