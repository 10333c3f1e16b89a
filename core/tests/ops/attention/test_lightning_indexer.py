"""lightning_indexer: the composite against its parts, and in every division of a sequence into calls."""

import pytest
import torch

from isolith import Make
from isolith.materials.indexer import batch_of_scores
from isolith.ops.attention import indexer_score, indexer_topk, lightning_indexer

WIDE = torch.float64


def test_selection_is_indexer_topk_of_indexer_score():
    call = batch_of_scores(Make(WIDE, seed=1), [4, 2], [33, 90], 4, 3, 32, 5)
    lengths = torch.tensor([8, 8, 9, 9, 22, 23])
    want = indexer_topk(indexer_score(**call, out_dtype="float64"), lengths, 7)
    got = lightning_indexer(**call, k=7, out_dtype="float64")
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_all_visible_entries_are_selected_when_there_are_at_most_k():
    call = batch_of_scores(Make(WIDE, seed=2), [6], [10], 4, 3, 32, 5)
    indices, count = lightning_indexer(**call, k=4)
    seen = [(p + 1) // 4 for p in range(10, 16)]
    assert count.tolist() == seen
    assert [sorted(i for i in row if i >= 0) for row in indices.tolist()] == [list(range(n)) for n in seen]


@pytest.mark.parametrize("splits", [[1] * 24, [7, 0, 17], [23, 1]], ids=["decode", "chunks", "last_alone"])
def test_selection_does_not_depend_on_the_division_into_calls(splits):
    whole = batch_of_scores(Make(WIDE, seed=3), [24], [0], 2, 2, 32, 4)
    rows, start = [], 0
    for tokens in splits:
        cu_seqlens, start_pos = Make().batch([tokens], [start])
        part = {name: whole[name][start : start + tokens] for name in ("q", "weights")}
        part |= {"cu_seqlens": cu_seqlens, "start_pos": start_pos}
        rows.append(lightning_indexer(**whole | part, k=3, out_dtype="float64")[0])
        start += tokens
    assert torch.equal(torch.cat(rows), lightning_indexer(**whole, k=3, out_dtype="float64")[0])


def test_rounding_scores_to_bfloat16_makes_ties_that_the_lower_index_wins():
    call = batch_of_scores(Make(torch.float32, seed=4), [1], [7], 1, 1, 32, 8)
    keys = torch.zeros_like(call["k_cache"])
    block = int(call["block_table"][0, 0])
    keys[block, :, 0] = torch.tensor([1.0, 1.001, 1.002, 0.5, 0.5, 0.5, 0.5, 0.5])
    one = torch.zeros(1, 1, 32).index_fill(2, torch.tensor([0]), 1.0)
    call |= {"k_cache": keys, "q": one, "weights": torch.ones(1, 1), "softmax_scale": 1.0}
    assert lightning_indexer(**call, k=1, out_dtype="bfloat16")[0].tolist() == [[0]]


@pytest.mark.parametrize("size", [1, 4])
def test_only_entries_of_the_candidate_blocks_are_selected(size):
    call = batch_of_scores(Make(WIDE, seed=5), [2, 1], [70, 50], 2, 2, 32, 4)
    candidates = torch.tensor([[3, -1, 0], [2, 2, 5], [1, 99, -1]])
    indices, count = lightning_indexer(**call, k=50, candidates=candidates, candidate_block=size)
    blocks = [{i // size for i in row if i >= 0} for row in indices.tolist()]
    assert blocks == [{0, 3}, {2, 5}, {1}]
    assert count.tolist() == [2 * size, 2 * size, size]
