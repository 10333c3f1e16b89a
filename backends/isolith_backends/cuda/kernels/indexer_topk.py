"""The k largest of every row, ties to the lowest index: the k-th largest is found digit by digit, exactly.

A score becomes an unsigned key of the same order. A row that fits in a program's registers is read once; the k-th
largest key is built from its highest bit down, each bit by a count. A longer row is cut into pieces, one program each:
a launch for every eight bits adds the pieces' histograms, which integer atomics may do in any order, then one counts
what each piece has above and at the k-th key, and one writes each piece's share behind those of the pieces before it.
Entries stand in ascending order, whatever the pieces. Floor: the row's bytes, once; here four to six times for a long
row, the later ones mostly from the second-level cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.kernels.tensors import dense
from isolith_backends.cuda.launch import ceil_div, launch, power_of_two

ROW = 8192  # entries that a program of 16 warps holds
PIECE = 4096  # entries that a program reads at a time
MULTIPROCESSORS = 132
PROGRAMS = 8 * MULTIPROCESSORS  # what a split of rows aims at
DIGIT = 8  # bits: a histogram of 256 is what a warp keeps in a few registers
LOWEST = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
"""The lowest bit that a dtype has as a float32; those below follow from the sign."""


@triton.jit
def keys_of(scores):
    """float32 -> uint32 of the same order; zeros of both signs are one, NaN is above all."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.uint32, bitcast=True)
    keys = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(scores == scores, keys, 0xFFFFFFFF)


@triton.jit
def competing(MARKS, row, entry, end, inside, marks_stride, candidate_block):
    """Which entries may be chosen."""
    competes = inside & (entry < end)
    if MARKS is not None:
        at = row.to(tl.int64) * marks_stride + entry // candidate_block
        competes &= tl.load(MARKS + at, mask=competes, other=0) != 0
    return competes


@triton.jit
def mark_candidates(CANDIDATES, MARKS, pairs, columns, stride, blocks, SIZE: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    row = pair // columns
    block = tl.load(CANDIDATES + row * stride + pair % columns, mask=pair < pairs, other=-1)
    legal = (block >= 0) & (block < blocks)
    tl.store(MARKS + row * blocks + block, tl.full((SIZE,), 1, tl.uint8), mask=legal)


@triton.jit
def topk_rows(
    S,
    LENGTHS,
    MARKS,
    INDICES,
    COUNT,
    rows,
    entries,
    stride,
    marks_stride,
    candidate_block,
    k,
    LOW: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    entry = tl.arange(0, ENTRIES)[None, :]
    end = tl.load(LENGTHS + row, mask=row < rows, other=0)
    inside = (row < rows)[:, None] & (entry < entries)
    competes = competing(MARKS, row[:, None], entry, end[:, None], inside, marks_stride, candidate_block)
    at = S + row.to(tl.int64)[:, None] * stride + entry
    keys = keys_of(tl.load(at, mask=competes, other=0.0).to(tl.float32))
    count = tl.minimum(tl.sum(competes.to(tl.int32), axis=1), k)
    # The largest key that at least `count` entries reach, in the bits that tell keys apart.
    keys = keys >> LOW
    threshold = tl.zeros((ROWS,), tl.uint32)
    bit = tl.full((ROWS,), 1 << (31 - LOW), tl.uint32)
    for _ in range(32 - LOW):
        reached = tl.sum((competes & (keys >= (threshold | bit)[:, None])).to(tl.int32), axis=1)
        threshold = tl.where(reached >= count, threshold | bit, threshold)
        bit = bit >> 1
    above = competes & (keys > threshold[:, None])
    equal = competes & (keys == threshold[:, None])
    need = count - tl.sum(above.to(tl.int32), axis=1)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), axis=1) <= need[:, None]))
    place_of = tl.cumsum(chosen.to(tl.int32), axis=1) - 1
    out = INDICES + row.to(tl.int64)[:, None] * k
    tl.store(out + place_of, tl.broadcast_to(entry, (ROWS, ENTRIES)), mask=chosen)
    for base in range(0, k, ENTRIES):
        column = base + entry
        empty = (row < rows)[:, None] & (column >= count[:, None]) & (column < k)
        tl.store(out + column, tl.full((ROWS, ENTRIES), -1, tl.int32), mask=empty)
    tl.store(COUNT + row, count, mask=row < rows)


@triton.jit
def digit_of(HISTOGRAM, need, BINS: tl.constexpr):
    """(the largest digit that `need` entries reach, how many are above it)."""
    counts = tl.load(HISTOGRAM + tl.arange(0, BINS))
    reached = tl.cumsum(counts, axis=0, reverse=True)
    digit = tl.sum((reached >= need).to(tl.int32), axis=0) - 1
    return digit, tl.sum(tl.where(tl.arange(0, BINS) > digit, counts, 0), axis=0)


@triton.jit
def threshold_of(HISTOGRAM, row, k, PASSES: tl.constexpr, STRIDE: tl.constexpr, BINS: tl.constexpr):
    """(the highest digits of the k-th key, entries still due among those that have them, entries due in all)."""
    first = HISTOGRAM + row.to(tl.int64) * STRIDE * BINS
    total = tl.minimum(tl.sum(tl.load(first + tl.arange(0, BINS)), axis=0), k)
    threshold = total.to(tl.uint32) * 0
    need = total
    for number in tl.static_range(PASSES):
        digit, above = digit_of(first + number * BINS, need, BINS)
        threshold = (threshold << 8) | digit.to(tl.uint32)
        need -= above
    return threshold, need, total


@triton.jit
def digit_histograms(
    S,
    LENGTHS,
    MARKS,
    HISTOGRAM,
    entries,
    stride,
    marks_stride,
    candidate_block,
    k,
    pieces,
    steps,
    PASS: tl.constexpr,
    PASSES: tl.constexpr,
    PIECE: tl.constexpr,
):
    row = tl.program_id(0) // pieces
    low = (tl.program_id(0) % pieces) * steps * PIECE
    end = tl.minimum(tl.load(LENGTHS + row), entries)
    if low < end:
        if PASS:
            threshold, _, _ = threshold_of(HISTOGRAM, row, k, PASS, PASSES, 256)
        counts = tl.zeros((256,), tl.int32)
        for step in range(tl.minimum(steps, tl.cdiv(end - low, PIECE).to(tl.int32))):
            entry = low + step * PIECE + tl.arange(0, PIECE)
            competes = competing(MARKS, row, entry, end, entry < entries, marks_stride, candidate_block)
            scores = tl.load(S + row.to(tl.int64) * stride + entry, mask=competes, other=0.0).to(tl.float32)
            keys = keys_of(scores)
            if PASS:
                competes &= (keys >> (32 - 8 * PASS)) == threshold
            digits = (keys >> (24 - 8 * PASS)) & 255
            counts += tl.histogram(digits.to(tl.int32), 256, mask=competes)
        at = HISTOGRAM + (row.to(tl.int64) * PASSES + PASS) * 256 + tl.arange(0, 256)
        tl.atomic_add(at, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def chosen_of_pieces(
    S,
    LENGTHS,
    MARKS,
    HISTOGRAM,
    SHARES,
    INDICES,
    COUNT,
    entries,
    stride,
    marks_stride,
    candidate_block,
    k,
    pieces,
    steps,
    WRITE: tl.constexpr,
    PASSES: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Count what a piece has above and at the k-th key; with WRITE, write its share of the row."""
    row, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    low = piece * steps * PIECE
    end = tl.minimum(tl.load(LENGTHS + row), entries)
    threshold, need, total = threshold_of(HISTOGRAM, row, k, PASSES, PASSES, 256)
    shares = SHARES + row.to(tl.int64) * pieces * 2
    above, equal = 0, 0
    if WRITE:
        before = tl.arange(0, PIECES)
        above = tl.sum(tl.load(shares + before * 2, mask=before < piece, other=0), axis=0)
        equal = tl.sum(tl.load(shares + before * 2 + 1, mask=before < piece, other=0), axis=0)
    for step in range(tl.minimum(steps, tl.cdiv(tl.maximum(end - low, 0), PIECE).to(tl.int32))):
        entry = low + step * PIECE + tl.arange(0, PIECE)
        competes = competing(MARKS, row, entry, end, entry < entries, marks_stride, candidate_block)
        scores = tl.load(S + row.to(tl.int64) * stride + entry, mask=competes, other=0.0).to(tl.float32)
        keys = keys_of(scores) >> (32 - 8 * PASSES)
        is_above, is_equal = competes & (keys > threshold), competes & (keys == threshold)
        if WRITE:
            rank = equal + tl.cumsum(is_equal.to(tl.int32), axis=0)
            chosen = is_above | (is_equal & (rank <= need))
            place = above + tl.minimum(equal, need) + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
            tl.store(INDICES + row.to(tl.int64) * k + place, entry, mask=chosen)
        above += tl.sum(is_above.to(tl.int32), axis=0)
        equal += tl.sum(is_equal.to(tl.int32), axis=0)
    if WRITE:
        if piece == 0:
            tl.store(COUNT + row, total)
            for base in range(0, k, PIECE):
                column = base + tl.arange(0, PIECE)
                empty = (column >= total) & (column < k)
                tl.store(INDICES + row.to(tl.int64) * k + column, tl.full((PIECE,), -1, tl.int32), mask=empty)
    else:
        tl.store(shares + piece * 2, above)
        tl.store(shares + piece * 2 + 1, equal)


def marks_of(candidates: Tensor, entries: int, candidate_block: int) -> Tensor:
    """[tokens, blocks] bytes: 1 where a block is among a token's candidates."""
    blocks, listed = ceil_div(entries, candidate_block), dense(candidates)
    marks = torch.zeros(listed.shape[0], blocks, dtype=torch.uint8, device=listed.device)
    pairs, columns = listed.numel(), listed.shape[1]
    shape = (pairs, columns, listed.stride(0), blocks)
    launch(mark_candidates, (ceil_div(pairs, 1024),), listed, marks, *shape, warps=4, stages=1, SIZE=1024)
    return marks


def indexer_topk(
    scores: Tensor,
    lengths: Tensor,
    k: int,
    candidates: Tensor | None,
    candidate_block: int,
    indices: Tensor,
    topk_length: Tensor,
) -> None:
    """Write the selection of every row to `indices` [tokens, k] and `topk_length` [tokens], both contiguous."""
    (rows, entries), scores, lengths = scores.shape, dense(scores), lengths.contiguous()
    if not entries:
        indices.fill_(-1)
        topk_length.zero_()
        return
    marks = None if candidates is None else marks_of(candidates, entries, candidate_block)
    blocks = ceil_div(entries, candidate_block)
    shape = (entries, scores.stride(0), blocks, candidate_block, k)
    padded = power_of_two(entries, least=16)
    if padded <= ROW:
        together = min(power_of_two(rows // MULTIPROCESSORS), max(1, PIECE // padded))
        launch(
            topk_rows,
            (ceil_div(rows, together),),
            *(scores, lengths, marks, indices, topk_length, rows, *shape),
            warps=min(max(together * padded // 512, 1), 16),
            stages=1,
            LOW=LOWEST[scores.dtype],
            ROWS=together,
            ENTRIES=padded,
        )
        return
    passes = ceil_div(32 - LOWEST[scores.dtype], DIGIT)
    most = ceil_div(entries, PIECE)
    pieces = ceil_div(most, ceil_div(most, max(1, PROGRAMS // max(rows, 1))))
    steps = ceil_div(most, pieces)
    histogram = torch.zeros(rows, passes, 1 << DIGIT, dtype=torch.int32, device=scores.device)
    shares = torch.empty(rows, pieces, 2, dtype=torch.int32, device=scores.device)
    row = (scores, lengths, marks, histogram)
    cut = {"warps": 8, "stages": 1, "PASSES": passes, "PIECE": PIECE}
    for number in range(passes):
        launch(digit_histograms, (rows * pieces,), *row, *shape, pieces, steps, PASS=number, **cut)
    for write in (False, True):
        launch(
            chosen_of_pieces,
            (rows * pieces,),
            *(*row, shares, indices, topk_length, *shape, pieces, steps),
            WRITE=write,
            PIECES=power_of_two(pieces),
            **cut,
        )
