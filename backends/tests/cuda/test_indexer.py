import pytest
import torch

from isolith import OPERATORS, Make
from isolith.materials.indexer import batch_of_scores
from isolith_backends.cuda import attention
from isolith_backends.cuda.kernels import indexer_score, indexer_topk, lightning_indexer

MAKE = Make(torch.bfloat16, seed="indexer")


def selected(name, call):
    """(what the kernel selects, what the reference does), each list in ascending order."""
    operator = OPERATORS[name]
    arguments = operator.arguments(**call)
    results = getattr(attention, name).fn(**arguments), operator.reference(**arguments)
    return [[indices.sort().values.tolist(), count.tolist()] for indices, count in results]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pieces", [1, 3], ids=["whole", "in_pieces"])
def test_rows_beyond_the_registers_select_as_the_reference(monkeypatch, dtype, pieces):
    monkeypatch.setattr(indexer_topk, "ROW", 64)
    monkeypatch.setattr(indexer_topk, "PIECE", 128)
    monkeypatch.setattr(indexer_topk, "PROGRAMS", 3 * pieces)
    few = MAKE.integers(-3, 4, 3, 700).to(dtype)  # hundreds of equal scores at the k-th
    call = {"scores": few, "lengths": MAKE.tensor([700, 333, 0], torch.int32), "k": 97}
    ours, due = selected("indexer_topk", call)
    assert ours == due


def test_candidates_of_a_row_in_pieces_are_the_reference_s(monkeypatch):
    monkeypatch.setattr(indexer_topk, "ROW", 64)
    monkeypatch.setattr(indexer_topk, "PIECE", 128)
    call = {"scores": MAKE.normal(2, 700), "lengths": MAKE.tensor([700, 500], torch.int32), "k": 60}
    listed = MAKE.integers(-1, 80, 2, 20)
    ours, due = selected("indexer_topk", call | {"candidates": listed, "candidate_block": 9})
    assert ours == due


def test_minus_infinity_competes_behind_all_others_in_pieces(monkeypatch):
    monkeypatch.setattr(indexer_topk, "ROW", 64)
    monkeypatch.setattr(indexer_topk, "PIECE", 128)
    scores = MAKE.normal(1, 300)
    scores[:, ::2] = -torch.inf
    ours, due = selected("indexer_topk", {"scores": scores, "lengths": MAKE.tensor([300], torch.int32), "k": 200})
    assert ours == due


@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_runs_of_tokens_select_as_all_at_once(monkeypatch, tokens):
    call = batch_of_scores(MAKE, [9, 0, 1, 6], [70, 8, 2, 125], 4, 8, 32, 4) | {"k": 5}
    monkeypatch.setattr(lightning_indexer, "SCORED", tokens * call["max_entries"] * 4)
    ours, due = selected("lightning_indexer", call)
    assert ours == due


@pytest.mark.parametrize("first", [0, 1, 4, 9, 10])
def test_scores_of_some_tokens_are_those_of_all(first):
    call = batch_of_scores(MAKE, [9, 0, 1, 6], [70, 8, 2, 125], 4, 8, 32, 4)
    due = OPERATORS["indexer_score"].reference(**call)[first : first + 6]
    entries, scale = call.pop("max_entries"), call.pop("softmax_scale")
    out = torch.full((6, entries), torch.nan)
    indexer_score.indexer_score(*call.values(), scale, None, out, first)
    torch.testing.assert_close(out, due)


@pytest.mark.parametrize("block", [1 << 20, -7])
def test_blocks_beyond_the_pool_are_not_read(block):
    call = batch_of_scores(MAKE, [3], [60], 4, 4, 32, 4)
    lost = call["block_table"].clone()
    lost[0, 1] = -1
    due = OPERATORS["indexer_score"].reference(**call | {"block_table": lost})
    call["block_table"][0, 1] = block
    torch.testing.assert_close(attention.indexer_score.fn(**call), due)
