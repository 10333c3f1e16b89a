"""Which type multiplies for two operands, where their scales multiply, and how large the tiles are.

All of it follows from dtypes, shapes and the compute capability: the same call has the same tiles everywhere.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from isolith.dtypes import DEVICE_FLOAT
from isolith.numerics.scaled_matmul import FP4_GROUP, QUANTISED, inner_of
from isolith_backends.cuda.kernels.tensors import TYPES, stored
from isolith_backends.cuda.launch import ceil_div, power_of_two

MULTIPROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 103: 148, 120: 188}
"""Of the largest product of a capability (vendor data sheets): for how many programs tiles are chosen."""
INT8_INPUTS = (1 << 31) // (128 * 127)  # products of codes that an int32 sum holds
WHOLE = 1 << 30  # columns that share a scale, where all do
STEP = 256  # columns of a step, at most

ACTIVATIONS = (*DEVICE_FLOAT, *QUANTISED)
WEIGHTS = (*ACTIVATIONS, torch.uint8)
FLOORS = {"fp8": 1e-4, "int8": 1e-10}
"""The smallest amax of a group, as act_quant_fp8 and act_quant_int8 have it by default."""
POWERS = (torch.float8_e8m0fnu, torch.uint8)  # as it is, and as bytes
KINDS = {torch.float8_e4m3fn: "e4m3", torch.int8: "int8", torch.uint8: "e2m1"}


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What one program computes at a time, and with how many warps and steps in flight."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


SMALL = (
    (16, Tile(rows=16, columns=64, inner=128, warps=4, stages=4)),
    (32, Tile(rows=32, columns=64, inner=128, warps=4, stages=4)),
    (64, Tile(rows=64, columns=128, inner=64, warps=8, stages=3)),
)
"""Tiles for few rows, the most rows first: the weight streams through, in pieces of 128 bytes or more of a row."""
LARGE = Tile(rows=128, columns=128, inner=64, warps=8, stages=3)
WIDE = 128  # columns of a step of 8-bit products
STREAMED = 8192  # elements of a weight that a program with few rows takes at a time
SHARE = 1 << 16  # elements of a weight that are worth a program of their own
IEEE = {"columns": 64, "inner": 32, "stages": 2}
"""float32 products run on the vector units, which want registers more than shared memory."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Where the scales of an operand multiply: "none", "end", "step" or "fold"; a folded one covers `fold` columns."""

    place: str
    group: int = WHOLE
    fold: int = 1


@dataclass(frozen=True, kw_only=True)
class Format:
    """How two operands are multiplied."""

    dot: Any  # Any: Triton's types have none
    x: Scale
    weight: Scale
    step: int
    """The most columns of a step; a power of two."""
    native: bool
    """Whether the architecture has e4m3."""


def kind_of(tensor: Tensor) -> str:
    """The name of a kind of elements, for kernels."""
    return KINDS.get(tensor.dtype, "float")


def stored_scale(scale: Tensor | None) -> Tensor | None:
    """The scale, where there is one, as kernels take it."""
    return None if scale is None else stored(scale)


def reachable(weight: Tensor) -> Tensor:
    """The weight, copied where its rows spread over more than 32-bit offsets reach."""
    return weight if (weight.shape[-1] - 1) * weight.stride(-1) < 1 << 31 else weight.contiguous()


def dot_of(x: torch.dtype, weight: torch.dtype, native: bool) -> Any:  # Any: Triton's types have none
    """The narrowest type with tensor cores that holds the elements of both; codes fit into every float."""
    floats = {TYPES[dtype] for dtype in (x, weight) if dtype in TYPES}
    if floats:
        return floats.pop() if len(floats) == 1 else tl.float32
    if x == weight == torch.int8:
        return tl.int8
    return tl.float8e4nv if native and x == weight == torch.float8_e4m3fn else tl.bfloat16


def format_of(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    act_group: int,
    block_k: int,
    arch: int,
) -> Format:
    """How to multiply these operands."""
    inputs, native = inner_of(weight), arch >= 89
    dot = dot_of(x.dtype, weight.dtype, native)
    groups = (
        None if x_scale is None else group_of(x.dtype, act_group, inputs),
        None if weight_scale is None else group_of(weight.dtype, block_k, inputs),
    )
    # The largest step of which no scale ends inside, over operands that have more than one scale in a row.
    step = power_dividing(*(group for group in groups if group is not None and group != WHOLE))
    if step < (32 if dot in (tl.float8e4nv, tl.int8) else 16):
        dot = tl.float32
    exact = [dot == tl.bfloat16 and s is not None and s.dtype in POWERS for s in (x_scale, weight_scale)]
    # Once an operand is folded in short groups, the other is too: the sums then stay in the tensor cores.
    fold = (
        step < STEP // 2 and dot == tl.bfloat16 and (groups[0] is None or exact[0]) and (groups[1] is None or exact[1])
    )
    placed = [
        placed_scale(group, dot == tl.float32 or (exact[place] and (fold or group == FP4_GROUP)))
        for place, group in enumerate(groups)
    ]
    steps = [scale.group for scale in placed if scale.place == "step"]
    return Format(dot=dot, x=placed[0], weight=placed[1], step=power_dividing(*steps), native=native)


def group_of(dtype: torch.dtype, block: int, inputs: int) -> int:
    """Columns that share a scale."""
    if dtype == torch.uint8:
        return FP4_GROUP if inputs > FP4_GROUP else WHOLE
    return WHOLE if dtype == torch.int8 or block >= inputs else block


def placed_scale(group: int | None, fold: bool) -> Scale:
    """Where the scales of groups of columns multiply."""
    if group is None:
        return Scale(place="none")
    if group == WHOLE:
        return Scale(place="end")
    if fold:
        return Scale(place="fold", group=group, fold=power_dividing(group))
    return Scale(place="step", group=group)


def power_dividing(*groups: int) -> int:
    """The largest power of two up to STEP that divides all groups."""
    common = math.gcd(STEP, *groups)
    return common & -common


def tile_for(rows: int, columns: int, inputs: int, made: Format, batches: int, arch: int) -> Tile:
    """The tile for matrices of about so many rows, of which there are `batches`."""
    tile = next((tile for most, tile in SMALL if rows <= most), LARGE)
    if made.dot == tl.float32:
        tile = replace(tile, rows=min(tile.rows, 64), warps=8 if tile.rows >= 64 else 4, **IEEE)
    elif made.dot in (tl.float8e4nv, tl.int8):
        tile = replace(tile, inner=WIDE)
    if tile.rows >= 64:
        tile = fitted(tile, made, arch)
    elif made.x.place == "fold" and (made.x.fold < tile.inner or arch < 90):
        # Scales of short groups take registers, for both operands; without e4m3, so does decoding.
        tile = replace(tile, inner=64)
    # Few rows leave nothing but the columns to spread over the multiprocessors.
    most, down = tile.columns, batches * ceil_div(rows, tile.rows)
    least = 16 if tile.rows <= 32 else 32
    while most > least and most * inputs > SHARE and down * ceil_div(columns, most) < MULTIPROCESSORS[arch]:
        most //= 2
    if most < tile.columns and tile.rows <= 32 and made.dot != tl.float32:
        # As many bytes in flight, in longer runs.
        tile = replace(tile, inner=min(STREAMED // most, STEP if made.dot != tl.float8e4nv else WIDE))
    least = 32 if made.dot in (tl.float8e4nv, tl.int8) else 16
    inner = min(tile.inner, made.step, power_of_two(inputs, least=least))
    return replace(tile, columns=min(most, power_of_two(columns, least=16)), inner=inner)


def fitted(tile: Tile, made: Format, arch: int) -> Tile:
    """The tile for many rows as the registers of an architecture allow it."""
    decoded = {"fold", "step"} & {made.x.place, made.weight.place}
    if arch < 90 and decoded:
        # Operands of mma.sync lie in registers: there is no room for a wider tile and its decoding.
        if made.x.place == "fold" and made.x.fold < tile.inner:
            return replace(tile, rows=64, columns=64, warps=4)
        return replace(tile, columns=64) if tile.rows > 64 else tile
    # Tensor cores of sm_100 keep sums of floats in a memory of their own, which four warps read.
    sums_apart = 100 <= arch < 120 and made.dot in (tl.bfloat16, tl.float16) and (tile.rows == 64 or not decoded)
    return replace(tile, warps=4) if sums_apart else tile


def constants_of(
    x: Tensor, weight: Tensor, made: Format, tile: Tile, w_rows: int
) -> dict[str, Any]:  # Any: Triton's constants
    """The constants of `product_of_tile`."""
    return {
        "X_KIND": kind_of(x),
        "W_KIND": kind_of(weight),
        "X_SCALE": made.x.place,
        "W_SCALE": made.weight.place,
        "X_FOLD": min(made.x.fold, tile.inner),
        "W_FOLD": min(made.weight.fold, tile.inner),
        "DOT": made.dot,
        "NATIVE": made.native,
        "EVEN_K": inner_of(weight) % tile.inner == 0,
        "ONE_SCALE": w_rows % tile.columns == 0,
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile.inner,
    }
