"""Lists of entries: which columns are valid, and which slots they mean."""

import pytest
import torch

from isolith.numerics.lists import listed_entries, slots_of_columns

POOL = torch.arange(12.0).view(3, 4, 1)  # the entry of slot s is s
TABLE = torch.tensor([[2, -1], [0, 1]], dtype=torch.int32)


def slots(indices, length=None, sequence=None):
    table = None if sequence is None else TABLE
    owner = None if sequence is None else torch.tensor(sequence)
    return slots_of_columns(POOL, torch.tensor(indices), length, table, owner).tolist()


def test_index_without_a_table_is_a_slot_of_the_pool():
    assert slots([[0, 11, 5]]) == [[0, 11, 5]]


@pytest.mark.parametrize("index", [-1, -(2**31), 12, 2**31 - 1, 2**40])
def test_index_outside_the_pool_is_invalid(index):
    assert slots([[index, 3]]) == [[-1, 3]]


def test_index_with_a_table_is_an_item_of_the_tokens_own_sequence():
    assert slots([[1, 3], [1, 6]], sequence=[0, 1]) == [[9, 11], [1, 6]]


@pytest.mark.parametrize("index", [-1, 4, 7, 8, 2**31 - 1], ids=str)
def test_item_without_a_block_is_invalid(index):
    assert slots([[index, 0]], sequence=[0]) == [[-1, 8]]


@pytest.mark.parametrize(("length", "valid"), [(-1, 0), (0, 0), (1, 1), (3, 3), (9, 3)])
def test_columns_from_the_length_on_are_invalid(length, valid):
    assert slots([[5, 6, 7]], torch.tensor([length])) == [[5, 6, 7][:valid] + [-1] * (3 - valid)]


def test_entries_of_the_second_pool_come_behind_those_of_the_first():
    q, lists = torch.zeros(1, 1, 1), torch.tensor([[3, -1]])
    more = (POOL + 100, torch.tensor([[7, 0]]), torch.tensor([1]), None)
    kv, valid = listed_entries(q, POOL, lists, None, None, None, *more)
    assert kv[0, valid[0], 0].tolist() == [3.0, 107.0]


def test_what_invalid_columns_would_read_is_zero():
    kv, valid = listed_entries(
        torch.zeros(1, 1, 1), torch.full_like(POOL, torch.nan), torch.tensor([[-1, 12]]), *[None] * 7
    )
    assert (kv.count_nonzero().item(), valid.any().item()) == (0, False)
