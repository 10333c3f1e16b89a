"""indexer_topk: which entries, and which of equals."""

import math

import pytest
import torch

from isolith import Make
from isolith.ops.attention import indexer_topk

inf = math.inf


def by_hand(scores, length, k, blocks=None, size=1):
    """The selection of one row, with Python's stable sort."""
    competing = [s for s in range(min(length, len(scores))) if blocks is None or s // size in blocks]
    return sorted(competing, key=lambda s: -scores[s])[:k]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("k", [1, 7, 40, 64])
@pytest.mark.parametrize("size", [0, 1, 8], ids=["all", "candidates_of_1", "candidates_of_8"])
def test_selection_is_a_stable_sort_cut_at_k(k, size):
    make = Make(torch.float32, seed=1)
    scores, lengths = make.small_integers(5, 40), int32(0, 3, 17, 40, 99)
    lists = make.integers(-1, 7, 5, 6)
    indices, count = indexer_topk(scores, lengths, k, lists if size else None, max(size, 1))
    for row in range(5):
        blocks = set(lists[row].tolist()) if size else None
        want = by_hand(scores[row].tolist(), int(lengths[row]), k, blocks, size)
        assert indices[row].tolist() == want + [-1] * (k - len(want))
        assert int(count[row]) == len(want)


def test_tie_goes_to_the_lower_index():
    indices, _ = indexer_topk(torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]]), int32(5), 3)
    assert indices.tolist() == [[1, 3, 0]]


def test_negative_zero_ties_with_zero():
    indices, _ = indexer_topk(torch.tensor([[-0.0, 0.0, -0.0]]), int32(3), 2)
    assert indices.tolist() == [[0, 1]]


def test_a_visible_entry_of_minus_infinity_comes_after_finite_ones_and_before_none():
    indices, count = indexer_topk(torch.tensor([[-inf, -3.0, -inf, 9.0]]), int32(3), 4)
    assert indices.tolist() == [[1, 0, 2, -1]]
    assert count.tolist() == [3]


def test_nan_scores_leave_the_indices_in_range_and_distinct():
    scores = torch.tensor([[torch.nan, 1.0, torch.nan, 2.0, torch.nan, 0.0]])
    indices, _ = indexer_topk(scores, int32(5), 4)
    chosen = indices[0].tolist()
    assert set(chosen) <= set(range(5))
    assert len(set(chosen)) == 4


def test_invisible_nan_is_never_selected():
    indices, _ = indexer_topk(torch.tensor([[1.0, torch.nan, inf]]), int32(1), 2)
    assert indices.tolist() == [[0, -1]]


def test_two_levels_of_selection_find_the_largest_entry():
    scores = Make(torch.float32, seed=2).normal(3, 64)
    blocks, _ = indexer_topk(scores.view(3, 8, 8).amax(-1), int32(8, 8, 8), 2)
    indices, _ = indexer_topk(scores, int32(64, 64, 64), 1, blocks, 8)
    assert torch.equal(indices[:, 0].long(), scores.argmax(1))


def test_subnormal_scores_are_told_apart():
    indices, _ = indexer_topk(torch.tensor([[0.0, 2e-45, -2e-45, 5e-45]]), int32(4), 3)
    assert indices.tolist() == [[3, 1, 0]]
