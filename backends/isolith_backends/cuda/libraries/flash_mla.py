"""Sparse attention by FlashMLA: entries of 584 or 656 bytes in a decoding step, bfloat16 entries in a prefill.

Facts (FlashMLA 9241ae3, flash_mla/flash_mla_interface.py and tests/ref.py): queries [batch, tokens, heads, 512 or 576]
in bfloat16 with 64 or 128 heads; pools [blocks, block_size, 1, bytes]; indices int32 are slots, -1 for none, their
number a multiple of 64 (prefill: 128); lengths are per sequence of a batch, so each token is a batch of its own; lse is
a natural logarithm without the sink; no valid index gives 0 and +inf. The object that `get_mla_metadata` returns is
filled by a kernel in the first call and holds for its lengths alone, so every call gets a new one.
"""

from functools import partial

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.numerics.lists import slots_of_columns
from isolith.numerics.ragged import sequence_of_tokens
from isolith_backends.cuda.libraries import lacks, library

HEADS = (64, 128)
BYTES_OF_DIM = {512: 584, 576: 656}
VALUES = 512
ARCH = ">=9.0,<11"  # sm_90a and sm_100f


def slots(
    cache: Tensor, indices: Tensor, length: Tensor | None, table: Tensor | None, sequence: Tensor | None, unit: int
) -> Tensor:
    """[tokens, columns] int32: what the library takes, columns padded with -1 to a multiple of `unit`."""
    found = slots_of_columns(cache, indices, length, table, sequence).int()
    return torch.nn.functional.pad(found, (0, -found.shape[1] % unit), value=-1)


def padded_heads(q: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Queries and sinks of 64 or 128 heads; those added are zero, and nobody looks at their results."""
    added = next(heads for heads in HEADS if heads >= q.shape[1]) - q.shape[1]
    wide = torch.nn.functional.pad(q, (0, 0, 0, added)).contiguous()
    return wide, None if sink is None else torch.nn.functional.pad(sink.float(), (0, added))


def shape_refused(q: Tensor, indices: Tensor, value_dim: int) -> WhyNot:
    if q.shape[1] > HEADS[-1]:
        return f"heads={q.shape[1]}; takes at most {HEADS[-1]}"
    if q.shape[2] not in BYTES_OF_DIM:
        return f"head_dim={q.shape[2]}; takes 512 or 576"
    if (value_dim or q.shape[2]) != VALUES:
        return f"value_dim={value_dim or q.shape[2]}; takes {VALUES}"
    return "no columns" if indices.shape[1] == 0 else None


def decode_refused(
    q: Tensor, kv_cache: Tensor, indices: Tensor, extra_kv_cache: Tensor | None, value_dim: int, **_: object
) -> WhyNot:
    refused = shape_refused(q, indices, value_dim)
    if refused:
        return refused
    for name, cache in (("kv_cache", kv_cache), ("extra_kv_cache", extra_kv_cache)):
        if cache is not None and (cache.dtype != torch.uint8 or cache.shape[2] != BYTES_OF_DIM[q.shape[2]]):
            return f"{name} has {cache.shape[2]} x {cache.dtype}; takes {BYTES_OF_DIM[q.shape[2]]} bytes"
    return None


DECODE = "flash_mla_with_kvcache", "indices", "attn_sink", "extra_k_cache", "topk_length"


@implements(
    ops.attention.sparse_attn,
    requires=Requires(dtypes=(torch.bfloat16,), arch=ARCH, missing=partial(lacks, "flash_mla", *DECODE)),
    why_not=decode_refused,
)
def sparse_attn_flash_mla(
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
    flash_mla = library("flash_mla")
    heads, (queries, sinks) = q.shape[1], padded_heads(q, sink)
    sequence = None if cu_seqlens is None else sequence_of_tokens(cu_seqlens, q.shape[0])
    more = {}
    if extra_kv_cache is not None and extra_indices is not None:
        listed = slots(extra_kv_cache, extra_indices, extra_topk_length, extra_block_table, sequence, 64)
        more = {"extra_k_cache": extra_kv_cache.unsqueeze(2), "extra_indices_in_kvcache": listed.unsqueeze(1)}
        if extra_topk_length is not None:
            more["extra_topk_length"] = extra_topk_length.int()
    out, lse = flash_mla.flash_mla_with_kvcache(
        queries.unsqueeze(1),
        kv_cache.unsqueeze(2),
        None,
        None,
        VALUES,
        flash_mla.get_mla_metadata()[0],
        softmax_scale=softmax_scale,
        is_fp8_kvcache=True,
        indices=slots(kv_cache, indices, topk_length, block_table, sequence, 64).unsqueeze(1),
        attn_sink=sinks,
        topk_length=None if topk_length is None else topk_length.int(),
        **more,
    )
    return out[:, 0, :heads].contiguous(), lse[:, :heads, 0].contiguous()


def prefill_refused(
    q: Tensor, kv_cache: Tensor, indices: Tensor, extra_kv_cache: Tensor | None, value_dim: int, **_: object
) -> WhyNot:
    refused = shape_refused(q, indices, value_dim)
    if refused:
        return refused
    if extra_kv_cache is not None:
        return "extra_kv_cache is given; takes one pool"
    if kv_cache.dtype != torch.bfloat16:
        return f"kv_cache is {kv_cache.dtype}; takes bfloat16"
    return None if kv_cache.is_contiguous() else f"kv_cache is not contiguous; strides {tuple(kv_cache.stride())}"


PREFILL = "flash_mla_sparse_fwd", "attn_sink"


@implements(
    ops.attention.sparse_attn,
    requires=Requires(dtypes=(torch.bfloat16,), arch=ARCH, missing=partial(lacks, "flash_mla", *PREFILL)),
    why_not=prefill_refused,
)
def sparse_attn_flash_mla_prefill(
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
    flash_mla = library("flash_mla")
    heads, (queries, sinks) = q.shape[1], padded_heads(q, sink)
    sequence = None if cu_seqlens is None else sequence_of_tokens(cu_seqlens, q.shape[0])
    # Lengths are folded into the indices: the library may read a listed entry behind the length it is given.
    listed = slots(kv_cache, indices, topk_length, block_table, sequence, 128)
    out, _, lse = flash_mla.flash_mla_sparse_fwd(
        queries,
        kv_cache.flatten(0, 1).unsqueeze(1),
        listed.unsqueeze(1),
        softmax_scale,
        d_v=VALUES,
        attn_sink=sinks,
    )
    return out[:, :heads].contiguous(), lse[:, :heads].contiguous()
