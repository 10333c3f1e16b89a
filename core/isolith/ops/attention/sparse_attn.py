"""Attention of each token over the entries that its lists name, with a sink and one softmax over two pools.

    l[t,i,j]   = softmax_scale * sum_c q[t,i,c] * kv[t,j,c]        over all head_dim dimensions; -inf where j is invalid
    m[t,i]     = max_j l[t,i,j];   s[t,i] = sum_j exp(l[t,i,j] - m[t,i])
    out[t,i,c] = sum_j exp(l[t,i,j] - m[t,i]) * kv[t,j,c] / (s[t,i] + exp(sink[i] - m[t,i]))      c < value_dim, or all
    lse[t,i]   = m[t,i] + log(s[t,i])                              natural logarithm, both pools, without the sink

j runs over the columns of `indices` (entries of kv_cache) and then of `extra_indices` (entries of extra_kv_cache); an
entry is key and value at once, shared by all heads. With a block table an index is a logical item of the token's own
sequence, without one a slot of the pool. A column is invalid where the index is negative, behind the table or the
pool, in a block that the table gives as -1, or at or behind topk_length[t]; invalid columns may stand anywhere, and
whatever lies in the entries that they or nobody name, NaN too, does not matter. An entry listed twice counts twice.
The sink joins the denominator once, not the values: -inf is no sink, +inf gives 0. No valid column: out 0, lse +inf.
Products and sums in float32, out rounded once.

Source: DeepSeek-V4 inference/kernel.py, sparse_attn; FlashMLA 9241ae3 tests/ref.py, ref_sparse_attn_decode (two pools,
lse, empty rows); sink: arXiv:2309.17453 and gpt-oss.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isolith.dtypes import FLOAT, INT32, INTEGER, PACKED, WIDE, widen
from isolith.errors import ArgumentError
from isolith.materials.batches import batch_of_lists
from isolith.materials.byte_pools import byte_pool
from isolith.materials.relations_attention import relations_of_lists
from isolith.numerics.lists import listed_entries
from isolith.numerics.pages import check_block_table, check_cache, entry_dim
from isolith.numerics.ragged import check_cu_seqlens
from isolith.operator import Cost, Operator
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(
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
    kv, valid = listed_entries(
        *(q, kv_cache, indices, topk_length, block_table, cu_seqlens),
        *(extra_kv_cache, extra_indices, extra_topk_length, extra_block_table),
    )
    logits = torch.einsum("thc,tnc->thn", q.to(kv.dtype), kv) * softmax_scale
    logits = logits.masked_fill(~valid[:, None, :], -torch.inf)
    some = valid.any(-1)[:, None]
    largest = torch.where(some, logits.amax(-1), 0.0)
    weights = (logits - largest[..., None]).exp()
    total = weights.sum(-1)
    denominator = total if sink is None else total + (sink.to(kv.dtype) - largest).exp()
    values = kv[..., : value_dim or kv.shape[-1]]
    out = torch.einsum("thn,tnc->thc", weights, values) / denominator[..., None]
    out = torch.where(some[..., None], out, 0.0)
    lse = torch.where(some, largest + total.log(), torch.inf)
    return out.to(q.dtype).contiguous(), lse


def online(
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
    """Blocks of 64 columns with a running maximum, in powers of two, 16 channels at a time; the sink after that."""
    kv, valid = listed_entries(
        *(q, kv_cache, indices, topk_length, block_table, cu_seqlens),
        *(extra_kv_cache, extra_indices, extra_topk_length, extra_block_table),
    )
    wide, octaves = q.to(kv.dtype), softmax_scale / math.log(2)
    running = torch.full(q.shape[:2], -torch.inf, dtype=kv.dtype, device=q.device)
    total, out = torch.zeros_like(running), torch.zeros_like(wide)
    for part, legal in zip(kv.split(64, dim=1), valid.split(64, dim=1), strict=True):
        logits = sum_in_order(wide, part) * octaves
        logits = logits.masked_fill(~legal[:, None, :], -torch.inf)
        highest = torch.maximum(running, logits.amax(-1))
        base = highest.masked_fill(highest.isneginf(), 0.0)
        keep, weights = (running - base).exp2(), (logits - base[..., None]).exp2()
        total = total * keep + weights.sum(-1)
        out = out * keep[..., None] + torch.einsum("thn,tnc->thc", weights, part)
        running = highest
    lse = (running + total.log2()) * math.log(2)
    return with_sink(q, out / total[..., None], lse, valid, sink, value_dim)


def sum_in_order(q: Tensor, kv: Tensor) -> Tensor:
    """Dot products [T,h,n] whose terms are added 16 channels after 16 channels."""
    total = q.new_zeros(q.shape[0], q.shape[1], kv.shape[1])
    for ours, theirs in zip(q.split(16, dim=-1), kv.split(16, dim=-1), strict=True):
        total += torch.einsum("thc,tnc->thn", ours, theirs)
    return total


def rounded_halves(
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
    """Each half of the columns by itself, weights in q's dtype where they meet the values; merged by lse, then sink."""
    kv, valid = listed_entries(
        *(q, kv_cache, indices, topk_length, block_table, cu_seqlens),
        *(extra_kv_cache, extra_indices, extra_topk_length, extra_block_table),
    )
    outs, lses = [], []
    for part, legal in zip(kv.tensor_split(2, dim=1), valid.tensor_split(2, dim=1), strict=True):
        logits = torch.einsum("thc,tnc->thn", q.to(kv.dtype), part) * softmax_scale
        logits = logits.masked_fill(~legal[:, None, :], -torch.inf)
        lses.append(logits.logsumexp(-1))
        largest = torch.where(legal.any(-1)[:, None], lses[-1], 0.0)
        weights = (logits - largest[..., None]).exp().to(q.dtype)
        outs.append(torch.einsum("thn,tnc->thc", weights.to(kv.dtype), part))
    lse = torch.logaddexp(*lses)
    shares = [(part - lse).exp()[..., None] for part in lses]
    return with_sink(q, outs[0] * shares[0] + outs[1] * shares[1], lse, valid, sink, value_dim)


def with_sink(
    q: Tensor, out: Tensor, lse: Tensor, valid: Tensor, sink: Tensor | None, value_dim: int
) -> tuple[Tensor, Tensor]:
    """A result without sink -> the operator's: out / (1 + exp(sink - lse)), and the rule for empty rows."""
    some = valid.any(-1)[:, None]
    share = 1.0 if sink is None else (lse - sink.to(lse.dtype)).sigmoid()[..., None]
    out = torch.where(some[..., None], out[..., : value_dim or out.shape[-1]] * share, 0.0)
    return out.to(q.dtype).contiguous(), torch.where(some, lse, torch.inf)


def fake(q: Tensor, value_dim: int, **_: object) -> tuple[Tensor, Tensor]:
    tokens, heads, head_dim = q.shape
    return q.new_empty(tokens, heads, value_dim or head_dim), q.new_empty(tokens, heads, dtype=widen(q.dtype))


def check(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor | None,
    cu_seqlens: Tensor | None,
    extra_kv_cache: Tensor | None,
    extra_indices: Tensor | None,
    extra_topk_length: Tensor | None,
    extra_block_table: Tensor | None,
    value_dim: int,
    **_: object,
) -> None:
    for name, cache in (("kv_cache", kv_cache), ("extra_kv_cache", extra_kv_cache)):
        if cache is not None:
            check_cache("sparse_attn", name, cache)
            if (dim := entry_dim(cache)) != q.shape[2]:
                says = f"an entry of {name} must have head_dim = {q.shape[2]} elements"
                raise ArgumentError(f"sparse_attn: {says}; got {dim}.")
    if cu_seqlens is None and not (block_table is None and extra_block_table is None):
        raise ArgumentError("sparse_attn: a block table needs cu_seqlens, which says whose token it is; got None.")
    if (extra_kv_cache is None) != (extra_indices is None):
        given = "extra_indices" if extra_kv_cache is None else "extra_kv_cache"
        raise ArgumentError(f"sparse_attn: extra_kv_cache and extra_indices come together; got {given} alone.")
    for name, part in (("extra_topk_length", extra_topk_length), ("extra_block_table", extra_block_table)):
        if part is not None and extra_kv_cache is None:
            raise ArgumentError(f"sparse_attn: {name} needs extra_kv_cache; got None.")
    if not 0 <= value_dim <= q.shape[2]:
        raise ArgumentError(f"sparse_attn: value_dim must be in 0..head_dim = {q.shape[2]}; got {value_dim}.")


def check_values(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor | None,
    cu_seqlens: Tensor | None,
    extra_kv_cache: Tensor | None,
    extra_block_table: Tensor | None,
    **_: object,
) -> None:
    if cu_seqlens is not None:
        check_cu_seqlens("sparse_attn", cu_seqlens, q.shape[0])
    if block_table is not None:
        check_block_table("sparse_attn", "block_table", block_table, kv_cache)
    if extra_block_table is not None and extra_kv_cache is not None:
        check_block_table("sparse_attn", "extra_block_table", extra_block_table, extra_kv_cache)


def cost(
    q: Tensor,
    kv_cache: Tensor,
    indices: Tensor,
    sink: Tensor | None,
    extra_kv_cache: Tensor | None,
    extra_indices: Tensor | None,
    value_dim: int,
    **_: object,
) -> Cost:
    tokens, heads, head_dim = q.shape
    columns = read = 0
    for cache, listed in ((kv_cache, indices), (extra_kv_cache, extra_indices)):
        if cache is not None and listed is not None:
            columns += listed.shape[1]
            entries = min(listed.numel(), cache.shape[0] * cache.shape[1])
            read += entries * cache.shape[2] * cache.itemsize + listed.nbytes
    width = value_dim or head_dim
    return Cost(
        flops=2 * tokens * heads * columns * (head_dim + width),
        bytes_read=q.nbytes + read + (0 if sink is None else sink.nbytes),
        bytes_written=tokens * heads * (width * q.itemsize + widen(q.dtype).itemsize),
        math="bfloat16" if q.itemsize == 2 else "float32",
    )


def samples(make: Make) -> Iterator[Sample]:
    yield from samples_of_slots(make)
    yield from samples_of_batches(make)


def samples_of_slots(make: Make) -> Iterator[Sample]:
    def call(tokens: int, heads: int, dim: int, slots: int, columns: int) -> dict[str, Any]:  # Any: arguments
        return {
            "q": make.normal(tokens, heads, dim),
            "kv_cache": make.normal(1, slots, dim),
            "indices": make.integers(0, slots, tokens, columns),
            "softmax_scale": dim**-0.5,
            "sink": make.normal(heads, dtype=torch.float32),
        }

    yield Sample("pro_heads", "model", **call(1, 128, 512, 300, 128))
    yield Sample("v32_absorbed", "model", **call(1, 128, 576, 2100, 2048) | {"sink": None, "value_dim": 512})
    yield Sample("one_head_odd_width", **call(5, 1, 65, 90, 61))
    yield Sample("no_tokens", **call(0, 8, 64, 20, 16))
    yield Sample("no_columns", **call(2, 4, 32, 20, 0))
    yield Sample("no_blocks", **call(2, 4, 32, 20, 3) | {"kv_cache": make.zeros(0, 16, 32)})
    # One entry of weight exactly 1 is returned as it lies in the pool; a logit of 0 has its lse in every base.
    yield Sample("single_entry", "exact", **call(3, 4, 32, 20, 1) | {"q": make.zeros(3, 4, 32), "sink": None})
    # More tokens than 16 bits count, the most that some axes of a launch grid take; then more slots.
    many = call(66000, 1, 2, 20, 1) | {"q": make.zeros(66000, 1, 2), "sink": None}
    yield Sample("tokens_66000", "exact", **many)
    large = call(2, 2, 8, 70000, 3) | {"indices": make.integers(65536, 70000, 2, 3)}
    table = {"cu_seqlens": make.batch([2])[0], "extra_block_table": make.tensor([[4374, 4100]], torch.int32)}
    table |= {"extra_kv_cache": make.normal(4375, 16, 8), "extra_indices": make.integers(0, 32, 2, 3)}
    yield Sample("slots_beyond_16_bits", **large | table)
    # The one valid column has a logit far below numbers that stand for -inf elsewhere.
    deep = {"q": make.uniform(6, 4, 32, low=8.0, high=16.0), "kv_cache": make.uniform(1, 20, 32, low=-16.0, high=-8.0)}
    deep["indices"] = make.tensor([[-1, 5, -1, -1], [7, -1, 99, -1]] * 3, torch.int32) + make.integers(0, 3, 6, 1)
    deep["indices"] -= 3
    yield Sample("one_logit_of_minus_100000", **call(6, 4, 32, 20, 4) | deep | {"sink": None, "softmax_scale": 24.0})
    # The sink must count once, unscaled, on a head of its own; +inf takes everything, -inf nothing.
    sink = make.tensor([6.0, -6.0, torch.inf, -torch.inf, 0.0, 3.0, 90.0, -90.0], torch.float32)
    yield Sample("extreme_sinks", **call(4, 8, 64, 50, 20) | {"sink": sink})
    yield Sample("logits_of_200", **call(4, 8, 64, 50, 40) | {"sink": sink, "softmax_scale": 8.0})
    yield Sample("equal_logits", **call(2, 8, 64, 600, 512) | {"q": make.zeros(2, 8, 64)})
    twice = make.tensor([[3, 3, 7, 3], [5, 1, 1, 5]], torch.int32)
    yield Sample("listed_twice", **call(2, 4, 32, 20, 4) | {"indices": twice})
    # Only slots 1..9 may be read: what the lists do not reach, or reach through an invalid column, is NaN or infinite.
    largest = 2**31 - 1
    rows = [[-1] * 6, [-1, 4, -1, -1, 20, 1], [largest, -largest, 9, 1, 5, -1], [5, 2, 3, 15, 16, 17], [11] * 6]
    poisoned = call(5, 4, 32, 20, 6) | {"topk_length": make.tensor([6, 9, 6, 3, 0], torch.int32)}
    poisoned["kv_cache"][:, [0, 10, 11, 12]], poisoned["kv_cache"][:, 13:] = torch.nan, torch.inf
    yield Sample("invalid_columns", **poisoned | {"indices": make.tensor(rows, torch.int32)})
    several = {"kv_cache": make.normal(3, 8, 32)[:, :7], "value_dim": 24, "sink": None}
    yield Sample("slots_of_several_blocks", **call(3, 2, 32, 21, 21) | several)


def samples_of_batches(make: Make) -> Iterator[Sample]:
    call = functools.partial(batch_of_lists, make)
    flash = call([1, 1], [128, 144], [700, 650], 64, 512, (128, 512))
    yield Sample("flash_decode", "model", **flash)
    quantised = {"kv_cache": byte_pool(make, 584, 18, 16), "extra_kv_cache": byte_pool(make, 584, 24, 64)}
    yield Sample("flash_decode_584_bytes", "model", **flash | quantised)
    odd = call([2, 1], [20, 16], [100, 61], 3, 512, (24, 40))
    quantised = {name: byte_pool(make, 584, *odd[name].shape[:2]) for name in ("kv_cache", "extra_kv_cache")}
    yield Sample("584_bytes_in_odd_blocks", **odd | quantised)
    ragged = call([3, 0, 5, 1], [40, 30, 7, 16], [12, 0, 200, 61], 8, 48, (20, 33))
    yield Sample("ragged_two_pools", **ragged)
    lengths = {"topk_length": make.integers(0, 25, 9), "extra_topk_length": make.integers(-1, 33, 9)}
    lengths["topk_length"][:3] = lengths["extra_topk_length"][3:6] = make.tensor([0, -1, 50], torch.int32)
    yield Sample("ragged_lengths", **ragged | lengths)
    yield Sample("large_sink_two_pools", **ragged | {"sink": make.full(6.0, 8, dtype=torch.float32)})
    unread = {"indices": make.full(-1, 9, 20, dtype=torch.int32), "kv_cache": make.full(torch.nan, 8, 16, 48)}
    yield Sample("only_the_second_list", **ragged | unread)
    slots = {"extra_block_table": None, "extra_kv_cache": make.normal(2, 61, 48)}
    yield Sample("slots_in_the_second", **ragged | slots)
    mla = call([2, 1], [40, 30], [5, 0], 4, 576, (9, 2))
    yield Sample("656_bytes", **mla | {"kv_cache": byte_pool(make, 656, 6, 16)})
    yield Sample("no_sequences", **call([], [], [], 4, 32, (5, 6)))


def errors(make: Make) -> Iterator[ErrorSample]:
    call: dict[str, Any] = {"q": make.normal(3, 4, 32), "kv_cache": make.normal(2, 8, 32), "softmax_scale": 1.0}
    call["indices"] = make.integers(0, 16, 3, 5)
    table, cu_seqlens = make.tensor([[0, 1]], torch.int32), make.batch([3])[0]
    paged = call | {"block_table": table, "cu_seqlens": cu_seqlens}
    extra = {"extra_kv_cache": call["kv_cache"], "extra_indices": call["indices"]}
    says = "an entry of kv_cache must have head_dim = 32 elements; got 31."
    yield refused("entry_width", call | {"kv_cache": make.normal(2, 8, 31)}, says)
    says = "an entry of extra_kv_cache must have head_dim = 32 elements; got 512."
    yield refused("extra_entry_width", call | extra | {"extra_kv_cache": byte_pool(make, 584, 2, 8)}, says)
    says = "a uint8 kv_cache has entries of 584, 656, 132 or 68 bytes; got 600."
    yield refused("no_such_format", call | {"kv_cache": make.zeros(2, 8, 600, dtype=torch.uint8)}, says)
    says = "a block table needs cu_seqlens, which says whose token it is; got None."
    yield refused("table_without_cu_seqlens", call | {"block_table": table}, says)
    yield refused("extra_table_without_cu_seqlens", call | extra | {"extra_block_table": table}, says)
    says = "extra_kv_cache and extra_indices come together; got extra_kv_cache alone."
    yield refused("extra_pool_alone", call | extra | {"extra_indices": None}, says)
    says = "extra_kv_cache and extra_indices come together; got extra_indices alone."
    yield refused("extra_list_alone", call | extra | {"extra_kv_cache": None}, says)
    says = "extra_topk_length needs extra_kv_cache; got None."
    yield refused("extra_length_alone", call | {"extra_topk_length": make.integers(0, 5, 3)}, says)
    yield refused("value_dim", call | {"value_dim": 33}, "value_dim must be in 0..head_dim = 32; got 33.")
    yield refused("tokens", call | {"indices": make.integers(0, 16, 2, 5)}, "tokens is 3 in q but 2 in indices.")
    says = "cu_seqlens must end at the number of tokens, 3; got 2."
    yield refused("cu_seqlens", paged | {"cu_seqlens": make.batch([2])[0]}, says)
    yield refused("block", paged | {"block_table": table + 1}, "block_table must be below blocks = 2; got 2.")
    says = "extra_block_table must be below blocks = 2; got 2."
    yield refused("extra_block", paged | extra | {"extra_block_table": table + 1}, says)


def refused(name: str, call: dict[str, Any], says: str) -> ErrorSample:  # Any: arguments
    return ErrorSample(name, says=f"sparse_attn: {says}", **call)


def relations(make: Make) -> Iterator[Relation]:
    yield from relations_of_lists(make, functools.partial(batch_of_lists, make))


sparse_attn = Operator(
    name="sparse_attn",
    shapes="q[tokens heads head_dim] kv_cache[blocks block_size _] indices[tokens columns] sink?[heads] "
    "topk_length?[tokens] block_table?[sequences max_blocks] cu_seqlens?[sequences+1] "
    "extra_kv_cache?[extra_blocks extra_block_size _] extra_indices?[tokens extra_columns] "
    "extra_topk_length?[tokens] extra_block_table?[sequences max_extra_blocks] "
    "-> out[tokens heads _] lse[tokens heads]",
    dtypes={
        "q": FLOAT,
        "kv_cache": FLOAT + PACKED,
        "indices": INTEGER,
        "sink": WIDE,
        "topk_length": INTEGER,
        "block_table": INT32,
        "cu_seqlens": INT32,
        "extra_kv_cache": FLOAT + PACKED,
        "extra_indices": INTEGER,
        "extra_topk_length": INTEGER,
        "extra_block_table": INT32,
    },
    reference=reference,
    variants=(online, rounded_halves),
    fake=fake,
    check=check,
    check_values=check_values,
    cost=cost,
    samples=samples,
    errors=errors,
    relations=relations,
)
