"""Multi-head latent attention over a cache of latents, dense and causal or over listed tokens (DSA).

A cache row is [c | r], a latent of w_uk.shape[2] elements and the rotated key part that all heads share; q[t,i] is
[n | u], as wide as w_uk.shape[1] and r. With p the position of token t and j a token of the same sequence:

    k[j,i] = [w_uk[i] c[j] | r[j]];    v[j,i] = w_uv[i] c[j]
    l[t,i,j] = softmax_scale * (n[t,i] . w_uk[i] c[j] + u[t,i] . r[j])                          j <= p, else -inf
    out[t,i] = sum_j softmax_j(l[t,i,:]) v[j,i];    lse[t,i] = log sum_j exp(l[t,i,j])          natural logarithm

`absorbed` names the form that a kernel computes in; the two are equal but for rounding. True: w_uk^T n first, then one
shared row per token, w_uv last (decoding). False: keys and values of every head (prefill). With topk_indices only the
positions that they list count, those behind p not; -1 and columns from topk_length[t] on list none, a position listed
twice counts twice. A position without a block is left out. No key: out 0, lse +inf. No sink, and out is not rotated
back. Rows must have been written before the call, those of its own tokens too. Products and sums in float32, out
rounded once.

Source: DeepSeek-V2 (arXiv:2405.04434) section 2.1; DeepSeek-V3 inference/model.py, MLA (naive and absorb);
DeepSeek-V3.2 (arXiv:2512.02556) section 2.1 and V3.2-Exp 3b99a53; FlashMLA 9241ae3.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isolith.dtypes import FLOAT, INT32, INTEGER, PACKED, widen
from isolith.errors import ArgumentError
from isolith.materials.batches import pool_of_items
from isolith.materials.byte_pools import byte_pool
from isolith.materials.relations import Ragged, in_steps, pages_renumbered, reordered, same, scaled, sequences_apart
from isolith.numerics.lists import slots_of_columns
from isolith.numerics.pages import check_block_table, check_cache, entry_dim, read_entries
from isolith.numerics.ragged import check_cu_seqlens, check_start_pos, positions_of_tokens
from isolith.operator import Cost, Operator
from isolith.ops.attention.sparse_attn import reference as sparse_attn
from isolith.ops.attention.sparse_attn import rounded_halves as in_halves
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(
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
    nope, latent = w_uk.shape[1:]
    wide = q.to(widen(q.dtype))
    q_latent = torch.einsum("thn,hnc->thc", wide[..., :nope], w_uk.to(wide.dtype))
    rows = torch.cat((q_latent, wide[..., nope:]), dim=-1)
    indices = visible_positions(cu_seqlens, start_pos, q.shape[0], topk_indices)
    out, lse = sparse_attn(
        rows, kv_cache, indices, softmax_scale, None, topk_length, block_table, cu_seqlens, value_dim=latent
    )
    return torch.einsum("thc,hvc->thv", out, w_uv.to(wide.dtype)).to(q.dtype).contiguous(), lse


def visible_positions(cu_seqlens: Tensor, start_pos: Tensor, tokens: int, topk_indices: Tensor | None) -> Tensor:
    """The positions that each token may look at, -1 in columns that name none: [tokens, n]."""
    _, position = positions_of_tokens(cu_seqlens, start_pos, tokens)
    if topk_indices is None:
        # Not as many as the table has room for, whose rows would take gigabytes where few are written.
        longest = int(position.max()) + 1 if tokens else 0
        topk_indices = torch.arange(longest, device=position.device).expand(tokens, longest)
    return torch.where(topk_indices <= position[:, None], topk_indices, -1)


def per_head(
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
    """Keys and values of every head in q's dtype, weights too where they meet the values (prefill kernels)."""
    nope, latent = w_uk.shape[1:]
    dtype = widen(q.dtype)
    indices = visible_positions(cu_seqlens, start_pos, q.shape[0], topk_indices)
    sequence, _ = positions_of_tokens(cu_seqlens, start_pos, q.shape[0])
    slots = slots_of_columns(kv_cache, indices, topk_length, block_table, sequence)
    slots = torch.cat((slots, slots.new_full((slots.shape[0], 1), -1)), dim=1)  # a maximum needs one column
    rows, valid = read_entries(kv_cache, slots, dtype), slots >= 0
    k = torch.einsum("tjc,hnc->thjn", rows[..., :latent], w_uk.to(dtype)).to(q.dtype).to(dtype)
    v = torch.einsum("tjc,hvc->thjv", rows[..., :latent], w_uv.to(dtype)).to(q.dtype).to(dtype)
    logits = torch.einsum("thn,thjn->thj", q[..., :nope].to(dtype), k)
    logits = (logits + torch.einsum("thr,tjr->thj", q[..., nope:].to(dtype), rows[..., latent:])) * softmax_scale
    logits = logits.masked_fill(~valid[:, None, :], -torch.inf)
    largest, some = logits.amax(-1, keepdim=True), valid.any(-1)[:, None]
    weights = (logits - largest).exp()
    total = weights.sum(-1)
    out = torch.einsum("thj,thjv->thv", weights.to(q.dtype).to(dtype), v) / total[..., None]
    lse = torch.where(some, largest[..., 0] + total.log(), torch.inf)
    return torch.where(some[..., None], out, 0.0).to(q.dtype).contiguous(), lse


def rounded_between(
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
    """The absorbed query and the latent result in q's dtype, as a decoding kernel between two products has them."""
    nope, latent = w_uk.shape[1:]
    dtype = widen(q.dtype)
    q_latent = torch.einsum("thn,hnc->thc", q[..., :nope].to(dtype), w_uk.to(dtype)).to(q.dtype)
    rows = torch.cat((q_latent, q[..., nope:]), dim=-1)
    indices = visible_positions(cu_seqlens, start_pos, q.shape[0], topk_indices)
    out, lse = sparse_attn(
        rows, kv_cache, indices, softmax_scale, None, topk_length, block_table, cu_seqlens, value_dim=latent
    )
    return torch.einsum("thc,hvc->thv", out.to(dtype), w_uv.to(dtype)).to(q.dtype).contiguous(), lse


def merged_halves(
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
    """Each half of the entries by itself, merged by lse, as a decoding kernel that splits them does."""
    nope, latent = w_uk.shape[1:]
    upcast, up = q.to(widen(q.dtype)), w_uk.to(widen(q.dtype))
    rows = torch.cat((torch.einsum("thn,hnc->thc", upcast[..., :nope], up), upcast[..., nope:]), dim=-1)
    seen = visible_positions(cu_seqlens, start_pos, q.shape[0], topk_indices)
    out, lse = in_halves(
        rows, kv_cache, seen, softmax_scale, None, topk_length, block_table, cu_seqlens, value_dim=latent
    )
    return torch.einsum("thc,hvc->thv", out, w_uv.to(upcast.dtype)).to(q.dtype).contiguous(), lse


def fake(q: Tensor, w_uv: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    tokens, heads = q.shape[:2]
    return q.new_empty(tokens, heads, w_uv.shape[1]), q.new_empty(tokens, heads, dtype=widen(q.dtype))


def check(
    q: Tensor, kv_cache: Tensor, w_uk: Tensor, topk_indices: Tensor | None, topk_length: Tensor | None, **_: object
) -> None:
    check_cache("mla_attention", "kv_cache", kv_cache)
    rotary = q.shape[2] - w_uk.shape[1]
    if rotary < 0:
        raise ArgumentError(
            f"mla_attention: q must be at least as wide as w_uk's second axis, {w_uk.shape[1]}; got {q.shape[2]}."
        )
    if entry_dim(kv_cache) != w_uk.shape[2] + rotary:
        raise ArgumentError(
            f"mla_attention: an entry of kv_cache must have latent + rotary = {w_uk.shape[2] + rotary} elements; "
            f"got {entry_dim(kv_cache)}."
        )
    if topk_length is not None and topk_indices is None:
        raise ArgumentError("mla_attention: topk_length needs topk_indices; got None.")


def check_values(
    q: Tensor, kv_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, start_pos: Tensor, **_: object
) -> None:
    check_cu_seqlens("mla_attention", cu_seqlens, q.shape[0])
    check_start_pos("mla_attention", start_pos)
    check_block_table("mla_attention", "block_table", block_table, kv_cache)


def cost(
    q: Tensor,
    kv_cache: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    block_table: Tensor,
    start_pos: Tensor,
    absorbed: bool,
    topk_indices: Tensor | None,
    **_: object,
) -> Cost:
    tokens, heads = q.shape[:2]
    (nope, latent), values, dim = w_uk.shape[1:], w_uv.shape[1], entry_dim(kv_cache)
    pool = kv_cache.shape[0] * kv_cache.shape[1]
    # Positions are data: without lists, every token is taken to see what the tables can hold.
    columns = block_table.shape[1] * kv_cache.shape[1] if topk_indices is None else topk_indices.shape[1]
    entries = min(start_pos.shape[0] * columns if topk_indices is None else tokens * columns, pool)
    # What the weights meet: the queries and results of tokens where absorbed, else every entry once.
    products = tokens * columns * ((dim + latent) if absorbed else (q.shape[2] + values))
    products += (tokens if absorbed else entries) * latent * (nope + values)
    lists = 0 if topk_indices is None else topk_indices.nbytes
    return Cost(
        flops=2 * heads * products,
        bytes_read=q.nbytes + w_uk.nbytes + w_uv.nbytes + lists + entries * kv_cache.shape[2] * kv_cache.itemsize,
        bytes_written=tokens * heads * (values * q.itemsize + widen(q.dtype).itemsize),
        math="bfloat16" if q.itemsize == 2 else "float32",
    )


def samples(make: Make) -> Iterator[Sample]:
    def call(
        tokens: list[int], start: list[int], heads: int, widths: tuple[int, int, int, int], block_size: int
    ) -> dict[str, Any]:  # Any: arguments
        """A batch whose rows are NaN where no token may look: behind each sequence's end, and in a spare block."""
        nope, rotary, latent, values = widths
        seen = [range(first + count) for first, count in zip(start, tokens, strict=True)]
        kv_cache, block_table = pool_of_items(make, seen, block_size, latent + rotary)
        cu_seqlens, start_pos = make.batch(tokens, start)
        return {
            "q": make.normal(sum(tokens), heads, nope + rotary),
            "kv_cache": kv_cache,
            "w_uk": make.normal(heads, nope, latent, std=latent**-0.5),
            "w_uv": make.normal(heads, values, latent, std=latent**-0.5),
            "block_table": block_table,
            "cu_seqlens": cu_seqlens,
            "start_pos": start_pos,
            "softmax_scale": (nope + rotary) ** -0.5,
        }

    v3 = call([1, 2], [40, 9], 16, (128, 64, 512, 128), 16)
    yield Sample("v3_decode", "model", **v3)
    yield Sample("v3_prefill", "model", **v3 | {"absorbed": False})
    # Half of what is listed lies behind the token, and -1 stands among the rest; one row lists nothing.
    chosen = make.integers(-1, 80, 3, 24)
    chosen[2] = -1
    yield Sample(
        "v32_listed", "model", **v3 | {"topk_indices": chosen, "topk_length": make.tensor([24, 20, 24], torch.int32)}
    )
    yield Sample("656_bytes", **v3 | {"kv_cache": byte_pool(make, 656, v3["kv_cache"].shape[0], 16)})
    ragged = call([4, 0, 1, 6], [0, 5, 70, 3], 4, (16, 8, 32, 24), 7)
    yield Sample("ragged", **ragged)
    yield Sample("ragged_per_head", **ragged | {"absorbed": False})
    # Lists reach behind the token's position, behind the table, and name a position twice; one row lists nothing.
    lists = make.integers(-2, 90, 11, 20)
    lists[3] = -1
    listed = ragged | {"topk_indices": lists}
    yield Sample("listed", **listed)
    yield Sample("listed_per_head", **listed | {"absorbed": False})
    yield Sample("listed_lengths", **listed | {"topk_length": make.integers(0, 23, 11)})
    # The key behind each token's own outweighs all others: who sees one token more is far off.
    ahead = call([5], [4], 2, (16, 8, 16, 8), 16) | {"w_uk": make.tensor(torch.eye(16).expand(2, 16, 16).tolist())}
    ahead["kv_cache"][ahead["block_table"][0, 0], 5:9] = 4 * ahead["q"][:4, 0]
    yield Sample("next_key_dominates", **ahead)
    yield Sample("next_key_dominates_per_head", **ahead | {"absorbed": False})
    lost = call([2], [20], 2, (16, 8, 32, 8), 4)
    lost["block_table"][0, 2] = -1
    yield Sample("positions_without_a_block", **lost)
    yield Sample("one_token", **call([1], [0], 4, (16, 8, 32, 24), 4))
    # A weight transposed, or taken for the other one, has the right shape.
    yield Sample("square_weights", **call([2, 1], [5, 9], 2, (16, 8, 16, 16), 4))
    # All logits of a head lie near 209 or near -209: only their differences from the largest have finite exponentials.
    large = {name: ragged[name].clone() for name in ("q", "kv_cache")}
    large["q"][:, ::2, -1], large["q"][:, 1::2, -1], large["kv_cache"][..., -1] = 32.0, -32.0, 32.0
    yield Sample("large_logits", **ragged | large)
    yield Sample("no_rotary_part", **call([3], [5], 2, (16, 0, 32, 8), 4))
    yield Sample("no_tokens", **call([0, 0], [4, 0], 4, (16, 8, 32, 24), 4))
    yield Sample("no_sequences", **call([], [], 4, (16, 8, 32, 24), 4))


def errors(make: Make) -> Iterator[ErrorSample]:
    call: dict[str, Any] = {
        "q": make.normal(3, 2, 24),
        "kv_cache": make.normal(2, 4, 40),
        "w_uk": make.normal(2, 16, 32),
        "w_uv": make.normal(2, 8, 32),
        "block_table": make.tensor([[1, 0]], torch.int32),
        "cu_seqlens": make.batch([3])[0],
        "start_pos": make.tensor([2], torch.int32),
        "softmax_scale": 1.0,
    }
    illegal: dict[str, tuple[dict[str, Any], str]] = {
        "narrow_q": ({"q": make.normal(3, 2, 8)}, "q must be at least as wide as w_uk's second axis, 16; got 8."),
        "entry_width": (
            {"kv_cache": make.normal(2, 4, 41)},
            "an entry of kv_cache must have latent + rotary = 40 elements; got 41.",
        ),
        "no_such_format": (
            {"kv_cache": make.zeros(2, 4, 40, dtype=torch.uint8)},
            "a uint8 kv_cache has entries of 584, 656, 132 or 68 bytes; got 40.",
        ),
        "length_alone": ({"topk_length": make.integers(0, 3, 3)}, "topk_length needs topk_indices; got None."),
        "latent": ({"w_uv": make.normal(2, 8, 31)}, "latent is 32 in w_uk but 31 in w_uv."),
        "cu_seqlens": ({"cu_seqlens": make.batch([4])[0]}, "cu_seqlens must end at the number of tokens, 3; got 4."),
        "start_pos": ({"start_pos": call["start_pos"] - 3}, "start_pos must not be negative; got -1."),
        "block": ({"block_table": call["block_table"] + 1}, "block_table must be below blocks = 2; got 2."),
    }
    for name, (change, says) in illegal.items():
        yield ErrorSample(name, says=f"mla_attention: {says}", **call | change)


def relations(make: Make) -> Iterator[Relation]:
    calls = {sample.name: sample.arguments for sample in samples(make)}
    ragged = Ragged(tokens=("q", "topk_indices", "topk_length"), sequences=("block_table",))
    call = calls["ragged"]
    for name in ("listed_lengths", "ragged_per_head"):
        steps = [[2, 0, 0, 1], [0, 0, 1, 2], [2, 0, 0, 3]]
        yield in_steps(f"chunks_are_prefill_{name}", calls[name], steps, ragged)
    yield sequences_apart("sequences_apart", call, ragged)
    order = make.permutation(call["kv_cache"].shape[0])
    yield pages_renumbered("pages_renumbered", call, order, "kv_cache", "block_table")
    yield reordered("heads_reordered", call, make.permutation(4), {"q": 1, "w_uk": 0, "w_uv": 0}, {0: 1, 1: 1})
    yield same("absorbed_or_not", call, {"absorbed": False})
    yield scaled("values_times_8", call, {"w_uv": 3}, [3, 0])
    if make.dtype != torch.float16:  # where scaling is not exact, and gold of a model's shape takes long
        yield scaled("v3_values_times_8", calls["v3_decode"], {"w_uv": 3}, [3, 0])


mla_attention = Operator(
    name="mla_attention",
    shapes="q[tokens heads _] kv_cache[blocks block_size _] w_uk[heads nope latent] w_uv[heads value_dim latent] "
    "block_table[sequences max_blocks] cu_seqlens[sequences+1] start_pos[sequences] topk_indices?[tokens k] "
    "topk_length?[tokens] -> out[tokens heads value_dim] lse[tokens heads]",
    dtypes={
        "q": FLOAT,
        "kv_cache": FLOAT + PACKED,
        "w_uk": FLOAT,
        "w_uv": FLOAT,
        "block_table": INT32,
        "cu_seqlens": INT32,
        "start_pos": INT32,
        "topk_indices": INTEGER,
        "topk_length": INTEGER,
    },
    reference=reference,
    variants=(per_head, rounded_between, merged_halves),
    fake=fake,
    check=check,
    check_values=check_values,
    cost=cost,
    samples=samples,
    errors=errors,
    relations=relations,
)
