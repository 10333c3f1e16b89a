"""Wrong mixes of the residual streams, before and behind a sublayer."""

from mutants.residual_sinkhorn import COLUMNS, LOOP, ROWS, START, looped, softmax
from mutation import mutant

SINKHORN = "ops.residual.sinkhorn"
FLAT = "    flat = streams.to(widen(streams.dtype)).flatten(1)\n    z = flat"
Z = "    z = flat @ fn.to(flat.dtype).T * (flat.square().mean(-1, keepdim=True) + norm_eps).rsqrt()\n"
MEAN = "flat.square().mean(-1, keepdim=True)"
ROOT = f"({MEAN} + norm_eps).rsqrt()"
PRODUCT = "flat @ fn.to(flat.dtype).T"
COLLAPSE = "x = (pre[:, :, None] * streams.to(z.dtype)).sum(dim=1)"
CUT_FN = "(fn.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)"


def of_both(name, old, new, **about):
    """The same mistake in hc_pre and hc_head."""
    return [mutant(operator, name, (old, new), **about) for operator in ("hc_pre", "hc_head")]


PROJECTIONS = [
    *of_both("norm_missing", ROOT, "1.0"),
    *of_both("norm_eps_missing", ROOT, f"{MEAN}.rsqrt()"),
    *of_both("norm_eps_is_the_default", ROOT, f"({MEAN} + 1e-6).rsqrt()"),
    *of_both("norm_eps_is_hc_eps", ROOT, f"({MEAN} + hc_eps).rsqrt()"),
    *of_both("norm_eps_outside_the_root", ROOT, f"({MEAN}.sqrt() + norm_eps).reciprocal()"),
    *of_both("norm_eps_added_to_the_sum", ROOT, "((flat.square().sum(-1, True) + norm_eps) / flat.shape[1]).rsqrt()"),
    *of_both("mean_over_hidden", MEAN, "flat.square().sum(-1, True) / streams.shape[2]"),
    *of_both("mean_of_the_first_stream", MEAN, "flat[:, : streams.shape[2]].square().mean(-1, keepdim=True)"),
    *of_both("sum_for_mean", MEAN, "flat.square().sum(-1, True)"),
    *of_both("mean_subtracted", MEAN, "flat.var(-1, keepdim=True, correction=0)"),
    *of_both("squared_narrow", MEAN, "streams.flatten(1).square().to(flat.dtype).mean(-1, True)"),
    *of_both(
        "streams_normalised_alone",
        FLAT,
        "    flat = streams.to(widen(streams.dtype))\n"
        "    flat = (flat * (flat.square().mean(-1, True) + norm_eps).rsqrt()).flatten(1)\n    z = flat",
    ),
    *of_both("flattened_hidden_first", FLAT, FLAT.replace(").flatten", ").transpose(1, 2).flatten")),
    *of_both("streams_in_reverse", FLAT, FLAT.replace(").flatten", ").flip(1).flatten")),
    *of_both(
        "strides_ignored",
        FLAT,
        "    streams = streams.as_strided(streams.shape, torch.empty(streams.shape).stride())\n" + FLAT,
    ),
    *of_both("last_column_not_multiplied", PRODUCT, "flat[:, :-1] @ fn[:, :-1].to(flat.dtype).T", row="G1"),
    *of_both(
        "tail_of_64_not_multiplied",
        PRODUCT,
        "(lambda k: flat[:, :k] @ fn[:, :k].T)(flat.shape[1] // 64 * 64)",
        row="G1",
    ),
    *of_both(
        "last_split_not_merged",
        PRODUCT,
        "(lambda k: flat[:, :k] @ fn[:, :k].T)(flat.shape[1] - (flat.shape[1] > 8192) * 4096)",
    ),
    *of_both("weights_narrow", PRODUCT, "flat @ fn.to(torch.bfloat16).to(flat.dtype).T"),
    *of_both("float32_in_tf32", PRODUCT, f"flat @ ({CUT_FN} if streams.dtype == torch.float32 else fn).T", row="G8"),
    *of_both(
        "normalised_streams_narrow",
        Z,
        f"    z = (flat * {ROOT}).to(torch.bfloat16).to(flat.dtype) @ fn.to(flat.dtype).T\n",
    ),
    *of_both(
        "summed_narrow",
        PRODUCT,
        "sum((a @ b.T).bfloat16() for a, b in zip(flat.split(64, 1), fn.split(64, 1))).to(flat.dtype)",
        row="G5",
    ),
    *of_both("projection_narrow", Z, Z + "    z = z.to(torch.bfloat16).to(flat.dtype)\n"),
    *of_both(
        "collapse_of_normalised_streams",
        COLLAPSE,
        COLLAPSE + "\n    x = x * streams.to(z.dtype).square().mean((1, 2))[:, None].add(1e-6).rsqrt()",
    ),
    *of_both("collapse_is_a_mean", COLLAPSE, COLLAPSE.replace("sum", "mean")),
    *of_both(
        "collapse_without_the_last_stream",
        COLLAPSE,
        COLLAPSE.replace(".sum", "[:, : max(streams.shape[1] - 1, 1)].sum"),
    ),
    *of_both("collapse_in_reverse", COLLAPSE, COLLAPSE.replace("pre[", "pre.flip(1)[")),
    *of_both("collapse_of_the_first_token", COLLAPSE, COLLAPSE.replace("pre[:, ", "pre[:1, ")),
    *of_both(
        "collapse_coefficients_narrow",
        COLLAPSE,
        COLLAPSE.replace("pre[:, :, None]", "pre[:, :, None].to(streams.dtype)"),
    ),
    *of_both(
        "collapse_summed_narrow",
        COLLAPSE,
        "x = sum((pre[:, j, None] * streams[:, j].to(z.dtype)).to(streams.dtype) for j in range(streams.shape[1]))",
    ),
    *of_both(
        "store_cuts",
        "x.to(streams.dtype).contiguous()",
        "(x if streams.dtype != torch.bfloat16 else (x.view(torch.int32) & "
        "-65536).view(torch.float32)).to(streams.dtype).contiguous()",
        row="G7",
    ),
]

PRE = "pre = torch.sigmoid(scale[0] * z[:, :n] + base[:n]) + hc_eps"
POST = "post = 2 * torch.sigmoid(scale[1] * z[:, n : 2 * n] + base[n : 2 * n])"
LOGITS = "logits = scale[2] * z[:, 2 * n :] + base[2 * n :]"
COMB = "comb = sinkhorn(logits.unflatten(1, (n, n)), sinkhorn_iters, hc_eps)"


def hc_pre(name, old, new, **about):
    return mutant("hc_pre", name, (old, new), **about)


PRES = [
    hc_pre("pre_without_hc_eps", PRE, PRE.replace(" + hc_eps", "")),
    hc_pre("pre_with_the_default_hc_eps", PRE, PRE.replace("hc_eps", "1e-6")),
    hc_pre("pre_has_hc_eps_inside", PRE, PRE.replace("base[:n]) + hc_eps", "base[:n] + hc_eps)")),
    hc_pre(
        "pre_has_hc_eps_as_floor", PRE, PRE.replace(" + hc_eps", ".clamp(min=hc_eps)").replace("= torch", "= torch")
    ),
    hc_pre("pre_doubled", PRE, PRE.replace("= torch", "= 2 * torch")),
    hc_pre("pre_softmax", PRE, PRE.replace("torch.sigmoid(", "torch.softmax(").replace("base[:n])", "base[:n], -1)")),
    hc_pre("pre_is_tanh", PRE, PRE.replace("sigmoid", "tanh")),
    hc_pre(
        "pre_sigmoid_overflows",
        PRE,
        "e = (scale[0] * z[:, :n] + base[:n]).exp()\n    pre = e / (1 + e) + hc_eps",
        row="A8",
    ),
    hc_pre("pre_base_ignored", PRE, PRE.replace(" + base[:n]", "")),
    hc_pre("pre_base_scaled", PRE, PRE.replace("scale[0] * z[:, :n] + base[:n]", "scale[0] * (z[:, :n] + base[:n])")),
    hc_pre("pre_scale_of_post", PRE, PRE.replace("scale[0]", "scale[1]")),
    hc_pre("pre_scale_ignored", PRE, PRE.replace("scale[0] * ", "")),
    hc_pre("pre_base_of_post", PRE, PRE.replace("base[:n]", "base[n : 2 * n]")),
    hc_pre("post_not_doubled", POST, POST.replace("2 * torch", "torch")),
    hc_pre("post_with_hc_eps", POST, POST + " + hc_eps"),
    hc_pre(
        "post_sigmoid_overflows",
        POST,
        POST.replace("2 * torch.sigmoid(", "(lambda e: 2 * e / (1 + e))((").replace(" * n])", " * n]).exp())"),
        row="A8",
    ),
    hc_pre("post_base_ignored", POST, POST.replace(" + base[n : 2 * n]", "")),
    hc_pre("post_base_of_pre", POST, POST.replace("base[n : 2 * n]", "base[:n]")),
    hc_pre("post_scale_of_pre", POST, POST.replace("scale[1]", "scale[0]")),
    hc_pre("post_scale_of_comb", POST, POST.replace("scale[1]", "scale[2]")),
    hc_pre("post_narrow", POST, POST + "\n    post = post.to(streams.dtype).to(z.dtype)"),
    hc_pre("post_narrow_in_float32_calls_too", POST, POST + "\n    post = post.to(torch.bfloat16).to(z.dtype)"),
    hc_pre("pre_and_post_swapped", POST, POST + "\n    pre, post = post / 2 + hc_eps, 2 * (pre - hc_eps)"),
    hc_pre("comb_scale_of_post", LOGITS, LOGITS.replace("scale[2]", "scale[1]")),
    hc_pre("comb_base_ignored", LOGITS, LOGITS.replace(" + base[2 * n :]", "")),
    hc_pre("comb_base_columnwise", LOGITS, LOGITS.replace("base[2 * n :]", "base[2 * n :].view(n, n).T.flatten()")),
    hc_pre("comb_columnwise", COMB, COMB.replace("(n, n))", "(n, n)).mT")),
    hc_pre("comb_transposed", COMB, COMB + ".mT"),
    hc_pre("comb_narrow", COMB, COMB + "\n    comb = comb.to(streams.dtype).to(z.dtype)"),
    hc_pre("comb_narrow_in_float32_calls_too", COMB, COMB + "\n    comb = comb.to(torch.bfloat16).to(z.dtype)"),
    hc_pre("comb_without_sinkhorn", COMB, "comb = torch.softmax(logits.unflatten(1, (n, n)), dim=-1)"),
    hc_pre("sinkhorn_iters_is_the_default", COMB, COMB.replace("sinkhorn_iters", "20")),
    hc_pre("sinkhorn_iters_one_less", COMB, COMB.replace("sinkhorn_iters", "max(sinkhorn_iters - 1, 1)")),
    hc_pre("sinkhorn_iters_one_more", COMB, COMB.replace("sinkhorn_iters", "sinkhorn_iters + 1")),
    hc_pre("sinkhorn_eps_is_the_default", COMB, COMB.replace(", hc_eps", "")),
    mutant(
        "hc_pre",
        "sinkhorn_eps_is_norm_eps",
        ("sinkhorn_iters, hc_eps)\n\n\ndef mixed", "sinkhorn_iters, norm_eps, hc_eps)\n\n\ndef mixed"),
        ("sinkhorn_iters: int, hc_eps: float\n)", "sinkhorn_iters: int, norm_eps: float, hc_eps: float\n)"),
        (COMB, COMB.replace("hc_eps", "norm_eps")),
    ),
    mutant("hc_pre", "softmax_over_columns", (SINKHORN, START, START.replace("dim=-1", "dim=-2", 1))),
    mutant(
        "hc_pre",
        "no_largest_subtracted",
        (SINKHORN, START, softmax("logits.exp() / logits.exp().sum(-1, True)")),
        row="S6",
    ),
    mutant("hc_pre", "columns_before_rows", (SINKHORN, LOOP, looped(COLUMNS, ROWS))),
    hc_pre("collapse_with_post", COLLAPSE, COLLAPSE.replace("pre[", "post[")),
    hc_pre("collapse_without_hc_eps", COLLAPSE, COLLAPSE.replace("pre[:, :, None]", "(pre - hc_eps)[:, :, None]")),
]

GATE = "pre = torch.sigmoid(scale.to(z.dtype) * z + base.to(z.dtype)) + hc_eps"


def hc_head(name, new, old=GATE, **about):
    return mutant("hc_head", name, (old, new), **about)


HEADS = [
    hc_head("pre_without_hc_eps", GATE.replace(" + hc_eps", "")),
    hc_head("pre_with_the_default_hc_eps", GATE.replace("hc_eps", "1e-6")),
    hc_head("pre_doubled", GATE.replace("= torch", "= 2 * torch")),
    hc_head("pre_softmax", GATE.replace("torch.sigmoid(", "torch.softmax(").replace("z.dtype))", "z.dtype), -1)")),
    hc_head(
        "pre_sigmoid_overflows",
        "e = (scale.to(z.dtype) * z + base.to(z.dtype)).exp()\n    pre = e / (1 + e) + hc_eps",
        row="A8",
    ),
    hc_head("scale_ignored", GATE.replace("scale.to(z.dtype) * ", "")),
    hc_head("base_ignored", GATE.replace(" + base.to(z.dtype)", "")),
    hc_head("base_scaled", GATE.replace("z + base.to(z.dtype)", "(z + base.to(z.dtype))")),
    hc_head("base_in_reverse", GATE.replace("base.to", "base.flip(0).to")),
    hc_head("coefficients_normalised", GATE + "\n    pre = pre / pre.sum(1, True)"),
]

EXPANDED = "expanded = post.to(wide)[:, :, None] * x.to(wide)[:, None, :]"
MIXED = "y = expanded + comb.to(wide).mT @ streams.to(wide)"
STORE = MIXED + "\n    return y.to(streams.dtype).contiguous()"


def hc_post(name, old, new, **about):
    return mutant("hc_post", name, (old, new), **about)


POSTS = [
    hc_post("comb_not_transposed", MIXED, MIXED.replace(".mT", "")),
    hc_post("comb_ignored", MIXED, "y = expanded + streams.to(wide)"),
    hc_post(
        "comb_diagonal_only",
        MIXED,
        MIXED.replace("comb.to(wide).mT", "torch.diag_embed(comb.to(wide).diagonal(0, 1, 2))"),
    ),
    hc_post(
        "comb_without_the_last_stream", MIXED, "y = expanded + comb[:, :-1].to(wide).mT @ streams[:, :-1].to(wide)"
    ),
    hc_post("comb_of_the_first_token", MIXED, MIXED.replace("comb.to", "comb[:1].to")),
    hc_post("comb_in_reverse", MIXED, MIXED.replace("comb.to", "comb.flip(1).to")),
    hc_post(
        "comb_strides_ignored",
        MIXED,
        MIXED.replace("comb.to", "comb.as_strided(comb.shape, torch.empty(comb.shape).stride()).to"),
    ),
    hc_post("comb_narrow", MIXED, MIXED.replace("comb.to(wide)", "comb.to(streams.dtype).to(wide)")),
    hc_post("comb_in_bfloat16", MIXED, MIXED.replace("comb.to(wide)", "comb.to(torch.bfloat16).to(wide)")),
    hc_post(
        "comb_in_tf32",
        MIXED,
        MIXED.replace("comb.to(wide)", "(comb.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)"),
        row="G8",
    ),
    hc_post("comb_of_float16_range", MIXED, MIXED.replace("comb.to(wide)", "comb.to(torch.float16).to(wide)")),
    hc_post(
        "streams_strides_ignored",
        "    wide = wide_of(x, streams)\n    expanded",
        "    streams = streams.as_strided(streams.shape, torch.empty(streams.shape).stride())\n"
        "    wide = wide_of(x, streams)\n    expanded",
    ),
    hc_post("streams_narrow_as_x", MIXED, MIXED.replace("streams.to(wide)", "streams.to(x.dtype).to(wide)")),
    hc_post("streams_not_mixed_but_summed", MIXED, "y = expanded + streams.to(wide).sum(1, True)"),
    hc_post(
        "mix_narrow_before_the_sum",
        MIXED,
        "y = expanded + (comb.to(wide).mT @ streams.to(wide)).to(streams.dtype).to(wide)",
    ),
    hc_post("sublayer_narrow_before_the_sum", MIXED, MIXED.replace("expanded", "expanded.to(streams.dtype).to(wide)")),
    hc_post(
        "summed_narrow",
        MIXED,
        "y = expanded.to(streams.dtype)\n    for j in range(streams.shape[1]):\n"
        "        y = (y.to(wide) + comb[:, j, :, None].to(wide) * streams[:, j, None].to(wide)).to(streams.dtype)",
        row="G5",
    ),
    hc_post("post_ignored", EXPANDED, EXPANDED.replace("post.to(wide)", "torch.ones_like(post).to(wide)")),
    hc_post("post_halved", EXPANDED, EXPANDED.replace("post.to(wide)", "(post.to(wide) / 2)")),
    hc_post("post_squared", EXPANDED, EXPANDED.replace("post.to(wide)", "post.to(wide).square()")),
    hc_post("post_of_the_first_token", EXPANDED, EXPANDED.replace("post.to", "post[:1].to")),
    hc_post(
        "post_of_the_first_stream",
        EXPANDED,
        EXPANDED.replace("post.to(wide)", "post[:, :1].to(wide).expand(post.shape)"),
    ),
    hc_post("post_in_reverse", EXPANDED, EXPANDED.replace("post.to", "post.flip(1).to")),
    hc_post("post_narrow", EXPANDED, EXPANDED.replace("post.to(wide)", "post.to(streams.dtype).to(wide)")),
    hc_post("post_in_bfloat16", EXPANDED, EXPANDED.replace("post.to(wide)", "post.to(torch.bfloat16).to(wide)")),
    hc_post("post_clamped_to_1", EXPANDED, EXPANDED.replace("post.to(wide)", "post.to(wide).clamp(max=1)")),
    hc_post("sublayer_ignored", MIXED, MIXED.replace("expanded + ", "")),
    hc_post("sublayer_narrow_as_streams", EXPANDED, EXPANDED.replace("x.to(wide)", "x.to(streams.dtype).to(wide)")),
    hc_post("sublayer_subtracted", MIXED, MIXED.replace("expanded +", "-expanded +")),
    hc_post(
        "last_column_unmixed",
        STORE,
        STORE.replace("    return", "    y[..., -1:] = streams[..., -1:].to(wide)\n    return"),
    ),
    hc_post(
        "tail_of_8_columns_unmixed",
        STORE,
        STORE.replace("    return", "    y[..., streams.shape[2] // 8 * 8 :] = 0\n    return"),
    ),
    hc_post(
        "columns_beyond_4096_unmixed",
        STORE,
        STORE.replace("    return", "    y[..., 4096:] = streams[..., 4096:].to(wide)\n    return"),
    ),
    hc_post("result_like_x", STORE, STORE.replace("y.to(streams.dtype)", "y.to(x.dtype)")),
    hc_post("rounded_as_x_first", STORE, STORE.replace("y.to(streams", "y.to(x.dtype).to(streams")),
    hc_post(
        "store_cuts",
        STORE,
        STORE.replace(
            "y.to(",
            "(y if streams.dtype != torch.bfloat16 else (y.view(torch.int32) & -65536).view(torch.float32)).to(",
        ),
        row="G7",
    ),
]

MUTANTS = [*PROJECTIONS, *PRES, *HEADS, *POSTS]
