"""Entries of a paged cache, widened: each byte of an entry read once, each element of the result written once.

The floor is memory: of 584 bytes 1,024 are made. Wider numbers are read as bytes, since a page may begin anywhere.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith.numerics.pages import entry_dim, format_of
from isolith_backends.cuda.kernels.cache_entries import addresses_of_entries
from isolith_backends.cuda.kernels.codes import decoded_e4m3, value_of_e2m1, value_of_e8m0
from isolith_backends.cuda.kernels.kv_cache_write import ROPE, constants_of, rows_together, slots_of
from isolith_backends.cuda.launch import capability, ceil_div, launch, power_of_two


@triton.jit
def read_rows(
    CACHE,
    SLOTS,
    Y,
    rows,
    slots,
    columns,
    block_size,
    page,
    entry_stride,
    column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    slot, live = slots_of(SLOTS, row, rows, slots)
    at = (slot // block_size) * page + (slot % block_size) * entry_stride
    inside = column < columns
    come_from = CACHE + at[:, None] + column.to(tl.int64) * column_stride
    y = tl.load(come_from, mask=live[:, None] & inside, other=0.0).to(tl.float32)
    tl.store(Y + row[:, None] * columns + column, y.to(Y.dtype.element_ty), mask=(row < rows)[:, None] & inside)


@triton.jit
def read_entries(
    CACHE,
    SLOTS,
    Y,
    rows,
    slots,
    block_size,
    page,
    DIM: tl.constexpr,
    FORMAT: tl.constexpr,
    HELD: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    ROPE_AT: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot, live = slots_of(SLOTS, row, rows, slots)
    entry, scale_at = addresses_of_entries(slot // block_size, slot % block_size, block_size, page, FORMAT, FORMAT)
    group = tl.arange(0, GROUPS)
    held = (group < HELD)[None, :]
    inside = live[:, None] & held
    column = (group[:, None] * GROUP + tl.arange(0, GROUP)[None, :])[None, :, :]
    if FORMAT == 68:
        byte = (group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :])[None, :, :]
        packed = tl.load(CACHE + entry[:, None, None] + byte, mask=inside[:, :, None], other=0)
        value = value_of_e2m1(tl.reshape(tl.join(packed & 0xF, packed >> 4), (ROWS, GROUPS, GROUP)))
    else:
        code = tl.load(CACHE + entry[:, None, None] + column, mask=inside[:, :, None], other=0)
        value = decoded_e4m3(code, tl.float32, NATIVE)
    if FORMAT == 584 or FORMAT == 68:
        scale = value_of_e8m0(tl.load(CACHE + scale_at[:, None] + group[None, :], mask=inside, other=0))
    else:
        part = tl.arange(0, 4)[None, None, :]
        come_from = CACHE + scale_at[:, None, None] + group[None, :, None] * 4 + part
        bits = tl.load(come_from, mask=inside[:, :, None], other=0).to(tl.uint32) << (8 * part).to(tl.uint32)
        scale = tl.sum(bits, axis=2).to(tl.uint32).to(tl.float32, bitcast=True)
    y = (value * scale[:, :, None]).to(Y.dtype.element_ty)
    to, known = Y + row * DIM, row < rows
    tl.store(to[:, None, None] + column, y, mask=known[:, None, None] & held[:, :, None])
    if ROPE_AT > 0:
        dim, part = tl.arange(0, ROPE), tl.arange(0, 2)[None, None, :]
        come_from = CACHE + entry[:, None, None] + ROPE_AT + dim[None, :, None] * 2 + part
        bits = tl.load(come_from, mask=live[:, None, None], other=0).to(tl.uint32) << (16 + 8 * part).to(tl.uint32)
        rope = tl.sum(bits, axis=2).to(tl.uint32).to(tl.float32, bitcast=True)
        tl.store(to[:, None] + HELD * GROUP + dim[None, :], rope.to(Y.dtype.element_ty), mask=known[:, None])


def kv_cache_read(cache: Tensor, slot_mapping: Tensor, dtype: torch.dtype) -> Tensor:
    """Entries of slots [...] -> [... dim]; zeros for negative slots, and for those beyond the pool."""
    blocks, block_size, columns = cache.shape
    dim = entry_dim(cache)
    y = torch.empty((*slot_mapping.shape, dim), dtype=dtype, device=cache.device)
    rows, slots, slot_mapping = slot_mapping.numel(), blocks * block_size, slot_mapping.contiguous()
    if slots == 0:
        return y.zero_()
    if format_of(cache) is None:
        wide = power_of_two(columns, most=1024)
        together = rows_together(rows, wide)
        sizes = (rows, slots, columns, block_size, *cache.stride())
        grid = (ceil_div(rows, together), ceil_div(columns, wide))
        launch(read_rows, grid, cache, slot_mapping, y, *sizes, stages=1, ROWS=together, COLUMNS=wide)
        return y
    together = rows_together(rows, dim)
    launch(
        read_entries,
        (ceil_div(rows, together),),
        cache,
        slot_mapping,
        y,
        rows,
        slots,
        block_size,
        cache.stride(0),
        warps=4 if dim * together >= 1024 else 1,
        stages=1,
        DIM=dim,
        NATIVE=capability(cache.device) >= 89,
        ROWS=together,
        **constants_of(cache),
    )
    return y
