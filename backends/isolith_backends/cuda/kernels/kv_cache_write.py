"""Rows into the entries of a paged cache, quantised on the way where it holds bytes.

Each row is read once and each byte of an entry written once, whatever its format; wider numbers go out as bytes, since
a page may begin anywhere. The floor is the rows' bytes: at decoding the launch is all that takes time, and every row
has a program of its own.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from isolith.numerics.codes import E2M1_MAX, E4M3_MAX, SMALLEST_SCALE
from isolith.numerics.pages import format_of
from isolith_backends.cuda.kernels.act_quant_fp8 import e4m3_byte, inverse_of_e8m0
from isolith_backends.cuda.kernels.cache_entries import addresses_of_entries
from isolith_backends.cuda.kernels.codes import e2m1_of, e8m0_at_least, value_of_e8m0
from isolith_backends.cuda.kernels.tensors import dense
from isolith_backends.cuda.launch import capability, ceil_div, launch, power_of_two

TILE = 2048  # elements of a program
PROGRAMS = 264  # two for each multiprocessor of an H100: beyond, a program takes more rows
ROPE = tl.constexpr(64)


@triton.jit
def slots_of(SLOTS, row, rows, slots):
    """(slot, whether the row has one) of each row; slots beyond the pool are none."""
    slot = tl.load(SLOTS + row, mask=row < rows, other=-1).to(tl.int64)
    live = (slot >= 0) & (slot < slots)
    return tl.where(live, slot, 0), live


@triton.jit
def write_rows(
    CACHE,
    X,
    SLOTS,
    rows,
    slots,
    columns,
    stride,
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
    inside = live[:, None] & (column < columns)
    x = tl.load(X + row[:, None] * stride + column, mask=inside, other=0.0).to(tl.float32)
    at = (slot // block_size) * page + (slot % block_size) * entry_stride
    to = CACHE + at[:, None] + column.to(tl.int64) * column_stride
    tl.store(to, x.to(CACHE.dtype.element_ty), mask=inside)


@triton.jit
def write_entries(
    CACHE,
    X,
    SLOTS,
    rows,
    slots,
    stride,
    block_size,
    page,
    floor,
    FORMAT: tl.constexpr,
    HELD: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    LARGEST: tl.constexpr,
    ROPE_AT: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot, live = slots_of(SLOTS, row, rows, slots)
    entry, scale_at = addresses_of_entries(slot // block_size, slot % block_size, block_size, page, FORMAT, FORMAT)
    group = tl.arange(0, GROUPS)
    inside = live[:, None] & (group < HELD)[None, :]
    column = (group[:, None] * GROUP + tl.arange(0, GROUP)[None, :])[None, :, :]
    start = X + row * stride
    x = tl.load(start[:, None, None] + column, mask=inside[:, :, None], other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(x), axis=2), floor)
    ratio = tl.div_rn(amax, LARGEST)
    power = e8m0_at_least(ratio)
    if POWER_OF_TWO:
        scaled = x * inverse_of_e8m0(power)[:, :, None]
    else:
        scaled = x * tl.div_rn(1.0, ratio)[:, :, None]
    if FORMAT == 68:
        low, high = tl.split(tl.reshape(e2m1_of(scaled), (ROWS, GROUPS, GROUP // 2, 2)))
        byte = (group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :])[None, :, :]
        tl.store(CACHE + entry[:, None, None] + byte, low | (high << 4), mask=inside[:, :, None])
    else:
        tl.store(CACHE + entry[:, None, None] + column, e4m3_byte(scaled, NATIVE), mask=inside[:, :, None])
    if FORMAT == 584 or FORMAT == 68:
        tl.store(CACHE + scale_at[:, None] + group[None, :], power, mask=inside)
    else:
        scale = ratio
        if POWER_OF_TWO:
            scale = value_of_e8m0(power)
        part = tl.arange(0, 4)[None, None, :]
        bits = scale.to(tl.uint32, bitcast=True)[:, :, None] >> (8 * part).to(tl.uint32)
        to = CACHE + scale_at[:, None, None] + group[None, :, None] * 4 + part
        tl.store(to, (bits & 0xFF).to(tl.uint8), mask=inside[:, :, None])
    if ROPE_AT > 0:
        dim, part = tl.arange(0, ROPE), tl.arange(0, 2)[None, None, :]
        rope = tl.load(start[:, None] + HELD * GROUP + dim[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        bits = rope.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)[:, :, None] >> (8 * part).to(tl.uint32)
        to = CACHE + entry[:, None, None] + ROPE_AT + dim[None, :, None] * 2 + part
        tl.store(to, (bits & 0xFF).to(tl.uint8), mask=live[:, None, None])


def kv_cache_write(cache: Tensor, x: Tensor, slot_mapping: Tensor, scale_format: str, amax_floor: float | None) -> None:
    """Write rows x [rows dim] to their slots; negative ones, and those beyond the pool, are skipped."""
    blocks, block_size, columns = cache.shape
    x, slot_mapping = dense(x), slot_mapping.contiguous()
    rows, slots = x.shape[0], blocks * block_size
    if slots == 0:
        return
    layout = format_of(cache)
    if layout is None:
        wide = power_of_two(columns, most=1024)
        together = rows_together(rows, wide)
        sizes = (rows, slots, columns, x.stride(0), block_size, *cache.stride())
        grid = (ceil_div(rows, together), ceil_div(columns, wide))
        launch(write_rows, grid, cache, x, slot_mapping, *sizes, stages=1, ROWS=together, COLUMNS=wide)
        return
    together = rows_together(rows, layout.dim)
    largest = E2M1_MAX if layout.entry == 68 else E4M3_MAX
    floor = amax_floor
    if floor is None:
        floor = E2M1_MAX * SMALLEST_SCALE if layout.entry == 68 else 1e-4
    launch(
        write_entries,
        (ceil_div(rows, together),),
        cache,
        x,
        slot_mapping,
        rows,
        slots,
        x.stride(0),
        block_size,
        cache.stride(0),
        floor,
        warps=4 if layout.dim * together >= 1024 else 1,
        stages=1,
        LARGEST=largest,
        POWER_OF_TWO=scale_format == "ue8m0",
        # sm_89 converts by way of float16 in some releases of Triton, and rounds twice.
        NATIVE=capability(x.device) >= 90,
        ROWS=together,
        **constants_of(cache),
    )


def rows_together(rows: int, columns: int) -> int:
    """Rows of a program: one while there are few."""
    return power_of_two(ceil_div(rows, PROGRAMS), most=max(1, TILE // power_of_two(columns)))


def constants_of(cache: Tensor) -> dict[str, Any]:  # Any: Triton's constants
    """A byte format as kernels take it."""
    layout = format_of(cache)
    assert layout is not None, "only pools of bytes have a format"
    rope = layout.dim > layout.quantised
    return {
        "FORMAT": layout.entry,
        "HELD": layout.scales,
        "GROUPS": power_of_two(layout.scales),
        "GROUP": layout.group,
        "ROPE_AT": layout.data_bytes - 2 * ROPE.value if rope else 0,
    }
