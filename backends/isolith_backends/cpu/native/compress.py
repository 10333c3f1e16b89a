"""The compressor in C++: compress.cpp; its norm and rotations are those of norm.cpp and rotary.cpp."""

import ctypes

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT
from isolith.numerics.windows import max_entries_of_call
from isolith_backends.cpu.native import norm, rotary
from isolith_backends.cpu.native.library import Library

library = Library("compress")

FP32 = (torch.float32,)
TOKENS, CHANNELS = 512, 96  # as in compress.cpp
FEW = 12
"""Tokens up to which weights are streamed."""
GIVEN = ("x", "wkv", "wgate", "norm_weight")
TABLES = ("cos_table", "sin_table", "state_cache", "ape")


class Call(ctypes.Structure):
    """The struct of compress.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("table", "cu_seqlens", "start_pos")),
        *((name, ctypes.c_int64) for name in ("sequences", "table_width", "tokens")),
        ("state", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("blocks", "block_size", "block_stride", "row_stride")),
        *((name, ctypes.c_int64) for name in ("ratio", "dim", "channels", "overlap")),
    )


def missing() -> WhyNot:
    """Of the three libraries."""
    return library.missing() or norm.library.missing() or rotary.library.missing()


def not_rotated(norm_weight: Tensor, cos_table: Tensor, rotate: bool = False, **_: object) -> WhyNot:
    wide = rotary.wide_rows(norm_weight) if rotate else None
    return wide or rotary.many_pairs(cos_table)


def projected(x: Tensor, wkv: Tensor, wgate: Tensor) -> Tensor:
    """[tokens, 2*channels] in float32: x times both weights."""
    (tokens, hidden), channels = x.shape, wkv.shape[0]
    rows = x.new_empty((tokens, 2 * channels), dtype=torch.float32)
    half = {x.dtype, wkv.dtype, wgate.dtype} == {torch.bfloat16}
    if not half or hidden % 2 or not hidden:
        wide = x.float()
        torch.mm(wide, wkv.float().T, out=rows[:, :channels])
        torch.mm(wide, wgate.float().T, out=rows[:, channels:])
        return rows
    x, wkv, wgate = x.contiguous(), wkv.contiguous(), wgate.contiguous()
    laid = sums = None
    if tokens > FEW:
        laid = x.new_empty((hidden // 2, -(-min(tokens, TOKENS) // 16) * 16), dtype=torch.int32)
        sums = x.new_empty((torch.get_num_threads(), CHANNELS, TOKENS), dtype=torch.float32)
    library.call("project", x, wkv, wgate, rows, tokens, channels, hidden, laid, sums)
    return rows


@implements(
    ops.attention.kv_compress,
    requires=Requires(dtypes={**dict.fromkeys(GIVEN, DEVICE_FLOAT), **dict.fromkeys(TABLES, FP32)}, missing=missing),
    why_not=not_rotated,
)
def kv_compress_native(
    x: Tensor,
    wkv: Tensor,
    wgate: Tensor,
    norm_weight: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    state_cache: Tensor,
    state_block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    ape: Tensor | None = None,
    overlap: bool = False,
    rotate: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    rows = projected(x, wkv, wgate)
    state = state_cache if state_cache.stride(2) == 1 else state_cache.contiguous()
    table, starts, lengths = state_block_table.contiguous(), cu_seqlens.contiguous(), start_pos.contiguous()
    most, dim = max_entries_of_call(x.shape[0], start_pos.shape[0], ratio), norm_weight.shape[0]
    entries, positions = x.new_empty((most, dim)), x.new_empty(most, dtype=torch.int64)
    sources = x.new_empty((most, (1 + overlap) * ratio), dtype=torch.int64)
    counts = torch.empty_like(starts)
    call = Call(
        *(table.data_ptr(), starts.data_ptr(), lengths.data_ptr(), start_pos.shape[0], table.shape[1], x.shape[0]),
        *(state.data_ptr(), state.shape[0], state.shape[1], state.stride(0), state.stride(1)),
        *(ratio, dim, wkv.shape[0], overlap),
    )
    term = None if ape is None else ape.contiguous()
    library.call(
        *("compress", ctypes.addressof(call), rows, term, sources, entries, entries.dtype, most, positions, counts)
    )
    if state is not state_cache:
        state_cache.copy_(state)
    entries = norm.rms_norm_native.fn(entries, norm_weight, eps)
    entries = rotary.rope_native.fn(entries, positions, cos_table, sin_table)
    return rotary.hadamard_native.fn(entries) if rotate else entries, counts
