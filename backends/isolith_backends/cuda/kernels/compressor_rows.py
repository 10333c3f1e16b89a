"""The compressor's rows: two projections of every token in one pass over it, and their place in the paged state.

A program multiplies a tile of tokens with the same rows of both weights. At decode the weights' bytes are the floor,
and their features are cut into parts for enough programs; whoever reads a row adds the parts, always in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.kernels.tensors import TYPES, dense
from isolith_backends.cuda.launch import ceil_div, launch, power_of_two

PROGRAMS = 528  # 4 for each of 132 multiprocessors
PARTS = 16  # parts that features are cut into, at most


@triton.jit
def project_tokens(
    X,
    WKV,
    WGATE,
    PARTIAL,
    tokens,
    channels,
    hidden,
    x_stride,
    kv_stride,
    gate_stride,
    steps,
    KIND: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """A part's sums: PARTIAL[part, token] is [u | z without ape]."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.program_id(2)
    u = tl.zeros((TOKENS, CHANNELS), tl.float32)
    z = tl.zeros((TOKENS, CHANNELS), tl.float32)
    x_at = X + token.to(tl.int64)[:, None] * x_stride
    kv_at = WKV + channel.to(tl.int64)[None, :] * kv_stride
    gate_at = WGATE + channel.to(tl.int64)[None, :] * gate_stride
    for step in range(steps):
        feature = (part * steps + step) * FEATURES + tl.arange(0, FEATURES)
        known = feature < hidden
        x = tl.load(x_at + feature[None, :], mask=(token < tokens)[:, None] & known[None, :], other=0.0).to(KIND)
        mask = known[:, None] & (channel < channels)[None, :]
        kv = tl.load(kv_at + feature[:, None], mask=mask, other=0.0).to(KIND)
        u = tl.dot(x, kv, u, input_precision="ieee")
        gate = tl.load(gate_at + feature[:, None], mask=mask, other=0.0).to(KIND)
        z = tl.dot(x, gate, z, input_precision="ieee")
    at = PARTIAL + (part.to(tl.int64) * tokens + token)[:, None] * (2 * channels) + channel[None, :]
    inside = (token < tokens)[:, None] & (channel < channels)[None, :]
    tl.store(at, u, mask=inside)
    tl.store(at + channels, z, mask=inside)


@triton.jit
def sum_of_parts(PARTIAL, at, mask, tokens, width, parts):
    """Elements of the rows of tokens, the parts of their features added in order."""
    total = tl.load(PARTIAL + at, mask=mask, other=0.0)
    for _ in range(1, parts):
        at += tokens * width
        total += tl.load(PARTIAL + at, mask=mask, other=0.0)
    return total


@triton.jit
def keep_rows(
    PARTIAL,
    APE,
    STATE,
    TABLE,
    CU,
    START,
    tokens,
    sequences,
    ratio,
    channels,
    parts,
    ape_stride,
    page_stride,
    row_stride,
    column_stride,
    table_stride,
    table_columns,
    blocks,
    block_size,
    TOKENS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the rows of tokens to the state, but not where a later token of the call goes to the same place."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    sequence = tl.zeros((TOKENS,), tl.int32)
    shift = tl.zeros((TOKENS,), tl.int32)
    end = tl.zeros((TOKENS,), tl.int32)
    for base in range(0, sequences, SEQUENCES):
        number = base + tl.arange(0, SEQUENCES)
        known = number < sequences
        low = tl.load(CU + number, mask=known, other=0)
        high = tl.load(CU + number + 1, mask=known, other=0)
        start = tl.load(START + number, mask=known, other=0)
        here = (token[:, None] >= low[None, :]) & (token[:, None] < high[None, :])
        sequence += tl.sum(tl.where(here, number[None, :], 0), axis=1)
        shift += tl.sum(tl.where(here, (start - low)[None, :], 0), axis=1)
        end += tl.sum(tl.where(here, (start - low + high)[None, :], 0), axis=1)
    position = token + shift
    place, offset = position // block_size, position % block_size
    table = TABLE + sequence.to(tl.int64) * table_stride
    known = (token < tokens) & (place < table_columns)
    block = tl.load(table + place, mask=known, other=-1)
    kept = (block >= 0) & (block < blocks)
    # The last place that a token of this call goes to at the same offset.
    last = tl.where(kept, tl.minimum((end - 1 - offset) // block_size, table_columns - 1), 0)
    for base in range(tl.min(tl.where(kept, place + 1, 2147483647), axis=0), tl.max(last, axis=0) + 1, 64):
        later = base + tl.arange(0, 64)[None, :]
        asked = (later > place[:, None]) & (later <= last[:, None])
        same = tl.load(table[:, None] + later, mask=asked, other=-1) == block[:, None]
        kept &= tl.sum((asked & same).to(tl.int32), axis=1) == 0
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    width = 2 * channels
    mask = kept[:, None] & (column < width)
    at = token.to(tl.int64)[:, None] * width + column
    row = sum_of_parts(PARTIAL, at, mask, tokens, width, parts)
    if APE is not None:
        gate = mask & (column >= channels)
        ape_at = (position % ratio)[:, None] * ape_stride + column - channels
        row += tl.load(APE + ape_at, mask=gate, other=0.0)
    to = tl.where(kept, block, 0).to(tl.int64) * page_stride + offset.to(tl.int64) * row_stride
    tl.store(STATE + to[:, None] + column.to(tl.int64) * column_stride, row, mask=mask)


def project(x: Tensor, wkv: Tensor, wgate: Tensor) -> Tensor:
    """[parts, tokens, 2*channels] float32, whose sum over parts is the rows without ape."""
    (tokens, hidden), channels = x.shape, wkv.shape[0]
    kinds = {x.dtype, wkv.dtype, wgate.dtype}
    kind = TYPES[x.dtype] if len(kinds) == 1 else tl.float32
    exact = kind == tl.float32
    together = power_of_two(tokens, least=16, most=64 if exact else 128)
    wide = 64 if together >= 64 else 16 if channels <= 256 else 32
    features = 32 if exact else 64 if together > 64 else 128
    tiles = ceil_div(tokens, together), ceil_div(channels, wide)
    pieces = max(1, ceil_div(hidden, features))
    parts = min(PARTS, pieces, max(1, PROGRAMS // max(1, tiles[0] * tiles[1])))
    steps = ceil_div(pieces, parts)
    parts = ceil_div(pieces, steps)
    x, wkv, wgate = dense(x), dense(wkv), dense(wgate)
    partial = torch.empty(parts, tokens, 2 * channels, dtype=torch.float32, device=x.device)
    launch(
        project_tokens,
        (*tiles, parts),
        *(x, wkv, wgate, partial, tokens, channels, hidden, x.stride(0), wkv.stride(0), wgate.stride(0), steps),
        warps=8 if together >= 64 else 4,
        stages=2 if exact else 3,
        KIND=kind,
        TOKENS=together,
        CHANNELS=wide,
        FEATURES=features,
    )
    return partial


def keep(
    partial: Tensor,
    ape: Tensor | None,
    state_cache: Tensor,
    state_block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
) -> None:
    """Write the row of every token that has a place to the state; of several with one place the last one stays."""
    (parts, tokens, width), table = partial.shape, dense(state_block_table)
    together = 4 if tokens <= 256 else 16
    columns = min(power_of_two(width), 4096 // together, 512)
    launch(
        keep_rows,
        (ceil_div(tokens, together), ceil_div(width, columns)),
        *(partial, ape, state_cache, table, cu_seqlens.contiguous(), start_pos.contiguous()),
        *(tokens, start_pos.shape[0], ratio, width // 2, parts, 0 if ape is None else ape.stride(0)),
        *(*state_cache.stride(), table.stride(0), table.shape[1], state_cache.shape[0], max(1, state_cache.shape[1])),
        warps=4,
        stages=1,
        TOKENS=together,
        SEQUENCES=128,
        COLUMNS=columns,
    )
