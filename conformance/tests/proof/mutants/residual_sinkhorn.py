"""Wrong Sinkhorn normalisations."""

from mutation import mutant

SOFTMAX = "    comb = torch.softmax(logits, dim=-1) + eps\n"
COLUMNS = "    comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)\n"
ROWS = COLUMNS.replace("dim=-2", "dim=-1")
LOOP = f"    for _ in range(iters - 1):\n    {ROWS}    {COLUMNS}"
START = SOFTMAX + COLUMNS
WHOLE = START + LOOP


def sinkhorn(name, new, old=WHOLE, **about):
    return mutant("sinkhorn", name, (old, new), **about)


def looped(*steps):
    return "    for _ in range(iters - 1):\n" + "".join(f"    {step}" for step in steps)


def softmax(inner):
    return SOFTMAX.replace("torch.softmax(logits, dim=-1)", inner) + COLUMNS


MUTANTS = [
    sinkhorn("softmax_over_columns", softmax("torch.softmax(logits, dim=-2)"), START),
    sinkhorn("softmax_over_the_matrix", softmax("torch.softmax(logits.flatten(-2), -1).view(logits.shape)"), START),
    sinkhorn("exponential_for_softmax", softmax("(logits - logits.amax(-1, True)).exp()"), START),
    sinkhorn("no_largest_subtracted", softmax("logits.exp() / logits.exp().sum(-1, True)"), START, row="S6"),
    sinkhorn(
        "largest_of_the_matrix_subtracted",
        "    e = (logits - (logits.amax((-2, -1), True) if logits.numel() else 0)).exp()\n"
        + softmax("e / e.sum(-1, True)"),
        START,
    ),
    sinkhorn("logits_clamped", softmax("torch.softmax(logits.clamp(-80, 80), dim=-1)"), START),
    sinkhorn("logits_narrow", softmax("torch.softmax(logits.bfloat16().float(), dim=-1)"), START),
    sinkhorn("softmax_narrow", softmax("torch.softmax(logits, dim=-1).bfloat16().float()"), START),
    sinkhorn(
        "softmax_in_tf32",
        softmax("(torch.softmax(logits, dim=-1).view(torch.int32) & -8192).view(torch.float32)"),
        START,
    ),
    sinkhorn("exponential_of_the_reciprocal", softmax("torch.softmax(-logits, dim=-1)"), START),
    sinkhorn("eps_not_in_the_matrix", START.replace("1) + eps\n", "1)\n"), START),
    sinkhorn("eps_in_the_matrix_before_softmax", softmax("torch.softmax(logits + eps, dim=-1) - eps"), START),
    sinkhorn("eps_in_the_matrix_as_floor", START.replace("1) + eps\n", "1).clamp(min=eps)\n"), START),
    sinkhorn("eps_in_the_matrix_twice", START.replace("1) + eps\n", "1) + 2 * eps\n"), START),
    sinkhorn("eps_in_the_matrix_every_iteration", looped("    comb = comb + eps\n", ROWS, COLUMNS), LOOP),
    sinkhorn("eps_not_in_the_first_divisor", SOFTMAX + COLUMNS.replace(" + eps", ""), START),
    sinkhorn("eps_not_in_the_rows", looped(ROWS.replace(" + eps", ""), COLUMNS), LOOP),
    sinkhorn("eps_not_in_the_columns", looped(ROWS, COLUMNS.replace(" + eps", "")), LOOP),
    sinkhorn("eps_is_a_floor_of_rows", looped(ROWS.replace("True) + eps)", "True).clamp(min=eps))"), COLUMNS), LOOP),
    sinkhorn("eps_is_a_floor_of_columns", looped(ROWS, COLUMNS.replace("True) + eps)", "True).clamp(min=eps))")), LOOP),
    sinkhorn("eps_is_the_default", "    eps = 1e-6\n" + WHOLE),
    sinkhorn("no_first_columns", SOFTMAX, START),
    sinkhorn("rows_first", SOFTMAX + ROWS + looped(COLUMNS, ROWS)),
    sinkhorn("columns_before_rows", looped(COLUMNS, ROWS), LOOP),
    sinkhorn("rows_only", looped(ROWS), LOOP),
    sinkhorn("columns_only", looped(COLUMNS), LOOP),
    sinkhorn(
        "rows_and_columns_at_once",
        looped("    comb = comb / (comb.sum(-1, True) + eps) / (comb.sum(-2, True) + eps)\n"),
        LOOP,
    ),
    sinkhorn("rows_last", WHOLE + ROWS),
    sinkhorn("one_iteration_more", LOOP.replace("iters - 1", "iters"), LOOP),
    sinkhorn("one_iteration_less", LOOP.replace("iters - 1", "iters - 2"), LOOP),
    sinkhorn("iters_is_the_default", LOOP.replace("iters - 1", "19"), LOOP),
    sinkhorn(
        "ends_when_nearly_converged",
        LOOP + "        if logits.numel() and (comb.sum(-1) - 1).abs().max() < 1e-3:\n            break\n",
        LOOP,
    ),
    sinkhorn("iterated_narrow", looped(ROWS, COLUMNS, "    comb = comb.bfloat16().float()\n"), LOOP),
    sinkhorn(
        "divisors_of_12_bits",
        looped(
            ROWS,
            "    total = comb.sum(-2, True) + eps\n",
            "    comb = comb / (total.view(torch.int32) & -4096).view(torch.float32)\n",
        ),
        LOOP,
    ),
    sinkhorn("transposed", WHOLE + "    comb = comb.mT\n"),
    sinkhorn("transposed_logits", "    logits = logits.mT\n" + WHOLE),
    sinkhorn(
        "strides_ignored", "    logits = logits.as_strided(logits.shape, torch.empty(logits.shape).stride())\n" + WHOLE
    ),
    sinkhorn(
        "columns_of_all_matrices", SOFTMAX + "    comb = comb / (comb.flatten(0, -2).sum(0, True) + eps)\n" + LOOP
    ),
    sinkhorn("means_for_sums", looped(ROWS.replace("sum", "mean"), COLUMNS), LOOP),
]
