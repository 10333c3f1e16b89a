"""Block tables with one row for each query token: get_window_block_tables, get_compress_block_tables and
concat_block_table of tmo 1.12.1 (domesticated_torch_mlu_ops@9fbf7df6 _ops.py).

A sequence whose keys are as many as its queries is a prefill, whose rows count into a dense tensor; any other is a
decode, whose rows come from its block table. The window's prefill rows are inferred, since no formula is public.
Columns behind a row's count are undefined.
"""

import torch
from torch import Tensor

from isolith_backends.cambricon.vendor.rules import fill_undefined, need, need_int32, need_none, need_shape, undefined


def get_compress_block_tables(
    compress_block_tables: Tensor,
    compress_context_lens: Tensor,
    seq_k_lens: Tensor,
    query_start_loc: Tensor,
    offset: Tensor,
    block_table: Tensor,
    block_size: int,
    ratio: int,
) -> None:
    call = "get_compress_block_tables"
    need_lists(call, compress_block_tables, compress_context_lens, seq_k_lens, query_start_loc, block_table, block_size)
    need_int32(call, offset=offset)
    need_shape(call, offset=(offset, tuple(seq_k_lens.shape)))
    fill_undefined(compress_block_tables)
    for sequence, token, position, prefill in tokens_of(seq_k_lens, query_start_loc):
        count, first = (position + 1) // ratio, int(offset[sequence])
        row = torch.arange(first, first + count) if prefill else block_table[sequence, first : first + count]
        write_row(call, compress_block_tables, compress_context_lens, token, row, count)


def get_window_block_tables(
    window_block_tables: Tensor,
    window_context_lens: Tensor,
    seq_k_lens: Tensor,
    query_start_loc: Tensor,
    block_table: Tensor,
    block_size: int,
    window_size: int,
) -> None:
    call = "get_window_block_tables"
    need_lists(call, window_block_tables, window_context_lens, seq_k_lens, query_start_loc, block_table, block_size)
    need(window_size < 1024, f"{call}: window_size must be below 1024, but is {window_size}.")
    fill_undefined(window_block_tables)
    for sequence, token, position, prefill in tokens_of(seq_k_lens, query_start_loc):
        count = min(position + 1, window_size)
        row = torch.arange(token - count + 1, token + 1) if prefill else block_table[sequence, :count]
        write_row(call, window_block_tables, window_context_lens, token, row, count)


def concat_block_table(
    first_block_table: Tensor,
    first_context_lens: Tensor,
    second_block_table: Tensor,
    second_context_lens: Tensor,
    new_block_table: Tensor | None = None,
    new_context_lens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    call = "concat_block_table"
    rows, columns = first_block_table.shape[0], first_block_table.shape[1] + second_block_table.shape[1]
    need_int32(call, first=first_block_table, second=second_block_table, new=new_block_table)
    need_int32(call, first_lens=first_context_lens, second_lens=second_context_lens, new_lens=new_context_lens)
    need_shape(call, second=(second_block_table, (rows, -1)), new=(new_block_table, (rows, -1)))
    need_shape(call, first_lens=(first_context_lens, (rows,)), second_lens=(second_context_lens, (rows,)))
    need_shape(call, new_lens=(new_context_lens, (rows,)))
    if new_block_table is not None:
        aliased = new_block_table.data_ptr() == second_block_table.data_ptr() and second_block_table.numel() > 0
        need(not aliased, f"{call}: new_block_table must not be second_block_table.")
        widest = max(first_block_table.shape[1], second_block_table.shape[1])
        need(new_block_table.shape[1] >= widest, f"{call}: new_block_table must have {widest} columns or more.")
    first, second = first_block_table.clone(), second_block_table.clone()
    lengths = list(zip(first_context_lens.tolist(), second_context_lens.tolist(), strict=True))
    table = undefined((rows, columns), torch.int32) if new_block_table is None else fill_undefined(new_block_table)
    lens = undefined((rows,), torch.int32) if new_context_lens is None else new_context_lens
    for row, (one, two) in enumerate(lengths):
        joint = torch.cat((first[row, :one], second[row, :two]))
        write_row(call, table, lens, row, joint, one + two)
    return table, lens


def need_lists(
    call: str,
    tables: Tensor,
    lens: Tensor,
    seq_k_lens: Tensor,
    query_start_loc: Tensor,
    block_table: Tensor,
    block_size: int,
) -> None:
    """Refuse what a table for each token cannot be made from."""
    batch = seq_k_lens.shape[0]
    need_int32(call, tables=tables, lens=lens, seq_k_lens=seq_k_lens, query_start_loc=query_start_loc)
    need_int32(call, block_table=block_table)
    need(batch <= 10000, f"{call}: batch must be at most 10000, but is {batch}.")
    need(block_size == 1 or block_size % 16 == 0, f"{call}: block_size must be 1 or a multiple of 16.")
    need_none(call, block_size=None if block_size == 1 else block_size)  # what a column means then is not public
    need_shape(call, query_start_loc=(query_start_loc, (batch + 1,)), block_table=(block_table, (batch, -1)))
    tokens = int(query_start_loc[-1])
    need(tables.shape[0] >= tokens and lens.shape[0] >= tokens, f"{call}: the tables must have {tokens} rows.")


def tokens_of(seq_k_lens: Tensor, query_start_loc: Tensor) -> list[tuple[int, int, int, bool]]:
    """(sequence, token, position, whether it is a prefill) of every query token."""
    starts, found = query_start_loc.tolist(), []
    for sequence, keys in enumerate(seq_k_lens.tolist()):
        queries = starts[sequence + 1] - starts[sequence]
        for i in range(queries):
            found.append((sequence, starts[sequence] + i, keys - queries + i, queries == keys))
    return found


def write_row(call: str, table: Tensor, lens: Tensor, row: int, values: Tensor, count: int) -> None:
    """Put a row and its count into the tables."""
    need(len(values) == count, f"{call}: row {row} needs {count} columns of its source, which has {len(values)}.")
    need(count <= table.shape[1], f"{call}: row {row} needs {count} columns, but the table has {table.shape[1]}.")
    table[row, :count] = values.int()
    lens[row] = count
