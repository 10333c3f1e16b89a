"""Ragged batches: whose token it is, where it stands, and which batches are refused."""

import pytest
import torch

from isolith import ArgumentError, Make
from isolith.numerics import ragged


def test_tokens_of_empty_sequences_go_to_nobody():
    cu_seqlens, _ = Make().batch([0, 2, 0, 0, 3, 0])
    assert ragged.sequence_of_tokens(cu_seqlens, 5).tolist() == [1, 1, 4, 4, 4]


def test_positions_count_from_where_the_sequence_stood():
    cu_seqlens, start_pos = Make().batch([2, 0, 3], [7, 4, 0])
    sequence, position = ragged.positions_of_tokens(cu_seqlens, start_pos, 5)
    assert (sequence.tolist(), position.tolist()) == ([0, 0, 2, 2, 2], [7, 8, 0, 1, 2])


@pytest.mark.parametrize("tokens", [[], [0, 0]], ids=["no sequences", "no tokens"])
def test_a_batch_may_be_empty(tokens):
    sequence, position = ragged.positions_of_tokens(*Make().batch(tokens), 0)
    assert (sequence.tolist(), position.tolist()) == ([], [])


def test_positions_do_not_overflow_int32_when_they_are_added():
    cu_seqlens, start_pos = Make().batch([2], [2**31 - 1])
    assert ragged.positions_of_tokens(cu_seqlens, start_pos, 2)[1].tolist() == [2**31 - 1, 2**31]


def test_spans_are_listed_one_after_the_other_and_those_that_end_before_they_start_not_at_all():
    sequence, item = ragged.items_of_spans(torch.tensor([3, 5, 0, 2]), torch.tensor([5, 1, 0, 3]))
    assert (sequence.tolist(), item.tolist()) == ([0, 0, 3], [3, 4, 2])


@pytest.mark.parametrize(
    ("cu_seqlens", "says"),
    [
        ([], "op: cu_seqlens must start at 0; got no element."),
        ([1, 3], "op: cu_seqlens must start at 0; got 1."),
        ([0, 2, 1, 3], "op: cu_seqlens must not decrease; got 2, 1 at 1."),
        ([0, 2], "op: cu_seqlens must end at the number of tokens, 3; got 2."),
        ([0, 4], "op: cu_seqlens must end at the number of tokens, 3; got 4."),
    ],
    ids=["empty", "first", "falling", "short", "long"],
)
def test_illegal_cu_seqlens_get_their_sentence(cu_seqlens, says):
    with pytest.raises(ArgumentError) as caught:
        ragged.check_cu_seqlens("op", torch.tensor(cu_seqlens, dtype=torch.int32), 3)
    assert str(caught.value) == says


@pytest.mark.parametrize("cu_seqlens", [[0, 3], [0, 0, 3, 3], [0, 1, 1, 3]], ids=str)
def test_legal_cu_seqlens_pass(cu_seqlens):
    ragged.check_cu_seqlens("op", torch.tensor(cu_seqlens, dtype=torch.int32), 3)
