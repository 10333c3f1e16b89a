"""Attention over latents: queries taken into the space of the latents, one softmax over shared rows, results taken out.

Both forms of the operator run so. Keys and values of every head would take 64 KiB an entry (128 heads, 256 wide in
bfloat16), for sequences whose lengths no shape says; forming them anew for each tile of queries costs more than this.

Floor: of the two products by head, the weights once (16 MiB each for 128 heads); programs of neighbouring tokens find
them in the L2 cache. Of the attention, see `sparse_attn`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.kernels.cache_entries import pool_of
from isolith_backends.cuda.kernels.lists_attended import attention, listed, seen
from isolith_backends.cuda.kernels.tensors import TYPES, dense
from isolith_backends.cuda.launch import ceil_div, launch, power_of_two


@triton.jit
def multiply_heads(
    X,
    W,
    Y,
    tokens,
    inner,
    outer,
    x_token,
    x_head,
    w_head,
    w_inner,
    w_outer,
    y_token,
    y_head,
    copied,
    TOKENS: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    COPIED: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y[t,h,:outer] = x[t,h,:inner] times w[h] [inner, outer]; what follows in x is copied behind it."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * OUTER + tl.arange(0, OUTER)
    head = tl.program_id(2).to(tl.int64)
    x_at = X + head * x_head + token.to(tl.int64)[:, None] * x_token
    y_at = Y + head * y_head + token.to(tl.int64)[:, None] * y_token
    w_at = W + head * w_head + column[None, :].to(tl.int64) * w_outer
    sums = tl.zeros((TOKENS, OUTER), tl.float32)
    for start in range(0, inner, INNER):
        k = start + tl.arange(0, INNER)
        x = tl.load(x_at + k[None, :], mask=(token < tokens)[:, None] & (k < inner)[None, :], other=0.0)
        w_inside = (k < inner)[:, None] & (column < outer)[None, :]
        w = tl.load(w_at + k[:, None].to(tl.int64) * w_inner, mask=w_inside, other=0.0)
        if x.dtype != TYPE:
            x = x.to(tl.float32).to(TYPE)
        if w.dtype != TYPE:
            w = w.to(tl.float32).to(TYPE)
        sums = tl.dot(x, w, sums, input_precision=PRECISION)
    inside = (token < tokens)[:, None] & (column < outer)[None, :]
    tl.store(y_at + column[None, :], sums.to(Y.dtype.element_ty), mask=inside)
    if COPIED:
        rest = tl.arange(0, COPIED)
        behind = (token < tokens)[:, None] & (rest < tl.where(tl.program_id(1) == 0, copied, 0))[None, :]
        kept = tl.load(x_at + inner + rest[None, :], mask=behind, other=0.0).to(tl.float32)
        tl.store(y_at + outer + rest[None, :], kept.to(Y.dtype.element_ty), mask=behind)


def products_by_head(x: Tensor, weight: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    """x [tokens, heads, inner + rest] and weight [heads, inner, outer] -> [tokens, heads, outer + rest].

    Args:
        x: What follows its first `inner` elements is copied.
        weight: As above; [heads, outer, inner] where transposed.
        dtype: Of the result.
        transposed: Which way round the weight lies.
    """
    x, weight = dense(x), dense(weight)
    tokens, heads, width = x.shape
    inner, outer = weight.shape[1:][::-1] if transposed else weight.shape[1:]
    copied = width - inner
    y = torch.empty(tokens, heads, outer + copied, dtype=dtype, device=x.device)
    strides = (weight.stride(2), weight.stride(1)) if transposed else (weight.stride(1), weight.stride(2))
    kinds = {x.dtype, weight.dtype}
    exact = torch.float32 in kinds
    rows = 16 if exact else power_of_two(tokens, 16, 64)
    columns = power_of_two(outer, 16, 32 if exact else 128)
    launch(
        multiply_heads,
        (ceil_div(tokens, rows), ceil_div(outer, columns), heads),
        *(x, weight, y, tokens, inner, outer, x.stride(0), x.stride(1)),
        *(weight.stride(0), *strides, y.stride(0), y.stride(1), copied),
        warps=4,
        stages=3,
        TOKENS=rows,
        INNER=power_of_two(inner, 16, 32 if exact else 64),
        OUTER=columns,
        COPIED=power_of_two(copied) if copied else 0,
        TYPE=TYPES[x.dtype] if len(kinds) == 1 else tl.float32,
        PRECISION="ieee" if exact or len(kinds) == 1 else "tf32",
    )
    return y


def mla_attention(
    q: Tensor,
    kv_cache: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    softmax_scale: float,
    topk_indices: Tensor | None,
    topk_length: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) over all positions up to each token's own, or over the listed ones of them."""
    pool = pool_of(kv_cache)
    # The latent result is in q's dtype where that is the dtype of all it meets, else in float32. The latent query stays
    # in float32: a large scale would enlarge what rounding does to logits.
    met = {q.dtype, w_uk.dtype, w_uv.dtype, torch.bfloat16 if pool.tensor.dtype == torch.uint8 else pool.tensor.dtype}
    between = q.dtype if len(met) == 1 else torch.float32
    rows = products_by_head(q, w_uk, torch.float32, transposed=False)
    if topk_indices is None:
        entries = seen(pool, block_table, reach=1)
    else:
        entries = listed(pool, topk_indices, topk_length, block_table)
    out, lse = attention(rows, (entries,), softmax_scale, None, w_uk.shape[2], cu_seqlens, start_pos, between)
    return products_by_head(out, w_uv, q.dtype, transposed=True), lse
