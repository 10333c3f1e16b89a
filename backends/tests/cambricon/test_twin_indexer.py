"""The twin's indexer and block tables, by hand."""

import pytest
import torch

HEADS, DIM = 32, 128


def keys_of(values):
    keys = torch.zeros(len(values), DIM)
    keys[:, 0] = torch.tensor(values)
    return keys.bfloat16()


def query_of(tokens):
    query = torch.zeros(tokens, HEADS, DIM)
    query[:, 0, 0] = 1.0
    return query.bfloat16()


def decode(tmo, int32, keys, length, topk=2, offset=None, size=1, table=None, **changed):
    pages = torch.zeros(len(keys), 1, 16, DIM, dtype=torch.bfloat16)
    pages[0, 0, : len(keys)] = keys_of(keys)
    given = {
        "query": query_of(1)[:, None],
        "k_cache": pages,
        "weights": torch.ones(1, 1, HEADS, 1),
        "kv_cache_block_table": int32([list(range(10, 26))]) if table is None else table,
        "cu_seq_q_lens": None,
        "cu_seq_k_lens": None,
        "k_context_lens": int32([length]),
        "k_cache_block_table": int32([[0]]),
        "is_prefill": False,
        "index_topk": topk,
        "kv_cache_block_size": size,
        "softmax_scale": 1.0,
        "q_scale": None,
        "k_scale_cache": None,
        "sparse_block_table": None,
        "sparse_context_lens": None,
        "kv_cache_block_table_offset": offset,
        "compress_ratio": 4,
        "is_score_float": True,
    }
    return tmo.masked_indexer_select_paged_kv(**given | changed)


def test_result_is_slots_in_no_order_of_the_caller(tmo, int32):
    table, lens = decode(tmo, int32, [1.0, 3.0, 2.0], 12)
    assert (table.flatten().tolist(), lens.tolist()) == ([12, 11], [2])


def test_columns_behind_the_count_are_undefined(tmo, int32):
    table, lens = decode(tmo, int32, [1.0, 3.0], 7)
    assert (table.flatten().tolist(), lens.tolist()) == ([10, -0x7F7F7F7F], [1])


def test_given_tables_are_written(tmo, int32):
    given = int32([[[-1, -1]]])
    decode(tmo, int32, [1.0], 4, sparse_block_table=given, sparse_context_lens=int32([0]))
    assert given.flatten().tolist() == [10, -0x7F7F7F7F]


def test_lengths_are_those_before_compression(tmo, int32):
    assert decode(tmo, int32, [1.0, 3.0, 2.0], 3)[1].tolist() == [0]


def test_day0_lengths_are_those_after_compression(day0, int32):
    assert decode(day0, int32, [1.0, 3.0, 2.0], 3, topk=9)[1].tolist() == [3]


def test_offset_shifts_the_columns(tmo, int32):
    assert decode(tmo, int32, [1.0], 4, topk=1, offset=int32([5]))[0].item() == 15


def test_offset_is_positive(tmo, int32):
    with pytest.raises(RuntimeError, match="must be positive"):
        decode(tmo, int32, [1.0], 4, offset=int32([0]))


def test_slots_of_larger_blocks(tmo, int32):
    table, _ = decode(tmo, int32, [0.0] * 15 + [9.0], 64, topk=1, size=16, table=int32([[7]]))
    assert table.item() == 7 * 16 + 15


def test_relu_comes_before_the_weight(tmo, int32):
    # Head 0, of weight -1, reads lane 0; head 1 reads lane 1. Without the relu the entry at -5 would be worth 5.
    query, weights = query_of(1)[:, None], torch.ones(1, 1, HEADS, 1)
    query[0, 0, 1, 1], weights[0, 0, 0] = 1.0, -1.0
    pages = torch.zeros(1, 1, 16, DIM, dtype=torch.bfloat16)
    pages[0, 0, 0, 0], pages[0, 0, 1, 1] = -5.0, 1.0
    assert decode(tmo, int32, [0.0], 8, topk=1, query=query, weights=weights, k_cache=pages)[0].item() == 11


@pytest.mark.parametrize(("exact", "slot"), [(True, 11), (False, 10)])
def test_scores_are_rounded_unless_asked_for(tmo, int32, exact, slot):
    keys, scale = [1.0, 1.0], torch.ones(2, 1, 16)
    scale[0, 0, 1] = 1.001
    codes = torch.zeros(2, 1, 16, DIM, dtype=torch.int8)
    codes[0, 0, :2, 0] = 1
    query = query_of(1)[:, None].to(torch.int8)
    given = {"k_cache": codes, "query": query, "q_scale": torch.ones(1, 1, HEADS), "k_scale_cache": scale}
    assert decode(tmo, int32, keys, 8, topk=1, is_score_float=exact, **given)[0].item() == slot


@pytest.mark.parametrize(("heads", "dim"), [(16, 128), (32, 64)])
def test_heads_are_32_or_64_of_128(tmo, int32, heads, dim):
    with pytest.raises(RuntimeError, match="must be"):
        decode(tmo, int32, [1.0], 4, query=torch.zeros(1, 1, heads, dim), weights=torch.ones(1, 1, heads, 1))


def prefill(tmo, int32, lengths_q, lengths_k, keys):
    def sums(lengths):
        return torch.tensor([0, *lengths]).cumsum(0).int()

    tokens = sum(lengths_q)
    table = torch.arange(100 * len(lengths_q), dtype=torch.int32).view(len(lengths_q), 100)
    given = (query_of(tokens), keys_of(keys), torch.ones(tokens, HEADS, 1), table, sums(lengths_q), sums(lengths_k))
    return tmo.masked_indexer_select_paged_kv(*given, None, None, True, 2, 1, 1.0, compress_ratio=4)


def test_dense_keys_of_a_sequence_begin_behind_the_whole_windows_before(tmo, int32):
    table, lens = prefill(tmo, int32, [7, 4], [7, 4], [1.0, 2.0])
    assert (lens.tolist(), table[-1, 0].item()) == ([0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1], 100)


def test_a_chunk_ends_where_its_keys_end(tmo, int32):
    assert prefill(tmo, int32, [2], [8], [1.0, 2.0])[1].tolist() == [1, 2]


def test_query_is_rotated_at_its_end(tmo, int32):
    q, w = torch.ones(1, 1).half(), torch.ones(1, 128, 1).half()
    sin, cos = torch.zeros(1, 64), torch.zeros(1, 64)
    out = tmo.fused_indexer_q(q, w, sin, cos, int32([0]), rope_at_front=False)
    assert (out[0, 0, 63].item(), out[0, 0, 64].item()) == (1.0, 0.0)


def test_query_is_rotated_at_its_front_by_default(tmo, int32):
    q, w = torch.ones(1, 1).half(), torch.ones(1, 128, 1).half()
    out = tmo.fused_indexer_q(q, w, torch.zeros(1, 64), torch.zeros(1, 64), int32([0]))
    assert (out[0, 0, 63].item(), out[0, 0, 64].item()) == (0.0, 1.0)


def compress_tables(tmo, int32, keys, starts, offset, width=4):
    tables, lens = torch.zeros(starts[-1], width, dtype=torch.int32), torch.zeros(starts[-1], dtype=torch.int32)
    block_table = int32([[50 + i for i in range(8)]] * len(keys))
    tmo.get_compress_block_tables(tables, lens, int32(keys), int32(starts), int32(offset), block_table, 1, 4)
    return tables, lens


def test_decode_rows_come_from_the_block_table(tmo, int32):
    tables, lens = compress_tables(tmo, int32, [11], [0, 1], [3])
    assert (tables[0].tolist(), lens.tolist()) == ([53, 54, -0x7F7F7F7F, -0x7F7F7F7F], [2])


def test_prefill_rows_count_from_the_offset(tmo, int32):
    tables, lens = compress_tables(tmo, int32, [5], [0, 5], [9])
    assert (tables[4, 0].item(), lens.tolist()) == (9, [0, 0, 0, 1, 1])


def test_rows_must_fit(tmo, int32):
    with pytest.raises(RuntimeError, match="needs 2 columns, but the table has 1"):
        compress_tables(tmo, int32, [11], [0, 1], [3], width=1)


def window_tables(tmo, int32, keys, starts, window):
    tables, lens = torch.zeros(starts[-1], 4, dtype=torch.int32), torch.zeros(starts[-1], dtype=torch.int32)
    block_table = int32([[50 + i for i in range(8)]] * len(keys))
    tmo.get_window_block_tables(tables, lens, int32(keys), int32(starts), block_table, 1, window)
    return [row[:count].tolist() for row, count in zip(tables, lens.tolist(), strict=True)]


def test_a_window_of_a_decode_is_the_ring(tmo, int32):
    assert window_tables(tmo, int32, [9], [0, 1], 3) == [[50, 51, 52]]


def test_a_window_of_a_prefill_is_dense_rows(tmo, int32):
    assert window_tables(tmo, int32, [2, 3], [0, 2, 5], 2) == [[0], [0, 1], [2], [2, 3], [3, 4]]


def test_windows_are_below_1024(tmo, int32):
    with pytest.raises(RuntimeError, match="below 1024, but is 1024"):
        window_tables(tmo, int32, [1], [0, 1], 1024)


def test_joined_rows_leave_no_gap(tmo, int32):
    table, lens = tmo.concat_block_table(int32([[1, -1]]), int32([1]), int32([[7, 8]]), int32([2]))
    assert (table[0, :3].tolist(), lens.tolist()) == ([1, 7, 8], [3])


def test_joined_rows_may_replace_the_first(tmo, int32):
    first = int32([[1, 0, 0]])
    tmo.concat_block_table(first, int32([1]), int32([[7, 8]]), int32([2]), first, int32([0]))
    assert first.tolist() == [[1, 7, 8]]


def test_joined_rows_may_not_replace_the_second(tmo, int32):
    second = int32([[7, 8]])
    with pytest.raises(RuntimeError, match="must not be second_block_table"):
        tmo.concat_block_table(int32([[1]]), int32([1]), second, int32([2]), second)
