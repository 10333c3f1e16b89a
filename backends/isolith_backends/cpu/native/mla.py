"""Multi-head latent attention in C++, always in the absorbed form: attention.cpp between the products of heads.h."""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT
from isolith_backends.cpu.native import attention

library = attention.library

TOKENS = 64  # as in heads.h


def head_products(a: Tensor, w: Tensor, rows: bool, c: Tensor) -> None:
    """c[t, h] = a[t, h] . w[h]; w is [heads, inner, outer], or [heads, outer, inner] where `rows`."""
    (tokens, heads, inner), outer = a.shape, c.shape[2]
    if not c.numel():
        return
    units, lanes = -(-inner // 32) * 32, -(-outer // 32) * 32
    words = units * lanes + TOKENS * (units + lanes)
    room = torch.empty(torch.get_num_threads() * words, dtype=torch.int32)
    strides = (*a.stride()[:2], *c.stride()[:2])
    library.call("head_products", a, a.dtype, w, rows, c, tokens, heads, inner, outer, *strides, room, words)


def weights_refused(kv_cache: Tensor, w_uk: Tensor, w_uv: Tensor, **_: object) -> WhyNot:
    for name, value in (("kv_cache", kv_cache), ("w_uk", w_uk), ("w_uv", w_uv)):
        if value.dtype == torch.float64:
            return f"{name} is float64; products here are in float32"
    return None


@implements(
    ops.attention.mla_attention,
    requires=Requires(dtypes=DEVICE_FLOAT, missing=library.missing),
    why_not=weights_refused,
    batch_invariant=True,
)
def mla_attention_native(
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
    (tokens, heads, _), (nope, latent) = q.shape, w_uk.shape[1:]
    # float16 between the products could overflow, and weights of another dtype are not to be rounded. Who does not ask
    # for the absorbed form expects no rounding between its products: with it, a V3 was 1.5 times as far from float32.
    alike = absorbed and q.dtype == w_uk.dtype == w_uv.dtype == torch.bfloat16
    wide, w_uk, w_uv = (value.contiguous() if alike else value.float().contiguous() for value in (q, w_uk, w_uv))
    rows = wide.new_empty(tokens, heads, latent + q.shape[2] - nope)
    head_products(wide[..., :nope], w_uk, False, rows[..., :latent])
    rows[..., latent:] = wide[..., nope:]
    lists = (attention.Listed * 2)()
    kept = attention.described(lists[0], kv_cache, topk_indices, topk_length, block_table, ratio=1)
    between, lse = attention.attend(rows, lists, 1, softmax_scale, None, cu_seqlens, start_pos, latent)
    del kept
    out = wide.new_empty(tokens, heads, w_uv.shape[1])
    head_products(between, w_uv, True, out)
    return out.to(q.dtype), lse
