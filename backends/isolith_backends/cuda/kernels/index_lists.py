"""Lists of what a token sees, in its window and of compressed entries: written once, from its position alone."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.launch import ceil_div, launch, power_of_two

PROGRAMS = 1056  # eight for each multiprocessor of an H100: beyond, a program writes more than 1,024 indices
TILE = 32768  # and at most so many, with 16 warps


@triton.jit
def list_indices(
    POSITIONS,
    Y,
    tokens,
    columns,
    ratio,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    position = tl.load(POSITIONS + token, mask=token < tokens, other=0).to(tl.int32)
    if WINDOW:
        first, seen = tl.maximum(position - columns + 1, 0), position + 1
    else:
        first, seen = tl.zeros((ROWS,), tl.int32), (position + 1) // ratio
    index = first[:, None] + column
    index = tl.where(index < seen[:, None], index, -1)
    inside = (token < tokens)[:, None] & (column < columns)
    tl.store(Y + token[:, None] * columns + column, index, mask=inside)


def list_of(positions: Tensor, columns: int, ratio: int | None) -> Tensor:
    """[tokens columns] int32: the last positions that a window shows, or without one the entries of a ratio."""
    tokens = positions.shape[0]
    y = torch.empty((tokens, columns), dtype=torch.int32, device=positions.device)
    if columns == 0:
        return y
    tile = power_of_two(ceil_div(tokens * columns, PROGRAMS), least=1024, most=TILE)
    wide = power_of_two(columns, most=1024)
    together = min(power_of_two(tokens), tile // wide)
    launch(
        list_indices,
        (ceil_div(tokens, together), ceil_div(columns, wide)),
        positions.contiguous(),
        y,
        tokens,
        columns,
        1 if ratio is None else ratio,
        warps=ceil_div(together * wide, 2048) if together * wide > 8192 else 4,
        stages=1,
        WINDOW=ratio is None,
        ROWS=together,
        COLUMNS=wide,
    )
    return y


def window_indices(positions: Tensor, window: int) -> Tensor:
    """Positions that a sliding window shows, ascending, then -1."""
    return list_of(positions, window, None)


def compress_indices(positions: Tensor, ratio: int, max_entries: int) -> Tensor:
    """Compressed entries that can be seen, then -1."""
    return list_of(positions, max_entries, ratio)
