"""Caches and lists in C++: cache.cpp."""

import ctypes

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT, FLOAT_NAMES, PACKED
from isolith.numerics.codes import E2M1_MAX, SMALLEST_SCALE
from isolith.numerics.pages import entry_dim
from isolith_backends.cpu.native.library import Library, in_large_pages
from isolith_backends.cpu.native.pages import pool_of

library = Library("cache")

POOL = DEVICE_FLOAT + PACKED


@implements(
    ops.attention.kv_cache_write,
    requires=Requires(dtypes={"cache": POOL, "x": DEVICE_FLOAT}, missing=library.missing),
    batch_invariant=True,
)
def kv_cache_write_native(
    cache: Tensor, x: Tensor, slot_mapping: Tensor, scale_format: str = "ue8m0", amax_floor: float | None = None
) -> None:
    if not cache.numel():
        return
    x, slots, pool = x.contiguous(), slot_mapping.contiguous(), pool_of(cache)
    if amax_floor is None:
        amax_floor = E2M1_MAX * SMALLEST_SCALE if pool.kind == 68 else 1e-4
    library.call(
        *("kv_cache_write", ctypes.addressof(pool), x, x.dtype, slots, slots.dtype == torch.int64),
        *(slots.shape[0], amax_floor, scale_format == "ue8m0"),
    )


def wide_output(out_dtype: str = "bfloat16", **_: object) -> WhyNot:
    return "values in float64 are left to the reference" if out_dtype == "float64" else None


@implements(
    ops.attention.kv_cache_read,
    requires=Requires(dtypes={"cache": POOL}, missing=library.missing),
    why_not=wide_output,
    batch_invariant=True,
)
def kv_cache_read_native(cache: Tensor, slot_mapping: Tensor, out_dtype: str = "bfloat16") -> Tensor:
    slots, shape = slot_mapping.contiguous(), (*slot_mapping.shape, entry_dim(cache))
    y = in_large_pages(cache.new_empty(shape, dtype=FLOAT_NAMES[out_dtype]))
    pool = pool_of(cache)
    library.call(
        *("kv_cache_read", ctypes.addressof(pool), slots, slots.dtype == torch.int64, y, y.dtype, slots.numel())
    )
    return y


@implements(ops.attention.window_indices, requires=Requires(missing=library.missing), batch_invariant=True)
def window_indices_native(positions: Tensor, window: int) -> Tensor:
    positions, tokens = positions.contiguous(), positions.shape[0]
    lists = in_large_pages(positions.new_empty((tokens, window), dtype=torch.int32))
    library.call("window_indices", positions, positions.dtype == torch.int64, lists, tokens, window)
    return lists


@implements(ops.attention.compress_indices, requires=Requires(missing=library.missing), batch_invariant=True)
def compress_indices_native(positions: Tensor, ratio: int, max_entries: int) -> Tensor:
    positions, tokens = positions.contiguous(), positions.shape[0]
    lists = in_large_pages(positions.new_empty((tokens, max_entries), dtype=torch.int32))
    library.call("compress_indices", positions, positions.dtype == torch.int64, lists, tokens, ratio, max_entries)
    return lists
