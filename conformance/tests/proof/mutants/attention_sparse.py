"""Wrong sparse_attn: arithmetic."""

from mutation import mutant

OP = "sparse_attn"
DENOMINATOR = "denominator = total if sink is None else total + (sink.to(kv.dtype) - largest).exp()"
LOGITS = "q.to(kv.dtype), kv) * softmax_scale"
MASK = "logits = logits.masked_fill(~valid[:, None, :], -torch.inf)"
OUT = 'out = torch.einsum("thn,tnc->thc", weights, values) / denominator[..., None]'
SOME = "some = valid.any(-1)[:, None]\n    largest"
STORE = "return out.to(q.dtype).contiguous(), lse\n"
LSE = "lse = torch.where(some, largest + total.log(), torch.inf)"
IN_SPLITS = """splits = zip(weights.tensor_split(4, -1), values.tensor_split(4, 1))
    parts = [torch.einsum("thn,tnc->thc", *split) for split in splits]
    out = {merged} / denominator[..., None]"""
ROUNDED_SUM = """out = torch.zeros((*q.shape[:2], values.shape[-1]), dtype=torch.bfloat16)
    for part, entry in zip(weights.split(16, -1), values.split(16, 1)):
        out = (out.float() + torch.einsum("thn,tnc->thc", part, entry).float()).to(torch.bfloat16)
    out = out.to(kv.dtype) / denominator[..., None]"""

SCALES_AND_SINKS = [
    mutant(OP, "scale_missing", (LOGITS, "q.to(kv.dtype), kv)"), row="S5"),
    mutant(OP, "scale_of_448_of_512", (LOGITS, f"{LOGITS} * (512 / 448) ** 0.5"), row="S5"),
    mutant(OP, "scale_in_half", (LOGITS, "q.to(kv.dtype), kv) * torch.tensor(softmax_scale).to(torch.float16).item()")),
    mutant(OP, "sink_missing", (DENOMINATOR, "denominator = total"), row="S4"),
    mutant(OP, "sink_twice", (DENOMINATOR, DENOMINATOR.replace("+ (", "+ 2 * (")), row="S4"),
    mutant(OP, "sink_scaled", (DENOMINATOR, DENOMINATOR.replace(".dtype)", ".dtype) * softmax_scale")), row="S4"),
    mutant(
        OP,
        "sink_once_a_pool",
        (DENOMINATOR, DENOMINATOR.replace("+ (", "+ (1 + (extra_indices is not None)) * (")),
        row="S4",
    ),
    mutant(OP, "sink_not_shifted", (DENOMINATOR, DENOMINATOR.replace(" - largest", "")), row="S4"),
    mutant(OP, "sink_in_base_2", (DENOMINATOR, DENOMINATOR.replace("exp", "exp2"))),
    mutant(OP, "sink_of_the_first_head", (DENOMINATOR, DENOMINATOR.replace("sink.to", "sink[:1].to"))),
    mutant(OP, "sink_rounded_to_bfloat16", (DENOMINATOR, DENOMINATOR.replace("sink.to", "sink.to(torch.bfloat16).to"))),
    mutant(OP, "sink_in_lse", (LSE, LSE.replace("total", "denominator"))),
    mutant(
        OP,
        "sink_joins_the_maximum",
        (
            SOME,
            "some = valid.any(-1)[:, None]\n"
            "    logits_and_sink = logits if sink is None else torch.cat((logits, sink.to(kv.dtype)[None,"
            " :, None].expand(q.shape[0], -1, 1)), -1)\n"
            "    largest",
        ),
        ("some, logits.amax(-1), 0.0)", "some, logits_and_sink.amax(-1), 0.0)"),
        row="S4",
    ),
    mutant(OP, "sink_clamped_to_30", (DENOMINATOR, DENOMINATOR.replace(".dtype)", ".dtype).clamp(-30, 30)"))),
    mutant(
        OP,
        "sink_absent_counts_as_0",
        (DENOMINATOR, "denominator = total + ((0.0 if sink is None else sink.to(kv.dtype)) - largest).exp()"),
    ),
]

SOFTMAX = [
    mutant(
        OP,
        "maximum_not_subtracted",
        ("largest = torch.where(some, logits.amax(-1), 0.0)", "largest = torch.zeros_like(logits[..., 0])"),
        row="S6",
    ),
    mutant(
        OP,
        "maximum_over_heads_and_clamped",
        ("some, logits.amax(-1), 0.0)", "some, logits.amax(-1), 0.0).clamp(max=60)"),
        row="S6",
    ),
    mutant(
        OP,
        "log2e_of_four_digits",
        (
            "weights = (logits - largest[..., None]).exp()\n    total",
            "weights = ((logits - largest[..., None]) * 1.4427).exp2()\n    total",
        ),
    ),
    mutant(
        OP,
        "exp_to_8_bits",
        (
            "weights = (logits - largest[..., None]).exp()\n    total",
            "weights = (logits - largest[..., None]).exp()\n"
            "    weights = weights * (1 + 2**-9 * (logits - largest[..., None]).nan_to_num(0,"
            " 0, 0).mul(40).sin())\n    total",
        ),
    ),
    mutant(
        OP,
        "small_weights_dropped",
        (
            "weights = (logits - largest[..., None]).exp()\n    total",
            "weights = (logits - largest[..., None]).exp()\n    weights = weights.where(weights > 2e-3, 0)\n    total",
        ),
    ),
    mutant(
        OP,
        "second_pool_not_rescaled",
        (
            "weights = (logits - largest[..., None]).exp()\n    total",
            "weights = (logits - largest[..., None]).exp()\n"
            "    first = indices.shape[1] + 1\n"
            "    if logits.shape[-1] > first:\n"
            "        weights[..., first:] = (logits[..., first:] - logits[..., first:].amax(-1,"
            " keepdim=True).nan_to_num(0, 0, 0)).exp()\n"
            "    total",
        ),
        row="S4",
    ),
    mutant(OP, "lse_without_maximum", (LSE, LSE.replace("largest + ", ""))),
    mutant(OP, "lse_in_base_2", (LSE, LSE.replace("log()", "log2()"))),
    mutant(OP, "lse_rounded", (LSE, f"{LSE}.to(q.dtype if q.dtype != torch.float32 else torch.bfloat16).to(kv.dtype)")),
    mutant(OP, "lse_is_the_sum", (LSE, "lse = torch.where(some, total, torch.inf)")),
    mutant(OP, "lse_of_the_first_pool", (LSE, LSE.replace("total", "weights[..., : indices.shape[1] + 1].sum(-1)"))),
    mutant(
        OP,
        "empty_row_is_nan",
        ("out = torch.where(some[..., None], out, 0.0)", "out = torch.where(some[..., None], out, torch.nan)"),
        row="S13",
    ),
    mutant(OP, "empty_row_lse_minus_inf", (LSE, LSE.replace("torch.inf", "-torch.inf")), row="S13"),
    mutant(OP, "empty_row_lse_0", (LSE, LSE.replace("torch.inf", "0.0")), row="S13"),
    mutant(
        OP,
        "finite_mask",
        (MASK, MASK.replace("-torch.inf", "-1e30")),
        (SOME, "some = torch.ones_like(valid[:, :1])\n    largest"),
        row="S13",
    ),
    mutant(OP, "mask_of_minus_30", (MASK, MASK.replace("-torch.inf", "-30.0"))),
    mutant(OP, "mask_missing", (MASK, "pass"), row="S13"),
    mutant(
        OP,
        "empty_row_is_the_mean",
        (
            "out = torch.where(some[..., None], out, 0.0)",
            "out = torch.where(some[..., None], out,"
            " kv_cache.reshape(-1, kv_cache.shape[-1])[:1].to(out.dtype).mean(-1)"
            " if kv_cache.numel() else 0.0)",
        ),
        row="S13",
    ),
]

PRECISION = [
    mutant(
        OP, "weights_in_e4m3", ("weights, values)", "weights.to(torch.float8_e4m3fn).to(kv.dtype), values)"), row="S9"
    ),
    mutant(
        OP, "weights_in_bfloat16", ("weights, values)", "weights.to(torch.bfloat16).to(kv.dtype), values)"), row="S9"
    ),
    mutant(OP, "keys_in_e4m3", (LOGITS, "q.to(kv.dtype), kv.to(torch.float8_e4m3fn).to(kv.dtype)) * softmax_scale")),
    mutant(OP, "logits_in_bfloat16", (LOGITS, f"{LOGITS}\n    logits = logits.to(torch.bfloat16).to(kv.dtype)")),
    mutant(OP, "logits_in_float16", (LOGITS, f"{LOGITS}\n    logits = logits.to(torch.float16).to(kv.dtype)")),
    mutant(
        OP,
        "tensor_float_32",
        (
            LOGITS,
            "((q.to(kv.dtype).view(torch.int32) + 4096) & -8192).view(torch.float32),"
            " ((kv.view(torch.int32) + 4096) & -8192).view(torch.float32)) * softmax_scale",
        ),
        row="G8",
    ),
    mutant(OP, "accumulator_in_bfloat16", (OUT, ROUNDED_SUM), row="G5"),
    mutant(
        OP,
        "splits_rounded_to_bfloat16",
        (OUT, IN_SPLITS.format(merged="sum(part.to(torch.bfloat16).to(kv.dtype) for part in parts)")),
    ),
    mutant(
        OP,
        "output_truncated",
        (
            STORE,
            "out = out.contiguous()\n    low = {torch.bfloat16: -65536, torch.float16:"
            " -8192}.get(q.dtype, -256)\n    out = (out.view(torch.int32) & low).view(torch.float32)\n"
            "    " + STORE,
        ),
        row="G7",
    ),
    mutant(
        OP,
        "denominator_in_bfloat16",
        (OUT, OUT.replace("denominator[", "denominator.to(torch.bfloat16).to(kv.dtype)[")),
    ),
    mutant(
        OP,
        "reciprocal_of_8_bits",
        (
            OUT,
            OUT.replace("/ denominator[..., None]", "* (1 / denominator).to(torch.bfloat16).to(kv.dtype)[..., None]"),
        ),
    ),
]

TILES = [
    mutant(
        OP,
        "last_partial_tile_of_64_dropped",
        (MASK, "valid = valid & (torch.arange(valid.shape[1]) < max(valid.shape[1] // 64 * 64, 64))\n    " + MASK),
        row="G1",
    ),
    mutant(
        OP, "columns_beyond_512_dropped", (MASK, "valid = valid & (torch.arange(valid.shape[1]) < 512)\n    " + MASK)
    ),
    mutant(OP, "last_split_dropped", (OUT, IN_SPLITS.format(merged="sum(parts[:-1])"))),
    mutant(OP, "splits_averaged", (OUT, IN_SPLITS.format(merged="sum(parts) / 4 * 3.9"))),
    mutant(
        OP,
        "channels_beyond_64_dropped",
        (
            LOGITS,
            "q[..., : max(q.shape[-1] // 64 * 64, 64)].to(kv.dtype), kv[..., : max(q.shape[-1]"
            " // 64 * 64, 64)]) * softmax_scale",
        ),
        row="G1",
    ),
    mutant(
        OP,
        "channels_behind_the_values_not_in_the_keys",
        (LOGITS, "q[..., : value_dim or None].to(kv.dtype), kv[..., : value_dim or None]) * softmax_scale"),
    ),
    mutant(
        OP, "heads_beyond_64_repeat", (STORE, "out = out[:, torch.arange(out.shape[1]) % 64]\n    " + STORE), row="S12"
    ),
    mutant(OP, "heads_shifted", (LOGITS, "q.roll(1, 1).to(kv.dtype), kv) * softmax_scale"), row="S12"),
    mutant(
        OP,
        "values_from_the_end",
        ("values = kv[..., : value_dim or kv.shape[-1]]", "values = kv[..., -(value_dim or kv.shape[-1]) :]"),
    ),
    mutant(OP, "value_dim_ignored", ("values = kv[..., : value_dim or kv.shape[-1]]", "values = kv")),
    mutant(
        OP,
        "tokens_in_16_bits",
        (STORE, "out, lse = (part[torch.arange(q.shape[0]) % 65536] for part in (out, lse))\n    " + STORE),
        row="S14",
    ),
]

MUTANTS = SCALES_AND_SINKS + SOFTMAX + PRECISION + TILES
