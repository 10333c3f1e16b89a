"""Wrong lightning_indexer."""

from mutation import mutant

DOTS = 'dots = torch.einsum("thc,tsc->ths", dequantised(q, q_scale, dtype), keys).relu()\n'
SUM = 'scores = torch.einsum("ths,th->ts", dots, weights.to(dtype)) * softmax_scale\n'
SLOTS = "slots = slots_of_items(block_table, sequence[:, None], entry, k_cache.shape[1])"
SORT = "by_score = scores.argsort(dim=1, descending=True, stable=True)"
COMPOSITE = "lightning_indexer"
RANK = "return indexer_topk(scores, (position + 1) // ratio, k, candidates, candidate_block)"
SCORES_CALL = """scores = indexer_score(
        *(q, weights, k_cache, block_table, cu_seqlens, start_pos, ratio, max_entries),
        *(softmax_scale, q_scale, out_dtype),"""
REFERENCE = "ops.attention.indexer_score"

MUTANTS = [
    mutant(COMPOSITE, "entry_late", (RANK, RANK.replace("(position + 1)", "position")), row="I4"),
    mutant(COMPOSITE, "entry_early", (RANK, RANK.replace("+ 1)", "+ ratio)")), row="I4"),
    mutant(
        COMPOSITE, "limit_on_the_position", (RANK, RANK.replace("(position + 1) // ratio", "position + 1")), row="I4"
    ),
    mutant(
        COMPOSITE,
        "limit_of_the_last_token",
        (RANK, RANK.replace("(position + 1)", "(start_pos + cu_seqlens.diff())[_]")),
        row="I4",
    ),
    mutant(
        COMPOSITE,
        "all_entries_compete",
        (RANK, RANK.replace("(position + 1) // ratio", "position * 0 + max_entries")),
        row="I4",
    ),
    mutant(
        COMPOSITE,
        "start_pos_ignored",
        (
            "_, position = positions_of_tokens(cu_seqlens, start_pos, q.shape[0])\n    " + RANK,
            "_, position = positions_of_tokens(cu_seqlens, start_pos * 0, q.shape[0])\n    " + RANK,
        ),
    ),
    mutant(
        COMPOSITE,
        "k_one_less",
        (
            RANK,
            "indices, count = indexer_topk(scores, (position + 1) // ratio, k, candidates,"
            " candidate_block)\n    indices = indices.clone()\n"
            "    indices[:, k - 1] = -1\n    return indices, count.clamp(max=max(k -"
            " 1, 1))",
        ),
        row="RT7",
    ),
    mutant(
        COMPOSITE,
        "indices_with_an_offset",
        (RANK, "indices, count = " + RANK[7:] + "\n    return torch.where(indices >= 0, indices + 1, -1), count"),
    ),
    mutant(
        COMPOSITE,
        "indices_are_slots",
        (
            RANK,
            "indices, count = "
            + RANK[7:]
            + "\n    return torch.where(indices >= 0, block_table[_][:, :1] * k_cache.shape[1] + indices, -1), count",
        ),
        row="I6",
    ),
    mutant(
        COMPOSITE,
        "scale_missing",
        (SCORES_CALL, SCORES_CALL.replace("softmax_scale", "1.0")),
        row="I3",
        equivalent="a positive scale keeps the order of scores; the operator's scale is one, dI^-0.5 * hI^-0.5",
    ),
    mutant(COMPOSITE, "q_scale_ignored", (REFERENCE, "if q_scale is None:\n", "if True:\n"), row="Q1"),
    mutant(
        COMPOSITE,
        "key_scale_ignored",
        ("numerics.pages", "* factor[..., None]", "* torch.ones_like(factor)[..., None]"),
        row="I9",
    ),
    mutant(COMPOSITE, "out_dtype_bfloat16", (SCORES_CALL, SCORES_CALL.replace("out_dtype", '"bfloat16"'))),
    mutant(COMPOSITE, "candidates_ignored", (RANK, RANK.replace("candidates,", "None,"))),
    mutant(COMPOSITE, "candidate_block_ignored", (RANK, RANK.replace("candidate_block", "1"))),
    mutant(COMPOSITE, "candidate_blocks_are_pages", (RANK, RANK.replace("candidate_block", "k_cache.shape[1]"))),
    mutant(COMPOSITE, "relu_missing", (REFERENCE, DOTS, DOTS.replace(".relu()", "")), row="I1"),
    mutant(COMPOSITE, "magnitude_for_relu", (REFERENCE, DOTS, DOTS.replace(".relu()", ".abs()")), row="I1"),
    mutant(COMPOSITE, "negative_weights_are_0", (REFERENCE, SUM, SUM.replace("weights.to", "weights.clamp(min=0).to"))),
    mutant(
        COMPOSITE,
        "weights_missing",
        (REFERENCE, SUM, SUM.replace("weights.to(dtype)", "torch.ones_like(weights).to(dtype)")),
    ),
    mutant(
        COMPOSITE,
        "last_head_dropped",
        (REFERENCE, SUM, SUM.replace("dots,", "dots[:, :-1],").replace("weights.", "weights[:, :-1].")),
    ),
    mutant(
        COMPOSITE,
        "products_in_e4m3",
        (
            REFERENCE,
            DOTS,
            DOTS.replace(
                "dequantised(q, q_scale, dtype), keys",
                "dequantised(q, q_scale, dtype).to(torch.float8_e4m3fn).to(dtype),"
                " keys.to(torch.float8_e4m3fn).to(dtype)",
            ),
        ),
    ),
    mutant(
        COMPOSITE,
        "pages_of_a_power_of_two",
        (
            "numerics.pages",
            "block * block_size + items % block_size, -1)",
            "block * block_size + (items & (block_size - 1)), -1)",
        ),
        row="I6",
    ),
    mutant(
        COMPOSITE,
        "table_of_the_first_sequence",
        (REFERENCE, SLOTS, SLOTS.replace("sequence[:, None]", "sequence[:, None] * 0")),
        row="I6",
    ),
    mutant(
        COMPOSITE,
        "ties_to_the_higher",
        (
            "ops.attention.indexer_topk",
            SORT,
            "by_score = entries - 1 - scores.flip(1).argsort(dim=1, descending=True, stable=True)",
        ),
        row="RT9",
    ),
    mutant(
        COMPOSITE,
        "ties_within_chunks_of_256",
        (
            "ops.attention.indexer_topk",
            SORT,
            "chunk = torch.arange(entries) // 256\n"
            "    far = torch.argsort(chunk, descending=True, stable=True)\n"
            "    by_score = far[scores[:, far].argsort(dim=1, descending=True, stable=True)]",
        ),
        row="RT9",
    ),
    mutant(
        COMPOSITE,
        "everything_selected_in_the_short_path",
        (
            RANK,
            "indices, count = " + RANK[7:] + "\n    short = ((position + 1) // ratio <= k)[:, None]\n"
            "    every = torch.arange(k)\n    every = torch.where(every < max_entries,"
            " every, -1).to(torch.int32)\n    return torch.where(short, every, indices),"
            " count",
        ),
        row="RT7",
    ),
]
