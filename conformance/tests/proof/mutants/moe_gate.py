"""Wrong routers: scores, selection, groups, weights, masks; and the same of hash layers."""

from mutation import mutant

SOFTPLUS = "torch.nn.functional.softplus(logits, threshold=SOFTPLUS_IDENTITY)"
SQRTSOFTPLUS = f"return {SOFTPLUS}.sqrt()"
SIGMOID = "return logits.sigmoid() if"
SOFTMAX = "logits.softmax(dim=-1)"
GATHERED = "weights = scores.gather(1, chosen)\n    if renormalize"
SUM = "(weights.sum(-1, keepdim=True) + SUM_FLOOR)"
SCALED = "return masked(chosen, weights * routed_scale, mask)"
EXPERTS = "chosen.to(torch.int32, memory_format=torch.contiguous_format)"
SWITCHED_OFF = "~mask[:, None]"
NO_WEIGHT = f"weights.masked_fill({SWITCHED_OFF}, 0.0)"
NO_EXPERT = f"experts.masked_fill({SWITCHED_OFF}, -1)"
STALE_TAIL = "chosen[torch.arange(len(chosen)).clamp(max=max(len(chosen) - 2, 0))].int()"
UNPACKED_NAN = "chosen.masked_fill(weights.isnan().any(1, keepdim=True), 999).int()"
NEXT_TOKEN_TOO = "weights = weights + 0 * weights.roll(1, 0)\n    "

SHARED = [
    ("softmax_for_sqrtsoftplus", "RT1", SQRTSOFTPLUS, "return logits.softmax(-1)"),
    ("sigmoid_for_sqrtsoftplus", "RT1", SQRTSOFTPLUS, "return logits.sigmoid()"),
    ("root_missing", "RT1", SQRTSOFTPLUS, f"return {SOFTPLUS}"),
    ("relu_for_softplus", "RT1", SOFTPLUS, "logits.relu()"),
    ("log_of_one_plus", "A9", SOFTPLUS, "torch.where(logits > 20, logits, torch.log(1 + torch.exp(logits)))"),
    ("softplus_overflows", "A8", "threshold=SOFTPLUS_IDENTITY", "threshold=1e30"),
    ("softplus_is_identity_above_10", "", "threshold=SOFTPLUS_IDENTITY", "threshold=10.0"),
    ("softplus_flushes_below_minus_20", "", SOFTPLUS, f"{SOFTPLUS}.masked_fill(logits < -20, 0.0)"),
    ("softplus_in_float16", "A9", SQRTSOFTPLUS, f"return {SOFTPLUS}.half().to(logits.dtype).sqrt()"),
    ("root_to_11_bits", "A9", SQRTSOFTPLUS, f"{SQRTSOFTPLUS}.half().to(logits.dtype)"),
    ("logits_in_bfloat16", "G8", SQRTSOFTPLUS, SQRTSOFTPLUS.replace("(logits", "(logits.bfloat16().to(logits.dtype)")),
    ("logits_in_tf32", "G8", SQRTSOFTPLUS, SQRTSOFTPLUS.replace("(logits", "(logits.half().to(logits.dtype)")),
    ("sigmoid_overflows", "A8", SIGMOID, "return logits.exp() / (1 + logits.exp()) if"),
    ("sigmoid_hard", "A6", SIGMOID, "return torch.nn.functional.hardsigmoid(logits) if"),
    ("sigmoid_in_float16", "A9", SIGMOID, "return logits.sigmoid().half().to(logits.dtype) if"),
    ("softmax_for_sigmoid", "RT1", SIGMOID, "return logits.softmax(-1) if"),
    ("softmax_without_maximum", "S6", SOFTMAX, "logits.exp() / logits.exp().sum(-1, keepdim=True)"),
    ("softmax_less_the_largest_of_all", "RT10", SOFTMAX, "(logits - logits.max()).softmax(dim=-1)"),
    ("softmax_over_tokens", "K3", SOFTMAX, "logits.softmax(dim=0)"),
    ("softmax_not_divided", "", SOFTMAX, "(logits - logits.amax(-1, keepdim=True)).exp()"),
    ("softmax_in_bfloat16", "", SOFTMAX, "logits.softmax(dim=-1).bfloat16().to(logits.dtype)"),
    ("scores_of_chosen_in_bfloat16", "", GATHERED, GATHERED.replace("chosen)", "chosen).bfloat16().to(scores.dtype)")),
    ("sum_floor_missing", "", " + SUM_FLOOR)", ")"),
    ("sum_floor_clamps", "", SUM, "weights.sum(-1, keepdim=True).clamp(min=SUM_FLOOR)"),
    ("sum_floor_1e_6", "", "SUM_FLOOR = 1e-20", "SUM_FLOOR = 1e-6"),
    ("sum_floor_1e_12", "", "SUM_FLOOR = 1e-20", "SUM_FLOOR = 1e-12"),
    ("never_renormalized", "", "if renormalize:", "if False:"),
    ("always_renormalized", "", "if renormalize:", "if True:"),
    ("renormalized_by_all_experts", "", SUM, "scores.sum(-1, keepdim=True)"),
    ("renormalized_by_the_largest", "", SUM, "weights.amax(-1, keepdim=True)"),
    ("renormalized_by_the_norm", "", SUM, "weights.norm(dim=-1, keepdim=True)"),
    ("renormalized_without_the_last_slot", "", SUM, "(weights[:, : chosen.shape[1] - 1].sum(-1, True) + 1e-20)"),
    ("renormalized_by_softmax", "", f"weights = weights / {SUM}", "weights = weights.softmax(-1)"),
    ("scale_missing", "RT6", SCALED, "return masked(chosen, weights, mask)"),
    ("scale_twice", "RT6", "weights * routed_scale, mask", "weights * routed_scale**2, mask"),
    ("scale_divides", "RT6", "weights * routed_scale, mask", "weights / routed_scale, mask"),
    ("scale_cancels", "RT6", "weights * routed_scale, mask", "weights * (1 if renormalize else routed_scale), mask"),
    (
        "scale_only_renormalized",
        "",
        "weights * routed_scale, mask",
        "weights * (routed_scale if renormalize else 1), mask",
    ),
    ("scale_in_bfloat16", "", "* routed_scale, mask", "* torch.tensor(routed_scale).bfloat16().to(weights), mask"),
    (
        "weights_in_bfloat16",
        "",
        "weights * routed_scale, mask",
        "(weights * routed_scale).bfloat16().to(weights), mask",
    ),
    ("weights_in_reversed_slots", "", "weights * routed_scale, mask", "(weights * routed_scale).flip(1), mask"),
    ("mask_ignored", "", "if mask is None:", "if True:"),
    ("mask_inverted", "", SWITCHED_OFF, "mask[:, None]", 2),
    ("mask_of_the_token_before", "", SWITCHED_OFF, "~mask.roll(1)[:, None]", 2),
    ("masked_weights_stay", "", NO_WEIGHT, "weights"),
    ("masked_weights_times_0", "RT10", NO_WEIGHT, "weights * mask[:, None]"),
    ("masked_experts_stay", "", NO_EXPERT, "experts"),
    ("masked_experts_are_0", "", NO_EXPERT, NO_EXPERT.replace("-1", "0")),
    (
        "slots_after_8_are_stale",
        "G1",
        EXPERTS,
        "chosen.index_fill(1, torch.arange(8, max(chosen.shape[1], 8)), 0).int()",
    ),
    ("experts_in_8_bits", "P9", EXPERTS, "chosen.to(torch.uint8).int()"),
    ("last_token_as_the_one_before", "C5", EXPERTS, STALE_TAIL),
    ("duplicate_in_the_last_slot", "RT11", EXPERTS, "torch.cat((chosen[:, :-1], chosen[:, :1]), 1).int()"),
    ("nan_reaches_the_next_token", "RT10", SCALED, NEXT_TOKEN_TOO + SCALED),
]

SCORES = "    scores = routing.router_scores(logits, score)"
CHOSEN = "router_weights(scores, largest(choice, k)"
CHOICE = "choice = scores if bias is None else scores + bias.to(scores.dtype)"
SORTED = "values.sort(dim=1, descending=True, stable=True).indices"
BEST = "best = min(1 if bias is None else 2, grouped.shape[-1])"
OF_GROUPS = "grouped.sort(dim=-1, descending=True).values[..., :best].sum(-1)"
UNFLATTENED = "choice.unflatten(1, (groups, -1))"
TOPK_GROUPS = ", topk_groups)\n    wins"
# Of equal values those from the middle on come first.
FROM_THE_MIDDLE = f"(values.roll(-(values.shape[1] // 2), 1){SORTED[6:]} + values.shape[1] // 2) % values.shape[1]"
PADDED = "largest(torch.nn.functional.pad(choice, (0, -choice.shape[1] % 32)), k).clamp(max=choice.shape[1] - 1)"
UNSEEN = "\n    if choice.shape[1] > 8:\n        choice = choice.index_fill(1, torch.tensor([{}]), float('-inf'))"
TAIL_UNSEEN = (
    "\n    if choice.shape[1] > 32:\n        choice = choice.clone()\n"
    "        choice[:, choice.shape[1] // 32 * 32 :] = float('-inf')"
)

GATE = [
    ("bias_in_the_weights", "RT3", CHOSEN, CHOSEN.replace("(scores", "(scores if bias is None else scores + bias")),
    ("bias_ignored", "RT4", CHOICE, "choice = scores"),
    ("bias_subtracted", "RT4", "scores + bias", "scores - bias"),
    ("bias_multiplied", "RT4", "scores + bias", "scores * bias"),
    ("bias_before_the_score", "RT4", SCORES, SCORES.replace("(logits", "(logits if bias is None else logits + bias")),
    ("bias_of_the_next_expert", "RT4", "bias.to(scores.dtype)", "bias.to(scores.dtype).roll(-1)"),
    ("bias_in_bfloat16", "", "bias.to(scores.dtype)", "bias.bfloat16().to(scores.dtype)"),
    ("bias_in_float16", "", "bias.to(scores.dtype)", "bias.half().to(scores.dtype)"),
    (
        "bias_ignored_in_groups",
        "RT4",
        f"grouped: Tensor = {UNFLATTENED}",
        "grouped = scores.unflatten(1, (groups, -1))",
    ),
    ("choice_in_bfloat16", "G8", SORTED, f"values.bfloat16(){SORTED[6:]}"),
    ("choice_in_float16", "G8", SORTED, f"values.half(){SORTED[6:]}"),
    ("choice_not_below_zero", "", SORTED, f"values.clamp(min=0){SORTED[6:]}"),
    ("choice_by_magnitude", "I8", SORTED, f"values.abs(){SORTED[6:]}"),
    ("choice_by_bits_as_integers", "I8", SORTED, f"values.float().view(torch.int32){SORTED[6:]}"),
    ("tie_to_the_highest", "RT9", SORTED, f"(values.shape[1] - 1 - values.flip(1){SORTED[6:]})"),
    ("tie_to_the_middle", "RT9", SORTED, FROM_THE_MIDDLE),
    ("smallest_first", "", "descending=True, stable=True", "descending=False, stable=True"),
    ("largest_left_out", "RT7", "order[:, :k]", "order[:, 1 : k + 1] if values.shape[1] > k else order[:, :k]"),
    ("one_expert_too_few", "RT7", CHOSEN, f"{CHOSEN}[:, [*range(k - 1), 0]]"),
    ("one_expert_too_many", "RT7", CHOSEN, CHOSEN.replace(", k)", ", k + 1)")),
    ("slots_ascending", "", CHOSEN, f"{CHOSEN}.flip(1)"),
    ("slots_by_expert", "", CHOSEN, f"{CHOSEN}.sort(1).values"),
    ("last_tile_of_experts_unseen", "G1", CHOICE, CHOICE + TAIL_UNSEEN),
    ("first_expert_unseen", "", CHOICE, CHOICE + UNSEEN.format(0)),
    ("last_expert_unseen", "", CHOICE, CHOICE + UNSEEN.format("choice.shape[1] - 1")),
    (
        "padding_to_32_is_selectable",
        "RT14",
        "largest(choice, k), renormalize, routed_scale, mask)\n\n\ndef choices",
        f"{PADDED}, renormalize, routed_scale, mask)\n\n\ndef choices",
    ),
    ("groups_ignored", "", "if groups == 1:", "if True:"),
    ("groups_interleaved", "S12", UNFLATTENED, "choice.unflatten(1, (-1, groups)).transpose(1, 2)"),
    ("group_by_its_best_alone", "", BEST, "best = 1"),
    ("group_by_its_best_two_always", "", BEST, "best = min(2, grouped.shape[-1])"),
    ("group_by_its_best_three", "", BEST, "best = min(1 if bias is None else 3, grouped.shape[-1])"),
    ("group_by_its_sum", "", BEST, "best = grouped.shape[-1]"),
    ("group_by_its_smallest", "", "dim=-1, descending=True", "dim=-1, descending=False"),
    ("group_by_scores_alone", "RT4", OF_GROUPS, OF_GROUPS.replace("grouped", "scores.unflatten(1, (groups, -1))")),
    ("group_score_in_bfloat16", "", OF_GROUPS, OF_GROUPS + ".bfloat16()"),
    ("one_group_more", "", TOPK_GROUPS, ", min(topk_groups + 1, groups))\n    wins"),
    ("one_group_fewer", "", TOPK_GROUPS, ", max(topk_groups - 1, 1))\n    wins"),
    ("one_group_alone", "", TOPK_GROUPS, ", 1)\n    wins"),
    (
        "tie_to_the_highest_group",
        "RT9",
        f"largest({OF_GROUPS}, topk_groups)",
        f"groups - 1 - largest({OF_GROUPS}.flip(1), topk_groups)",
    ),
    ("losing_groups_at_zero", "", 'float("-inf")', "0.0"),
    ("losing_groups_at_minus_one", "", 'float("-inf")', "-1.0"),
    ("losing_groups_win", "", "masked_fill(~wins", "masked_fill(wins"),
]

ROW = "table[token_ids.long()].long()\n    return"
HASH_SCORES = "routing.router_scores(logits, score), chosen"
BY_SCORE = "\n    chosen = chosen.gather(1, logits.gather(1, chosen).argsort(dim=1, descending=True))"
COUNTED = "torch.zeros_like(logits).scatter_add(1, chosen, torch.ones_like(logits[:, :1]).expand(chosen.shape))"
UNCHOSEN_GONE = "logits.masked_fill(torch.ones_like(logits).scatter(1, chosen, 0.0) > 0, float('-inf'))"

HASH = [
    ("sorted_by_score", "", ROW, f"{ROW[:-11]}{BY_SCORE}\n    return"),
    ("sorted_by_expert", "", ROW, f"{ROW[:-11]}.sort(1).values\n    return"),
    ("row_of_the_token", "", ROW, ROW.replace("token_ids.long()", "torch.arange(len(token_ids)) % len(table)")),
    ("row_after_the_id", "", ROW, ROW.replace("token_ids.long()", "(token_ids.long() + 1) % len(table)")),
    ("row_before_the_id", "", ROW, ROW.replace("token_ids.long()", "token_ids.long() - 1")),
    ("ids_in_16_bits", "P9", ROW, ROW.replace("token_ids.long()", "token_ids.long() % 65536")),
    ("ids_in_15_bits", "P9", ROW, ROW.replace("token_ids.long()", "token_ids.long() % 32768")),
    ("table_by_columns", "G3", ROW, ROW.replace("table[", "table.T.reshape(table.shape)[")),
    ("topk_for_the_table", "", ROW, "logits.topk(min(table.shape[1], logits.shape[1])).indices\n    return"),
    (
        "repeated_expert_counts_once",
        "RT11",
        HASH_SCORES,
        HASH_SCORES.replace("score)", f"score) / {COUNTED}.clamp(min=1)"),
    ),
    (
        "softmax_over_the_chosen",
        "",
        HASH_SCORES,
        HASH_SCORES.replace("logits,", f"{UNCHOSEN_GONE} if score == 'softmax' else logits,"),
    ),
    ("score_ignored", "RT1", HASH_SCORES, HASH_SCORES.replace("score)", "'sqrtsoftplus')")),
    (
        "unchosen_logits_leak",
        "RT10",
        HASH_SCORES,
        HASH_SCORES.replace("score)", "score) + 0 * logits.exp().sum(-1, keepdim=True)"),
    ),
]


def in_routing(operator, name, row, old, new, count=1, equivalent=""):
    return mutant(operator, name, ("numerics.routing", old, new, count), row=row, equivalent=equivalent)


MUTANTS = [
    *(in_routing(operator, *entry) for operator in ("moe_gate", "moe_hash_gate") for entry in SHARED),
    *(mutant("moe_gate", name, (old, new), row=row) for name, row, old, new in GATE),
    in_routing("moe_gate", "nan_token_leaves_the_range", "RT10", EXPERTS, UNPACKED_NAN),
    *(mutant("moe_hash_gate", name, (old, new), row=row) for name, row, old, new in HASH),
    mutant(
        "moe_hash_gate",
        "masked_ids_are_0",
        (ROW, ROW.replace("token_ids.long()", "(token_ids if mask is None else token_ids * mask).long()")),
        equivalent="a token that the mask switches off gets -1 and 0, whatever row of the table is read for it",
    ),
]
