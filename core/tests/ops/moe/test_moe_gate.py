import torch
from torch.testing import assert_close

from isolith.ops.moe import moe_gate, moe_hash_gate


def logits_of(rows, experts, seed=0):
    return torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_worked_example_chooses_by_biased_scores():
    logits = torch.tensor([[-2.0, 0.0, 1.0, 3.0, 25.0]], dtype=torch.float64)
    bias = torch.tensor([1.0, 0.0, 0.5, -1.0, -4.0], dtype=torch.float64)
    idx, _ = moe_gate(logits, 2, bias, routed_scale=1.5)
    assert idx.tolist() == [[2, 0]]


def test_worked_example_weighs_by_unbiased_scores():
    logits = torch.tensor([[-2.0, 0.0, 1.0, 3.0, 25.0]], dtype=torch.float64)
    bias = torch.tensor([1.0, 0.0, 0.5, -1.0, -4.0], dtype=torch.float64)
    _, weights = moe_gate(logits, 2, bias, routed_scale=1.5)
    want = torch.tensor([[1.1442631, 0.3557369]], dtype=torch.float64)
    assert_close(weights, want, rtol=0, atol=6e-8)


def test_scores_of_the_worked_example():
    logits = torch.tensor([[-2.0, 0.0, 1.0, 3.0, 25.0]], dtype=torch.float64)
    _, weights = moe_gate(logits, 5, renormalize=False)
    want = torch.tensor([[5.0, 1.7460204, 1.1459763, 0.8325546, 0.3562696]], dtype=torch.float64)
    assert_close(weights, want, rtol=0, atol=6e-8)


def test_tie_goes_to_the_lower_expert():
    idx, _ = moe_gate(torch.zeros(2, 33), 5)
    assert idx.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_tie_of_groups_goes_to_the_lower_group():
    idx, _ = moe_gate(torch.zeros(1, 32), 8, torch.zeros(32), groups=8, topk_groups=2)
    assert idx.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_groups_that_lose_stay_out_when_all_choices_are_negative():
    # Masking with 0 instead of -inf would let experts 4..7 win.
    bias = torch.tensor([-3.0] * 4 + [-5.0] * 4)
    idx, _ = moe_gate(torch.zeros(1, 8), 4, bias, score="sigmoid", groups=2, topk_groups=1)
    assert idx.tolist() == [[0, 1, 2, 3]]


def test_group_counts_by_its_two_largest_with_a_bias():
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.6]], dtype=torch.float64)
    idx, _ = moe_gate(scores.logit(), 1, torch.zeros(4, dtype=torch.float64), "sigmoid", groups=2)
    assert idx.tolist() == [[2]]


def test_group_counts_by_its_largest_without_a_bias():
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.6]], dtype=torch.float64)
    idx, _ = moe_gate(scores.logit(), 1, None, "sigmoid", groups=2)
    assert idx.tolist() == [[0]]


def test_renormalised_weights_sum_to_the_scale():
    _, weights = moe_gate(logits_of(9, 24), 6, routed_scale=2.5)
    assert_close(weights.sum(1), torch.full((9,), 2.5, dtype=torch.float64))


def test_softmax_weights_are_the_probabilities_without_renormalising():
    logits = logits_of(9, 24)
    idx, weights = moe_gate(logits, 6, score="softmax", renormalize=False)
    assert_close(weights, logits.softmax(1).gather(1, idx.long()))


def test_scores_that_all_underflow_give_zeros_not_nan():
    _, weights = moe_gate(torch.full((1, 8), -400.0), 4)
    assert weights.tolist() == [[0.0] * 4]


def test_masked_token_gets_no_expert_even_when_it_is_nan():
    logits = torch.full((1, 8), float("nan"))
    idx, weights = moe_gate(logits, 2, mask=torch.tensor([False]))
    assert (idx.tolist(), weights.tolist()) == ([[-1, -1]], [[0.0, 0.0]])


def test_nan_token_chooses_experts_that_exist():
    logits = logits_of(4, 24).float()
    logits[1], logits[2, 5], logits[3, 0] = float("nan"), float("inf"), float("nan")
    idx, _ = moe_gate(logits, 8, torch.zeros(24), groups=4, topk_groups=2)
    assert all(len(set(row)) == 8 and min(row) >= 0 and max(row) < 24 for row in idx.tolist())


def test_nan_token_leaves_its_neighbours_alone():
    clean = logits_of(4, 24)
    dirty = clean.clone()
    dirty[2] = float("nan")
    keep = torch.tensor([0, 1, 3])
    assert torch.equal(moe_gate(dirty, 4)[1][keep], moe_gate(clean, 4)[1][keep])


def test_hash_layer_keeps_the_order_of_its_table():
    table = torch.tensor([[5, 1, 7], [0, 6, 2]], dtype=torch.int32)
    idx, _ = moe_hash_gate(logits_of(3, 8), torch.tensor([1, 0, 1]), table)
    assert idx.tolist() == [[0, 6, 2], [5, 1, 7], [0, 6, 2]]


def test_hash_layer_with_the_gates_choice_gives_the_gates_weights():
    logits = logits_of(6, 24)
    idx, weights = moe_gate(logits, 4, routed_scale=1.5)
    assert_close(moe_hash_gate(logits, torch.arange(6), idx, routed_scale=1.5)[1], weights)


def test_repeated_expert_counts_once_a_slot():
    table = torch.tensor([[3, 3]], dtype=torch.int32)
    _, weights = moe_hash_gate(logits_of(1, 8), torch.tensor([0]), table)
    assert_close(weights, torch.full((1, 2), 0.5, dtype=torch.float64))
