"""Sparse and latent attention, its caches, its compressor and its indexer."""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT, FLOAT_NAMES, PACKED
from isolith.numerics.pages import entry_dim
from isolith.numerics.windows import max_entries_of_call
from isolith_backends.cuda.kernels import grouped_output_proj as projecting
from isolith_backends.cuda.kernels import index_lists as listing
from isolith_backends.cuda.kernels import indexer_score as scoring
from isolith_backends.cuda.kernels import indexer_topk as selecting
from isolith_backends.cuda.kernels import kv_cache_read as reading
from isolith_backends.cuda.kernels import kv_cache_write as writing
from isolith_backends.cuda.kernels import kv_compress as compressing
from isolith_backends.cuda.kernels import lightning_indexer as indexing
from isolith_backends.cuda.kernels import lists_attended as attending
from isolith_backends.cuda.kernels import mla_attention as latents
from isolith_backends.cuda.kernels.cache_entries import pool_of
from isolith_backends.cuda.kernels.formats import WEIGHTS
from isolith_backends.cuda.kernels.quant_linear import Rules, quantising_refused

INDEXED = {
    "q": (*DEVICE_FLOAT, torch.float8_e4m3fn, torch.uint8),
    "weights": DEVICE_FLOAT,
    "k_cache": (*DEVICE_FLOAT, torch.uint8),
}


def scores_refused(q: Tensor, k_cache: Tensor, out_dtype: str, **_: object) -> WhyNot:
    dim = entry_dim(k_cache)
    if out_dtype == "float64":
        return "out_dtype=float64; sums are in float32"
    if q.shape[1] > scoring.HEADS:
        return f"heads={q.shape[1]}; a program holds the products of at most {scoring.HEADS}"
    return None if dim <= scoring.DIM else f"head_dim={dim}; a program holds keys of at most {scoring.DIM}"


@implements(ops.attention.indexer_score, requires=Requires(dtypes=INDEXED), why_not=scores_refused)
def indexer_score(
    q: Tensor,
    weights: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    max_entries: int,
    softmax_scale: float = 1.0,
    q_scale: Tensor | None = None,
    out_dtype: str = "float32",
) -> Tensor:
    out = torch.empty(q.shape[0], max_entries, dtype=FLOAT_NAMES[out_dtype], device=q.device)
    batch = (block_table, cu_seqlens, start_pos, ratio)
    scoring.indexer_score(q, weights, k_cache, *batch, softmax_scale, q_scale, out)
    return out


ATTENDED = {
    "q": DEVICE_FLOAT,
    **dict.fromkeys(("kv_cache", "extra_kv_cache"), (*DEVICE_FLOAT, torch.uint8)),
    "sink": (torch.float32,),
}


def entries_refused(q: Tensor, **_: object) -> WhyNot:
    dim = q.shape[2]
    if dim < attending.NARROWEST:
        return f"head_dim={dim}; a product on tensor cores takes at least {attending.NARROWEST}"
    if dim > attending.WIDEST:
        return f"head_dim={dim}; a program holds the sums of at most {attending.WIDEST}"
    return None


@implements(ops.attention.sparse_attn, requires=Requires(dtypes=ATTENDED), why_not=entries_refused)
def sparse_attn(
    q: Tensor,
    kv_cache: Tensor,
    indices: Tensor,
    softmax_scale: float,
    sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    block_table: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    extra_kv_cache: Tensor | None = None,
    extra_indices: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    extra_block_table: Tensor | None = None,
    value_dim: int = 0,
) -> tuple[Tensor, Tensor]:
    lists = [attending.listed(pool_of(kv_cache), indices, topk_length, block_table)]
    if extra_kv_cache is not None and extra_indices is not None:
        lists.append(attending.listed(pool_of(extra_kv_cache), extra_indices, extra_topk_length, extra_block_table))
    # Whose token it is only tables ask.
    paged = block_table is not None or extra_block_table is not None
    return attending.attention(
        q, tuple(lists), softmax_scale, sink, value_dim or q.shape[2], cu_seqlens if paged else None
    )


LATENT = dict.fromkeys(("q", "w_uk", "w_uv"), DEVICE_FLOAT) | {"kv_cache": (*DEVICE_FLOAT, torch.uint8)}


def latents_refused(kv_cache: Tensor, w_uk: Tensor, w_uv: Tensor, **_: object) -> WhyNot:
    dim, least = entry_dim(kv_cache), min(*w_uk.shape[1:], w_uv.shape[1])
    if dim > attending.WIDEST:
        return f"entries of {dim}; a program holds the sums of at most {attending.WIDEST}"
    return None if least else "a weight is empty"


@implements(ops.attention.mla_attention, requires=Requires(dtypes=LATENT), why_not=latents_refused)
def mla_attention(
    q: Tensor,
    kv_cache: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    softmax_scale: float,
    absorbed: bool = True,
    topk_indices: Tensor | None = None,
    topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch = (block_table, cu_seqlens, start_pos, softmax_scale)
    return latents.mla_attention(q, kv_cache, w_uk, w_uv, *batch, topk_indices, topk_length)


HYBRID = {
    "q": DEVICE_FLOAT,
    **dict.fromkeys(("window_cache", "compressed_cache"), (*DEVICE_FLOAT, torch.uint8)),
    "sink": (torch.float32,),
}


@implements(ops.attention.hybrid_attention, requires=Requires(dtypes=HYBRID), why_not=entries_refused)
def hybrid_attention(
    q: Tensor,
    window_cache: Tensor,
    window_block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    window: int,
    softmax_scale: float,
    sink: Tensor | None = None,
    ratio: int = 0,
    compressed_cache: Tensor | None = None,
    compressed_block_table: Tensor | None = None,
    topk_indices: Tensor | None = None,
    topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    lists = [attending.windowed(pool_of(window_cache), window_block_table, window)]
    if compressed_cache is not None and compressed_block_table is not None:
        pool = pool_of(compressed_cache)
        if topk_indices is None:
            lists.append(attending.seen(pool, compressed_block_table, ratio))
        else:
            lists.append(attending.listed(pool, topk_indices, topk_length, compressed_block_table, ratio))
    return attending.attention(q, tuple(lists), softmax_scale, sink, q.shape[2], cu_seqlens, start_pos)


@implements(ops.attention.indexer_topk, requires=Requires(dtypes=DEVICE_FLOAT), batch_invariant=True)
def indexer_topk(
    scores: Tensor, lengths: Tensor, k: int, candidates: Tensor | None = None, candidate_block: int = 1
) -> tuple[Tensor, Tensor]:
    indices = torch.empty(scores.shape[0], k, dtype=torch.int32, device=scores.device)
    topk_length = torch.empty(scores.shape[0], dtype=torch.int32, device=scores.device)
    selecting.indexer_topk(scores, lengths, k, candidates, candidate_block, indices, topk_length)
    return indices, topk_length


@implements(ops.attention.lightning_indexer, requires=Requires(dtypes=INDEXED), why_not=scores_refused)
def lightning_indexer(
    q: Tensor,
    weights: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    k: int,
    max_entries: int,
    softmax_scale: float = 1.0,
    q_scale: Tensor | None = None,
    out_dtype: str = "float32",
    candidates: Tensor | None = None,
    candidate_block: int = 1,
) -> tuple[Tensor, Tensor]:
    batch = (block_table, cu_seqlens, start_pos)
    scored = (ratio, k, max_entries, softmax_scale, q_scale, FLOAT_NAMES[out_dtype])
    return indexing.lightning_indexer(q, weights, k_cache, batch, *scored, candidates, candidate_block)


def projection_refused(
    wo_a: Tensor, wo_b: Tensor, act_quant_a: str, act_quant_b: str, act_group: int, **_: object
) -> WhyNot:
    first = quantising_refused(wo_a, act_quant_a, act_group)
    return first or quantising_refused(wo_b, act_quant_b, act_group)


@implements(
    ops.attention.grouped_output_proj,
    requires=Requires(dtypes={"x": DEVICE_FLOAT, "wo_a": WEIGHTS, "wo_b": WEIGHTS}),
    why_not=projection_refused,
)
def grouped_output_proj(
    x: Tensor,
    wo_a: Tensor,
    wo_b: Tensor,
    wo_a_scale: Tensor | None = None,
    wo_b_scale: Tensor | None = None,
    act_quant_a: str = "none",
    act_quant_b: str = "auto",
    act_group: int = 128,
    scale_format: str = "ue8m0",
    block_n: int = 128,
    block_k: int = 128,
) -> Tensor:
    rules = Rules(
        act_quant=act_quant_b, act_group=act_group, scale_format=scale_format, block_n=block_n, block_k=block_k
    )
    return projecting.grouped_output_proj(x, wo_a, wo_b, wo_a_scale, wo_b_scale, act_quant_a, rules)


@implements(ops.attention.window_indices, batch_invariant=True)
def window_indices(positions: Tensor, window: int) -> Tensor:
    return listing.window_indices(positions, window)


COMPRESSED = {
    **dict.fromkeys(("x", "wkv", "wgate", "norm_weight"), DEVICE_FLOAT),
    **dict.fromkeys(("cos_table", "sin_table", "state_cache", "ape"), (torch.float32,)),
}


def entry_too_wide(norm_weight: Tensor, **_: object) -> WhyNot:
    dim = norm_weight.shape[0]
    return None if 0 < dim <= compressing.DIM else f"dim={dim}; a program holds an entry of 1 to {compressing.DIM}"


@implements(ops.attention.kv_compress, requires=Requires(dtypes=COMPRESSED), why_not=entry_too_wide)
def kv_compress(
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
    entries = x.new_empty(max_entries_of_call(x.shape[0], start_pos.shape[0], ratio), norm_weight.shape[0])
    cu_entries = torch.empty_like(cu_seqlens, memory_format=torch.contiguous_format)
    weights, tables = (wkv, wgate, norm_weight), (cos_table, sin_table)
    state, batch = (state_cache, state_block_table), (cu_seqlens, start_pos)
    options = (ratio, ape, overlap, rotate, eps)
    compressing.kv_compress(x, weights, tables, state, batch, *options, entries, cu_entries)
    return entries, cu_entries


@implements(ops.attention.compress_indices, batch_invariant=True)
def compress_indices(positions: Tensor, ratio: int, max_entries: int) -> Tensor:
    return listing.compress_indices(positions, ratio, max_entries)


@implements(
    ops.attention.kv_cache_write,
    requires=Requires(dtypes={"cache": DEVICE_FLOAT + PACKED, "x": DEVICE_FLOAT}),
    batch_invariant=True,
)
def kv_cache_write(
    cache: Tensor, x: Tensor, slot_mapping: Tensor, scale_format: str = "ue8m0", amax_floor: float | None = None
) -> None:
    writing.kv_cache_write(cache, x, slot_mapping, scale_format, amax_floor)


def float64_refused(out_dtype: str, **_: object) -> WhyNot:
    return "out_dtype=float64; products are in float32" if out_dtype == "float64" else None


@implements(
    ops.attention.kv_cache_read,
    requires=Requires(dtypes={"cache": DEVICE_FLOAT + PACKED}),
    why_not=float64_refused,
    batch_invariant=True,
)
def kv_cache_read(cache: Tensor, slot_mapping: Tensor, out_dtype: str = "bfloat16") -> Tensor:
    return reading.kv_cache_read(cache, slot_mapping, FLOAT_NAMES[out_dtype])
