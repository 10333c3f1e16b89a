"""Columns of a token's list, and the slots that they mean (see isolith.numerics.lists).

A list is given as indices, or follows from the token's position: the last positions up to it, or all that it sees.
"""

import triton
import triton.language as tl

NONE = 0
GIVEN = 1
"""Indices, up to the token's length, invalid ones anywhere."""
SEEN = 2
"""Items 0, 1, 2 .. of those that the token sees."""
WINDOW = 3
"""The last positions up to the token's own."""

GIVEN_LIST = tl.constexpr(GIVEN)
WINDOW_LIST = tl.constexpr(WINDOW)
SCANNED = tl.constexpr(1024)


@triton.jit
def span_of_list(INDICES, LENGTH, token, columns, position, reach, room, KIND: tl.constexpr, CAUSAL: tl.constexpr):
    """(first item, columns to look at, items that may be looked at) of a token's list.

    Args:
        INDICES: The token's row of indices, for a given list.
        LENGTH: How many of its columns count, or None.
        token: The token.
        columns: Columns of a given list.
        position: The token's position, where anything depends on it.
        reach: Positions of a window; else positions to an item.
        room: Items that the tables or the pool have room for.
        KIND: NONE, GIVEN, SEEN or WINDOW.
        CAUSAL: Whether a given list may name items that the token does not see.
    """
    first = token * 0
    count = first
    limit = first + room
    if KIND == WINDOW_LIST:
        first = tl.maximum(position - reach + 1, 0)
        count = position - first + 1
    else:
        if KIND != GIVEN_LIST or CAUSAL:
            limit = tl.minimum(limit, (position + 1) // reach)
        count = limit
        if KIND == GIVEN_LIST:
            if LENGTH is not None:
                length = tl.load(LENGTH + token)
                count = tl.minimum(tl.maximum(length, 0), columns).to(tl.int32)
            else:
                # Lists end in columns that name nothing: whoever looks for their end need not go through them.
                count = token * 0
                for start in range(0, columns, SCANNED):
                    column = start + tl.arange(0, SCANNED)
                    item = tl.load(INDICES + column, mask=column < columns, other=-1)
                    count = tl.maximum(count, tl.max(tl.where(item >= 0, column + 1, 0)))
    return first, count, limit


@triton.jit
def slots_of_columns(INDICES, TABLE, column, first, count, limit, blocks, block_size):
    """(block, row, valid) [columns]; where not valid, block and row are 0."""
    valid = column < count
    if INDICES is None:
        item = first + column
    else:
        item = tl.load(INDICES + column, mask=valid, other=-1)
    valid = valid & (item >= 0) & (item < limit)
    item = tl.where(valid, item, 0).to(tl.int32)
    block = item // block_size
    row = item - block * block_size
    if TABLE is not None:
        block = tl.load(TABLE + block, mask=valid, other=-1)
        valid = valid & (block >= 0) & (block < blocks)
        block = tl.where(valid, block, 0)
    return block, row, valid
