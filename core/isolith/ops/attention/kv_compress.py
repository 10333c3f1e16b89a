"""Compress windows of tokens into one entry each, for any mix of prefill, chunks and decode, with a paged state.

    u[p] = wkv x[p],   z[p] = wgate x[p] + ape[p mod m]                     m = ratio; one state row per token, [u | z]
    c[w] = sum_j a[j] * u[j],   a = softmax over the window's tokens j of z[j], each channel by itself
    entry[w] = hadamard(rope(rms_norm(c[w], norm_weight, eps), position m*w)),   hadamard only with `rotate`

Window w is the tokens m*w .. m*w+m-1 of a sequence, and an entry has dim channels. With `overlap` u and z have 2*dim
and the window before joins the same softmax: its tokens bring their first dim channels, the window's own their last;
window 0 has none before it. An entry exists once its last token has been seen: a call with tokens s .. e-1 of a
sequence emits w = floor(s/m) .. floor(e/m)-1, and nothing for the rest. Without `ape` its term is 0. Sequences are
told apart by cu_seqlens; those without tokens in the call emit and write nothing.

entries holds min(T, floor(T/m) + B) rows, which no value decides: the entries packed by sequence, then by w, sequence b
from cu_entries[b] on; rows from cu_entries[B] on are zeros here, and unspecified in a kernel.

The state. Row p of a sequence is item p of its state_block_table. A row is read if the call emits an entry that pools
its token, and p < start_pos; others may hold anything, NaN too. So start_pos = 0 starts afresh on any state, and a
smaller start_pos than before takes tokens back. Reads come first; then every token of the call is written, in order,
where the table has a block: in a ring (blocks named again and again) of m rows, 2m with overlap, the latest stays.
Specified after a call that ends at length L are the rows of tokens m*floor(L/m) .. L-1, with overlap also of the m
before them; blocks that the table does not name stay as they were. A row that has no block when it is to be read is the
caller's error.

Projections, logits and pooling in float32, whatever the weights' dtypes; pooled value, norm, rotation and Hadamard are
rounded to x's dtype each (one rounding at the end is legal). Quantising is the cache write's.

Source: DeepSeek-V4 inference/model.py, Compressor; arXiv:2606.19348, section 2.3, eqs. 9-17 (overlap) and 20-23;
state rows per token: vllm-ascend csrc/attention/compressor.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from isolith.dtypes import FLOAT, INT32, WIDE, widen
from isolith.errors import ArgumentError
from isolith.materials.batches import pages_or_ring
from isolith.materials.relations_kv_compress import relations_of_compressor
from isolith.numerics import windows
from isolith.numerics.pages import check_block_table, read_entries
from isolith.numerics.ragged import check_cu_seqlens, check_start_pos, positions_of_tokens
from isolith.numerics.rope_tables import rope_frequencies, rope_tables
from isolith.operator import Cost, Operator
from isolith.ops.norm.rms_norm import reference as rms_norm
from isolith.ops.rotary.hadamard import reference as hadamard
from isolith.ops.rotary.rope import reference as rope
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(
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
    wide = widen(x.dtype)
    sequence, position = positions_of_tokens(cu_seqlens, start_pos, x.shape[0])
    z = x.to(wide) @ wgate.to(wide).T
    if ape is not None:
        z = z + ape.to(wide)[position % ratio]
    rows = torch.cat((x.to(wide) @ wkv.to(wide).T, z), dim=-1)
    entries = windows.entries_of_call(cu_seqlens, start_pos, x.shape[0], ratio)
    token, slot = windows.sources(entries, cu_seqlens, start_pos, state_cache, state_block_table, ratio, overlap)
    # Columns of a row: u's first and last half with overlap, u alone without; z's likewise. The tokens of the window
    # before come first, and so do their columns.
    dim, halves = norm_weight.shape[0], 2 if overlap else 1
    columns = zip(rows.split(dim, -1), state_cache.split(dim, -1), strict=True)
    sources = zip(token.chunk(halves, 1) * 2, slot.chunk(halves, 1) * 2, strict=True)
    parts = [gather(*column, *source) for column, source in zip(columns, sources, strict=True)]
    u, z = torch.cat(parts[:halves], dim=1), torch.cat(parts[halves:], dim=1)
    z = z.masked_fill(((token < 0) & (slot < 0))[..., None], -torch.inf)
    windows.write_rows(state_cache, state_block_table, sequence, position, rows)

    pooled = (z.softmax(dim=1) * u).sum(dim=1).to(x.dtype)
    normed = rms_norm(pooled, norm_weight, eps)
    rotated = rope(normed, entries.window * ratio, cos_table, sin_table)
    result = hadamard(rotated) if rotate else rotated
    return torch.where(entries.emitted[:, None], result, 0.0), entries.cu_entries.to(torch.int32)


def gather(rows: Tensor, state: Tensor, token: Tensor, slot: Tensor) -> Tensor:
    """The rows of windows: from this call where `token` names one, else from the state's `slot`, else zeros."""
    return torch.where((token >= 0)[..., None], rows[token.clamp(min=0)], read_entries(state, slot, rows.dtype))


def fused(
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
    """Sum over features in reverse order, and round once, at the end."""
    sums = (x.flip(1).to(widen(x.dtype)), wkv.flip(1), wgate.flip(1), norm_weight, cos_table, sin_table)
    batch = (state_cache, state_block_table, cu_seqlens, start_pos)
    entries, cu_entries = reference(*sums, *batch, ratio, ape, overlap, rotate, eps)
    return entries.to(x.dtype), cu_entries


def defined(
    x: Tensor,
    state_cache: Tensor,
    state_block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    overlap: bool,
    **_: object,
) -> tuple[Tensor | None, ...]:
    entries = windows.entries_of_call(cu_seqlens, start_pos, x.shape[0], ratio)
    lengths = start_pos + cu_seqlens.diff()
    rows = windows.live_rows(state_cache, state_block_table, lengths, ratio, overlap)
    block = torch.arange(state_cache.shape[0], device=state_cache.device)
    return entries.emitted, None, rows | ~torch.isin(block, state_block_table)[:, None]


def fake(
    x: Tensor, norm_weight: Tensor, cu_seqlens: Tensor, start_pos: Tensor, ratio: int, **_: object
) -> tuple[Tensor, Tensor]:
    rows = windows.max_entries_of_call(x.shape[0], start_pos.shape[0], ratio)
    return x.new_empty(rows, norm_weight.shape[0]), torch.empty_like(cu_seqlens, memory_format=torch.contiguous_format)


def check(
    wkv: Tensor,
    norm_weight: Tensor,
    cos_table: Tensor,
    ratio: int,
    overlap: bool,
    rotate: bool,
    eps: float,
    **_: object,
) -> None:
    if ratio < 1:
        raise ArgumentError(f"kv_compress: ratio must be at least 1; got {ratio}.")
    if not eps > 0:
        raise ArgumentError(f"kv_compress: eps must be positive; got {eps}.")
    dim, halves = norm_weight.shape[0], 2 if overlap else 1
    if wkv.shape[0] != halves * dim:
        said = "2*dim" if overlap else "dim"
        raise ArgumentError(
            f"kv_compress: wkv must have {said} = {halves * dim} rows with overlap={overlap}; got {wkv.shape[0]}."
        )
    if rotate and dim & (dim - 1):
        raise ArgumentError(f"kv_compress: dim must be a power of two with rotate=True; got {dim}.")
    if 2 * cos_table.shape[1] > dim:
        raise ArgumentError(
            f"kv_compress: cos_table must have at most dim/2 = {dim // 2} columns; got {cos_table.shape[1]}."
        )


def check_values(
    x: Tensor,
    cos_table: Tensor,
    state_cache: Tensor,
    state_block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    overlap: bool,
    **_: object,
) -> None:
    check_cu_seqlens("kv_compress", cu_seqlens, x.shape[0])
    check_start_pos("kv_compress", start_pos)
    check_block_table("kv_compress", "state_block_table", state_block_table, state_cache)
    rows = (state_cache, state_block_table, cu_seqlens, start_pos)
    windows.check_windows("kv_compress", *rows, ratio, overlap, cos_table.shape[0])


def cost(
    x: Tensor,
    wkv: Tensor,
    wgate: Tensor,
    norm_weight: Tensor,
    cos_table: Tensor,
    state_cache: Tensor,
    state_block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    ape: Tensor | None,
    **_: object,
) -> Cost:
    tokens, hidden = x.shape
    channels, dim, pairs = wkv.shape[0], norm_weight.shape[0], cos_table.shape[1]
    entries = tokens // ratio
    inputs = (x, wkv, wgate, norm_weight, ape, state_block_table, cu_seqlens, start_pos)
    return Cost(
        # A window's softmax and sum take 5 operations an element; norm and rotation about 8.
        flops=4 * tokens * hidden * channels + 5 * entries * ratio * channels + 8 * entries * dim,
        bytes_read=sum(t.nbytes for t in inputs if t is not None) + 2 * entries * pairs * cos_table.itemsize,
        bytes_written=entries * dim * x.itemsize + 2 * tokens * channels * state_cache.itemsize + cu_seqlens.nbytes,
        # Products of halves are exact in float32, so that a matrix unit of the halves' format serves.
        math="bfloat16" if x.itemsize == wkv.itemsize == wgate.itemsize == 2 else "float32",
    )


def arguments(
    make: Make,
    tokens: Sequence[int],
    start: Sequence[int] = (),
    ratio: int = 4,
    *,
    overlap: bool = True,
    ape: bool = True,
    rotate: bool = False,
    dim: int = 8,
    hidden: int = 24,
    ring: int = 0,
    norm_of_x: bool = False,
) -> dict[str, Any]:  # Any: an operator's arguments
    """A call whose state holds values in the live rows and NaN elsewhere; `ring` = rows of a ring, 0 for pages; the
    norm's weight is float32, or x's dtype.
    """
    wide, channels = torch.float32, 2 * dim if overlap else dim
    cu_seqlens, start_pos = make.batch(tokens, start)
    ends = [t + s for t, s in zip(tokens, start or [0] * len(tokens), strict=True)]
    pages = pages_or_ring(make, ends, 4, ring)
    state = make.full(torch.nan, pages.blocks, pages.block_size, 2 * channels, dtype=wide)
    live = windows.live_rows(state, pages.block_table, start_pos, ratio, overlap)
    state[live] = make.normal(int(live.sum()), 2 * channels, dtype=wide)
    length = max(ends, default=0) + 1
    cos_table, sin_table = rope_tables(rope_frequencies(2 * min(dim // 4, 32), 160000.0), length, make.device)
    return {
        "x": make.normal(sum(tokens), hidden),
        "wkv": make.normal(channels, hidden, std=hidden**-0.5),
        "wgate": make.normal(channels, hidden, std=2 * hidden**-0.5),
        "norm_weight": make.normal(dim, mean=1.0, dtype=make.dtype if norm_of_x else wide),
        "cos_table": cos_table,
        "sin_table": sin_table,
        "state_cache": state,
        "state_block_table": pages.block_table,
        "cu_seqlens": cu_seqlens,
        "start_pos": start_pos,
        "ratio": ratio,
        "ape": make.normal(ratio, channels, dtype=wide) if ape else None,
        "overlap": overlap,
        "rotate": rotate,
    }


LENGTHS = (0, 1, 3, 4, 5, 7, 8, 127, 128, 129, 300)
HCA: dict[str, Any] = {"ratio": 128, "overlap": False}  # Any: options of `arguments`
CALLS: dict[str, dict[str, Any]] = {
    "csa_prefill": {"tokens": LENGTHS},
    "hca_prefill": {"tokens": LENGTHS, **HCA},
    "csa_decode_at_every_residue": {"tokens": [1] * 13, "start": range(13)},
    "hca_decode": {"tokens": [1] * 7, "start": [0, 126, 127, 128, 254, 255, 256], **HCA},
    "chunks_of_several_sequences": {"tokens": [5, 0, 1, 8, 2, 0, 9], "start": [0, 3, 7, 6, 9, 8, 4]},
    "hca_chunks": {"tokens": [3, 0, 200, 129], "start": [126, 127, 100, 255], **HCA},
    "counts_of_the_contract": {"tokens": [3, 1, 0, 6], "start": [0, 3, 2, 7]},
    "indexer_rotates": {"tokens": [9, 2], "start": [0, 6], "dim": 16, "rotate": True},
    "ring_shorter_than_the_call": {"tokens": [13, 3, 1], "start": [0, 6, 11], "ring": 8},
    "ring_of_one_window": {"tokens": [300, 1, 3], "start": [0, 127, 130], **HCA, "ring": 128},
    "far_position": {"tokens": [7], "start": [65533], "ring": 8},
    "ratio_2_without_ape": {"tokens": [5, 1, 1], "start": [0, 3, 4], "ratio": 2, "overlap": False, "ape": False},
    "ratio_1_without_ape": {"tokens": [3, 1], "start": [0, 9], "ratio": 1, "overlap": False, "ape": False},
    "ratio_1_overlaps": {"tokens": [3, 1], "start": [0, 9], "ratio": 1},
    "ratio_3_overlaps": {"tokens": [7, 1, 2], "start": [0, 5, 7], "ratio": 3},
    "odd_width": {"tokens": [9], "dim": 13, "hidden": 7},
    "no_tokens": {"tokens": [0, 0], "start": [0, 7]},
    "no_sequences": {"tokens": []},
    "norm_of_x_csa": {"tokens": [6, 1, 0, 9], "start": [2, 7, 3, 0], "dim": 512, "hidden": 1024, "norm_of_x": True},
    "norm_of_x_indexer": {
        "tokens": [5, 1],
        "start": [3, 11],
        "dim": 128,
        "hidden": 1024,
        "norm_of_x": True,
        "rotate": True,
    },
    "norm_of_x_hca": {"tokens": [2, 130], "start": [127, 0], "dim": 512, "hidden": 1024, "norm_of_x": True, **HCA},
    "flash_csa": {"tokens": [6, 1], "start": [2, 7], "dim": 512, "hidden": 4096, "ring": 8},
    "flash_indexer": {"tokens": [6, 1], "start": [2, 7], "dim": 128, "hidden": 4096, "ring": 8, "rotate": True},
    "flash_hca": {"tokens": [1, 129], "start": [127, 0], "dim": 512, "hidden": 4096, **HCA},
}


def samples(make: Make) -> Iterator[Sample]:
    # The window before has nearly all the weight: who leaves it out is far off.
    call = arguments(make, [1, 3], [7, 9])
    call["state_cache"][..., 16:24] += 8.0
    yield Sample("window_before_dominates", **call)
    call = arguments(make, [21, 5], [0, 21])
    call["state_block_table"][0, :4] = call["state_block_table"][1, :4] = -1
    # Nobody names the first block or the last, where the row of a token without a block might end up.
    table, spare = call["state_block_table"], torch.full_like(call["state_cache"][:1], torch.nan)
    call["state_block_table"] = torch.where(table >= 0, table + 1, -1).to(torch.int32)
    call["state_cache"] = torch.cat((spare, call["state_cache"], spare))
    yield Sample("old_rows_are_not_kept", **call)
    # Logits in the hundreds: exp overflows unless the largest is subtracted.
    call = arguments(make, [9, 1], [0, 7])
    yield Sample("large_logits", **{**call, "wgate": call["wgate"] * 100})
    yield Sample("eps_dominates", **{**call, "wkv": call["wkv"] * 1e-3, "eps": 1e-3})
    padded = make.full(torch.nan, *call["state_cache"].shape[:2], 40, dtype=torch.float32)[..., :32]
    yield Sample("padded_pages", **{**call, "state_cache": padded.copy_(call["state_cache"])})
    for name, options in CALLS.items():
        yield Sample(name, *(["model"] if name.startswith("flash") else []), **arguments(make, **options))


def errors(make: Make) -> Iterator[ErrorSample]:
    call = arguments(make, [9, 1], [0, 7])

    def wrong(name: str, says: str, **changes: Any) -> ErrorSample:  # Any: an operator's arguments
        return ErrorSample(name, **{**call, **changes}, says=f"kv_compress: {says}")

    yield wrong("zero_ratio", "ratio must be at least 1; got 0.", ratio=0, ape=None)
    yield wrong("other_ape", "ratio is 4 in the arguments but 2 in ape.", ape=call["ape"][:2])
    yield wrong("zero_eps", "eps must be positive; got 0.0.", eps=0.0)
    yield wrong("no_overlap", "wkv must have dim = 8 rows with overlap=False; got 16.", overlap=False)
    yield wrong("wgate_rows", "channels is 16 in wkv but 8 in wgate.", wgate=call["wgate"][:8])
    says = "axis 2 of state_cache [blocks block_size 2*channels] must be 2*channels = 32; got 16."
    yield wrong("state_of_another_compressor", says, state_cache=call["state_cache"][..., :16])
    says = "state_cache must be float32 or float64; got bfloat16."
    yield wrong("rounded_state", says, state_cache=call["state_cache"].bfloat16())
    table = make.zeros(4, 5, dtype=torch.float32)
    says = "cos_table must have at most dim/2 = 4 columns; got 5."
    yield wrong("wide_tables", says, cos_table=table, sin_table=table)
    says = "cos_table must reach position ratio*w = 4; got 4 rows."
    yield wrong("short_tables", says, cos_table=table[:, :2], sin_table=table[:, :2])
    says = "sequences is 2 in state_block_table but 1 in start_pos."
    yield wrong("sequences", says, start_pos=call["start_pos"][:1])
    says = "start_pos must not be negative; got -1."
    yield wrong("negative_start", says, start_pos=make.tensor([0, -1], torch.int32))
    says = "cu_seqlens must start at 0; got 1."
    yield wrong("first_token", says, cu_seqlens=make.tensor([1, 9, 10], torch.int32))
    says = "cu_seqlens must not decrease; got 11, 10 at 1."
    yield wrong("falling", says, cu_seqlens=make.tensor([0, 11, 10], torch.int32))
    says = "cu_seqlens must end at the number of tokens, 10; got 11."
    yield wrong("last_token", says, cu_seqlens=make.tensor([0, 9, 11], torch.int32))
    says = "state_block_table must be below blocks = 6; got 6."
    yield wrong("block_beyond_the_pool", says, state_block_table=call["state_block_table"].clamp(min=6))
    says = "state_block_table must have a block for every row that is read; got none for position 0 of sequence 1."
    yield wrong("needed_row_without_block", says, state_block_table=call["state_block_table"].clamp(max=-1))
    says = "state_cache must hold positions 0..6 of sequence 1 at once; got 4 rows."
    yield wrong("ring_of_one_window", says, **arguments(make, [9, 1], [0, 7], ring=4))
    says = "kv_compress: dim must be a power of two with rotate=True; got 12."
    yield ErrorSample("rotate_width", **arguments(make, [9], dim=12, rotate=True), says=says)


def relations(make: Make) -> Iterator[Relation]:
    yield from relations_of_compressor(make, arguments)


def invariants(
    results: list[Tensor], x: Tensor, cu_seqlens: Tensor, start_pos: Tensor, ratio: int, **_: object
) -> str | None:
    due = windows.entries_of_call(cu_seqlens, start_pos, x.shape[0], ratio).cu_entries
    return None if torch.equal(results[1].long(), due) else "cu_entries does not count the entries emitted"


kv_compress = Operator(
    name="kv_compress",
    shapes="x[tokens hidden] wkv[channels hidden] wgate[channels hidden] norm_weight[dim] cos_table[length pairs]"
    " sin_table[length pairs] state_cache[blocks block_size 2*channels] state_block_table[sequences max_blocks]"
    " cu_seqlens[sequences+1] start_pos[sequences] ape?[ratio channels] -> entries[_ dim] cu_entries[sequences+1]",
    dtypes={
        **dict.fromkeys(("x", "wkv", "wgate", "norm_weight"), FLOAT),
        **dict.fromkeys(("cos_table", "sin_table", "state_cache", "ape"), WIDE),
        **dict.fromkeys(("state_block_table", "cu_seqlens", "start_pos"), INT32),
    },
    reference=reference,
    variants=(fused,),
    fake=fake,
    check=check,
    check_values=check_values,
    cost=cost,
    samples=samples,
    errors=errors,
    mutates=("state_cache",),
    defined=defined,
    relations=relations,
    invariants=invariants,
)
