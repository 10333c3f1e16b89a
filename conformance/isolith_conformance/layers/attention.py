"""The attention sublayer of a decoder layer, from the normed residual to the projected output, with its caches.

    q  = rope(head_rms_norm(wq_b qr)),  qr = rms_norm(wq_a x, q_norm)         kv = rope(rms_norm(wkv x, kv_norm))
    window_cache takes kv; entries take kv_compress(x, main_*); keys take kv_compress(x, index_*), rotated
    listed = lightning_indexer(hadamard(rope(index_wq qr)), index_weights x, keys)
    y  = grouped_output_proj(rope(hybrid_attention(q, window_cache, entries, listed, sink), inverse), wo_a, wo_b)

A ratio of 0 is SWA, which has neither entries nor keys; HCA has entries; CSA has both. Caches are written before they
are read, and a token sees itself. Everything is computed in x's dtype between the operators, the indexer's weights
apart, which stay in float32. Sequences are at their own positions, in paged caches; a part that only CSA or HCA has is
None elsewhere.

Source: DeepSeek-V4 inference/model.py, Attention.forward, Compressor and Indexer.
"""

# a layer's parts have the names of an operator's, and its docstring is its module's

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from isolith import (
    Cost,
    Operator,
    grouped_output_proj,
    hadamard,
    head_rms_norm,
    hybrid_attention,
    kv_cache_write,
    kv_compress,
    lightning_indexer,
    quant_linear,
    rms_norm,
    rope,
)
from isolith.dtypes import FLOAT, INT32, WIDE, dtype_name, widen
from isolith.errors import ArgumentError
from isolith.numerics import windows
from isolith.numerics.pages import check_block_table, slots_of_items
from isolith.numerics.ragged import check_cu_seqlens, check_start_pos, positions_of_tokens
from isolith.sample import ErrorSample, Make, Relation, Sample
from isolith_conformance.layers.variants import in_variants

PARTS = (
    *("quant_linear", "rms_norm", "head_rms_norm", "rope", "kv_cache_write", "hybrid_attention"),
    "grouped_output_proj",
)
COMPRESSOR_PARTS, INDEXER_PARTS = ("kv_compress",), ("hadamard", "lightning_indexer")
STATE = ("window_cache", "main_state", "entries", "index_state", "keys")
"""The caches, in the order in which a layer that has them gives them back."""

VARIANTS = 3
"""As many as the parts have at the most."""


def reference(
    x: Tensor,
    wq_a: Tensor,
    q_norm: Tensor,
    wq_b: Tensor,
    wkv: Tensor,
    kv_norm: Tensor,
    wo_a: Tensor,
    wo_b: Tensor,
    sink: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    window_cache: Tensor,
    window_table: Tensor,
    window: int,
    ratio: int = 0,
    main_wkv: Tensor | None = None,
    main_wgate: Tensor | None = None,
    main_norm: Tensor | None = None,
    main_ape: Tensor | None = None,
    main_state: Tensor | None = None,
    main_state_table: Tensor | None = None,
    entries: Tensor | None = None,
    entries_table: Tensor | None = None,
    k: int = 0,
    index_wq: Tensor | None = None,
    index_weights: Tensor | None = None,
    index_wkv: Tensor | None = None,
    index_wgate: Tensor | None = None,
    index_norm: Tensor | None = None,
    index_ape: Tensor | None = None,
    index_state: Tensor | None = None,
    index_state_table: Tensor | None = None,
    keys: Tensor | None = None,
    keys_table: Tensor | None = None,
) -> Tensor:
    batch, turn = (cu_seqlens, start_pos), (cos_table, sin_table)
    sequence, position = positions_of_tokens(*batch, x.shape[0])
    q_low = rms_norm(linear(x, wq_a), q_norm)
    q = rope(head_rms_norm(by_head(linear(q_low, wq_b), sink.shape[0])), position, *turn)
    kv = rope(rms_norm(linear(x, wkv), kv_norm), position, *turn)
    kv_cache_write(window_cache, kv, slots_of_items(window_table, sequence, position, window_cache.shape[1]))
    compressor = (main_wkv, main_wgate, main_norm, *turn, main_state, main_state_table)
    indexer = (index_wkv, index_wgate, index_norm, *turn, index_state, index_state_table)
    if ratio:
        compress(x, compressor, main_ape, entries, entries_table, batch, ratio)
    listed: tuple[Tensor | None, Tensor | None] = (None, None)
    if k:
        compress(x, indexer, index_ape, keys, keys_table, batch, ratio, rotate=True)
        listed = select(x, q_low, index_wq, index_weights, keys, keys_table, turn, batch, ratio, k)
    scale = q.shape[-1] ** -0.5
    near = (window_cache, window_table, *batch, window, scale, sink)
    out, _ = hybrid_attention(q, *near, ratio, entries, entries_table, *listed)
    return grouped_output_proj(rope(out, position, *turn, inverse=True), wo_a, wo_b)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """A projection in x's dtype."""
    return quant_linear(x, weight, out_dtype=dtype_name(x.dtype))


def by_head(x: Tensor, heads: int) -> Tensor:
    """[tokens, heads*dim] -> [tokens, heads, dim]."""
    return x.view(x.shape[0], heads, x.shape[1] // heads)


def compress(
    x: Tensor,
    compressor: tuple[Any, ...],  # Any: tensors, or None in a layer that has none
    ape: Tensor | None,
    pool: Any,
    table: Any,
    batch: tuple[Tensor, Tensor],
    ratio: int,
    rotate: bool = False,
) -> None:
    """Run a compressor, and write what it emits to its pool."""
    overlap = compressor[0].shape[0] == 2 * compressor[2].shape[0]
    wkv, wgate, norm, cos_table, sin_table, state, state_table = compressor
    weights = (wkv, wgate, norm, cos_table, sin_table)
    emitted, _ = kv_compress(x, *weights, state, state_table, *batch, ratio, ape, overlap, rotate)
    due = windows.entries_of_call(*batch, x.shape[0], ratio)
    items = torch.where(due.emitted, due.window, -1)
    kv_cache_write(pool, emitted, slots_of_items(table, due.sequence, items, pool.shape[1]))


def select(
    x: Tensor,
    q_low: Tensor,
    index_wq: Any,  # Any: tensors, or None in a layer that has none
    index_weights: Any,
    keys: Any,
    keys_table: Any,
    turn: tuple[Tensor, Tensor],
    batch: tuple[Tensor, Tensor],
    ratio: int,
    k: int,
) -> tuple[Tensor, Tensor]:
    """The entries that the indexer lists for every token."""
    _, position = positions_of_tokens(*batch, x.shape[0])
    heads, dim = index_weights.shape[0], keys.shape[2]
    q = hadamard(rope(by_head(linear(q_low, index_wq), heads), position, *turn))
    weights = quant_linear(x, index_weights, out_dtype=dtype_name(widen(x.dtype)))
    room = keys_table.shape[1] * keys.shape[1]
    return lightning_indexer(q, weights, keys, keys_table, *batch, ratio, k, room, (heads * dim) ** -0.5)


def fake(x: Tensor, **_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def check(ratio: int, entries: Tensor | None, k: int, keys: Tensor | None, **_: object) -> None:
    if ratio < 0 or k < 0:
        raise ArgumentError(f"attention layer: ratio and k must not be negative; got {ratio}, {k}.")
    if (entries is None) != (ratio == 0) or (keys is None) != (k == 0):
        raise ArgumentError("attention layer: entries come with a ratio, and keys with k; got one of them.")


def check_values(
    x: Tensor, cu_seqlens: Tensor, start_pos: Tensor, window_table: Tensor, window_cache: Tensor, **_: object
) -> None:
    check_cu_seqlens("attention layer", cu_seqlens, x.shape[0])
    check_start_pos("attention layer", start_pos)
    check_block_table("attention layer", "window_table", window_table, window_cache)


def defined(
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    main_wkv: Tensor | None,
    main_norm: Tensor | None,
    main_state: Tensor | None,
    main_state_table: Tensor | None,
    index_state: Tensor | None,
    index_state_table: Tensor | None,
    **_: object,
) -> tuple[Tensor | None, ...]:
    if main_state is None or main_state_table is None or main_wkv is None or main_norm is None:
        return None, None
    length, overlap = start_pos + cu_seqlens.diff(), main_wkv.shape[0] == 2 * main_norm.shape[0]
    main = windows.live_rows(main_state, main_state_table, length, ratio, overlap)
    if index_state is None or index_state_table is None:
        return None, None, main, None
    index = windows.live_rows(index_state, index_state_table, length, ratio, overlap)
    return None, None, main, None, index, None


def cost(x: Tensor, **arguments: Any) -> Cost:  # Any: an operator's arguments
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    weights = [value for name, value in tensors.items() if "w" in name and value.dim() > 1 and "window" not in name]
    read = sum(value.nbytes for name, value in tensors.items() if name not in STATE)
    # The projections; what the attention itself takes, its operator says.
    return Cost(
        flops=2 * x.shape[0] * sum(weight.numel() for weight in weights),
        bytes_read=x.nbytes + read,
        bytes_written=x.nbytes,
        math="bfloat16" if x.itemsize == 2 else "float32",
    )


SHAPES = (
    "x[tokens hidden] wq_a[rank hidden] q_norm[rank] wq_b[q_width rank] wkv[dim hidden] kv_norm[dim]"
    " wo_a[groups o_rank _] wo_b[hidden o_width] sink[heads] cos_table[length pairs] sin_table[length pairs]"
    " cu_seqlens[sequences+1] start_pos[sequences] window_cache[window_blocks window_block_size dim]"
    " window_table[sequences _] main_wkv?[channels hidden] main_wgate?[channels hidden] main_norm?[dim]"
    " main_ape?[ratio channels] main_state?[_ _ 2*channels] main_state_table?[sequences _] entries?[_ _ dim]"
    " entries_table?[sequences _] index_wq?[index_width rank] index_weights?[index_heads hidden]"
    " index_wkv?[index_channels hidden] index_wgate?[index_channels hidden] index_norm?[index_dim]"
    " index_ape?[ratio index_channels] index_state?[_ _ 2*index_channels] index_state_table?[sequences _]"
    " keys?[_ _ index_dim] keys_table?[sequences _]"
)

DTYPES = {
    **dict.fromkeys(("x", "wq_a", "q_norm", "wq_b", "wkv", "kv_norm", "wo_a", "wo_b"), FLOAT),
    **dict.fromkeys(("sink", "cos_table", "sin_table"), WIDE),
    **dict.fromkeys(("cu_seqlens", "start_pos", "window_table"), INT32),
    **dict.fromkeys(("window_cache", "entries", "keys"), FLOAT),
    **dict.fromkeys(("main_wkv", "main_wgate", "main_norm", "index_wkv", "index_wgate", "index_norm"), FLOAT),
    **dict.fromkeys(("main_ape", "main_state", "index_ape", "index_state"), WIDE),
    **dict.fromkeys(("main_state_table", "entries_table", "index_state_table", "keys_table"), INT32),
    **dict.fromkeys(("index_wq", "index_weights"), FLOAT),
}


def attention_layer(
    name: str,
    kind: str,
    samples: Callable[[Make], Iterator[Sample]],
    errors: Callable[[Make], Iterator[ErrorSample]],
    relations: Callable[[Make], Iterator[Relation]],
) -> Operator[..., Tensor]:
    """The declaration of a layer of a kind: "swa", "hca" or "csa"."""
    place = ("swa", "hca", "csa").index(kind)
    return Operator(
        name=name,
        shapes=f"{SHAPES} -> y[tokens hidden]",
        dtypes=DTYPES,
        reference=reference,
        variants=in_variants(reference, VARIANTS),
        fake=fake,
        check=check,
        check_values=check_values,
        cost=cost,
        samples=samples,
        errors=errors,
        mutates=STATE[: 1 + 2 * place],
        defined=defined,
        composed_of=(*PARTS, *(COMPRESSOR_PARTS, INDEXER_PARTS)[0][:place], *(INDEXER_PARTS if place == 2 else ())),
        sample_dtypes=(torch.float32, torch.bfloat16),
        relations=relations,
    )
