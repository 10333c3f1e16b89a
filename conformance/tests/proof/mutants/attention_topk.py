"""Wrong indexer_topk."""

from mutation import mutant

TOPK = "indexer_topk"
SORT = "by_score = scores.argsort(dim=1, descending=True, stable=True)"
COMPETES = "visible = torch.arange(scores.shape[1], device=scores.device) < lengths[:, None]"
LENGTH = "topk_length = competes.sum(1).clamp(max=k)"
INDICES = "indices = torch.where(torch.arange(k, device=scores.device) < topk_length[:, None], order, -1)"
ORDER = "order = torch.nn.functional.pad(by_score.gather(1, first)[:, :k], (0, max(0, k - entries)))"
LISTED = "visible & listed(candidates, candidate_block, scores.shape[1])"
LEGAL = "legal = (candidates >= 0) & (candidates < blocks)"

MUTANTS = [
    mutant(TOPK, "smallest", (SORT, SORT.replace("descending=True", "descending=False"))),
    mutant(TOPK, "by_magnitude", (SORT, SORT.replace("scores.", "scores.abs()."))),
    mutant(
        TOPK,
        "ties_to_the_higher",
        (SORT, "by_score = entries - 1 - scores.flip(1).argsort(dim=1, descending=True, stable=True)"),
        row="RT9",
    ),
    mutant(
        TOPK,
        "ties_from_the_middle",
        (
            SORT,
            "by_score = scores.roll(-(entries // 2), 1).argsort(dim=1, descending=True,"
            " stable=True).add(entries // 2).remainder(max(entries, 1))",
        ),
        row="RT9",
    ),
    mutant(
        TOPK,
        "by_unsigned_bits",
        (
            SORT,
            "by_score = scores.float().contiguous().view(torch.int32).long().remainder(2**32).argsort(dim=1,"
            " descending=True, stable=True)",
        ),
        row="I8",
    ),
    mutant(
        TOPK,
        "by_signed_bits",
        (SORT, "by_score = scores.float().contiguous().view(torch.int32).argsort(dim=1, descending=True, stable=True)"),
        row="I8",
    ),
    mutant(
        TOPK,
        "negative_zero_below_zero",
        (
            SORT,
            "bits = scores.float().contiguous().view(torch.int32)\n"
            "    by_score = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).argsort(dim=1,"
            " descending=True, stable=True)",
        ),
        row="I8",
    ),
    mutant(
        TOPK,
        "by_12_bits",
        (
            SORT,
            "bits = (scores.float().nan_to_num(0) + 0.0).contiguous().view(torch.int32)\n"
            "    by_score = (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> 20).argsort(dim=1,"
            " descending=True, stable=True)",
        ),
        row="I8",
    ),
    mutant(
        TOPK,
        "by_24_bits",
        (
            SORT,
            "bits = (scores.float().nan_to_num(0) + 0.0).contiguous().view(torch.int32)\n"
            "    by_score = (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> 8).argsort(dim=1,"
            " descending=True, stable=True)",
        ),
        row="I8",
    ),
    mutant(
        TOPK,
        "subnormals_are_0",
        (
            SORT,
            "flushed = torch.where(scores.abs() < torch.finfo(scores.dtype).tiny, 0.0,"
            " scores)\n    by_score = flushed.argsort(dim=1, descending=True, stable=True)",
        ),
        row="I8",
    ),
    mutant(TOPK, "scores_in_bfloat16", (SORT, SORT.replace("scores.", "scores.to(torch.bfloat16)."))),
    mutant(TOPK, "scores_in_float16", (SORT, SORT.replace("scores.", "scores.to(torch.float16)."))),
    mutant(TOPK, "scores_clamped_from_below", (SORT, SORT.replace("scores.", "scores.clamp(min=-1e-3).")), row="I8"),
    mutant(TOPK, "negative_scores_are_0", (SORT, SORT.replace("scores.", "scores.relu().")), row="I8"),
    mutant(
        TOPK,
        "lengths_ignored",
        (COMPETES, COMPETES.replace("lengths[:, None]", "scores.shape[1] + 0 * lengths[:, None]")),
        row="I4",
    ),
    mutant(TOPK, "lengths_one_more", (COMPETES, COMPETES.replace("<", "<=")), row="I4"),
    mutant(
        TOPK, "lengths_one_less", (COMPETES, COMPETES.replace("lengths[:, None]", "lengths[:, None] - 1")), row="I4"
    ),
    mutant(
        TOPK,
        "lengths_of_the_first_token",
        (COMPETES, COMPETES.replace("lengths[:, None]", "lengths[:1, None].expand(len(lengths), 1)")),
        row="X4",
    ),
    mutant(TOPK, "lengths_in_16_bits", (COMPETES, COMPETES.replace("lengths[", "(lengths % 65536)["))),
    mutant(
        TOPK,
        "length_0_is_all",
        (COMPETES, COMPETES.replace("lengths[", "torch.where(lengths == 0, scores.shape[1], lengths)[")),
    ),
    mutant(TOPK, "k_one_less", (LENGTH, LENGTH.replace("max=k", "max=max(k - 1, 1)")), row="RT7"),
    mutant(TOPK, "count_is_k", (LENGTH, "topk_length = torch.full_like(lengths, k)"), row="RT7"),
    mutant(
        TOPK,
        "count_not_limited_by_k",
        ("return indices.to(torch.int32), topk_length", "return indices.to(torch.int32), competes.sum(1)"),
        row="RT7",
    ),
    mutant(
        TOPK,
        "count_is_the_length",
        (
            "return indices.to(torch.int32), topk_length",
            "return indices.to(torch.int32), lengths.clamp(max=min(k, entries))",
        ),
        row="RT7",
    ),
    mutant(
        TOPK,
        "count_by_candidates_listed",
        (
            LENGTH,
            "topk_length = competes.sum(1).clamp(max=k) if candidates is None else torch.minimum(competes.sum(1),"
            " (candidates >= 0).sum(1) * candidate_block).clamp(max=min(k, 8))",
        ),
    ),
    mutant(TOPK, "tail_is_0", (INDICES, INDICES.replace("order, -1)", "order, 0)")), row="RT14"),
    mutant(
        TOPK, "tail_is_the_largest_integer", (INDICES, INDICES.replace("order, -1)", "order, 2**31 - 1)")), row="RT14"
    ),
    mutant(
        TOPK,
        "tail_is_what_does_not_compete",
        (INDICES, "indices = torch.where(torch.arange(k) < min(k, entries), order, -1)"),
        row="RT14",
    ),
    mutant(TOPK, "tail_first", (INDICES, INDICES + ".flip(1)"), row="RT14"),
    mutant(
        TOPK,
        "an_index_twice",
        (
            INDICES,
            INDICES + "\n    indices = torch.where((torch.arange(k) == k - 1) & (topk_length[:,"
            " None] == k), indices[:, :1], indices)",
        ),
        row="RT11",
    ),
    mutant(
        TOPK, "minus_inf_does_not_compete", (COMPETES, COMPETES + "\n    visible &= ~scores.isneginf()"), row="RT10"
    ),
    mutant(
        TOPK,
        "minus_inf_listed_as_minus_1",
        (
            INDICES,
            INDICES + "\n    padded = torch.nn.functional.pad(scores, (0, 1))\n"
            "    indices = torch.where(padded.gather(1, torch.where(indices < 0, entries,"
            " indices)).isneginf(), -1, indices)",
        ),
        row="RT10",
    ),
    mutant(
        TOPK,
        "minus_inf_by_the_higher",
        (
            SORT,
            SORT + "\n    low = scores.isneginf()\n"
            "    by_score = (entries - 1 - torch.where(low, -torch.inf, scores).flip(1).argsort(dim=1,"
            " descending=True, stable=True)) if bool(low.any()) else by_score",
        ),
        row="RT9",
    ),
    mutant(
        TOPK,
        "unseen_nan_first",
        (LENGTH, "order = torch.nn.functional.pad(by_score[:, :k], (0, max(0, k - entries)))\n    " + LENGTH),
        row="RT10",
    ),
    mutant(TOPK, "unseen_scores_win", (ORDER, ORDER.replace("by_score.gather(1, first)", "by_score")), row="RT10"),
    mutant(
        TOPK,
        "entries_beyond_2048_dropped",
        (COMPETES, COMPETES + "\n    visible &= torch.arange(scores.shape[1]) < 2048"),
        row="G1",
    ),
    mutant(
        TOPK,
        "last_partial_tile_of_64_dropped",
        (
            SORT,
            "scores = torch.where(torch.arange(entries) < max(entries // 64 * 64, 64), scores, -torch.inf)\n    "
            + SORT,
        ),
        row="G1",
    ),
    mutant(
        TOPK,
        "best_of_each_half",
        (
            SORT,
            "half = (entries + 1) // 2\n    rank = scores.argsort(dim=1, descending=True,"
            " stable=True).argsort(dim=1)\n    if entries > 64:\n"
            "        rank = torch.cat([part.argsort(dim=1, descending=True, stable=True).argsort(dim=1)"
            " for part in scores.split(half, 1)], 1)\n"
            "    by_score = rank.argsort(dim=1, stable=True)",
        ),
        row="G13",
    ),
    mutant(
        TOPK,
        "indices_in_16_bits",
        ("return indices.to(torch.int32), topk", "return indices.to(torch.int16).to(torch.int32), topk"),
        row="P9",
    ),
    mutant(TOPK, "candidates_ignored", (LISTED, "visible")),
    mutant(TOPK, "candidate_block_ignored", (LISTED, LISTED.replace("candidate_block", "1"))),
    mutant(
        TOPK,
        "candidate_blocks_one_longer",
        (
            LISTED,
            "visible & (listed(candidates, candidate_block, scores.shape[1]) | listed(candidates,"
            " candidate_block, scores.shape[1]).roll(1, 1))",
        ),
    ),
    mutant(
        TOPK,
        "candidates_of_the_first_token",
        (LISTED, LISTED.replace("candidates", "candidates[:1].expand_as(candidates)")),
        row="X4",
    ),
    mutant(
        TOPK,
        "candidate_minus_1_is_block_0",
        (LISTED, LISTED.replace("candidates", "candidates.clamp(min=0)")),
    ),
    mutant(
        TOPK,
        "candidate_minus_1_is_the_last_block",
        (LEGAL, "candidates = torch.where(candidates < 0, blocks - 1, candidates)\n    " + LEGAL),
    ),
    mutant(
        TOPK,
        "candidate_behind_is_the_last_block",
        (LEGAL, "candidates = candidates.clamp(max=blocks - 1)\n    " + LEGAL),
    ),
    mutant(
        TOPK, "candidate_minus_1_ends_the_list", (LEGAL, LEGAL + "\n    legal &= (candidates >= 0).cumprod(1).bool()")
    ),
    mutant(
        TOPK,
        "candidate_twice_drops_it",
        (LEGAL, LEGAL + "\n    legal &= (candidates[:, :, None] == candidates[:, None, :]).sum(-1) == 1"),
    ),
    mutant(TOPK, "candidates_beyond_the_lengths", (LISTED, "listed(candidates, candidate_block, scores.shape[1])")),
    mutant(
        TOPK,
        "last_short_block_dropped",
        ("blocks = -(-entries // candidate_block)", "blocks = entries // candidate_block"),
        (LEGAL, LEGAL),
        (
            "torch.arange(entries, device=candidates.device) // candidate_block]",
            "(torch.arange(entries, device=candidates.device) // candidate_block).clamp(max=blocks)]",
        ),
        (
            "torch.where(legal, candidates, blocks).long(), True)",
            "torch.where(legal, candidates, blocks).long(), True)\n    marks[:, blocks] = False",
        ),
    ),
    mutant(
        TOPK,
        "no_candidates_is_all",
        (
            LISTED,
            "visible & (listed(candidates, candidate_block, scores.shape[1]) | (candidates < 0).all(1, keepdim=True))",
        ),
    ),
]
