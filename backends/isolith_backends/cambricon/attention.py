"""Attention over listed entries: paged decoding with a row for each token, over pages of one entry.

A call has one pool and one softmax, and rounds what it gives: two pools are one buffer, of which both are slices, or
their listed rows are gathered into one, some tokens at a time. Whether the logarithm that a call returns counts a sink
is documented nowhere, so it is taken from a call without one, and a second call has the sink in its softmax.

Source: domesticated_torch_mlu_ops 9fbf7df6 _ops.py (single_query_cached_kv_attn: values are the keys' first columns, at
most 256 heads of bfloat16 and 128 of others); vllm-mlu b9925203 (a row for each token, pages of one entry; the sink by
another name).
"""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT, dtype_name
from isolith.numerics.lists import slots_of_columns
from isolith.numerics.ragged import positions_of_tokens, sequence_of_tokens
from isolith_backends.cambricon.calls import tmo, why_not
from isolith_backends.vendor_calls import VendorCall

CALL = (
    *("q", "k_cache", "v_cache", "out", "block_tables", "context_lens", "k_cache_quant_scale", "v_cache_quant_scale"),
    *("alibi_slopes", "max_context_len", "windows_size_left", "windows_size_right", "softmax_scale", "return_lse"),
)
MORE = ("q_quant_scale", "head_size_v", "compute_dtype", "mask")
SINGLE_QUERY = {sink: tmo("single_query_cached_kv_attn", CALL, (*MORE, sink)) for sink in ("sink", "learnable_sink")}
MOST_HEADS = {torch.bfloat16: 256, torch.float16: 128, torch.float32: 128}
NO_WINDOW = -1
MOST_GATHERED = 2**28
"""Elements of rows that are gathered at once."""


def missing_attention() -> WhyNot:
    """What this installation lacks of the call, in either release's form."""
    reasons = [call.missing() for call in SINGLE_QUERY.values()]
    return None if None in reasons else "; ".join(map(str, reasons))


def single_query() -> tuple[VendorCall, str]:
    """The call that is here, and its name for the sink."""
    return next((call, sink) for sink, call in SINGLE_QUERY.items() if call.missing() is None)


def attended(
    q: Tensor, pool: Tensor, slots: Tensor, softmax_scale: float, value_dim: int, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of tokens over the slots listed, -1 for none; with a sink lse says nothing.

    Without a slot out is 0 and lse -inf.
    """
    tokens, heads, dim = q.shape
    valid = slots >= 0
    # A row's slots come first, and nothing behind its length is read. A row without a slot reads one, for nobody: what
    # a length of 0 gives is not documented.
    order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
    table = slots.gather(1, order).clamp(min=0).to(torch.int32)
    out = torch.empty((tokens, 1, heads, value_dim or dim), dtype=q.dtype, device=q.device)
    call, name = single_query()
    out, lse = call(
        q=q.contiguous()[:, None],
        k_cache=pool.view(-1, 1, 1, dim),
        v_cache=None,
        out=out,
        block_tables=table.contiguous(),
        context_lens=valid.sum(-1).clamp(min=1).to(torch.int32),
        k_cache_quant_scale=None,
        v_cache_quant_scale=None,
        alibi_slopes=None,
        max_context_len=table.shape[1],
        windows_size_left=NO_WINDOW,
        windows_size_right=NO_WINDOW,
        softmax_scale=softmax_scale,
        return_lse=True,
        q_quant_scale=None,
        head_size_v=-1,
        compute_dtype=torch.float32,
        mask=None,
        **{name: None if sink is None else sink.float().contiguous()},
    )
    some = valid.any(-1)
    out = torch.where(some[:, None, None], out[:, 0], 0.0)
    return out, torch.where(some[:, None], lse[:, :, 0], -torch.inf)


def one_pool(q: Tensor, pools: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(pool, slots) with the columns of both pools side by side: of the buffer that both are slices of, or of rows
    that are gathered.
    """
    (near, ids), (far, more) = pools
    dim, start = q.shape[2], min(near.storage_offset(), far.storage_offset())
    rows = [(pool.storage_offset() - start) / dim for pool in (near, far)]
    shared = torch._C._is_alias_of(near, far)  # type: ignore[attr-defined]  # torch declares it nowhere
    if shared and all(row.is_integer() for row in rows):
        length = max(pool.storage_offset() + pool.numel() for pool in (near, far)) - start
        based = [torch.where(at >= 0, at + int(row), -1) for at, row in zip((ids, more), rows, strict=True)]
        return near.as_strided((length // dim, dim), (dim, 1), start), torch.cat(based, dim=1)
    gathered = [pool.view(-1, dim)[at.clamp(min=0)] for pool, at in pools]
    valid = torch.cat((ids, more), dim=1) >= 0
    return torch.cat(gathered, dim=1), torch.where(
        valid, torch.arange(valid.numel(), device=q.device).view_as(valid), -1
    )


def joined(
    q: Tensor,
    pools: list[tuple[Tensor, Tensor]],
    softmax_scale: float,
    sink: Tensor | None,
    value_dim: int = 0,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of one softmax over one pool or two with the slots listed of each, as the operators define them."""
    pools = [(pool, slots) for pool, slots in pools if slots.shape[1] and pool.numel()]
    if not pools:
        shape = (*q.shape[:2], value_dim or q.shape[2])
        return q.new_zeros(shape), q.new_full(q.shape[:2], torch.inf, dtype=torch.float32)
    most = max(1, MOST_GATHERED // sum(slots.shape[1] for _, slots in pools) // q.shape[2])
    if len(pools) > 1 and q.shape[0] > most:
        parts = [
            joined(q[at : at + most], [(p, s[at : at + most]) for p, s in pools], softmax_scale, sink, value_dim)
            for at in range(0, q.shape[0], most)
        ]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
    pool, slots = pools[0] if len(pools) == 1 else one_pool(q, pools)
    out, lse = attended(q, pool, slots, softmax_scale, value_dim, None)
    if sink is not None:
        out, _ = attended(q, pool, slots, softmax_scale, value_dim, sink)
    return out, torch.where(lse.isneginf(), torch.inf, lse)


def why_not_pool(name: str, cache: Tensor, q: Tensor) -> WhyNot:
    """What the call says of a pool of entries."""
    if cache.dtype != q.dtype:
        kinds = f"{name} is {dtype_name(cache.dtype)} and q {dtype_name(q.dtype)}"
        return f"{kinds}; single_query_cached_kv_attn takes one dtype"
    if not cache.is_contiguous():
        return f"{name} has strides {tuple(cache.stride())}; pages of one entry need a pool without gaps"
    return None


def why_not_heads(q: Tensor) -> WhyNot:
    most = MOST_HEADS.get(q.dtype, 0)
    kind = dtype_name(q.dtype)
    return f"heads={q.shape[1]}; the call takes at most {most} of {kind}" if q.shape[1] > most else None


def why_not_sparse(q: Tensor, kv_cache: Tensor, extra_kv_cache: Tensor | None, **_: object) -> WhyNot:
    for name, cache in (("kv_cache", kv_cache), ("extra_kv_cache", extra_kv_cache)):
        if cache is not None and (reason := why_not_pool(name, cache, q)):
            return reason
    return why_not_heads(q)


@implements(
    ops.attention.sparse_attn,
    requires=Requires(dtypes={"q": DEVICE_FLOAT}, missing=missing_attention),
    why_not=why_not(why_not_sparse),
)
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
    if q.numel() == 0:
        shape = (*q.shape[:2], value_dim or q.shape[2])
        return q.new_empty(shape), q.new_full(q.shape[:2], torch.inf, dtype=torch.float32)
    sequence = None if cu_seqlens is None else sequence_of_tokens(cu_seqlens, q.shape[0])
    pools = [(kv_cache, slots_of_columns(kv_cache, indices, topk_length, block_table, sequence))]
    if extra_kv_cache is not None and extra_indices is not None:
        extra = (extra_indices, extra_topk_length, extra_block_table, sequence)
        pools.append((extra_kv_cache, slots_of_columns(extra_kv_cache, *extra)))
    return joined(q, pools, softmax_scale, sink, value_dim)


def why_not_hybrid(q: Tensor, window_cache: Tensor, compressed_cache: Tensor | None, **_: object) -> WhyNot:
    for name, cache in (("window_cache", window_cache), ("compressed_cache", compressed_cache)):
        if cache is not None and (reason := why_not_pool(name, cache, q)):
            return reason
    return why_not_heads(q)


@implements(
    ops.attention.hybrid_attention,
    requires=Requires(dtypes={"q": DEVICE_FLOAT}, missing=missing_attention),
    why_not=why_not(why_not_hybrid),
)
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
    tokens = q.shape[0]
    if q.numel() == 0:
        return q.new_empty(q.shape), q.new_full(q.shape[:2], torch.inf, dtype=torch.float32)
    sequence, position = positions_of_tokens(cu_seqlens, start_pos, tokens)
    near = position[:, None] - torch.arange(window, device=q.device)
    pools = [(window_cache, slots_of_columns(window_cache, near, None, window_block_table, sequence))]
    if compressed_cache is not None and compressed_block_table is not None:
        far = topk_indices
        if far is None:
            room = compressed_block_table.shape[1] * compressed_cache.shape[1]
            far = torch.arange(room, device=q.device).expand(tokens, room)
        far = torch.where(far < (position[:, None] + 1) // ratio, far, -1)
        table = compressed_block_table
        pools.append((compressed_cache, slots_of_columns(compressed_cache, far, topk_length, table, sequence)))
    return joined(q, pools, softmax_scale, sink)


def why_not_mla(q: Tensor, kv_cache: Tensor, w_uk: Tensor, w_uv: Tensor, **_: object) -> WhyNot:
    for name, weight in (("w_uk", w_uk), ("w_uv", w_uv)):
        if weight.dtype != q.dtype:
            return f"{name} is {dtype_name(weight.dtype)} and q {dtype_name(q.dtype)}; one dtype is adapted"
    return why_not_pool("kv_cache", kv_cache, q) or why_not_heads(q)


@implements(
    ops.attention.mla_attention,
    requires=Requires(dtypes={"q": DEVICE_FLOAT}, missing=missing_attention),
    why_not=why_not(why_not_mla),
)
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
    (tokens, heads), (nope, latent) = q.shape[:2], w_uk.shape[1:]
    if q.numel() == 0:
        return q.new_empty((tokens, heads, w_uv.shape[1])), q.new_full((tokens, heads), torch.inf, dtype=torch.float32)
    sequence, position = positions_of_tokens(cu_seqlens, start_pos, tokens)
    if topk_indices is None:
        room = block_table.shape[1] * kv_cache.shape[1]
        topk_indices = torch.arange(room, device=q.device).expand(tokens, room)
    seen = torch.where(topk_indices <= position[:, None], topk_indices, -1)
    slots = slots_of_columns(kv_cache, seen, topk_length, block_table, sequence)
    latent_q = torch.einsum("thn,hnc->thc", q[..., :nope].float(), w_uk.float()).to(q.dtype)
    rows = torch.cat((latent_q, q[..., nope:]), dim=-1)
    out, lse = joined(rows, [(kv_cache, slots)], softmax_scale, None, latent)
    return torch.einsum("thc,hvc->thv", out.float(), w_uv.float()).to(q.dtype).contiguous(), lse
