"""The lightning indexer's scores: keys times queries, rectified, weighted and summed over heads on chip.

A program holds the queries of a few tokens of one sequence and goes through a run of that sequence's entries; keys are
the rows of the product and heads its columns, so that the sum over heads stays within a thread or a few neighbours.
What leaves the chip is one number for a token and an entry. Floor: at decode the keys' bytes (of 132-byte entries 4 ns
per thousand tokens and entries at 3.35 TB/s), from about four tokens of a sequence on the products.

Codes are products of halves: e4m3 and e2m1 with their e8m0 scales are exact in bfloat16 or float16, and so are their
products in float32. Tensor cores for 8-bit floats are left alone, since Hopper's keep 14 bits of a sum.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.kernels.codes import decoded_e4m3, value_of_e2m1, value_of_e8m0
from isolith_backends.cuda.kernels.tensors import TYPES, dense, stored
from isolith_backends.cuda.kernels.token_tiles import first_token_of_tile, sequence_of_tile, tiles_of
from isolith_backends.cuda.launch import capability, ceil_div, launch, power_of_two

HEADS = 128  # columns of a product that a program holds for one token
DIM = 512  # elements of a key that a program holds at a time
PROGRAMS = 528  # 4 for each of 132 multiprocessors: what a split of the entries aims at
STEPS = 16  # tiles of entries that share one reading of the queries


@triton.jit
def queries_of(
    Q, QS, token, head, column, inside, q_token, q_head, s_token, s_head, KIND: tl.constexpr, NATIVE: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """[columns, tokens * heads]: the queries' elements `column`, e2m1 ones with their scales."""
    row = token.to(tl.int64) * q_token + head * q_head
    if KIND == "e2m1":
        byte = tl.load(Q + row[None, :] + (column // 2)[:, None], mask=inside, other=0)
        code = (byte >> ((column & 1) * 4).to(tl.uint8)[:, None]) & 15
        scale_at = (token.to(tl.int64) * s_token + head * s_head)[None, :] + (column // 32)[:, None]
        if QS.dtype.element_ty == tl.uint8:
            scale = value_of_e8m0(tl.load(QS + scale_at, mask=inside, other=127))
        else:
            scale = tl.load(QS + scale_at, mask=inside, other=0.0)
        return (value_of_e2m1(code) * scale).to(MATH)
    if KIND == "e4m3":
        return decoded_e4m3(tl.load(Q + row[None, :] + column[:, None], mask=inside, other=0), MATH, NATIVE)
    return tl.load(Q + row[None, :] + column[:, None], mask=inside, other=0.0).to(MATH)


@triton.jit
def float_of_bytes(P, at, mask):
    """The float32 in four bytes that may begin anywhere."""
    bits = tl.load(P + at, mask=mask, other=0).to(tl.uint32)
    bits |= tl.load(P + at + 1, mask=mask, other=0).to(tl.uint32) << 8
    bits |= tl.load(P + at + 2, mask=mask, other=0).to(tl.uint32) << 16
    bits |= tl.load(P + at + 3, mask=mask, other=0).to(tl.uint32) << 24
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def product(keys, queries, dots):
    """Add keys [entries, columns] times queries [columns, tokens * heads] to dots, in float32."""
    return tl.dot(keys, queries, dots, input_precision="ieee")


@triton.jit
def indexer_scores(
    Q,
    QS,
    W,
    K,
    TABLE,
    CU,
    START,
    OUT,
    q_token,
    q_head,
    s_token,
    s_head,
    w_token,
    page_stride,
    row_stride,
    table_stride,
    first,
    last,
    sequences,
    heads,
    dim,
    ratio,
    entries,
    table_columns,
    blocks,
    block_size,
    chunks,
    steps,
    softmax_scale,
    Q_KIND: tl.constexpr,
    K_KIND: tl.constexpr,
    NATIVE: tl.constexpr,
    MATH: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    tile = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    sequence = sequence_of_tile(CU, sequences, first, last, tile, TOKENS)
    base = first_token_of_tile(CU, sequence, first, last, tile, TOKENS)
    end = tl.minimum(tl.load(CU + sequence + 1), last)
    if base < end:
        # A token's position is its number plus the shift.
        shift = tl.load(START + sequence) - tl.load(CU + sequence)
        number = tl.arange(0, TOKENS * HEADS)
        token, head = base + number // HEADS, number % HEADS
        real = (token < end) & (head < heads)
        weight = tl.load(W + token.to(tl.int64) * w_token + head, mask=real, other=0.0).to(tl.float32) * softmax_scale
        if Q_KIND == "e4m3":
            scale_of_head = QS + token.to(tl.int64) * s_token + head * s_head
            if QS.dtype.element_ty == tl.uint8:
                weight *= value_of_e8m0(tl.load(scale_of_head, mask=real, other=127))
            else:
                weight *= tl.load(scale_of_head, mask=real, other=0.0)
        place_of_query = (q_token, q_head, s_token, s_head)
        if PART == COLUMNS:
            # Held for all entries; a byte of e2m1 keys holds an even and an odd column, each a product of its own.
            if K_KIND == "e2m1":
                pair = tl.arange(0, COLUMNS // 2)
                inside = real[None, :] & (pair < dim // 2)[:, None]
                query = queries_of(Q, QS, token, head, 2 * pair, inside, *place_of_query, Q_KIND, NATIVE, MATH)
                odd_query = queries_of(Q, QS, token, head, 2 * pair + 1, inside, *place_of_query, Q_KIND, NATIVE, MATH)
            else:
                column = tl.arange(0, COLUMNS)
                inside = real[None, :] & (column < dim)[:, None]
                query = queries_of(Q, QS, token, head, column, inside, *place_of_query, Q_KIND, NATIVE, MATH)
        out_token = base + tl.arange(0, TOKENS)
        count = (out_token + shift + 1) // ratio
        out = OUT + (out_token - first).to(tl.int64)[None, :] * entries
        most = (tl.minimum(base + TOKENS, end) + shift) // ratio
        low = chunk * steps * ENTRIES
        seen_steps = tl.minimum(tl.maximum(tl.cdiv(most - low, ENTRIES), 0), steps)
        for step in range(seen_steps):
            entry = low + step * ENTRIES + tl.arange(0, ENTRIES)
            place = entry // block_size
            known = (entry < most) & (place < table_columns)
            block = tl.load(TABLE + sequence.to(tl.int64) * table_stride + place, mask=known, other=-1)
            # What has no block is a key of zeros, whatever the pool holds.
            held = (block >= 0) & (block < blocks)
            page = tl.where(held, block, 0).to(tl.int64) * page_stride
            row = entry % block_size
            dots = tl.zeros((ENTRIES, TOKENS * HEADS), tl.float32)
            for part in range(COLUMNS // PART):
                if K_KIND == "e2m1":
                    pair = part * (PART // 2) + tl.arange(0, PART // 2)
                    if PART != COLUMNS:
                        inside = real[None, :] & (pair < dim // 2)[:, None]
                        query = queries_of(Q, QS, token, head, 2 * pair, inside, *place_of_query, Q_KIND, NATIVE, MATH)
                        odd_query = queries_of(
                            Q, QS, token, head, 2 * pair + 1, inside, *place_of_query, Q_KIND, NATIVE, MATH
                        )
                    byte = tl.load(K + (page + row * 64)[:, None] + pair[None, :], mask=held[:, None], other=0)
                    scale_at = (page + block_size * 64 + row * 4)[:, None] + (pair // 16)[None, :]
                    scale = value_of_e8m0(tl.load(K + scale_at, mask=held[:, None], other=127))
                    dots = product((value_of_e2m1(byte & 15) * scale).to(MATH), query, dots)
                    dots = product((value_of_e2m1(byte >> 4) * scale).to(MATH), odd_query, dots)
                else:
                    column = part * PART + tl.arange(0, PART)
                    if PART != COLUMNS:
                        inside = real[None, :] & (column < dim)[:, None]
                        query = queries_of(Q, QS, token, head, column, inside, *place_of_query, Q_KIND, NATIVE, MATH)
                    if K_KIND == "e4m3":
                        byte = tl.load(K + (page + row * 128)[:, None] + column[None, :], mask=held[:, None], other=0)
                        keys = decoded_e4m3(byte, MATH, NATIVE)
                    else:
                        key_at = (page + row.to(tl.int64) * row_stride)[:, None] + column[None, :]
                        keys = tl.load(K + key_at, mask=held[:, None] & (column < dim)[None, :], other=0.0).to(MATH)
                    dots = product(keys, query, dots)
            if K_KIND == "e4m3":
                dots *= float_of_bytes(K, page + block_size * 128 + row * 4, held)[:, None]
            dots = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL) * weight[None, :]
            dots = tl.where(real[None, :], dots, 0.0)
            score = tl.sum(tl.reshape(dots, (ENTRIES, TOKENS, HEADS)), axis=2)
            score = tl.where(entry[:, None] < count[None, :], score, float("-inf"))
            written = (entry < entries)[:, None] & (out_token < end)[None, :]
            tl.store(out + entry[:, None], score.to(OUT.dtype.element_ty), mask=written)
        for step in range(seen_steps, steps):
            entry = low + step * ENTRIES + tl.arange(0, ENTRIES)
            written = (entry < entries)[:, None] & (out_token < end)[None, :]
            hidden = tl.full((ENTRIES, TOKENS), float("-inf"), tl.float32)
            tl.store(out + entry[:, None], hidden.to(OUT.dtype.element_ty), mask=written)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What a program holds: tokens times heads as columns of a product, entries as its rows."""

    tokens: int
    heads: int
    columns: int
    part: int
    """Columns of keys and queries that are multiplied at a time; the queries stay on chip where that is all."""
    entries: int
    warps: int


def tile_of(heads: int, dim: int, together: int, math: torch.dtype, kind: str, native: bool) -> Tile:
    """The tile for so many heads of so many elements; `together` tokens of a sequence are in the call on average."""
    wide, columns = power_of_two(heads), power_of_two(dim, least=32)
    exact = math == torch.float32
    # By what float32 sums, and codes on their way to halves, take of the registers.
    most = 64 if exact else 256 if native else 128
    tokens = max(min(below(together), most // wide), 16 // wide, 1)
    held = tokens * wide
    room = 16384 if exact or kind == "e2m1" or not native else 32768
    entries = max(16, min(below(room // (columns + held)), 512))
    # A product is at least 16 deep (Triton 3.6), and packed keys come in pairs.
    part = columns if not exact else 32 if kind == "e2m1" else 16
    return Tile(tokens=tokens, heads=wide, columns=columns, part=part, entries=entries, warps=8 if held > 64 else 4)


def below(count: int) -> int:
    """The largest power of two that is not above a count; at least 1."""
    return power_of_two(count + 1) // 2 if count else 1


def math_of(q: Tensor, k_cache: Tensor, q_scale: Tensor | None) -> torch.dtype:
    """The dtype of the products' operands: halves where they hold every value, else float32."""
    floats = {tensor.dtype for tensor in (q, k_cache) if tensor.dtype in TYPES}
    e2m1 = q.dtype == torch.uint8 or (k_cache.dtype == torch.uint8 and k_cache.shape[2] == 68)
    scaled = q.dtype == torch.uint8 and q_scale is not None and q_scale.dtype == torch.float32
    if torch.float32 in floats or len(floats) > 1 or scaled or (e2m1 and torch.float16 in floats):
        return torch.float32
    return floats.pop() if floats else torch.bfloat16 if e2m1 else torch.float16


def indexer_score(
    q: Tensor,
    weights: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    softmax_scale: float,
    q_scale: Tensor | None,
    out: Tensor,
    first: int = 0,
) -> None:
    """Write the scores of the tokens from `first` on, as many as `out` [tokens, entries] has rows."""
    tokens, entries = out.shape
    if not tokens or not entries:
        return
    math, sequences = math_of(q, k_cache, q_scale), start_pos.shape[0]
    q_kind = {torch.uint8: "e2m1", torch.float8_e4m3fn: "e4m3"}.get(q.dtype, "float")
    k_kind = {132: "e4m3", 68: "e2m1"}[k_cache.shape[2]] if k_cache.dtype == torch.uint8 else "float"
    q, weights, keys, table = dense(stored(q)), dense(weights), dense(k_cache), dense(block_table)
    scale = None if q_scale is None else q_scale.contiguous()
    heads, dim = q.shape[1], q.shape[2] * (2 if q_kind == "e2m1" else 1)
    native = capability(q.device) >= 89
    tile = tile_of(heads, dim, tokens // max(sequences, 1), math, k_kind, native)
    tiles, pieces = tiles_of(tokens, sequences, tile.tokens), ceil_div(entries, tile.entries)
    steps = min(max(tiles * pieces // PROGRAMS, 1), STEPS)
    chunks = ceil_div(pieces, steps)
    launch(
        indexer_scores,
        (tiles * chunks,),
        *(q, None if scale is None else stored(scale), weights, keys, table),
        *(cu_seqlens.contiguous(), start_pos.contiguous(), out),
        *(q.stride(0), q.stride(1), *((0, 0) if scale is None else scale.stride()[:2]), weights.stride(0)),
        *(keys.stride(0), keys.stride(1), table.stride(0)),
        *(first, first + tokens, sequences, heads, dim, ratio, entries, table.shape[1]),
        *(keys.shape[0], max(keys.shape[1], 1), chunks, steps, softmax_scale),
        warps=tile.warps,
        stages=2,
        Q_KIND=q_kind,
        K_KIND=k_kind,
        NATIVE=native,
        MATH=TYPES[math],
        TOKENS=tile.tokens,
        HEADS=tile.heads,
        COLUMNS=tile.columns,
        PART=tile.part,
        ENTRIES=tile.entries,
    )
