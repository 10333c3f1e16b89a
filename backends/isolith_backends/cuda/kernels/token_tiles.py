"""Tiles of tokens of one sequence each, in a ragged batch whose counts the host does not know.

With tiles of n tokens sequence b owns the tiles from floor(cu_seqlens[b] / n) + b on, up to the next sequence's first:
enough for its tokens wherever they begin, and all of them number floor(tokens / n) + sequences, of which some are
empty. Tiles of one token are the tokens.
"""

import triton
import triton.language as tl


@triton.jit
def sequence_of_tile(CU, sequences, first, last, tile, TOKENS: tl.constexpr):
    """The sequence that owns a tile, of the tokens first..last-1 of the call alone; CU is cu_seqlens."""
    found = 0
    for base in range(0, sequences, 256):
        number = base + tl.arange(0, 256)
        known = number < sequences
        if TOKENS == 1:
            end = tl.load(CU + 1 + number, mask=known, other=0)
            found += tl.sum((known & (end <= first + tile)).to(tl.int32))
        else:
            begin = tl.load(CU + number, mask=known, other=0)
            begin = tl.minimum(tl.maximum(begin, first), last) - first
            found += tl.sum((known & (begin // TOKENS + number <= tile)).to(tl.int32))
    return tl.minimum(found, sequences - 1) if TOKENS == 1 else found - 1


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
