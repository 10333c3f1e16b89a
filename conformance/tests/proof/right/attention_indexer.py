"""Right kernels of the lightning indexer."""

import math

import torch
from right.attention import positions
from right.attention_caches import DTYPES, E2M1, E4M3, pool_values, slots_in_table
from variation import right

RIGHT = []


def query_values(q, q_scale):
    """q as values in float64, [T, h, d]."""
    if q.dtype == torch.uint8:
        pairs = torch.stack((E2M1[(q & 15).long()], E2M1[(q >> 4).long()]), -1)
        return pairs.flatten(-2) * q_scale.double().repeat_interleave(32, -1)
    if q.dtype == torch.float8_e4m3fn:
        return E4M3[q.view(torch.uint8).long()] * q_scale.double()[..., None]
    return q.double()


def seen_keys(k_cache, block_table, cu_seqlens, start_pos, tokens, ratio, max_entries):
    """(keys [T, n, d] float64, seen [T, n])."""
    sequence, position = positions(cu_seqlens, start_pos, tokens)
    entry = torch.arange(max_entries).expand(tokens, max_entries)
    seen = (entry + 1) * ratio <= position[:, None] + 1
    slots = torch.where(seen, slots_in_table(k_cache, block_table, sequence, entry), -1)
    values = torch.cat((pool_values(k_cache), torch.zeros(1, pool_values(k_cache[:0]).shape[1], dtype=torch.float64)))
    return values[slots], seen


def score_in_float64(q, weights, keys, scale):
    return ((q @ keys.mT).clamp(min=0) * weights.double()[..., None]).sum(1) * scale


def score_head_after_head(q, weights, keys, scale):
    """float32, heads from the last, the scale in the weight, eight channels at a time."""
    q, keys, factor = q.float(), keys.float(), weights.float() * scale
    total = torch.zeros(q.shape[0], keys.shape[1])
    for head in reversed(range(q.shape[1])):
        dot = torch.zeros_like(total)
        for c in range(0, q.shape[2], 8):
            dot = dot + (q[:, head, None, c : c + 8] * keys[..., c : c + 8]).sum(-1)
        total = total + torch.relu(dot) * factor[:, head, None]
    return total


def score_in_blocks(q, weights, keys, scale):
    """float32, the weight's size within the product, its sign behind the rectifier; split over eight parts of heads."""
    q, keys = q.float() * weights.float().abs()[..., None], keys.float()
    parts = []
    for part, sign in zip(q.tensor_split(8, 1), weights.float().sign().tensor_split(8, 1), strict=True):
        parts.append(((part @ keys.mT).relu() * sign[..., None]).sum(1))
    return torch.stack(parts).sum(0) * scale


def scorer(how):
    """An indexer_score that computes by `how`."""

    def run(
        q, weights, k_cache, block_table, cu_seqlens, start_pos, ratio, max_entries, softmax_scale, q_scale, out_dtype,
        **_,
    ):  # fmt: skip
        keys, seen = seen_keys(k_cache, block_table, cu_seqlens, start_pos, q.shape[0], ratio, max_entries)
        scores = how(query_values(q, q_scale), weights, keys, softmax_scale)
        return torch.where(seen, scores, -math.inf).to(DTYPES[out_dtype])

    return run


def competitors(row, length, candidates, candidate_block):
    """The entries of a row that compete, ascending."""
    listed = None if candidates is None else {c for c in candidates.tolist() if c >= 0}
    seen = range(min(max(length, 0), len(row)))
    return [e for e in seen if listed is None or e // candidate_block in listed]


def chosen_by_sorting(row, entries, k):
    """Best first; a NaN counts as the least."""
    values = row.double().nan_to_num(-math.inf, math.inf, -math.inf).tolist()
    return sorted(entries, key=lambda e: (-values[e], e))[:k]


def chosen_ascending(row, entries, k):
    """In the order of entries."""
    return sorted(chosen_by_sorting(row, entries, k))


def chosen_by_threshold(row, entries, k):
    """All above the k-th value, then its equals from the lowest; the equals first."""
    if len(entries) <= k:
        return list(entries)
    values = row.double().nan_to_num(-math.inf, math.inf, -math.inf)[entries]
    limit = values.sort(descending=True).values[k - 1]
    above = [e for e, v in zip(entries, values.tolist(), strict=True) if v > limit]
    equal = [e for e, v in zip(entries, values.tolist(), strict=True) if v == limit]
    return equal[: k - len(above)] + above


def selected(scores, lengths, k, candidates, candidate_block, how):
    """(indices, topk_length) by `how`."""
    indices = torch.full((scores.shape[0], k), -1, dtype=torch.int32)
    counts = torch.zeros(scores.shape[0], dtype=torch.int32)
    for t in range(scores.shape[0]):
        mine = None if candidates is None else candidates[t]
        chosen = how(scores[t], competitors(scores[t], int(lengths[t]), mine, candidate_block), k)
        indices[t, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
        counts[t] = len(chosen)
    return indices, counts


def ranker(how):
    """An indexer_topk that chooses by `how`."""

    def run(scores, lengths, k, candidates, candidate_block):
        return selected(scores, lengths, k, candidates, candidate_block, how)

    return run


def indexer(score, how):
    """A lightning_indexer that scores by `score` and chooses by `how`."""

    def run(k, candidates, candidate_block, **given):
        scores = scorer(score)(**given)
        _, position = positions(given["cu_seqlens"], given["start_pos"], len(scores))
        lengths = torch.div(position + 1, given["ratio"], rounding_mode="floor")
        return selected(scores, lengths, k, candidates, candidate_block, how)

    return run


SCORES = (score_in_float64, score_head_after_head, score_in_blocks)
CHOICES = (chosen_by_sorting, chosen_ascending, chosen_by_threshold)
for score, choice in zip(SCORES, CHOICES, strict=True):
    for operator, made in (
        ("indexer_score", scorer(score)),
        ("indexer_topk", ranker(choice)),
        ("lightning_indexer", indexer(score, choice)),
    ):
        made.__name__ = {"indexer_topk": choice, "indexer_score": score}.get(operator, score).__name__
        right(RIGHT, operator)(made)
