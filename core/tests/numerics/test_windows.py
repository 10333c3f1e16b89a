"""Compression windows: which entries a call emits, which rows it reads, and which it leaves."""

import pytest
import torch

from isolith import ArgumentError, Make
from isolith.numerics import windows


def entries(tokens, start, ratio=4):
    return windows.entries_of_call(*Make().batch(tokens, start), sum(tokens), ratio)


def test_windows_come_by_sequence_and_then_by_number():
    found = entries([3, 5, 0, 6], [0, 3, 8, 7])
    emitted = found.emitted.tolist()
    assert found.cu_entries.tolist() == [0, 0, 2, 2, 4]
    assert emitted == [True] * 4 + [False] * 3
    assert (found.sequence[:4].tolist(), found.window[:4].tolist()) == ([1, 1, 3, 3], [0, 1, 1, 2])


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 128])
@pytest.mark.parametrize("start", [0, 1, 2, 3, 127])
def test_no_batch_emits_more_than_the_rows_it_has(ratio, start):
    found = entries([1, 2, 0, 9, 130], [start] * 5, ratio)
    assert int(found.cu_entries[-1]) == int(found.emitted.sum()) <= len(found.emitted)


@pytest.mark.parametrize(("tokens", "rows"), [([1] * 4, 4), ([4], 2), ([8, 8], 6), ([0, 0], 0), ([], 0)], ids=str)
def test_rows_are_the_least_that_no_value_decides(tokens, rows):
    assert windows.max_entries_of_call(sum(tokens), len(tokens), 4) == rows


def sources_of(start, overlap):
    """Where the rows of the only entry come from, of a call that brings positions start .. 7 of ratio 4."""
    cu_seqlens, start_pos = Make().batch([8 - start], [start])
    found = windows.entries_of_call(cu_seqlens, start_pos, 8 - start, 4)
    state, table = torch.zeros(2, 8, 1), torch.tensor([[1]])
    token, slot = windows.sources(found, cu_seqlens, start_pos, state, table, 4, overlap)
    return token[0].tolist(), slot[0].tolist()


def test_rows_before_the_call_come_from_the_state_and_the_others_from_its_tokens():
    assert sources_of(6, True) == ([-1] * 6 + [0, 1], [8, 9, 10, 11, 12, 13, -1, -1])


def test_window_before_is_read_with_overlap_only():
    assert sources_of(6, False) == ([-1, -1, 0, 1], [12, 13, -1, -1])


def test_first_window_has_none_before_it():
    token, slot = sources_of(0, True)
    assert (token, slot) == ([-1] * 4 + [0, 1, 2, 3], [-1] * 8)


def write(table, positions):
    state, rows = torch.full((3, 2, 1), -1.0), torch.arange(float(len(positions)))[:, None]
    sequence = torch.zeros(len(positions), dtype=torch.int64)
    windows.write_rows(state, torch.tensor([table]), sequence, torch.tensor(positions), rows)
    return state.flatten().tolist()


def test_latest_row_of_a_ring_stays():
    assert write([1] * 9, [3, 4, 5, 6, 7]) == [-1.0, -1.0, 3.0, 4.0, -1.0, -1.0]


def test_row_without_a_block_is_not_written():
    assert write([2, -1, 0], [1, 2, 3, 4]) == [3.0, -1.0, -1.0, -1.0, -1.0, 0.0]


@pytest.mark.parametrize(
    ("length", "overlap", "live"),
    [
        (0, True, []),
        (3, True, [0, 1, 2]),
        (4, True, [0, 1, 2, 3]),
        (9, True, [4, 5, 6, 7, 8]),
        (0, False, []),
        (3, False, [0, 1, 2]),
        (4, False, []),
        (9, False, [8]),
    ],
)
def test_live_rows_are_those_of_the_open_window_and_with_overlap_of_the_one_before(length, overlap, live):
    state, table = torch.zeros(1, 12, 1), torch.tensor([[0]])
    assert windows.live_rows(state, table, torch.tensor([length]), 4, overlap)[0].nonzero().flatten().tolist() == live


def check(tokens, start, table, overlap=True, length=64):
    state = torch.zeros(4, 4, 1)
    table = torch.tensor([table] * len(tokens), dtype=torch.int32)
    windows.check_windows("op", state, table, *Make().batch(tokens, start), 4, overlap, length)


def test_rows_of_a_call_that_emits_nothing_need_no_block():
    check([2], [5], [-1, -1])


def test_row_of_this_call_needs_no_block():
    check([2, 0], [6, 9], [1, 2, -1])


def test_ring_that_lost_a_row_which_is_read_is_refused():
    with pytest.raises(ArgumentError, match=r"op: state_cache must hold positions 0\.\.6 of sequence 0 at once"):
        check([1], [7], [1, 1])


def test_ring_of_one_window_does_without_overlap():
    check([1], [7], [1, 1], overlap=False)


def test_tables_that_reach_the_last_windows_first_token_do():
    check([9], [0], [0, 1, 2], length=5)


def test_tables_that_end_before_it_are_refused():
    with pytest.raises(ArgumentError, match="cos_table must reach position ratio"):
        check([9], [0], [0, 1, 2], length=4)
