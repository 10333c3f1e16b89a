"""The compressor in three launches: rows projected, windows pooled into entries, rows kept for later calls.

A program makes one entry: it finds its window from the batch's counts, pools the rows channel by channel with a running
softmax, from this call's rows or from the state, and normalises, rotates and stores. All in float32, rounded once.
Reads of the state come before its writes, since they are launches of their own. Floor: at decode the weights' bytes; at
prefill the products, 4 * tokens * hidden * channels operations.
"""

import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.kernels.compressor_rows import keep, project, sum_of_parts
from isolith_backends.cuda.kernels.exponentials import exp_of
from isolith_backends.cuda.kernels.hadamard import in_steps
from isolith_backends.cuda.kernels.tensors import dense
from isolith_backends.cuda.launch import launch, power_of_two

DIM = 4096  # elements of an entry that a program holds
HELD = 2048  # elements of a step's rows that a program holds; of 512 columns a thread of 4 warps has 4, in every row


@triton.jit
def window_of_entry(CU, START, CU_ENTRIES, entry, sequences, ratio, SEQUENCES: tl.constexpr):
    """(sequence, its entry, whether there is one); the first program also writes where sequences' entries begin."""
    total, sequence, first = 0, 0, 0
    for base in range(0, sequences, SEQUENCES):
        number = base + tl.arange(0, SEQUENCES)
        known = number < sequences
        start = tl.load(START + number, mask=known, other=0)
        end = start + tl.load(CU + number + 1, mask=known, other=0) - tl.load(CU + number, mask=known, other=0)
        ends = total + tl.cumsum(end // ratio - start // ratio, axis=0)
        before = known & (ends <= entry)
        sequence += tl.sum(before.to(tl.int32), axis=0)
        first = tl.maximum(first, tl.max(tl.where(before, ends, 0), axis=0))
        total = tl.max(ends, axis=0)
        if entry == 0:
            tl.store(CU_ENTRIES + 1 + number, ends, mask=known)
    if entry == 0:
        tl.store(CU_ENTRIES, 0)
    return sequence, entry - first, entry < total


@triton.jit
def compress_windows(
    PARTIAL,
    APE,
    STATE,
    TABLE,
    CU,
    START,
    NORM,
    COS,
    SIN,
    OUT,
    CU_ENTRIES,
    tokens,
    sequences,
    ratio,
    channels,
    dim,
    pairs,
    parts,
    ape_stride,
    page_stride,
    row_stride,
    column_stride,
    table_stride,
    table_columns,
    blocks,
    block_size,
    cos_stride,
    sin_stride,
    eps,
    scale,
    OVERLAP: tl.constexpr,
    BITS: tl.constexpr,
    ODD: tl.constexpr,
    SEQUENCES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    out_row = tl.program_id(0)
    sequence, number, there = window_of_entry(CU, START, CU_ENTRIES, out_row, sequences, ratio, SEQUENCES)
    if there:
        start = tl.load(START + sequence)
        window = start // ratio + number
        oldest = (window - 1) * ratio if OVERLAP else window * ratio
        rows = 2 * ratio if OVERLAP else ratio
        # Pairs that are rotated together stand together, so that an entry of odd width begins one column later.
        column = tl.arange(0, COLUMNS) - ODD
        real = (column >= 0) & (column < dim)
        width = 2 * channels
        largest = tl.full((COLUMNS,), float("-inf"), tl.float32)
        weights = tl.zeros((COLUMNS,), tl.float32)
        pooled = tl.zeros((COLUMNS,), tl.float32)
        for base in range(0, rows, ROWS):
            row = base + tl.arange(0, ROWS)
            position = oldest + row
            exists = (row < rows) & (position >= 0)
            called = exists & (position >= start)
            token = tl.load(CU + sequence) + position - start
            place = position // block_size
            asked = exists & (position < start) & (place < table_columns)
            block = tl.load(TABLE + sequence.to(tl.int64) * table_stride + place, mask=asked, other=-1)
            held = (block >= 0) & (block < blocks)
            # The window before brings its first half of the channels, the window itself its last.
            half = tl.where(row >= ratio, dim, 0)[:, None] if OVERLAP else 0
            of_call = called[:, None] & real[None, :]
            at = token.to(tl.int64)[:, None] * width + half + column[None, :]
            u = sum_of_parts(PARTIAL, at, of_call, tokens, width, parts)
            z = sum_of_parts(PARTIAL, at + channels, of_call, tokens, width, parts)
            if APE is not None:
                ape_at = (position % ratio)[:, None] * ape_stride + half + column[None, :]
                z += tl.load(APE + ape_at, mask=of_call, other=0.0)
            of_state = held[:, None] & real[None, :]
            slot = tl.where(held, block, 0).to(tl.int64) * page_stride + (position % block_size) * row_stride
            at = slot[:, None] + (half + column[None, :]) * column_stride
            u += tl.load(STATE + at, mask=of_state, other=0.0)
            z += tl.load(STATE + at + channels * column_stride, mask=of_state, other=0.0)
            z = tl.where((called | held)[:, None], z, float("-inf"))
            new = tl.maximum(largest, tl.max(z, axis=0))
            # Where all were -inf so far, any finite number does.
            shift = tl.where(new == float("-inf"), 0.0, new)
            share = exp_of(z - shift[None, :])
            kept = exp_of(largest - shift)
            weights = weights * kept + tl.sum(share, axis=0)
            pooled = pooled * kept + tl.sum(share * u, axis=0)
            largest = new
        pooled = tl.where(real, pooled / weights, 0.0)
        mean = tl.sum(pooled * pooled, axis=0) / dim
        norm = tl.load(NORM + column, mask=real, other=0.0).to(tl.float32)
        values = pooled * tl.rsqrt(mean + eps) * norm
        a, b = tl.split(tl.reshape(values, (COLUMNS // 2, 2)))
        pair = tl.arange(0, COLUMNS // 2) - (dim + ODD - 2 * pairs) // 2
        turned = (pair >= 0) & (pair < pairs)
        angle = (window * ratio).to(tl.int64)
        cos = tl.load(COS + angle * cos_stride + pair, mask=turned, other=1.0)
        sin = tl.load(SIN + angle * sin_stride + pair, mask=turned, other=0.0)
        values = tl.join(tl.where(turned, a * cos - b * sin, a), tl.where(turned, a * sin + b * cos, b))
        values = tl.reshape(values, (COLUMNS,))
        if BITS:
            values = tl.reshape(in_steps(tl.reshape(values, (1, COLUMNS)), 1, COLUMNS, BITS), (COLUMNS,)) * scale
        tl.store(OUT + out_row.to(tl.int64) * dim + column, values.to(OUT.dtype.element_ty), mask=real)


def kv_compress(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor, Tensor],
    state: tuple[Tensor, Tensor],
    batch: tuple[Tensor, Tensor],
    ratio: int,
    ape: Tensor | None,
    overlap: bool,
    rotate: bool,
    eps: float,
    entries: Tensor,
    cu_entries: Tensor,
) -> None:
    """Write the entries of a call and where each sequence's begin, and the call's rows to the state.

    Args:
        x: [tokens hidden].
        weights: wkv, wgate, norm_weight.
        tables: Cosines and sines.
        state: The pool and its block table.
        batch: cu_seqlens, start_pos.
        ratio: Tokens of a window.
        ape: What is added to a logit by its place in the window.
        overlap: Whether the window before is pooled too.
        rotate: Whether the Hadamard rotation ends it.
        eps: Of the norm.
        entries: [rows dim], contiguous; rows that no window fills stay as they are.
        cu_entries: [sequences+1], contiguous.
    """
    partial = project(x, weights[0], weights[1])
    ape = None if ape is None else dense(ape)
    norm, cos, sin, table = dense(weights[2]), dense(tables[0]), dense(tables[1]), dense(state[1])
    cu_seqlens, start_pos = (each.contiguous() for each in batch)
    (parts, tokens, width), pool, dim = partial.shape, state[0], entries.shape[1]
    odd = dim % 2
    columns = power_of_two(dim + odd, least=2)
    rows = min(power_of_two(ratio * (2 if overlap else 1)), max(1, HELD // columns))
    launch(
        compress_windows,
        (max(1, entries.shape[0]),),
        *(partial, ape, pool, table, cu_seqlens, start_pos, norm, cos, sin, entries, cu_entries),
        *(tokens, start_pos.shape[0], ratio, width // 2, dim, cos.shape[1], parts),
        *(0 if ape is None else ape.stride(0), *pool.stride(), table.stride(0), table.shape[1]),
        *(pool.shape[0], max(1, pool.shape[1]), cos.stride(0), sin.stride(0), eps, dim**-0.5),
        warps=min(max(rows * columns // 512, 1), 8),
        stages=1,
        OVERLAP=overlap,
        BITS=dim.bit_length() - 1 if rotate else 0,
        ODD=odd,
        SEQUENCES=128,
        ROWS=rows,
        COLUMNS=columns,
    )
    keep(partial, ape, pool, table, cu_seqlens, start_pos, ratio)
