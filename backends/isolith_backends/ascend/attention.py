"""Attention over a window and compressed entries, over listed latents, the indexer of keys, and the output projection.

The vendor's paged attention gives no logarithm of the sum of weights, which the operators have among their results: it
is computed beside the call, by torch's operators on the device.

Source: vllm-ascend 182b75ea csrc (sparse_attn_sharedkv: pages in multiples of 16, a sink that must be given, metadata
for every call; its tiling takes multiples of 4 heads); Ascend/op-plugin 517f2e7d (npu_sparse_flash_attention,
npu_lightning_indexer, npu_transpose_batchmatmul); sgl-kernel-npu f425bdf1 tests (-1e4 for no sink).
"""

from typing import Any

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import dtype_name
from isolith.numerics.lists import listed_entries, slots_of_columns
from isolith.numerics.ragged import positions_of_tokens, sequence_of_tokens
from isolith_backends.vendor_calls import VendorCall

SHARED = (
    *("cu_seqlens_q", "seqused_kv", "cmp_ratio", "ori_mask_mode", "cmp_mask_mode", "ori_win_left", "ori_win_right"),
    *("layout_q", "layout_kv"),
)
METADATA = (
    *("num_heads_q", "num_heads_kv", "head_dim", "batch_size", "max_seqlen_q", "max_seqlen_kv", "cmp_topk"),
    *("has_ori_kv", "has_cmp_kv", "device"),
)
ATTENTION = (
    *("q", "ori_kv", "cmp_kv", "cmp_sparse_indices", "ori_block_table", "cmp_block_table", "sinks", "metadata"),
    "softmax_scale",
)
SPACES = ("_C_ascend", "custom")
# Both calls come from one extension: metadata of another one's kernel is not read by this one.
PAIRS = tuple(
    (
        VendorCall((f"{space}::npu_sparse_attn_sharedkv_metadata",), (*SHARED, *METADATA)),
        VendorCall((f"{space}::npu_sparse_attn_sharedkv",), (*SHARED, *ATTENTION)),
    )
    for space in SPACES
)
HEAD_DIM, HEADS_STEP, BLOCK_STEP, MOST_BLOCK = 512, 4, 16, 1024
RATIOS, LISTED, NO_SINK = (4, 128), 512, -1e4
HALF = (torch.bfloat16, torch.float16)


def missing_pair() -> WhyNot:
    """What is missing of the last extension asked, where none has both calls."""
    reasons = [next((r for call in pair if (r := call.missing())), None) for pair in PAIRS]
    return None if None in reasons else "; ".join(map(str, reasons))


def why_not_pages(name: str, cache: Tensor, q: Tensor) -> WhyNot:
    if cache.dtype != q.dtype:
        return f"{name} is {dtype_name(cache.dtype)} and q {dtype_name(q.dtype)}; the vendor's call takes one dtype"
    if cache.shape[1] % BLOCK_STEP or not 0 < cache.shape[1] <= MOST_BLOCK:
        return f"{name} has blocks of {cache.shape[1]}; takes multiples of {BLOCK_STEP} up to {MOST_BLOCK}"
    if not cache.is_contiguous() or cache.numel() == 0:
        return f"{name} has shape {tuple(cache.shape)} and strides {tuple(cache.stride())}; takes dense pools"
    return None


def why_not_hybrid(
    q: Tensor,
    window_cache: Tensor,
    ratio: int,
    compressed_cache: Tensor | None,
    compressed_block_table: Tensor | None,
    topk_indices: Tensor | None,
    **_: object,
) -> WhyNot:
    heads, head_dim = q.shape[1:]
    if head_dim != HEAD_DIM:
        return f"head_dim={head_dim}; sparse_attn_sharedkv takes {HEAD_DIM}"
    if heads % HEADS_STEP or not heads:
        return f"heads={heads}; sparse_attn_sharedkv takes multiples of {HEADS_STEP}"
    if ratio and ratio not in RATIOS:
        return f"ratio={ratio}; sparse_attn_sharedkv takes 4 and 128"
    if topk_indices is not None and topk_indices.shape[1] > LISTED:
        return f"topk_indices has {topk_indices.shape[1]} columns; sparse_attn_sharedkv takes {LISTED}"
    if compressed_cache is not None and compressed_block_table is not None:
        if compressed_block_table.shape[1] == 0:
            return "compressed_block_table has no columns; sparse_attn_sharedkv takes no empty tensors"
        if reason := why_not_pages("compressed_cache", compressed_cache, q):
            return reason
    return why_not_pages("window_cache", window_cache, q)


@implements(
    ops.attention.hybrid_attention,
    requires=Requires(dtypes=HALF, arch=">=2,<5", missing=missing_pair),
    why_not=why_not_hybrid,
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
    tokens, heads = q.shape[:2]
    if tokens == 0:
        return q.new_empty(q.shape), q.new_empty((0, heads), dtype=torch.float32)
    listed = listed_entries_of(q, cu_seqlens, compressed_cache, compressed_block_table, topk_indices, topk_length)
    options = spans(cu_seqlens, start_pos, window, ratio)
    prepare, attend = next(pair for pair in PAIRS if not any(call.missing() for call in pair))
    metadata = prepare(
        num_heads_q=heads,
        num_heads_kv=1,
        head_dim=HEAD_DIM,
        batch_size=start_pos.shape[0],
        # The longest there can be: lengths are on the device.
        max_seqlen_q=tokens,
        max_seqlen_kv=window_block_table.shape[1] * window_cache.shape[1],
        cmp_topk=0 if listed is None else LISTED,
        has_ori_kv=True,
        has_cmp_kv=compressed_cache is not None,
        device=str(q.device),
        **options,
    )
    out, _ = attend(
        q=q.contiguous(),
        ori_kv=window_cache[:, :, None],
        cmp_kv=None if compressed_cache is None else compressed_cache[:, :, None],
        cmp_sparse_indices=listed,
        # Blocks of positions that nobody looks at any more may be none; a table of the vendor names a block always.
        ori_block_table=window_block_table.clamp(min=0).contiguous(),
        cmp_block_table=None if compressed_block_table is None else compressed_block_table.clamp(min=0).contiguous(),
        sinks=sink_of(q, sink),
        metadata=metadata,
        softmax_scale=softmax_scale,
        **options,
    )
    near, far = seen(q, cu_seqlens, start_pos, window, ratio, compressed_cache, compressed_block_table, topk_indices)
    paged = (compressed_cache, far, topk_length, compressed_block_table)
    kv, valid = listed_entries(q, window_cache, near, None, window_block_table, cu_seqlens, *paged)
    return out.view(q.shape), lse_of(q, kv, valid, softmax_scale)


def spans(cu_seqlens: Tensor, start_pos: Tensor, window: int, ratio: int) -> dict[str, Any]:  # Any: the vendor's values
    """What both calls are told of the batch and of what a token sees."""
    return {
        "cu_seqlens_q": cu_seqlens.contiguous(),
        # Uncompressed length of each sequence, this call's tokens included.
        "seqused_kv": (start_pos + cu_seqlens.diff()).to(torch.int32),
        "cmp_ratio": ratio or 1,
        "ori_mask_mode": 4,
        "cmp_mask_mode": 3,
        "ori_win_left": window - 1,
        "ori_win_right": 0,
        "layout_q": "TND",
        "layout_kv": "PA_ND",
    }


def listed_entries_of(
    q: Tensor,
    cu_seqlens: Tensor,
    compressed_cache: Tensor | None,
    compressed_block_table: Tensor | None,
    topk_indices: Tensor | None,
    topk_length: Tensor | None,
) -> Tensor | None:
    """[tokens, 1, LISTED] int32: the entries listed that have a block, -1 elsewhere; the call drops unseen ones."""
    if topk_indices is None or compressed_cache is None:
        return None
    sequence = sequence_of_tokens(cu_seqlens, q.shape[0])
    slots = slots_of_columns(compressed_cache, topk_indices, topk_length, compressed_block_table, sequence)
    listed = torch.where(slots >= 0, topk_indices, -1).to(torch.int32)
    return torch.nn.functional.pad(listed, (0, LISTED - listed.shape[1]), value=-1)[:, None].contiguous()


def seen(
    q: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    window: int,
    ratio: int,
    compressed_cache: Tensor | None,
    compressed_block_table: Tensor | None,
    topk_indices: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The positions and the compressed entries that each token sees, negative where a column names none."""
    _, position = positions_of_tokens(cu_seqlens, start_pos, q.shape[0])
    near = position[:, None] - torch.arange(window, device=q.device)
    if compressed_cache is None or compressed_block_table is None:
        return near, None
    if topk_indices is None:
        room = compressed_block_table.shape[1] * compressed_cache.shape[1]
        topk_indices = torch.arange(room, device=q.device).expand(q.shape[0], room)
    return near, torch.where(topk_indices < (position[:, None] + 1) // ratio, topk_indices, -1)


def sink_of(q: Tensor, sink: Tensor | None) -> Tensor:
    """A finite logit for every head: the call needs one, and -1e4 adds nothing."""
    if sink is None:
        return torch.full((q.shape[1],), NO_SINK, dtype=torch.float32, device=q.device)
    return sink.float().clamp(NO_SINK, -NO_SINK).contiguous()


def lse_of(q: Tensor, kv: Tensor, valid: Tensor, softmax_scale: float) -> Tensor:
    """[tokens, heads]: the logarithm of the sum of weights over entries [tokens, n, dim], +inf where there is none."""
    logits = torch.einsum("thc,tnc->thn", q.to(kv.dtype), kv) * softmax_scale
    lse = logits.masked_fill(~valid[:, None], -torch.inf).logsumexp(-1)
    return torch.where(valid.any(-1)[:, None], lse, torch.inf)


SPARSE_FLASH = VendorCall(
    ("npu::npu_sparse_flash_attention", "_C_ascend::npu_sparse_flash_attention"),
    (
        *("query", "key", "value", "sparse_indices", "scale_value", "block_table", "actual_seq_lengths_query"),
        *("actual_seq_lengths_kv", "query_rope", "key_rope", "sparse_block_size", "layout_query", "layout_kv"),
        *("sparse_mode", "attention_mode"),
    ),
)
LATENT, ROPE, MOST_HEADS, ABSORBED, RIGHT_DOWN_CAUSAL = 512, 64, 128, 2, 3


def why_not_mla(
    q: Tensor, kv_cache: Tensor, w_uk: Tensor, absorbed: bool, topk_indices: Tensor | None, **_: object
) -> WhyNot:
    heads, (nope, latent) = q.shape[1], w_uk.shape[1:]
    if topk_indices is None:
        return "topk_indices is None; npu_sparse_flash_attention takes listed positions"
    if not absorbed:
        return "absorbed=False; npu_sparse_flash_attention is the absorbed form"
    if (latent, q.shape[2] - nope) != (LATENT, ROPE):
        return f"latent={latent} and {q.shape[2] - nope} rotated; npu_sparse_flash_attention takes {LATENT} and {ROPE}"
    if heads & (heads - 1) or not 0 < heads <= MOST_HEADS:
        return f"heads={heads}; npu_sparse_flash_attention takes powers of two up to {MOST_HEADS}"
    if w_uk.dtype != q.dtype:
        return f"w_uk is {dtype_name(w_uk.dtype)} and q {dtype_name(q.dtype)}; one dtype is adapted"
    if topk_indices.shape[1] == 0:
        return "topk_indices has no columns; npu_sparse_flash_attention takes at least one"
    return why_not_pages("kv_cache", kv_cache, q)


@implements(
    ops.attention.mla_attention,
    requires=Requires(dtypes=HALF, arch=">=2", missing=SPARSE_FLASH.missing),
    why_not=why_not_mla,
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
    (tokens, heads), nope = q.shape[:2], w_uk.shape[1]
    if tokens == 0 or topk_indices is None:
        return q.new_empty((tokens, heads, w_uv.shape[1])), q.new_empty((tokens, heads), dtype=torch.float32)
    latent_q = torch.einsum("thn,hnc->thc", q[..., :nope].float(), w_uk.float()).to(q.dtype)
    sequence, position = positions_of_tokens(cu_seqlens, start_pos, tokens)
    seen = torch.where(topk_indices <= position[:, None], topk_indices, -1)
    slots = slots_of_columns(kv_cache, seen, topk_length, block_table, sequence)
    # What is listed comes first, -1 behind it; a sort that keeps the order of the rest.
    order = (slots < 0).to(torch.uint8).argsort(dim=1, stable=True)
    listed = torch.where(slots >= 0, seen, -1).gather(1, order).to(torch.int32)
    # The two parts of an entry are two pools of the vendor, each dense.
    latent = kv_cache[:, :, None, :LATENT].contiguous()
    out, *_ = SPARSE_FLASH(
        query=latent_q.contiguous(),
        key=latent,
        value=latent,
        sparse_indices=listed[:, None].contiguous(),
        scale_value=softmax_scale,
        block_table=block_table.clamp(min=0).contiguous(),
        # Running sums without the 0 in front; keys are counted by sequence.
        actual_seq_lengths_query=cu_seqlens[1:].contiguous(),
        actual_seq_lengths_kv=(start_pos + cu_seqlens.diff()).to(torch.int32),
        query_rope=q[..., nope:].contiguous(),
        key_rope=kv_cache[:, :, None, LATENT:].contiguous(),
        sparse_block_size=1,
        layout_query="TND",
        layout_kv="PA_BSND",
        sparse_mode=RIGHT_DOWN_CAUSAL,
        attention_mode=ABSORBED,
    )
    rows = torch.cat((latent_q, q[..., nope:]), dim=-1)
    kv, valid = listed_entries(rows, kv_cache, seen, topk_length, block_table, cu_seqlens, None, None, None, None)
    out = torch.where(valid.any(-1)[:, None, None], out.float(), 0.0)
    values = torch.einsum("thc,hvc->thv", out, w_uv.float()).to(q.dtype)
    return values.contiguous(), lse_of(rows, kv, valid, softmax_scale)
