"""Lists of entries by token: which slot each column means, and the entries themselves.

A column holds a logical item of the token's own sequence where there is a block table, else a slot of the pool. It is
invalid where it is negative, behind the table or the pool, in a block given as -1, or at or behind the token's length.
"""

import torch
from torch import Tensor

from isolith.dtypes import widen
from isolith.numerics.pages import read_entries, slots_of_items
from isolith.numerics.ragged import sequence_of_tokens


def slots_of_columns(
    cache: Tensor, indices: Tensor, length: Tensor | None, block_table: Tensor | None, sequence: Tensor | None
) -> Tensor:
    """The slot that each column of a list means, -1 where the column is invalid: [tokens, n] int64.

    Args:
        cache: The pool.
        indices: [tokens, n].
        length: [tokens]; None = all columns.
        block_table: None = the indices are slots.
        sequence: [tokens], the sequence of each token; needed with a block table.
    """
    if block_table is not None and sequence is not None:
        slots = slots_of_items(block_table, sequence[:, None], indices, cache.shape[1])
    else:
        slots = indices.long()
    valid = (slots >= 0) & (slots < cache.shape[0] * cache.shape[1])
    if length is not None:
        valid &= torch.arange(indices.shape[1], device=indices.device) < length[:, None]
    return torch.where(valid, slots, -1)


def listed_entries(
    q: Tensor,
    kv_cache: Tensor,
    indices: Tensor,
    topk_length: Tensor | None,
    block_table: Tensor | None,
    cu_seqlens: Tensor | None,
    extra_kv_cache: Tensor | None,
    extra_indices: Tensor | None,
    extra_topk_length: Tensor | None,
    extra_block_table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The entries that each token's lists name, of both pools in turn, and which of them are valid.

    Returns:
        kv: [tokens, columns, head_dim] in float32 (float64); zeros where invalid. At least one column.
        valid: [tokens, columns].
    """
    sequence = None if cu_seqlens is None else sequence_of_tokens(cu_seqlens, q.shape[0])
    slots = slots_of_columns(kv_cache, indices, topk_length, block_table, sequence)
    slots = torch.cat((slots, slots.new_full((slots.shape[0], 1), -1)), dim=1)  # a maximum needs one column
    kv, valid = read_entries(kv_cache, slots, widen(q.dtype)), slots >= 0
    if extra_kv_cache is not None and extra_indices is not None:
        slots = slots_of_columns(extra_kv_cache, extra_indices, extra_topk_length, extra_block_table, sequence)
        kv = torch.cat((kv, read_entries(extra_kv_cache, slots, kv.dtype)), dim=1)
        valid = torch.cat((valid, slots >= 0), dim=1)
    return kv, valid
