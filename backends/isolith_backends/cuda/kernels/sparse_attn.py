"""Attention over listed entries of one or two pools: online softmax over tiles of columns, shared by many heads.

A program takes one token, up to 32 of its heads and a part of its columns. A tile of entries is gathered and widened
once and serves as keys and as values of all these heads. Entries are the rows of the first product and dimensions
those of the second, heads the columns of both: a warp group's product needs 64 rows, but few columns. Dimensions come
in pieces of 128, each with an accumulator of its own. 64 heads, or one accumulator of [512, 32], spill.

Where tokens are too few to fill a GPU, columns are split among programs and `merge` joins their sums. How many
programs is a matter of shapes alone; how many columns each gets, of the token's own list, so that lists of any length
are shared out evenly.

Floor: entries once over the memory's bandwidth (584 bytes each; the programs of a token are neighbours and meet in the
L2 cache), against 4 * heads * head_dim operations an entry. Parts cost 8 bytes a head and dimension more, which is why
no more programs split a token than fill the GPU once.
"""

import triton
import triton.language as tl

from isolith_backends.cuda.kernels.cache_entries import addresses_of_entries, factors_of_entries, part_of_entries
from isolith_backends.cuda.kernels.listed_columns import NONE, slots_of_columns, span_of_list
from isolith_backends.cuda.kernels.token_tiles import sequence_of_token

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
NO_LIST = tl.constexpr(NONE)


@triton.jit
def rounded_to_tf32(x):
    """To nearest, ties to even: products in TF32 cut off what they are given."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def attend_columns(
    q,
    sums,
    highest,
    total,
    low,
    high,
    first,
    count,
    limit,
    POOL,
    HALVES,
    WORDS,
    INDICES,
    TABLE,
    blocks,
    block_size,
    page,
    entry,
    octaves,
    DIM: tl.constexpr,
    VALUES: tl.constexpr,
    FULL: tl.constexpr,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    FP8: tl.constexpr,
    TWICE: tl.constexpr,
):
    """Go on with the sums over tiles low .. high-1 of a list: (sums, highest, total)."""
    PIECES: tl.constexpr = FULL + (1 if TAIL else 0)
    for tile in range(low, high):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        block, row, valid = slots_of_columns(INDICES, TABLE, column, first, count, limit, blocks, block_size)
        address, scale_at = addresses_of_entries(block, row, block_size, page, entry, FORMAT)
        logits = tl.zeros((COLUMNS, q[0].shape[1]), tl.float32)
        entries = ()
        factors = ()
        for piece in tl.static_range(PIECES):
            part = part_of_entries(
                POOL,
                HALVES,
                address,
                scale_at,
                valid,
                piece * WIDTH,
                WIDTH if piece < FULL else TAIL,
                DIM,
                FORMAT,
                TYPE,
                FP8,
            )
            entries += (part,)  # type: ignore[assignment]  # it grows
            if FORMAT == 132 or (FORMAT == 656 and piece * WIDTH < 512):
                factor = factors_of_entries(WORDS, scale_at, valid, piece * WIDTH)
                factors += (factor,)  # type: ignore[assignment]  # it grows
                product = tl.dot(part, q[piece], input_precision=PRECISION)
                if TWICE:
                    product = tl.dot(part, q[PIECES + piece], product, input_precision=PRECISION)
                logits += product * factor[:, None]
            else:
                logits = tl.dot(part, q[piece], logits, input_precision=PRECISION)
                if TWICE:
                    logits = tl.dot(part, q[PIECES + piece], logits, input_precision=PRECISION)
        logits = tl.where(valid[:, None], logits * octaves, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, axis=0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        keep = tl.exp2(highest - base)
        weights = tl.exp2(logits - base[None, :])
        total = total * keep + tl.sum(weights, axis=0)
        next_sums = ()
        for piece in tl.static_range(PIECES):
            if piece * WIDTH < VALUES:
                share = weights
                if FORMAT == 132 or (FORMAT == 656 and piece * WIDTH < 512):
                    share = weights * factors[piece][:, None]
                if PRECISION == "tf32":
                    share = rounded_to_tf32(share)
                kept = sums[piece] * keep[None, :]
                kept = tl.dot(tl.trans(entries[piece]), share.to(TYPE), kept, input_precision=PRECISION)
                next_sums += (kept,)  # type: ignore[assignment]  # it grows
        sums = next_sums
        highest = higher
    return sums, highest, total


@triton.jit
def attend(
    Q,
    SINK,
    OUT,
    LSE,
    TOTAL,
    CU_SEQLENS,
    START_POS,
    POOL,
    HALVES,
    WORDS,
    INDICES,
    LENGTH,
    TABLE,
    EXTRA_POOL,
    EXTRA_HALVES,
    EXTRA_WORDS,
    EXTRA_INDICES,
    EXTRA_LENGTH,
    EXTRA_TABLE,
    heads,
    groups,
    splits,
    sequences,
    q_token,
    q_head,
    octaves,
    blocks,
    block_size,
    page,
    entry,
    columns,
    indices_stride,
    table_stride,
    room,
    reach,
    extra_blocks,
    extra_block_size,
    extra_page,
    extra_entry,
    extra_columns,
    extra_indices_stride,
    extra_table_stride,
    extra_room,
    extra_reach,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    VALUES: tl.constexpr,
    FULL: tl.constexpr,
    WIDTH: tl.constexpr,
    TAIL: tl.constexpr,
    KIND: tl.constexpr,
    FORMAT: tl.constexpr,
    EXTRA_KIND: tl.constexpr,
    EXTRA_FORMAT: tl.constexpr,
    CAUSAL: tl.constexpr,
    SPLIT: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    FP8: tl.constexpr,
    TWICE: tl.constexpr,
):
    # Programs of one token are neighbours: they read the same entries.
    program = tl.program_id(0)
    group = program % groups
    split = (program // groups) % splits
    token = program // (groups * splits)

    sequence = token * 0
    if CU_SEQLENS is not None:
        sequence = sequence_of_token(token, CU_SEQLENS, sequences)
    position = token * 0
    if START_POS is not None:
        position = tl.load(START_POS + sequence) + token - tl.load(CU_SEQLENS + sequence)
    if INDICES is not None:
        INDICES += token.to(tl.int64) * indices_stride
    if TABLE is not None:
        TABLE += sequence.to(tl.int64) * table_stride
    if EXTRA_INDICES is not None:
        EXTRA_INDICES += token.to(tl.int64) * extra_indices_stride
    if EXTRA_TABLE is not None:
        EXTRA_TABLE += sequence.to(tl.int64) * extra_table_stride

    first, count, limit = span_of_list(INDICES, LENGTH, token, columns, position, reach, room, KIND, CAUSAL)
    tiles = tl.cdiv(count, COLUMNS)
    all_tiles = tiles
    if EXTRA_KIND != NO_LIST:
        extra_first, extra_count, extra_limit = span_of_list(
            EXTRA_INDICES,
            EXTRA_LENGTH,
            token,
            extra_columns,
            position,
            extra_reach,
            extra_room,
            EXTRA_KIND,
            CAUSAL,
        )
        all_tiles += tl.cdiv(extra_count, COLUMNS)
    low = token * 0
    high = all_tiles
    if SPLIT:
        each = tl.cdiv(all_tiles, splits)
        low = split * each
        high = tl.minimum(low + each, all_tiles)

    PIECES: tl.constexpr = FULL + (1 if TAIL else 0)
    head = group * HEADS + tl.arange(0, HEADS)
    q_at = Q + token.to(tl.int64) * q_token + head.to(tl.int64) * q_head
    q = ()
    rest = ()
    sums = ()
    for piece in tl.static_range(PIECES):
        dim = piece * WIDTH + tl.arange(0, WIDTH if piece < FULL else TAIL)
        inside = (dim < DIM)[:, None] & (head < heads)[None, :]
        part = tl.load(q_at[None, :] + dim[:, None], mask=inside, other=0.0)
        if part.dtype == TYPE:
            q += (part,)  # type: ignore[assignment]  # it grows
        else:
            wide = part.to(tl.float32)
            q += (wide.to(TYPE),)  # type: ignore[assignment]  # it grows
            if TWICE:
                rest += ((wide - wide.to(TYPE).to(tl.float32)).to(TYPE),)  # type: ignore[assignment]  # it grows
        if piece * WIDTH < VALUES:
            sums += (tl.zeros((WIDTH if piece < FULL else TAIL, HEADS), tl.float32),)  # type: ignore[assignment]  # it grows
    q += rest
    highest = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)

    sums, highest, total = attend_columns(
        q,
        sums,
        highest,
        total,
        low,
        tl.minimum(high, tiles),
        first,
        count,
        limit,
        POOL,
        HALVES,
        WORDS,
        INDICES,
        TABLE,
        blocks,
        block_size,
        page,
        entry,
        octaves,
        DIM,
        VALUES,
        FULL,
        WIDTH,
        TAIL,
        COLUMNS,
        FORMAT,
        TYPE,
        PRECISION,
        FP8,
        TWICE,
    )
    if EXTRA_KIND != NO_LIST:
        sums, highest, total = attend_columns(
            q,
            sums,
            highest,
            total,
            tl.maximum(low, tiles) - tiles,
            high - tiles,
            extra_first,
            extra_count,
            extra_limit,
            EXTRA_POOL,
            EXTRA_HALVES,
            EXTRA_WORDS,
            EXTRA_INDICES,
            EXTRA_TABLE,
            extra_blocks,
            extra_block_size,
            extra_page,
            extra_entry,
            octaves,
            DIM,
            VALUES,
            FULL,
            WIDTH,
            TAIL,
            COLUMNS,
            EXTRA_FORMAT,
            TYPE,
            PRECISION,
            FP8,
            TWICE,
        )

    place = (token.to(tl.int64) * splits + split) * heads + head
    factor = tl.full((HEADS,), 1.0, tl.float32)
    if SPLIT:
        tl.store(LSE + place, highest, mask=head < heads)
        tl.store(TOTAL + place, total, mask=head < heads)
    else:
        factor, lse = factor_and_lse(highest, total, SINK, head, heads)
        tl.store(LSE + place, lse, mask=head < heads)
    for piece in tl.static_range(PIECES):
        if piece * WIDTH < VALUES:
            dim = piece * WIDTH + tl.arange(0, WIDTH if piece < FULL else TAIL)
            inside = (dim < VALUES)[:, None] & (head < heads)[None, :]
            made = (sums[piece] * factor[None, :]).to(OUT.dtype.element_ty)
            tl.store(OUT + place[None, :] * VALUES + dim[:, None], made, mask=inside)


@triton.jit
def factor_and_lse(highest, total, SINK, head, heads):
    """What sums are multiplied by to be the result, and the natural logarithm of the sum of exponentials."""
    empty = total == 0.0
    base = tl.where(empty, 0.0, highest)
    denominator = total
    if SINK is not None:
        sink = tl.load(SINK + head, mask=head < heads, other=float("-inf"))
        denominator += tl.exp2(sink * LOG2_E - base)
    factor = 1.0 / tl.where(empty, 1.0, denominator)
    lse = tl.where(empty, float("inf"), (base + tl.log2(tl.where(empty, 1.0, total))) * LN_2)
    return tl.where(empty, 0.0, factor), lse


@triton.jit
def merge(
    SUMS,
    HIGHEST,
    TOTAL,
    SINK,
    OUT,
    LSE,
    heads,
    groups,
    splits,
    HEADS: tl.constexpr,
    VALUES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Join what the programs of one token made, in the order of their columns."""
    program = tl.program_id(0)
    token = (program // groups).to(tl.int64)
    head = (program % groups) * HEADS + tl.arange(0, HEADS)
    dim = tl.arange(0, WIDTH)
    inside = (head < heads)[:, None] & (dim < VALUES)[None, :]
    highest = tl.full((HEADS,), float("-inf"), tl.float32)
    for split in range(splits):
        place = (token * splits + split) * heads + head
        highest = tl.maximum(highest, tl.load(HIGHEST + place, mask=head < heads, other=float("-inf")))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros((HEADS,), tl.float32)
    sums = tl.zeros((HEADS, WIDTH), tl.float32)
    for split in range(splits):
        place = (token * splits + split) * heads + head
        share = tl.exp2(tl.load(HIGHEST + place, mask=head < heads, other=float("-inf")) - base)
        total += tl.load(TOTAL + place, mask=head < heads, other=0.0) * share
        sums += tl.load(SUMS + place[:, None] * VALUES + dim[None, :], mask=inside, other=0.0) * share[:, None]
    factor, lse = factor_and_lse(highest, total, SINK, head, heads)
    place = token * heads + head
    tl.store(LSE + place, lse, mask=head < heads)
    made = (sums * factor[:, None]).to(OUT.dtype.element_ty)
    tl.store(OUT + place[:, None] * VALUES + dim[None, :], made, mask=inside)
