"""Wrong norms."""

from mutation import mutant

WIDENED = "    wide = x.to(widen(x.dtype))\n    normed = wide"
MEAN = "wide.square().mean(dim=-1, keepdim=True)"
FACTOR = f"({MEAN} + eps).rsqrt()"
NORMED = f"normed = wide * {FACTOR}"
STORE = "(normed * weight.to(normed.dtype)).to(dtype).contiguous()"
HEAD_STORE = "return normed.to(x.dtype).contiguous()"
# Toward zero: the lower half of a float32 is cut before it is narrowed to bfloat16.
CUT = "({0} if {1} != torch.bfloat16 else ({0}.view(torch.int32) & -65536).view(torch.float32))"


def of_both(name, *, old=NORMED, new, **about):
    """The same mistake in both norms."""
    return [mutant(operator, name, (old, new), **about) for operator in ("rms_norm", "head_rms_norm")]


MUTANTS = [
    *of_both("eps_missing", old=FACTOR, new=f"{MEAN}.rsqrt()"),
    *of_both("eps_is_the_default", old=FACTOR, new=f"({MEAN} + 1e-6).rsqrt()"),
    *of_both("eps_twice", old=FACTOR, new=f"({MEAN} + 2 * eps).rsqrt()"),
    *of_both("eps_squared", old=FACTOR, new=f"({MEAN} + eps * eps).rsqrt()"),
    *of_both("eps_outside_the_root", old=FACTOR, new=f"({MEAN}.sqrt() + eps).reciprocal()"),
    *of_both("eps_added_to_the_sum", old=FACTOR, new="((wide.square().sum(-1, True) + eps) / x.shape[-1]).rsqrt()"),
    *of_both("eps_is_a_floor", old=FACTOR, new=f"{MEAN}.clamp(min=eps).rsqrt()"),
    *of_both("root_missing", old=FACTOR, new=f"({MEAN} + eps).reciprocal()"),
    *of_both("sum_for_mean", old=MEAN, new="wide.square().sum(dim=-1, keepdim=True)"),
    *of_both("mean_of_one_less", old=MEAN, new="wide.square().sum(-1, True) / max(x.shape[-1] - 1, 1)"),
    *of_both("mean_of_magnitudes", old=MEAN, new="wide.abs().mean(dim=-1, keepdim=True).square()"),
    *of_both("mean_subtracted", old=WIDENED, new=WIDENED.replace("= wide", "= (wide - wide.mean(-1, True))")),
    *of_both("variance", old=MEAN, new="wide.var(dim=-1, keepdim=True, correction=0)"),
    *of_both("largest_for_mean", old=MEAN, new="wide.square().amax(dim=-1, keepdim=True) if x.numel() else wide"),
    *of_both("mean_over_everything", old=MEAN, new="wide.square().mean()"),
    *of_both("mean_over_the_first_axis", old=MEAN, new="wide.square().mean(dim=0, keepdim=True)"),
    *of_both("last_element_not_summed", old=MEAN, new="wide[..., :-1].square().sum(-1, True) / x.shape[-1]"),
    *of_both(
        "tail_of_64_not_summed",
        old=MEAN,
        new="wide[..., : x.shape[-1] // 64 * 64].square().sum(-1, True) / x.shape[-1]",
    ),
    *of_both("squared_narrow", old=MEAN, new="x.square().to(wide.dtype).mean(dim=-1, keepdim=True)"),
    *of_both(
        "summed_narrow",
        old=MEAN,
        new="functools.reduce(torch.add, [p.square().sum(-1, True).to(x.dtype) for p in wide.split(16, "
        "-1)]).to(wide.dtype) / x.shape[-1]",
    ),
    *of_both("mean_narrow", old=MEAN, new=f"{MEAN}.to(x.dtype).to(wide.dtype)"),
    *of_both("factor_narrow", old=FACTOR, new=f"{FACTOR}.to(x.dtype).to(wide.dtype)"),
    *of_both("factor_of_12_bits", old=FACTOR, new=f"({FACTOR}.view(torch.int32) & -4096).view(torch.float32)"),
    *of_both(
        "tail_of_4_columns_as_it_is",
        old=NORMED,
        new=f"{NORMED}\n    tail = x.shape[-1] // 4 * 4\n    normed[..., tail:] = wide[..., tail:]",
    ),
    *of_both(
        "strides_ignored", old=WIDENED, new="    x = x.as_strided(x.shape, torch.empty(x.shape).stride())\n" + WIDENED
    ),
    *of_both("first_row_normalises_all", old=MEAN, new="wide[:1].square().mean(dim=-1, keepdim=True)"),
    mutant(
        "rms_norm", "columns_beyond_4096_not_summed", (MEAN, "wide[..., :4096].square().sum(-1, True) / x.shape[-1]")
    ),
    mutant("rms_norm", "weight_ignored", (STORE, "normed.to(dtype).contiguous()")),
    mutant("rms_norm", "weight_and_one", (STORE, STORE.replace("normed.dtype)", "normed.dtype).add(1)"))),
    mutant("rms_norm", "weight_narrow", (STORE, STORE.replace("to(normed.dtype)", "to(dtype).to(normed.dtype)"))),
    mutant("rms_norm", "weight_next_column", (STORE, STORE.replace("weight.to", "weight.roll(-1).to"))),
    mutant(
        "rms_norm",
        "weight_before_the_mean",
        (WIDENED, WIDENED.replace("    normed", "    wide = wide * weight\n    normed")),
        (STORE, "normed.to(dtype).contiguous()"),
    ),
    mutant("rms_norm", "product_narrow", (STORE, "(normed.to(dtype) * weight.to(dtype)).contiguous()")),
    mutant("rms_norm", "always_rounded_before_weight", ("if round_before_weight:", "if True:")),
    mutant("rms_norm", "never_rounded_before_weight", ("if round_before_weight:", "if False:")),
    mutant("rms_norm", "rounded_to_bfloat16_before_weight", ("normed.to(dtype).to", "normed.to(torch.bfloat16).to")),
    mutant(
        "rms_norm",
        "store_cuts",
        (STORE, f"{CUT.format('(normed * weight.to(normed.dtype))', 'dtype')}.to(dtype).contiguous()"),
        row="G7",
    ),
    mutant(
        "head_rms_norm",
        "store_cuts",
        (HEAD_STORE, f"return {CUT.format('normed', 'x.dtype')}.to(x.dtype).contiguous()"),
        row="G7",
    ),
    mutant("head_rms_norm", "mean_over_the_token", (MEAN, "wide.square().mean(dim=(-2, -1), keepdim=True)")),
    mutant(
        "head_rms_norm",
        "mean_without_the_rotated_dims",
        (MEAN, "wide[..., : max(x.shape[-1] - 64, 1)].square().mean(-1, True)"),
    ),
    mutant(
        "head_rms_norm",
        "rotated_dims_as_they_are",
        (NORMED, f"{NORMED}\n    if x.shape[-1] > 64:\n        normed[..., -64:] = wide[..., -64:]"),
    ),
    mutant("head_rms_norm", "mean_of_512", (MEAN, "wide.square().sum(-1, True) / 512")),
    mutant("head_rms_norm", "heads_beyond_64_as_they_are", (NORMED, f"{NORMED}\n    normed[:, 64:] = wide[:, 64:]")),
]
