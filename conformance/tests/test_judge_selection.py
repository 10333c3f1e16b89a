"""Selections are judged by values: what is below gold's, ties, reach, order."""

import torch

import isolith
from isolith import OPERATORS
from isolith_conformance.family import evaluate
from isolith_conformance.judge import expect, judge

TOPK = OPERATORS["indexer_topk"]


def topk(scores, length, k, **how):
    return isolith.indexer_topk.arguments(torch.tensor([scores]), torch.tensor([length]), k, **how)


def said(call, indices, exact=False):
    chosen = torch.tensor([indices], dtype=torch.int32)
    return expect(TOPK, call, exact).selection([chosen, (chosen >= 0).sum(1).int()]).check


def test_an_entry_that_is_not_visible_fails():
    assert said(topk([1.0, 2.0, 3.0, 9.0], 3, 2), [3, 2]) == "reach"


def test_an_entry_that_is_no_candidate_fails():
    call = topk([1.0, 2.0, 3.0, 9.0], 4, 2, candidates=torch.tensor([[0, 1]]), candidate_block=1)
    assert said(call, [3, 1]) == "reach"


def test_of_invisible_entries_alone_none_may_be_named():
    assert said(topk([1.0, 2.0], 0, 1), [0]) == "count"


def test_an_index_behind_the_tail_fails():
    assert said(topk([1.0, 2.0, 3.0], 2, 3), [1, -1, 0]) == "tail"


def test_a_visible_entry_of_minus_infinity_may_be_chosen():
    assert said(topk([1.0, -torch.inf, 3.0], 2, 2), [0, 1]) == ""


def test_nan_scores_leave_the_choice_free():
    assert said(topk([1.0, torch.nan, 3.0, 2.0], 4, 2), [0, 3]) == ""


def test_nan_scores_do_not_make_an_index_twice_legal():
    assert said(topk([1.0, torch.nan, 3.0, 2.0], 4, 2), [0, 0]) == "duplicates"


def test_a_tie_goes_to_the_lowest_index():
    assert said(topk([2.0, 1.0, 2.0, 2.0], 4, 2), [0, 3]) == "ties"


def test_no_entries_give_no_index():
    call = isolith.indexer_topk.arguments(torch.zeros(2, 0), torch.zeros(2, dtype=torch.int32), 3)
    assert judge(TOPK, call, evaluate(TOPK, TOPK.reference, call)).problem is None


GATE = OPERATORS["moe_gate"]


def gate(logits, k, **how):
    call = isolith.moe_gate.arguments(torch.tensor(logits), k, **how)
    return call, evaluate(GATE, GATE.reference, call)


def test_equal_logits_are_a_tie_though_their_scores_are_rounded():
    call, (_, weights) = gate([[0.3, 0.7, 0.3, 0.1]], 2)
    assert judge(GATE, call, [torch.tensor([[1, 2]]).int(), weights]).check == "ties"


def test_experts_within_a_rounding_of_each_other_are_either_right():
    call, (_, weights) = gate([[0.3, 0.7, 0.3 + 3e-8, 0.1]], 2)
    both = [torch.tensor([[1, other]]).int() for other in (0, 2)]
    assert [judge(GATE, call, [each, weights]).check for each in both] == ["", ""]


def test_the_order_of_experts_is_that_of_their_scores():
    call, (experts, weights) = gate([[0.3, 0.7, 0.4, 0.1]], 2)
    assert judge(GATE, call, [experts.flip(1), weights.flip(1)]).check == "order"


def test_an_expert_beyond_its_group_fails():
    logits = [[3.0, 2.9, 0.1, 0.2, 2.95, 0.0, 0.0, 0.0]]
    call, (_, weights) = gate(logits, 2, groups=2, topk_groups=1, bias=torch.zeros(8))
    assert judge(GATE, call, [torch.tensor([[0, 4]]).int(), weights]).check == "selection"


def test_a_token_that_is_off_names_no_expert():
    call, (_, weights) = gate([[0.3, 0.7, 0.4, 0.1]], 2, mask=torch.tensor([False]))
    assert judge(GATE, call, [torch.tensor([[0, 1]]).int(), weights]).check == "count"


def test_nan_logits_leave_the_experts_in_range():
    call, (_, weights) = gate([[0.3, torch.nan, 0.4, 0.1]], 2)
    found = [torch.tensor([pair]).int() for pair in ([3, 0], [1, 1], [4, 0])]
    assert [judge(GATE, call, [each, weights]).check for each in found] == ["", "", "range"]


def test_a_legal_variant_that_selects_otherwise_does_not_widen_the_limits():
    logits = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    logits[:, 1] = logits[:, 0] + 5e-8
    call, (experts, weights) = gate(logits.tolist(), 6)
    verdict = expect(GATE, call).judge([experts, weights * (1 + 1e-5)])
    assert verdict.check == "R1"


def test_the_selection_and_the_values_are_told_apart():
    call, (_, weights) = gate([[0.3, 0.7, 0.4, 0.1]], 2)
    expectation = expect(GATE, call)
    wrong = [torch.tensor([[1, 0]]).int(), weights]
    assert (expectation.judge(wrong).check, expectation.selection(wrong).check) == ("", "selection")
