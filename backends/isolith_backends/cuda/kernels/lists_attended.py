"""Launching attention over one or two lists of a token's entries: types, tiles and splits chosen by shape."""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from torch.torch_version import TorchVersion

from isolith_backends.cuda.kernels.cache_entries import Pool
from isolith_backends.cuda.kernels.listed_columns import GIVEN, NONE, SEEN, WINDOW
from isolith_backends.cuda.kernels.sparse_attn import attend, merge
from isolith_backends.cuda.kernels.tensors import TYPES, dense
from isolith_backends.cuda.launch import capability, ceil_div, launch, power_of_two

LOG2_E = 1.4426950408889634
PIECE = 128  # dimensions of an accumulator, and of a product
WIDEST = 640  # dimensions whose accumulators a program can hold
NARROWEST = 16  # dimensions that a product takes at least
PROGRAMS = 132  # that fill a GPU: the multiprocessors of an H100
SPLITS = 64  # programs that share a token's columns at most
LARGEST_ITEM = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Entries:
    """The entries of a pool that each token looks at.

    Args:
        pool: Where they lie.
        kind: GIVEN, SEEN or WINDOW (see `listed_columns`).
        columns: How many there can be.
        indices: [tokens, columns] for a given list.
        length: [tokens], how many columns of it count.
        table: [sequences, blocks of a sequence]; None = indices are slots.
        reach: Positions of a window; else positions to an item.
    """

    pool: Pool
    kind: int
    columns: int
    indices: Tensor | None = None
    length: Tensor | None = None
    table: Tensor | None = None
    reach: int = 1

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        """What stands for the tensors in the kernel's arguments."""
        return (*self.pool.pointers, self.indices, self.length, self.table)

    @property
    def numbers(self) -> tuple[int, ...]:
        """What stands for the sizes."""
        room = self.pool.slots if self.table is None else self.table.shape[1] * self.pool.sizes[1]
        return (
            *self.pool.sizes,
            self.columns,
            0 if self.indices is None else self.indices.stride(0),
            0 if self.table is None else self.table.stride(0),
            min(room if self.pool.slots else 0, LARGEST_ITEM),
            self.reach,
        )


def listed(pool: Pool, indices: Tensor, length: Tensor | None, table: Tensor | None, reach: int = 1) -> Entries:
    """Entries whose indices are given."""
    return Entries(
        pool=pool,
        kind=GIVEN,
        columns=indices.shape[1],
        indices=dense(indices),
        length=None if length is None else length.contiguous(),
        table=None if table is None else dense(table),
        reach=reach,
    )


def seen(pool: Pool, table: Tensor, reach: int) -> Entries:
    """The first entries of a token's sequence: one for `reach` positions up to its own."""
    columns = min(table.shape[1] * pool.sizes[1], LARGEST_ITEM)
    return Entries(pool=pool, kind=SEEN, columns=columns, table=dense(table), reach=reach)


def windowed(pool: Pool, table: Tensor, reach: int) -> Entries:
    """The entries of the last `reach` positions up to a token's own."""
    return Entries(pool=pool, kind=WINDOW, columns=reach, table=dense(table), reach=reach)


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a program works: heads and columns of its products, warps, and steps in flight."""

    heads: int
    columns: int
    warps: int
    stages: int


OLDER_TRITON = TorchVersion(triton.__version__) < "3.9"
TENSOR = {
    80: Tiles(heads=32, columns=32, warps=8, stages=2),
    90: Tiles(heads=32, columns=64, warps=8, stages=2),
    100: Tiles(heads=32, columns=64, warps=8, stages=1 if OLDER_TRITON else 2),
}
"""Products on tensor cores, by the least capability. From 9.0 on entries are the rows of a product, of which it takes
64 at a time. 64 heads would widen each entry once instead of twice for V4-Flash, and spill (Triton 3.9). On sm_100 two
steps in flight take 325 to 639 KiB of shared memory with Triton 3.6, and fit with 3.9."""
FEWER_COLUMNS = 32
"""For entries in bytes, whose widening takes registers, and before sm_100 for those wider than 512: 64 columns of
either spill in the loop (Triton 3.9, sm_90)."""
STAGES_OF_CODES = {True: 3, False: 2}
"""For entries in bytes, by whether programs share a token's columns: the other number spills in the loop."""
EXACT = Tiles(heads=16, columns=16, warps=4, stages=1)
"""Products in float32, which no tensor core makes."""


def tiles_of(heads: int, pools: list[Pool], precision: str, arch: int, twice: bool) -> Tiles:
    """The tiles for so many heads and entries of these pools: narrow entries come in more columns, up to 256.

    A query in two parts takes twice the room, so that only half of the heads find it.
    """
    dim = pools[0].dim
    if precision == "ieee":
        tiles = EXACT
    else:
        tiles = TENSOR[max(least for least in TENSOR if least <= arch)]
        if coded(pools) or (dim > 4 * PIECE and arch < 100):
            tiles = replace(tiles, columns=FEWER_COLUMNS)
    wider = max(1, min(4 * PIECE // power_of_two(dim), 256 // tiles.columns))
    most = tiles.heads // 2 if twice else tiles.heads
    return replace(tiles, heads=power_of_two(heads, NARROWEST, most), columns=tiles.columns * wider)


def coded(pools: list[Pool]) -> bool:
    """Whether entries are bytes."""
    return any(pool.format for pool in pools)


def types_of(dtype: torch.dtype, lists: tuple[Entries, ...]) -> tuple[torch.dtype, str]:
    """(what both operands of a product are converted to, its precision).

    Codes of entries are exact in bfloat16. TF32 holds bfloat16 and float16, where the two meet.
    """
    dtypes = {dtype} | {torch.bfloat16 if e.pool.tensor.dtype == torch.uint8 else e.pool.tensor.dtype for e in lists}
    if torch.float32 in dtypes:
        return torch.float32, "ieee"
    return (dtype, "bf16") if len(dtypes) == 1 else (torch.float32, "tf32")


def attention(
    q: Tensor,
    lists: tuple[Entries, ...],
    softmax_scale: float,
    sink: Tensor | None,
    value_dim: int,
    cu_seqlens: Tensor | None = None,
    start_pos: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [tokens, heads, value_dim], lse [tokens, heads]) over one softmax of one or two lists.

    Args:
        lists: One, or two with entries of the same width.
        value_dim: The first dimensions of an entry that are values.
        cu_seqlens: Where each sequence's tokens begin; None where there is neither a table nor a position.
        start_pos: The position of each sequence's first token; None = a token may look at all that is listed.
        out_dtype: Of the result, q's unless given. A float32 q then meets entries in two parts of that type, so that
            products are as exact as those of what it was made of.
    """
    q, (tokens, heads, dim) = dense(q), q.shape
    out_dtype = out_dtype or q.dtype
    dtype, precision = types_of(out_dtype, lists)
    twice = q.dtype == torch.float32 and dtype != torch.float32
    pools = [each.pool for each in lists]
    tiles = tiles_of(heads, pools, precision, capability(q.device), twice)
    groups = ceil_div(heads, tiles.heads)
    splits = splits_of(tokens * groups, tiles, lists)
    if coded(pools) and precision != "ieee":
        tiles = replace(tiles, stages=STAGES_OF_CODES[splits > 1])
    out = q.new_empty(tokens, heads, value_dim, dtype=out_dtype)
    lse = q.new_empty(tokens, heads, dtype=torch.float32)
    sums, highest, total = (out, lse, None) if splits == 1 else parts_of(q, splits, value_dim)
    first, extra = lists[0], lists[1] if len(lists) == 2 else None
    small = (each if each is None else each.contiguous() for each in (sink, cu_seqlens, start_pos))
    sink, cu_seqlens, start_pos = small
    launch(
        attend,
        (tokens * groups * splits,),
        *(q, sink, sums, highest, total, cu_seqlens, start_pos),
        *(*first.pointers, *((None,) * 6 if extra is None else extra.pointers)),
        *(heads, groups, splits, 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1),
        *(q.stride(0), q.stride(1), softmax_scale * LOG2_E),
        *first.numbers,
        *((0, 1, 0, 0, 0, 0, 0, 0, 1) if extra is None else extra.numbers),
        warps=tiles.warps,
        stages=tiles.stages,
        HEADS=tiles.heads,
        COLUMNS=tiles.columns,
        DIM=dim,
        VALUES=value_dim,
        CAUSAL=start_pos is not None,
        SPLIT=splits > 1,
        TWICE=twice,
        TYPE=TYPES[dtype],
        PRECISION="ieee" if precision == "bf16" else precision,
        FP8=capability(q.device) >= 89,
        **pieces_of(dim),
        **kinds_of(first, extra),
    )
    if total is not None:
        merge_parts(sums, highest, total, sink, out, lse)
    return out, lse


def parts_of(q: Tensor, splits: int, value_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where programs that share columns leave their sums, largest logits and sums of weights."""
    tokens, heads = q.shape[:2]
    sums = q.new_empty(tokens, splits, heads, value_dim, dtype=torch.float32)
    highest, total = q.new_empty(2, tokens, splits, heads, dtype=torch.float32)
    return sums, highest, total


def splits_of(programs: int, tiles: Tiles, lists: tuple[Entries, ...]) -> int:
    """How many programs share the columns of one program, so that they fill a GPU."""
    columns = sum(ceil_div(entries.columns, tiles.columns) for entries in lists)
    return max(1, min(PROGRAMS // max(1, programs), columns, SPLITS))


def kinds_of(first: Entries, extra: Entries | None) -> dict[str, int]:
    """What lists there are, and the formats of their entries."""
    kinds = {"KIND": first.kind, "FORMAT": first.pool.format}
    if extra is None:
        return kinds | {"EXTRA_KIND": NONE, "EXTRA_FORMAT": 0}
    return kinds | {"EXTRA_KIND": extra.kind, "EXTRA_FORMAT": extra.pool.format}


def pieces_of(dim: int) -> dict[str, int]:
    """How dimensions are cut: FULL pieces of WIDTH, and one of TAIL where something is left."""
    if dim <= PIECE:
        return {"FULL": 1, "WIDTH": power_of_two(dim, NARROWEST), "TAIL": 0}
    rest = dim % PIECE
    return {"FULL": dim // PIECE, "WIDTH": PIECE, "TAIL": power_of_two(rest, NARROWEST) if rest else 0}


def merge_parts(sums: Tensor, highest: Tensor, total: Tensor, sink: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """Join what several programs made of each token's columns: sums [tokens, splits, heads, value_dim]."""
    tokens, splits, heads, value_dim = sums.shape
    groups = ceil_div(heads, 4)
    launch(
        merge,
        (tokens * groups,),
        *(sums, highest, total, sink, out, lse, heads, groups, splits),
        warps=4,
        stages=2,
        HEADS=4,
        VALUES=value_dim,
        WIDTH=power_of_two(value_dim),
    )
