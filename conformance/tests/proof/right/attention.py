"""Right kernels of attention, on lists that they make themselves."""

import math

import torch
from right.attention_caches import pool_values, slots_in_table
from variation import right

RIGHT = []
INF = math.inf


def sequences(cu_seqlens, tokens):
    """The sequence of each token, [T]."""
    counts = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    return torch.repeat_interleave(torch.arange(len(counts)), counts, output_size=tokens)


def positions(cu_seqlens, start_pos, tokens):
    """(sequence, position) of each token."""
    sequence = sequences(cu_seqlens, tokens)
    places = [s + i for s, n in zip(start_pos.tolist(), cu_seqlens.diff().tolist(), strict=True) for i in range(n)]
    return sequence, torch.tensor(places, dtype=torch.int64)


def columns(cache, indices, length, table, sequence):
    """Slots [T, n], -1 where a column is invalid."""
    if table is not None:
        slots = slots_in_table(cache, table, sequence, indices)
    else:
        slots = torch.where(indices < cache.shape[0] * cache.shape[1], indices, -1).long()
    slots = slots.clamp(min=-1)
    if length is not None:
        for row, count in enumerate(length.tolist()):
            slots[row, max(count, 0) :] = -1
    return slots


def gathered(pools):
    """[T, n, d] float64 with zeros where invalid, and what is valid, of (cache, slots) pairs."""
    parts = []
    for cache, slots in pools:
        values = pool_values(cache)
        some = values[slots.clamp(min=0)] if len(values) else values.new_zeros(*slots.shape, values.shape[1])
        parts.append((torch.where((slots >= 0)[..., None], some, 0.0), slots >= 0))
    return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)


def pools_of(kv_cache, indices, topk_length, block_table, cu_seqlens, extra, tokens):
    """(cache, slots) of one pool, or of two."""
    sequence = None if cu_seqlens is None else sequences(cu_seqlens, tokens)
    pools = [(kv_cache, columns(kv_cache, indices, topk_length, block_table, sequence))]
    if extra[0] is not None:
        cache, listed, length, table = extra
        pools.append((cache, columns(cache, listed, length, table, sequence)))
    return pools


def dots(q, kv, step):
    """[T, h, n]: products added `step` channels at a time."""
    total = 0
    for c in range(0, q.shape[-1], step):
        total = total + q[..., c : c + step] @ kv[..., c : c + step].mT
    return total


def finished(q, out, lse, sink, value_dim):
    """The operator's results from those without a sink; lse -inf marks rows that see nothing."""
    empty = lse == -INF
    if sink is not None:
        out = out * (1 / (1 + (sink.to(lse.dtype) - lse).exp()))[..., None]
    out = torch.where(empty[..., None], 0.0, out)[..., : value_dim or out.shape[-1]]
    kept = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out.to(q.dtype).contiguous(), torch.where(empty, INF, lse).to(kept)


def whole(q, kv, valid, scale):
    """(out, lse) without a sink, in the dtype of kv."""
    logits = torch.where(valid[:, None], (q.to(kv.dtype) @ kv.mT) * scale, -INF)
    lse = torch.logsumexp(torch.nn.functional.pad(logits, (0, 1), value=-INF), -1)
    weights = torch.where(valid[:, None], (logits - lse[..., None]).exp(), 0.0)
    return weights @ kv, lse


def online(q, kv, valid, scale, step=1, backwards=False):
    """(out, lse) without a sink by a running maximum over `step` columns at a time, in float32."""
    q, kv = q.float(), kv.float()
    most = torch.full(q.shape[:2], -INF)
    total, out = torch.zeros(q.shape[:2]), torch.zeros(q.shape[:2] + kv.shape[2:])
    starts = list(range(0, kv.shape[1], step))
    for j in starts[::-1] if backwards else starts:
        part, legal = kv[:, j : j + step], valid[:, None, j : j + step]
        logits = torch.where(legal, dots(q, part, 64) * scale, -INF)
        peak = torch.maximum(most, logits.amax(-1))
        base = torch.where(peak == -INF, 0.0, peak)
        fade, weights = (most - base).exp(), (logits - base[..., None]).exp()
        total, out = total * fade + weights.sum(-1), out * fade[..., None] + weights @ part
        most = peak
    safe = torch.where(total == 0, 1.0, total)
    return out / safe[..., None], torch.where(total == 0, -INF, most + safe.log())


def two_passes(q, kv, valid, scale, step=16):
    """(out, lse) in powers of two, the scale in q, weights in q's dtype, blocks from the last."""
    folded, kv32 = q.float() * (scale * math.log2(math.e)), kv.float()
    logits = torch.where(valid[:, None], dots(folded, kv32, 32), -INF)
    most = torch.nn.functional.pad(logits, (0, 1), value=-INF).amax(-1)
    weights = (logits - torch.where(most == -INF, 0.0, most)[..., None]).exp2()
    total, out = torch.zeros(q.shape[:2]), torch.zeros(q.shape[:2] + kv.shape[2:])
    for j in reversed(range(0, kv.shape[1], step)):
        total = total + weights[..., j : j + step].sum(-1)
        out = out + weights[..., j : j + step].to(q.dtype).float() @ kv32[:, j : j + step]
    safe = torch.where(total == 0, 1.0, total)
    return out / safe[..., None], torch.where(total == 0, -INF, (most + safe.log2()) * math.log(2))


def merged(parts):
    """(out, lse) of partial ones."""
    lse = torch.logsumexp(torch.stack([part[1] for part in parts]), 0)
    shares = [torch.where(part[1] == -INF, 0.0, (part[1] - lse).exp()) for part in parts]
    return sum(part[0] * share[..., None] for part, share in zip(parts, shares, strict=True)), lse


def in_splits(q, kv, valid, scale):
    """(out, lse) by eight splits of the columns, added from the last."""
    splits = zip(kv.float().tensor_split(8, 1), valid.tensor_split(8, 1), strict=True)
    return merged([whole(q, *split, scale) for split in splits][::-1])


def sparse(how):
    """A sparse_attn that computes by `how`."""

    def run(
        q, kv_cache, indices, softmax_scale, sink, topk_length, block_table, cu_seqlens,
        extra_kv_cache, extra_indices, extra_topk_length, extra_block_table, value_dim,
    ):  # fmt: skip
        extra = (extra_kv_cache, extra_indices, extra_topk_length, extra_block_table)
        pools = pools_of(kv_cache, indices, topk_length, block_table, cu_seqlens, extra, q.shape[0])
        return finished(q, *how(q, *gathered(pools), softmax_scale), sink, value_dim)

    return run


def lists_of_layer(q, cu_seqlens, start_pos, window, ratio, room, topk_indices):
    """The window's positions and the entries that each token sees, made token by token."""
    near, far = [], []
    for t, p in enumerate(positions(cu_seqlens, start_pos, q.shape[0])[1].tolist()):
        near.append([p - j if p >= j else -1 for j in range(window)])
        seen = (p + 1) // ratio if ratio else 0
        listed = range(room) if topk_indices is None else topk_indices[t].tolist()
        far.append([e if e < seen else -1 for e in listed])
    width = room if topk_indices is None else topk_indices.shape[1]
    return (torch.tensor(rows, dtype=torch.int64).reshape(q.shape[0], n) for rows, n in ((near, window), (far, width)))


def hybrid(how):
    """A hybrid_attention that computes by `how`."""

    def run(
        q, window_cache, window_block_table, cu_seqlens, start_pos, window, softmax_scale, sink, ratio,
        compressed_cache, compressed_block_table, topk_indices, topk_length,
    ):  # fmt: skip
        room = 0 if compressed_cache is None else compressed_block_table.shape[1] * compressed_cache.shape[1]
        near, far = lists_of_layer(q, cu_seqlens, start_pos, window, ratio, room, topk_indices)
        extra = (compressed_cache, far, topk_length, compressed_block_table)
        pools = pools_of(window_cache, near, None, window_block_table, cu_seqlens, extra, q.shape[0])
        return finished(q, *how(q, *gathered(pools), softmax_scale), sink, 0)

    return run


def mla(how, materialised):
    """An mla_attention that computes by `how`, with keys and values of every head where `materialised`."""

    def run(
        q, kv_cache, w_uk, w_uv, block_table, cu_seqlens, start_pos, softmax_scale, absorbed, topk_indices, topk_length
    ):  # fmt: skip
        sequence, position = positions(cu_seqlens, start_pos, q.shape[0])
        listed = topk_indices
        if listed is None:
            listed = torch.arange(int(position.max()) + 1 if len(position) else 0).expand(q.shape[0], -1)
        listed = torch.where(listed > position[:, None], -1, listed)
        kv, valid = gathered([(kv_cache, columns(kv_cache, listed, topk_length, block_table, sequence))])
        nope, latent = w_uk.shape[1:]
        wide, up, down = q.to(kv.dtype), w_uk.to(kv.dtype), w_uv.to(kv.dtype)
        if not materialised:
            inner = torch.stack([wide[:, i, :nope] @ up[i] for i in range(q.shape[1])], 1) if q.shape[1] else wide
            out, lse = how(torch.cat((inner, wide[..., nope:]), -1), kv, valid, softmax_scale)
            return finished(q, torch.einsum("thc,hvc->thv", out[..., :latent].to(kv.dtype), down), lse, None, 0)
        outs, lses = [], []
        for i in range(q.shape[1]):
            k = torch.cat((kv[..., :latent] @ up[i].mT, kv[..., latent:]), -1)
            width = k.shape[-1]
            both = torch.cat((k, kv[..., :latent] @ down[i].mT), -1)
            padded = torch.nn.functional.pad(wide[:, i : i + 1], (0, both.shape[-1] - width))
            out, lse = how(padded, both, valid, softmax_scale)
            outs.append(out[..., width:]), lses.append(lse)
        return finished(q, torch.cat(outs, 1), torch.cat(lses, 1), None, 0)

    return run


HOW = {
    "in_float64": whole,
    "in_float32": lambda q, kv, valid, scale: whole(q, kv.float(), valid, scale),
    "column_after_column": online,
    "blocks_of_64_from_the_last": lambda *given: online(*given, step=64, backwards=True),
    "powers_of_two_in_two_passes": two_passes,
    "eight_splits": in_splits,
}

for name, how in HOW.items():
    for operator, made in (("sparse_attn", sparse(how)), ("hybrid_attention", hybrid(how))):
        made.__name__ = name
        right(RIGHT, operator)(made)
for name in ("in_float64", "blocks_of_64_from_the_last", "eight_splits"):
    for materialised in (False, True):
        made = mla(HOW[name], materialised)
        made.__name__ = f"{name}_{'of_every_head' if materialised else 'absorbed'}"
        right(RIGHT, "mla_attention")(made)
