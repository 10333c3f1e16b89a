"""Wrong kv_compress: what an entry is made of."""

from mutation import mutant

OP = "kv_compress"
APE = "z = z + ape.to(wide)[position % ratio]"
MASK = "z = z.masked_fill(((token < 0) & (slot < 0))[..., None], -torch.inf)"
WRITE = "windows.write_rows(state_cache, state_block_table, sequence, position, rows)"
POOL = "pooled = (z.softmax(dim=1) * u).sum(dim=1).to(x.dtype)"
NORM = "normed = rms_norm(pooled, norm_weight, eps)"
ROPE = "rotated = rope(normed, entries.window * ratio, cos_table, sin_table)"
RESULT = "result = hadamard(rotated) if rotate else rotated"
ROWS = "rows = torch.cat((x.to(wide) @ wkv.to(wide).T, z), dim=-1)"
SOURCES = "sources = zip(token.chunk(halves, 1) * 2, slot.chunk(halves, 1) * 2, strict=True)"
PARTS = "u, z = torch.cat(parts[:halves], dim=1), torch.cat(parts[halves:], dim=1)"
STORE = "return torch.where(entries.emitted[:, None], result, 0.0), entries.cu_entries.to(torch.int32)"

POOLING = [
    mutant(OP, "window_before_missing", (MASK, f"{MASK}\n    z[:, : (halves - 1) * ratio] = -torch.inf"), row="K1"),
    mutant(OP, "window_before_counts_as_0", (MASK, "pass"), row="K1"),
    mutant(
        OP,
        "window_before_not_of_other_calls",
        (
            MASK,
            f"{MASK}\n    z[:, : (halves - 1) * ratio].masked_fill_((slot >= 0)[:, : (halves"
            f" - 1) * ratio, None], -torch.inf)",
        ),
        row="K1",
    ),
    mutant(
        OP,
        "two_windows_of_one_softmax_each",
        (
            POOL,
            "pooled = sum((part.softmax(dim=1).nan_to_num(0) * value).sum(dim=1) for"
            " part, value in zip(z.chunk(halves, 1), u.chunk(halves, 1))).div(halves).to(x.dtype)",
        ),
        row="K1",
    ),
    mutant(
        OP,
        "halves_of_channels_swapped",
        (SOURCES, "sources = zip(token.chunk(halves, 1)[::-1] * 2, slot.chunk(halves, 1)[::-1] * 2, strict=True)"),
    ),
    mutant(
        OP,
        "both_windows_bring_their_last_half",
        (
            PARTS,
            "u, z = torch.cat((*parts[: halves - 1], parts[halves - 1]), dim=1), torch.cat(parts[halves:],"
            " dim=1)\n    if overlap:\n        again = gather(rows.split(dim, -1)[1],"
            " state_cache.split(dim, -1)[1], token[:, :ratio], slot[:, :ratio])\n"
            "        u = torch.cat((again, u[:, ratio:]), dim=1)",
        ),
    ),
    mutant(
        OP, "softmax_over_channels", (POOL, POOL.replace("softmax(dim=1)", "softmax(dim=2).nan_to_num(0)")), row="K3"
    ),
    mutant(
        OP, "softmax_shared_by_channels", (POOL, POOL.replace("z.softmax", "z.mean(2, keepdim=True).softmax")), row="K3"
    ),
    mutant(
        OP,
        "maximum_not_subtracted",
        (POOL, "pooled = (z.exp() / z.exp().sum(1, keepdim=True) * u).sum(dim=1).to(x.dtype)"),
        row="S6",
    ),
    mutant(
        OP,
        "maximum_of_the_other_tokens",
        (
            POOL,
            "weights = (z - z.amax((1, 2), keepdim=True)).exp()\n"
            "    pooled = (weights / weights.sum(1, keepdim=True) * u).sum(dim=1).to(x.dtype)",
        ),
        row="S6",
    ),
    mutant(
        OP,
        "mean_instead_of_softmax",
        (POOL, POOL.replace("z.softmax", "z.clamp(-1e-3, 1e-3).masked_fill(z.isneginf(), -torch.inf).softmax")),
    ),
    mutant(OP, "sum_not_divided", (POOL, "pooled = ((z - z.amax(1, keepdim=True)).exp() * u).sum(dim=1).to(x.dtype)")),
    mutant(OP, "sigmoid_instead_of_softmax", (POOL, POOL.replace("z.softmax(dim=1)", "z.sigmoid()"))),
    mutant(
        OP,
        "softmax_in_bfloat16",
        (POOL, POOL.replace("z.softmax(dim=1)", "z.softmax(dim=1).to(torch.bfloat16).to(wide)")),
    ),
    mutant(OP, "logits_in_bfloat16", (POOL, POOL.replace("z.softmax", "z.to(torch.bfloat16).to(wide).softmax"))),
    mutant(
        OP,
        "last_token_of_the_window_missing",
        (MASK, f"{MASK}\n    z[:, -1] = -torch.inf if ratio > 1 else z[:, -1]"),
        row="G1",
    ),
    mutant(OP, "tokens_beyond_64_of_a_window_missing", (MASK, f"{MASK}\n    z[:, 64:] = -torch.inf"), row="G1"),
    mutant(OP, "pooled_in_bfloat16", (POOL, POOL.replace("to(x.dtype)", "to(torch.bfloat16).to(x.dtype)"))),
]

POSITIONAL = [
    mutant(OP, "ape_missing", (APE, "z = z")),
    mutant(OP, "ape_by_token_of_the_call", (APE, "z = z + ape.to(wide)[torch.arange(x.shape[0]) % ratio]")),
    mutant(
        OP,
        "ape_by_token_of_the_sequence",
        (APE, "z = z + ape.to(wide)[(position - start_pos.long()[sequence]) % ratio]"),
    ),
    mutant(OP, "ape_one_token_late", (APE, "z = z + ape.to(wide)[(position + 1) % ratio]")),
    mutant(
        OP,
        "ape_on_the_values",
        (APE, "pass"),
        (
            ROWS,
            ROWS.replace("wkv.to(wide).T,", "wkv.to(wide).T + (0 if ape is None else ape.to(wide)[position % ratio]),"),
        ),
    ),
    mutant(
        OP,
        "ape_not_stored",
        (
            WRITE,
            WRITE.replace(
                "rows)",
                "rows if ape is None else rows - torch.cat((torch.zeros_like(ape), ape),"
                " 1).to(wide)[position % ratio])",
            ),
        ),
    ),
    mutant(
        OP,
        "ape_again_when_read",
        (
            PARTS,
            f"{PARTS}\n    if ape is not None:\n"
            f"        again = torch.cat(ape.to(wide).split(dim, 1), 0)\n"
            f"        z = torch.where((slot >= 0)[..., None], z + again, z)",
        ),
    ),
    mutant(OP, "ape_in_bfloat16", (APE, APE.replace("ape.to", "ape.to(torch.bfloat16).to"))),
    mutant(
        OP, "rotated_at_the_window_number", (ROPE, ROPE.replace("entries.window * ratio", "entries.window")), row="K8"
    ),
    mutant(
        OP,
        "rotated_at_the_window_end",
        (
            ROPE,
            ROPE.replace(
                "entries.window * ratio", "(entries.window * ratio + ratio - 1).clamp(max=cos_table.shape[0] - 1)"
            ),
        ),
        row="K8",
    ),
    mutant(
        OP,
        "rotated_at_the_window_before",
        (ROPE, ROPE.replace("entries.window * ratio", "((entries.window - int(overlap)) * ratio).clamp(min=0)")),
        row="K8",
    ),
    mutant(
        OP,
        "rotated_at_the_row",
        (
            ROPE,
            ROPE.replace("entries.window * ratio", "torch.arange(len(entries.window)) * ratio % cos_table.shape[0]"),
        ),
        row="K8",
    ),
    mutant(
        OP,
        "rotated_at_16_bits",
        (ROPE, ROPE.replace("entries.window * ratio", "entries.window * ratio % 32768")),
        row="O3",
    ),
    mutant(
        OP,
        "rotated_at_positions_in_bfloat16",
        (
            ROPE,
            ROPE.replace(
                "entries.window * ratio",
                "(entries.window * ratio).to(torch.bfloat16).long().clamp(max=cos_table.shape[0] - 1)",
            ),
        ),
        row="O3",
    ),
    mutant(OP, "rotated_backwards", (ROPE, ROPE.replace("sin_table", "-sin_table")), row="O2"),
    mutant(OP, "not_rotated", (ROPE, "rotated = normed"), row="O2"),
    mutant(OP, "half_split_rotation", (ROPE, ROPE.replace("sin_table)", "sin_table, interleaved=False)")), row="O1"),
    mutant(OP, "first_channels_rotated", (ROPE, ROPE.replace("sin_table)", "sin_table, rope_first=True)")), row="O4"),
    mutant(
        OP,
        "tables_in_bfloat16",
        (
            ROPE,
            ROPE.replace(
                "cos_table, sin_table", "cos_table.to(torch.bfloat16).float(), sin_table.to(torch.bfloat16).float()"
            ),
        ),
        row="O3",
    ),
]

FINISH = [
    mutant(OP, "norm_missing", (NORM, "normed = pooled")),
    mutant(OP, "norm_weight_missing", (NORM, NORM.replace("norm_weight", "torch.ones_like(norm_weight)"))),
    mutant(OP, "norm_weight_plus_1", (NORM, NORM.replace("norm_weight", "norm_weight + 1"))),
    mutant(
        OP, "norm_weight_in_bfloat16", (NORM, NORM.replace("norm_weight", "norm_weight.to(torch.bfloat16).float()"))
    ),
    mutant(OP, "eps_of_1e_6", (NORM, NORM.replace("eps", "1e-6"))),
    mutant(OP, "eps_missing", (NORM, NORM.replace("eps", "1e-30"))),
    mutant(
        OP,
        "norm_behind_the_rotation",
        (NORM, "normed = pooled"),
        (RESULT, "rotated = rms_norm(rotated, norm_weight, eps)\n    " + RESULT),
    ),
    mutant(
        OP,
        "norm_over_the_nope_part",
        (
            NORM,
            "cut = norm_weight.shape[0] - 2 * cos_table.shape[1]\n"
            "    normed = torch.cat((rms_norm(pooled[:, :cut], norm_weight[:cut], eps),"
            " pooled[:, cut:]), 1)",
        ),
    ),
    mutant(OP, "hadamard_missing", (RESULT, "result = rotated")),
    mutant(
        OP, "hadamard_always_where_it_can", (RESULT, "result = hadamard(rotated) if not dim & (dim - 1) else rotated")
    ),
    mutant(
        OP,
        "hadamard_before_the_rotation",
        (NORM, NORM + "\n    normed = hadamard(normed) if rotate else normed"),
        (RESULT, "result = rotated"),
    ),
    mutant(OP, "hadamard_not_scaled", (RESULT, RESULT.replace("hadamard(rotated)", "hadamard(rotated) * dim**0.5"))),
    mutant(
        OP,
        "result_truncated",
        (POOL, POOL.replace(".to(x.dtype)", "")),
        (
            STORE,
            "result = (result.contiguous().view(torch.int32) & {torch.bfloat16: -65536,"
            " torch.float16: -8192}.get(x.dtype, -256)).view(torch.float32).to(x.dtype)\n"
            "    " + STORE,
        ),
        row="G7",
    ),
]

PROJECTION = [
    mutant(OP, "x_in_bfloat16", (ROWS, ROWS.replace("x.to(wide)", "x.to(torch.bfloat16).to(wide)"))),
    mutant(
        OP,
        "projection_in_bfloat16",
        (
            ROWS,
            ROWS.replace("wkv.to(wide).T,", "wkv.to(wide).T.to(torch.bfloat16).to(wide),").replace(
                "(x.to(wide) @ wkv.to(wide).T.to(torch.bfloat16).to(wide)",
                "((x.to(wide) @ wkv.to(wide).T).to(torch.bfloat16).to(wide)",
            ),
        ),
    ),
    mutant(
        OP,
        "gate_in_bfloat16",
        ("z = x.to(wide) @ wgate.to(wide).T", "z = (x.to(wide) @ wgate.to(wide).T).to(torch.bfloat16).to(wide)"),
    ),
    mutant(
        OP,
        "tensor_float_32",
        (
            "z = x.to(wide) @ wgate.to(wide).T",
            "z = ((x.to(wide).view(torch.int32) + 4096) & -8192).view(wide)"
            " @ ((wgate.to(wide).contiguous().view(torch.int32)"
            " + 4096) & -8192).view(wide).T",
        ),
        row="G8",
    ),
    mutant(
        OP,
        "last_features_dropped",
        (ROWS, ROWS.replace("x.to(wide) @ wkv.to(wide).T", "x[:, :-1].to(wide) @ wkv[:, :-1].to(wide).T")),
        row="G1",
    ),
    mutant(
        OP,
        "gate_and_value_swapped",
        ("z = x.to(wide) @ wgate.to(wide).T", "z = x.to(wide) @ wkv.to(wide).T"),
        (ROWS, ROWS.replace("wkv", "wgate")),
    ),
    mutant(
        OP,
        "features_beyond_2048_dropped",
        ("z = x.to(wide) @ wgate.to(wide).T", "z = x[:, :2048].to(wide) @ wgate[:, :2048].to(wide).T"),
        row="G1",
    ),
    mutant(
        OP,
        "value_accumulated_in_bfloat16",
        (
            ROWS,
            "u = torch.zeros((x.shape[0], wkv.shape[0]), dtype=torch.bfloat16)\n"
            "    for part, weight in zip(x.to(wide).split(128, 1), wkv.to(wide).split(128,"
            " 1)):\n        u = (u.float() + part @ weight.T).to(torch.bfloat16)\n"
            "    rows = torch.cat((u.to(wide), z), dim=-1)",
        ),
        row="G5",
    ),
]

MUTANTS = POOLING + POSITIONAL + FINISH + PROJECTION
