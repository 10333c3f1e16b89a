"""Entries of a paged pool, gathered by slot and widened to what a product takes.

A pool is [blocks, block_size, entry] of floats, or of uint8, where the bytes of an entry name its format (see
isolith.numerics.pages). A tile is [entries, WIDTH] dimensions from FIRST on; scales that are any float32 are left to
the product, where they are factors of its columns, so that the tile holds codes, which every float type holds exactly.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith import Unsupported
from isolith.numerics.pages import entry_dim, format_of
from isolith_backends.cuda.kernels.codes import decoded_e4m3, value_of_e2m1, value_of_e8m0
from isolith_backends.cuda.kernels.tensors import dense


@triton.jit
def addresses_of_entries(block, row, block_size, page, entry, FORMAT: tl.constexpr):
    """(entry, scales) [entries] int64: where each begins in its pool, in elements; the scales in bytes."""
    start = block.to(tl.int64) * page
    if FORMAT == 584:
        return start + row.to(tl.int64) * 576, start + block_size * 576 + row.to(tl.int64) * 8
    if FORMAT == 132:
        return start + row.to(tl.int64) * 128, start + block_size * 128 + row.to(tl.int64) * 4
    if FORMAT == 68:
        return start + row.to(tl.int64) * 64, start + block_size * 64 + row.to(tl.int64) * 4
    entry_at = start + row.to(tl.int64) * entry
    return entry_at, entry_at + 512


@triton.jit
def values_of_codes(
    POOL, address, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, LAST: tl.constexpr, FP8: tl.constexpr
):
    """e4m3 codes of dimensions FIRST .. FIRST+WIDTH-1 as float32, zeros from LAST on."""
    dim = FIRST + tl.arange(0, WIDTH)
    inside = valid[:, None] & (dim < LAST)[None, :]
    byte = tl.load(POOL + address[:, None] + dim[None, :], mask=inside, other=0)
    return decoded_e4m3(byte, tl.float32, FP8)


@triton.jit
def times_powers(values, POOL, scale_at, valid, FIRST: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Values times the e8m0 scale of their group; the pool has GROUPS of them for an entry."""
    ENTRIES: tl.constexpr = values.shape[0]
    WIDTH: tl.constexpr = values.shape[1]
    group = FIRST // GROUP + tl.arange(0, WIDTH // GROUP)
    inside = valid[:, None] & (group < GROUPS)[None, :]
    scale = value_of_e8m0(tl.load(POOL + scale_at[:, None] + group[None, :], mask=inside, other=127))
    grouped = values.reshape(ENTRIES, WIDTH // GROUP, GROUP) * scale[:, :, None]
    return grouped.reshape(ENTRIES, WIDTH)


@triton.jit
def part_of_entries(
    POOL,
    HALVES,
    address,
    scale_at,
    valid,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    FORMAT: tl.constexpr,
    TYPE: tl.constexpr,
    FP8: tl.constexpr,
):
    """[entries, WIDTH] dimensions from FIRST on in TYPE, zeros where not valid; yet to be multiplied by `factors`.

    Args:
        POOL: The pool, floats or bytes.
        HALVES: The pool as bfloat16, where the format has such dimensions.
        address: [entries] int64, where entries begin.
        scale_at: [entries] int64, where their scales begin.
        valid: [entries]; nothing else is read.
        FIRST: The first dimension, a multiple of 128 (of 64 behind all codes).
        WIDTH: A power of two.
        DIM: Dimensions of an entry.
        FORMAT: Bytes of an entry; 0 = floats.
        TYPE: What the tile is converted to.
        FP8: Whether the architecture has e4m3.
    """
    dim = FIRST + tl.arange(0, WIDTH)
    if FORMAT == 0:
        inside = valid[:, None] & (dim < DIM)[None, :]
        tile = tl.load(POOL + address[:, None] + dim[None, :], mask=inside, other=0.0)
    elif FORMAT == 68:
        byte = tl.load(POOL + address[:, None] + (dim // 2)[None, :], mask=valid[:, None], other=0)
        tile = value_of_e2m1((byte.to(tl.int32) >> ((dim & 1) * 4)[None, :]) & 15)
        tile = times_powers(tile, POOL, scale_at, valid, FIRST, 32, 4)
    elif FORMAT == 132:
        tile = values_of_codes(POOL, address, valid, FIRST, WIDTH, 128, FP8)
    elif FORMAT == 656 and FIRST < 512:
        tl.static_assert(WIDTH <= 128, "a scale covers 128 codes")
        tile = values_of_codes(POOL, address, valid, FIRST, WIDTH, 512, FP8)
    elif FORMAT == 584 and FIRST >= 448:
        inside = valid[:, None] & (dim < DIM)[None, :]
        tile = tl.load(HALVES + (address // 2 + 224)[:, None] + (dim - 448)[None, :], mask=inside, other=0.0)
    elif FORMAT == 656:
        inside = valid[:, None] & (dim < DIM)[None, :]
        tile = tl.load(HALVES + (address // 2 + 264)[:, None] + (dim - 512)[None, :], mask=inside, other=0.0)
    else:
        tl.static_assert(FORMAT == 584, "formats are those of isolith.numerics.pages")
        tile = values_of_codes(POOL, address, valid, FIRST, WIDTH, 448, FP8)
        tile = times_powers(tile, POOL, scale_at, valid, FIRST, 64, 7)
        if FIRST + WIDTH > 448:
            inside = valid[:, None] & (dim >= 448)[None, :]
            rope = tl.load(HALVES + (address // 2 + 224)[:, None] + (dim - 448)[None, :], mask=inside, other=0.0)
            tile = tl.where((dim < 448)[None, :], tile, rope.to(tl.float32))
    if FORMAT != 0:
        # Always so. Without it the compiler widens bytes once for each product, in registers: what starts from a range
        # it leaves where it stands, and both products take the widened tile from shared memory.
        tile = tl.where((dim < 65536)[None, :], tile, 0.0)
    if tile.dtype != TYPE:
        tile = tile.to(tl.float32).to(TYPE)
    return tile


@triton.jit
def factors_of_entries(WORDS, scale_at, valid, FIRST: tl.constexpr):
    """[entries] float32: what dimensions FIRST .. FIRST+127 of a tile in the formats 656 and 132 are to be times."""
    return tl.load(WORDS + scale_at // 4 + FIRST // 128, mask=valid, other=0.0)


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A pool as kernels take it.

    Args:
        format: Bytes of an entry; 0 = floats.
        dim: Dimensions of an entry.
        tensor: The pool itself, dense in its last axis.
        halves: The same memory as bfloat16, where the format has such dimensions.
        words: The same memory as float32, where the format has such scales.
    """

    format: int
    dim: int
    tensor: Tensor
    halves: Tensor | None
    words: Tensor | None

    @property
    def pointers(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What stands for the pool in a kernel's arguments."""
        return self.tensor, self.halves, self.words

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(blocks, block_size, and the strides of both)."""
        blocks, block_size = self.tensor.shape[:2]
        return blocks, max(block_size, 1), self.tensor.stride(0), self.tensor.stride(1)

    @property
    def slots(self) -> int:
        """Entries that the pool has room for."""
        return self.tensor.shape[0] * self.tensor.shape[1]


def pool_of(cache: Tensor) -> Pool:
    """A pool of floats or bytes; Unsupported where the wider parts of bytes do not lie at multiples of their size."""
    layout = format_of(cache)
    if layout is None or 0 in cache.shape:
        return Pool(format=0, dim=entry_dim(cache), tensor=dense(cache), halves=None, words=None)
    has_halves, has_words = layout.dim > layout.quantised, layout.scale_dtype == torch.float32
    size = 4 if has_words else 2 if has_halves else 1
    if cache.data_ptr() % size or cache.stride(0) % size:
        raise Unsupported(f"pages at {cache.data_ptr()}, {cache.stride(0)} bytes apart; {size} must divide both")
    return Pool(
        format=layout.entry,
        dim=layout.dim,
        tensor=cache,
        halves=cache.view(torch.bfloat16) if has_halves else None,
        words=cache.view(torch.float32) if has_words else None,
    )
