"""Tiles of tokens of one sequence each, in a ragged batch whose counts the host does not know.

With tiles of n tokens sequence b owns the tiles from floor(cu_seqlens[b] / n) + b on, up to the next sequence's first:
enough for its tokens wherever they begin, and all of them number floor(tokens / n) + sequences, of which some are
empty. Tiles of one token are the tokens.
"""

import triton
import triton.language as tl


@triton.jit
def sequence_of_token(token, CU_SEQLENS, sequences):
    """The sequence that a token belongs to: how many end at or before it."""
    ended = token * 0
    for first in range(0, sequences, 128):
        row = first + tl.arange(0, 128)
        end = tl.load(CU_SEQLENS + 1 + row, mask=row < sequences, other=2147483647)
        ended += tl.sum((end <= token).to(tl.int32))
    return tl.minimum(ended, sequences - 1)


@triton.jit
def sequence_of_tile(CU, sequences, first, last, tile, TOKENS: tl.constexpr):
    """The sequence that owns a tile, of the tokens first..last-1 of the call alone; CU is cu_seqlens."""
    if TOKENS == 1:
        return sequence_of_token(first + tile, CU, sequences)
    found = 0
    for base in range(0, sequences, 256):
        number = base + tl.arange(0, 256)
        known = number < sequences
        begin = tl.load(CU + number, mask=known, other=0)
        begin = tl.minimum(tl.maximum(begin, first), last) - first
        found += tl.sum((known & (begin // TOKENS + number <= tile)).to(tl.int32))
    return found - 1


@triton.jit
def first_token_of_tile(CU, sequence, first, last, tile, TOKENS: tl.constexpr):
    """The first token of a tile; it may lie behind its sequence's last, where the tile is empty."""
    if TOKENS == 1:
        return first + tile
    begin = tl.minimum(tl.maximum(tl.load(CU + sequence), first), last)
    return begin + (tile - (begin - first) // TOKENS - sequence) * TOKENS


def tiles_of(tokens: int, sequences: int, size: int) -> int:
    """How many tiles of so many tokens a call may need."""
    return tokens if size == 1 else tokens // size + sequences
