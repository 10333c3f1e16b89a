"""Right kernels of kv_compress and grouped_output_proj."""

import torch
from right.attention_caches import E2M1
from variation import right

RIGHT = []


def product(x, weight, step, dtype):
    """x @ weight.T, `step` features at a time from the last."""
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=dtype)
    for c in reversed(range(0, x.shape[1], step)):
        total = total + x[:, c : c + step].to(dtype) @ weight[:, c : c + step].to(dtype).T
    return total


def rotated(row, at, cos_table, sin_table):
    """A row whose last channels are turned, pair by pair."""
    pairs = cos_table.shape[1]
    if not pairs:
        return row
    cos, sin = cos_table[at].to(row.dtype), sin_table[at].to(row.dtype)
    a, b = row[-2 * pairs :: 2], row[1 - 2 * pairs :: 2] if pairs else row[:0]
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), 1).flatten()
    return torch.cat((row[: -2 * pairs], turned))


def transformed(row):
    """The Hadamard transform by butterflies."""
    size, width = len(row), 1
    while width < size:
        row = row.reshape(-1, 2, width)
        row = torch.stack((row[:, 0] + row[:, 1], row[:, 0] - row[:, 1]), 1).flatten()
        width *= 2
    return row * size**-0.5


def pooled(values, logits, way):
    """Softmax of each channel over the tokens, by `way`."""
    if way == "online":
        most, total, out = logits[0], torch.ones_like(logits[0]), values[0]
        for value, logit in zip(values[1:], logits[1:], strict=True):
            peak = torch.maximum(most, logit)
            fade, weight = (most - peak).exp(), (logit - peak).exp()
            total, out, most = total * fade + weight, out * fade + weight * value, peak
        return out / total
    weights = ((logits - logits.amax(0)) * 1.4426950408889634).exp2() if way == "exp2" else logits.softmax(0)
    return (weights * values).flip(0).sum(0) / weights.flip(0).sum(0)


def compressor(dtype, way, step, rounds):
    """A kv_compress in `dtype`; `rounds` says whether every step rounds to x's dtype, or the last alone."""

    def run(
        x, wkv, wgate, norm_weight, cos_table, sin_table, state_cache, state_block_table, cu_seqlens, start_pos,
        ratio, ape, overlap, rotate, eps,
    ):  # fmt: skip
        dim, block_size, before = len(norm_weight), state_cache.shape[1], state_cache.clone()
        wide = torch.float64 if x.dtype == torch.float64 else dtype
        u, z = product(x, wkv, step, wide), product(x, wgate, step, wide)
        entries, counts = [], [0]

        def row_of(sequence, p, start, first):
            """(u, z) of a position: of this call, or from the state as it was."""
            if p >= start:
                return u[first + p - start], shifted[first + p - start]
            block = state_block_table[sequence, p // block_size]
            return before[block, p % block_size].to(wide).chunk(2)

        def at(rounded):
            return rounded.to(x.dtype).to(wide) if rounds else rounded

        bounds, shifted = cu_seqlens.tolist(), z.clone()
        for sequence, start in enumerate(start_pos.tolist()):
            for t in range(bounds[sequence], bounds[sequence + 1]):
                if ape is not None:
                    shifted[t] += ape[(start + t - bounds[sequence]) % ratio].to(wide)
        for sequence, start in enumerate(start_pos.tolist()):
            first, end = bounds[sequence], start + bounds[sequence + 1] - bounds[sequence]
            for w in range(start // ratio, end // ratio):
                rows = [row_of(sequence, p, start, first) for p in range(w * ratio, (w + 1) * ratio)]
                values, logits = ([row[i][-dim:] for row in rows] for i in (0, 1))
                if overlap and w:
                    old = [row_of(sequence, p, start, first) for p in range((w - 1) * ratio, w * ratio)]
                    values, logits = ([row[i][:dim] for row in old] + now for i, now in ((0, values), (1, logits)))
                entry = at(pooled(torch.stack(values), torch.stack(logits), way))
                entry = at(entry * (entry.square().mean() + eps).rsqrt() * norm_weight.to(wide))
                entry = at(rotated(entry, w * ratio, cos_table, sin_table))
                entries.append((transformed(entry) if rotate else entry).to(x.dtype))
            counts.append(len(entries))
        for sequence, start in enumerate(start_pos.tolist()):
            for t in range(bounds[sequence], bounds[sequence + 1]):
                p = start + t - bounds[sequence]
                block = (
                    int(state_block_table[sequence, p // block_size])
                    if p // block_size < state_block_table.shape[1]
                    else -1
                )
                if block >= 0:
                    state_cache[block, p % block_size] = torch.cat((u[t], shifted[t])).to(state_cache.dtype)
        out = torch.full((min(len(x), len(x) // ratio + len(start_pos)), dim), 7.0, dtype=x.dtype)
        for row, entry in enumerate(entries):
            out[row] = entry
        return out, torch.tensor(counts, dtype=torch.int32)

    return run


for name, made in {
    "in_float64": compressor(torch.float64, "softmax", 10**6, False),
    "online_rounded_at_every_step": compressor(torch.float32, "online", 64, True),
    "powers_of_two_rounded_once": compressor(torch.float32, "exp2", 16, False),
}.items():
    made.__name__ = name
    right(RIGHT, "kv_compress")(made)


def weight_values(weight, scale, block_n, block_k):
    """A weight [N, K] of any kind in float64."""
    if weight.dtype == torch.uint8:
        codes = torch.stack((E2M1[(weight & 15).long()], E2M1[(weight >> 4).long()]), -1).flatten(-2)
        block_n, block_k = 1, 32
    else:
        codes = weight.double()
        block_n, block_k = (1, weight.shape[1]) if weight.dtype == torch.int8 else (block_n, block_k)
    if scale is None:
        return codes
    factor = scale.to(torch.float32).double()
    rows, columns = torch.arange(codes.shape[0]) // block_n, torch.arange(codes.shape[1]) // block_k
    return codes * factor[rows][:, columns]


def quantised(x, kind, act_group, scale_format):
    """Activations [T, K] as the values that their codes mean, in float64."""
    if kind == "none":
        return x.double()
    wide = x.float()
    if kind == "int8":
        scale = torch.nn.functional.pad(wide.abs(), (0, 1)).amax(1, keepdim=True).clamp(min=1e-10) / 127
        return (wide / scale).round().clamp(-127, 127).double() * scale.double()
    parts = []
    for part in wide.split(act_group, 1):
        scale = part.abs().amax(1, keepdim=True).clamp(min=1e-4) / 448
        if scale_format == "ue8m0":
            mantissa, exponent = torch.frexp(scale)
            scale = torch.exp2((exponent - (mantissa == 0.5).int()).double()).float()
        parts.append((part / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double())
    return torch.cat(parts, 1) if parts else x.double()


def kind_of(act_quant, weight):
    """What "auto" means for a weight."""
    kinds = {torch.float8_e4m3fn: "fp8", torch.uint8: "fp8", torch.int8: "int8"}
    return kinds.get(weight.dtype, "none") if act_quant == "auto" else act_quant


def projection(dtype, step, between):
    """A grouped_output_proj in `dtype`, `step` columns at a time; u is rounded to x's dtype where `between`."""

    def run(
        x, wo_a, wo_b, wo_a_scale, wo_b_scale, act_quant_a, act_quant_b, act_group, scale_format, block_n, block_k
    ):  # fmt: skip
        groups, heads = wo_a.shape[0], x.shape[1]
        steps = []
        for a in range(groups):
            mine = x[:, a * heads // groups : (a + 1) * heads // groups].flatten(1)
            values = quantised(mine, kind_of(act_quant_a, wo_a), act_group, scale_format)
            weight = weight_values(wo_a[a], None if wo_a_scale is None else wo_a_scale[a], block_n, block_k)
            steps.append(product(values, weight, step, dtype))
        u = torch.cat(steps, 1)
        u = u.to(x.dtype) if between else u
        values = quantised(u, kind_of(act_quant_b, wo_b), act_group, scale_format)
        return product(values, weight_values(wo_b, wo_b_scale, block_n, block_k), step, dtype).to(x.dtype)

    return run


for name, made in {
    "in_float64": projection(torch.float64, 10**6, True),
    "blocks_of_16_from_the_last": projection(torch.float32, 16, True),
    "wide_between_in_blocks_of_64": projection(torch.float32, 64, False),
    "column_after_column": projection(torch.float32, 1, True),
}.items():
    made.__name__ = name
    right(RIGHT, "grouped_output_proj")(made)
