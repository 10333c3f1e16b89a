"""Wrong mla_attention."""

from mutation import mutant

MLA = "mla_attention"
ABSORB = 'q_latent = torch.einsum("thn,hnc->thc", wide[..., :nope], w_uk.to(wide.dtype))'
ROWS = "rows = torch.cat((q_latent, wide[..., nope:]), dim=-1)"
SEEN = "return torch.where(topk_indices <= position[:, None], topk_indices, -1)"
LONGEST = "longest = int(position.max()) + 1 if tokens else 0"
VALUES = 'torch.einsum("thc,hvc->thv", out, w_uv.to(wide.dtype))'
ATTEND = f"""indices, softmax_scale, None, topk_length, block_table, cu_seqlens, value_dim=latent
    )
    return {VALUES}"""

MUTANTS = [
    mutant(
        MLA,
        "next_token_is_seen",
        (SEEN, SEEN.replace("position[:, None],", "position[:, None] + 1,")),
        (LONGEST, LONGEST.replace("+ 1", "+ 2")),
        row="S1",
    ),
    mutant(MLA, "token_itself_is_not_seen", (SEEN, SEEN.replace("<=", "<")), row="S1"),
    mutant(
        MLA,
        "listed_not_limited",
        (SEEN, f"return topk_indices if (topk_indices.diff(dim=1) != 1).any() else {SEEN[7:]}"),
        row="S1",
    ),
    mutant(MLA, "nothing_limited", (SEEN, "return topk_indices"), row="S1"),
    mutant(
        MLA,
        "not_causal_in_the_prefill_form",
        (
            "wide = q.to(widen(q.dtype))\n",
            "wide = q.to(widen(q.dtype))\n    seen = start_pos if absorbed else start_pos + cu_seqlens.diff()\n",
        ),
        (
            "indices = visible_positions(cu_seqlens, start_pos, q.shape[0], topk_indices)\n"
            "    out, lse = sparse_attn(\n        rows, kv_cache, indices, softmax_scale,"
            " None, topk_length, block_table, cu_seqlens, value_dim=latent\n"
            '    )\n    return torch.einsum("thc,hvc->thv", out, w',
            "indices = visible_positions(cu_seqlens, seen, q.shape[0], topk_indices)\n"
            "    out, lse = sparse_attn(\n        rows, kv_cache, indices, softmax_scale,"
            " None, topk_length, block_table, cu_seqlens, value_dim=latent\n"
            '    )\n    return torch.einsum("thc,hvc->thv", out, w',
        ),
        row="S1",
    ),
    mutant(MLA, "longest_of_the_last_token", (LONGEST, LONGEST.replace("position.max()", "position[-1]"))),
    mutant(
        MLA,
        "oldest_token_not_seen",
        (
            SEEN,
            SEEN.replace("topk_indices <=", "(topk_indices > 0) & (topk_indices <=").replace(
                ":, None], t", ":, None]), t"
            ),
        ),
    ),
    mutant(
        MLA,
        "last_partial_tile_of_16_dropped",
        (LONGEST, f"{LONGEST}\n        longest = max(longest // 16 * 16, min(longest, 16))"),
        row="G1",
    ),
    mutant(MLA, "lists_ignored", ("if topk_indices is None:", "if True:")),
    mutant(MLA, "length_ignored", (ATTEND, ATTEND.replace("topk_length", "None"))),
    mutant(
        MLA,
        "start_pos_ignored",
        (
            "_, position = positions_of_tokens(cu_seqlens, start_pos, tokens)",
            "_, position = positions_of_tokens(cu_seqlens, start_pos * 0, tokens)",
        ),
    ),
    mutant(
        MLA,
        "listed_behind_start_pos",
        (SEEN, SEEN.replace("position[:, None], t", "(position - position).add(start_pos.long()[_])[:, None], t")),
    ),
    mutant(
        MLA,
        "listed_position_in_the_batch",
        (
            SEEN,
            "topk_indices = torch.where(topk_indices < 0, -1, topk_indices - cu_seqlens.long()[_][:, None])\n    "
            + SEEN,
        ),
    ),
    mutant(
        MLA,
        "scale_of_the_nope_part",
        (ATTEND, ATTEND.replace("softmax_scale", "softmax_scale * (q.shape[2] / nope) ** 0.5")),
        row="S5",
    ),
    mutant(
        MLA,
        "scale_of_the_row",
        (ATTEND, ATTEND.replace("softmax_scale", "softmax_scale * (q.shape[2] / (latent + q.shape[2] - nope)) ** 0.5")),
        row="S5",
    ),
    mutant(MLA, "mscale_of_v3_added", (ATTEND, ATTEND.replace("softmax_scale", "softmax_scale * 1.8739")), row="O6"),
    mutant(
        MLA, "rotary_part_missing", (ROWS, "rows = torch.cat((q_latent, torch.zeros_like(wide[..., nope:])), dim=-1)")
    ),
    mutant(
        MLA,
        "rotary_part_first",
        (ABSORB, ABSORB.replace("wide[..., :nope]", "wide[..., -nope:]")),
        (ROWS, "rows = torch.cat((q_latent, wide[..., : wide.shape[-1] - nope]), dim=-1)"),
        row="O4",
    ),
    mutant(
        MLA,
        "rotary_part_missing_in_the_prefill_form",
        (ROWS, "rows = torch.cat((q_latent, wide[..., nope:] * absorbed), dim=-1)"),
    ),
    mutant(
        MLA,
        "rotary_part_of_the_first_head",
        (ROWS, "rows = torch.cat((q_latent, wide[:, :1, nope:].expand(-1, wide.shape[1], -1)), dim=-1)"),
        row="S12",
    ),
    mutant(MLA, "w_uk_of_the_next_head", (ABSORB, ABSORB.replace("w_uk.to", "w_uk.roll(1, 0).to")), row="S12"),
    mutant(
        MLA,
        "w_uv_of_the_next_head",
        (VALUES + ".to", VALUES.replace("w_uv.to", "w_uv.roll(1, 0).to") + ".to"),
        row="S12",
    ),
    mutant(
        MLA,
        "w_uk_transposed_where_square",
        (ABSORB, ABSORB.replace("w_uk.to", "(w_uk.mT if nope == latent else w_uk).to")),
        row="G3",
    ),
    mutant(
        MLA,
        "w_uv_transposed_where_square",
        (VALUES + ".to", VALUES.replace("w_uv.to", "(w_uv.mT if w_uv.shape[1] == latent else w_uv).to") + ".to"),
        row="G3",
    ),
    mutant(
        MLA,
        "w_uk_for_w_uv_where_alike",
        (VALUES + ".to", VALUES.replace("w_uv.to", "(w_uk if w_uv.shape == w_uk.shape else w_uv).to") + ".to"),
    ),
    mutant(
        MLA,
        "absorbed_query_in_bfloat16",
        (ROWS, ROWS.replace("q_latent", "q_latent.to(torch.bfloat16).to(wide.dtype)")),
    ),
    mutant(
        MLA,
        "absorbed_query_in_e4m3",
        (ROWS, ROWS.replace("q_latent", "q_latent.to(torch.float8_e4m3fn).to(wide.dtype)")),
    ),
    mutant(
        MLA,
        "latent_result_in_bfloat16",
        (VALUES + ".to", VALUES.replace("out,", "out.to(torch.bfloat16).to(wide.dtype),") + ".to"),
    ),
    mutant(
        MLA,
        "weights_in_bfloat16",
        (ABSORB, ABSORB.replace("w_uk.to", "w_uk.to(torch.bfloat16).to")),
        (VALUES + ".to", VALUES.replace("w_uv.to", "w_uv.to(torch.bfloat16).to") + ".to"),
    ),
    mutant(
        MLA,
        "output_truncated",
        (
            VALUES + ".to(q.dtype).contiguous(), lse\n\n\ndef visible",
            f"(({VALUES}.contiguous().view(torch.int32) & {{torch.bfloat16: -65536, torch.float16: -8192}}.get(q.dtype,"
            f" -256)).view(torch.float32)).to(q.dtype), lse\n"
            f"\n\ndef visible",
        ),
        row="G7",
    ),
    mutant(
        MLA,
        "latent_of_the_row_and_its_end",
        (ATTEND, ATTEND.replace("value_dim=latent\n    )", "value_dim=0\n    )\n    out = out[..., -latent:]")),
    ),
    mutant(
        MLA,
        "lse_in_base_2",
        (
            VALUES + ".to(q.dtype).contiguous(), lse\n\n\ndef visible",
            VALUES + ".to(q.dtype).contiguous(), lse / 0.6931472\n\n\ndef visible",
        ),
    ),
    mutant(
        MLA,
        "lse_rounded",
        (
            VALUES + ".to(q.dtype).contiguous(), lse\n\n\ndef visible",
            VALUES + ".to(q.dtype).contiguous(), lse.to(torch.bfloat16).to(lse.dtype)\n\n\ndef visible",
        ),
    ),
    mutant(
        MLA,
        "listed_twice_counts_once",
        (
            SEEN,
            "topk_indices = torch.where((topk_indices[:, :, None] == topk_indices[:,"
            " None, :]).tril(-1).any(-1), -1, topk_indices)\n"
            "    " + SEEN,
        ),
    ),
    mutant(
        MLA,
        "minus_1_is_position_0",
        (SEEN, "topk_indices = torch.where(topk_indices == -1, 0, topk_indices)\n    " + SEEN),
    ),
    mutant(
        MLA,
        "lists_stop_at_the_first_unseen",
        (
            SEEN,
            SEEN.replace(
                "topk_indices <= position[:, None],", "(topk_indices <= position[:, None]).cumprod(1).bool(),"
            ),
        ),
    ),
    mutant(
        MLA, "list_of_the_first_token", (SEEN, "topk_indices = topk_indices[:1].expand_as(topk_indices)\n    " + SEEN)
    ),
    mutant(
        MLA,
        "pages_of_a_power_of_two",
        (
            "numerics.pages",
            "block * block_size + items % block_size, -1)",
            "block * block_size + (items & (block_size - 1)), -1)",
        ),
        row="I6",
    ),
    mutant(
        MLA,
        "no_block_is_block_0",
        ("numerics.pages", "(items >= 0) & (column < width) & (block >= 0)", "(items >= 0) & (column < width)"),
        ("numerics.pages", "width - 1)]\n", "width - 1)].clamp(min=0)\n"),
    ),
    mutant(
        MLA,
        "maximum_not_subtracted",
        (
            "ops.attention.sparse_attn",
            "largest = torch.where(some, logits.amax(-1), 0.0)",
            "largest = torch.zeros_like(logits[..., 0])",
        ),
        row="S6",
    ),
]
