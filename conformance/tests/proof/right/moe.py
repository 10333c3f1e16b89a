"""Right routers, dispatches, products and layers, computed otherwise than the references do."""

import torch
from torch import Tensor
from variation import right

RIGHT = []

LOG2_E = 1.4426950408889634


def exp_by_exp2(x: Tensor) -> Tensor:
    return torch.exp2(x * LOG2_E)


def scored(logits: Tensor, score: str, exp) -> Tensor:
    """Scores from one exponential, of what is not positive."""
    if score == "softmax":
        parts = exp(logits - logits.max(1, keepdim=True).values)
        total = parts[:, :1] * 0
        for column in parts.split(1, 1):
            total = total + column
        return parts / total
    small = exp(-logits.abs())
    if score == "sigmoid":
        return torch.where(logits >= 0, 1 / (1 + small), small / (1 + small))
    return torch.where(logits > 20, logits, logits.clamp(min=0) + torch.log1p(small)).sqrt()


def best(choice: list[float], k: int) -> list[int]:
    """By k scans for the largest, the first of equals."""
    taken: list[int] = []
    for _ in range(k):
        left = [e for e in range(len(choice)) if e not in taken]
        top = left[0]
        for e in left[1:]:
            top = e if choice[e] > choice[top] else top
        taken.append(top)
    return taken


def routed(logits, k, bias, score, groups, topk_groups, renormalize, routed_scale, mask, exp, reverse):
    """One token after the other."""
    scores = scored(logits, score, exp)
    choice = scores if bias is None else scores + bias
    idx, weights = torch.full((len(logits), k), -1, dtype=torch.int32), torch.zeros(len(logits), k)
    size = logits.shape[1] // groups
    for t, row in enumerate(choice.tolist()):
        if mask is not None and not mask[t]:
            continue
        parts = [sorted(row[g * size : (g + 1) * size], reverse=True) for g in range(groups)]
        tops = [torch.tensor(part[: 1 if bias is None else 2]).sum().item() for part in parts]
        kept = best(tops, topk_groups)
        chosen = best([c if e // size in kept else float("-inf") for e, c in enumerate(row)], k)
        idx[t] = torch.tensor(chosen)
        weights[t] = scores[t, chosen]
        if renormalize:
            total = torch.tensor(1e-20)
            for slot in reversed(range(k)) if reverse else range(k):
                total = total + weights[t, slot]
            weights[t] = weights[t] / total
    return idx, weights * routed_scale


@right(RIGHT, "moe_gate")
def token_by_token(logits, k, bias, score, groups, topk_groups, renormalize, routed_scale, mask):
    return routed(logits, k, bias, score, groups, topk_groups, renormalize, routed_scale, mask, torch.exp, False)


@right(RIGHT, "moe_gate")
def exponentials_of_base_2(logits, k, bias, score, groups, topk_groups, renormalize, routed_scale, mask):
    return routed(logits, k, bias, score, groups, topk_groups, renormalize, routed_scale, mask, exp_by_exp2, True)


@right(RIGHT, "moe_gate")
def in_float64_rounded_once(logits, k, bias, score, groups, topk_groups, renormalize, routed_scale, mask):
    wide = None if bias is None else bias.double()
    exp = torch.exp
    idx, weights = routed(logits.double(), k, wide, score, groups, topk_groups, False, 1.0, mask, exp, False)
    live = (idx >= 0).all(1)
    scores = scored(logits.double(), score, exp)
    weights = scores.gather(1, idx.clamp(min=0).long()) * live[:, None].double()
    weights = weights.masked_fill(~live[:, None], 0)
    if renormalize:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return idx, (weights * routed_scale).float()


def looked_up(logits, token_ids, table, score, renormalize, routed_scale, mask, exp, inverse):
    idx = torch.stack([table[int(i)] for i in token_ids]).int() if len(token_ids) else table[:0].int()
    weights = scored(logits, score, exp).gather(1, idx.long())
    if renormalize:
        total = weights.flip(1).cumsum(1)[:, -1:] + 1e-20
        weights = weights * (routed_scale / total) if inverse else weights / total * routed_scale
    else:
        weights = weights * routed_scale
    if mask is not None:
        off = ~mask[:, None].expand(idx.shape)
        idx, weights = torch.where(off, -1, idx), torch.where(off, 0.0, weights)
    return idx.contiguous(), weights


@right(RIGHT, "moe_hash_gate")
def row_by_row(logits, token_ids, table, score, renormalize, routed_scale, mask):
    return looked_up(logits, token_ids, table, score, renormalize, routed_scale, mask, torch.exp, False)


@right(RIGHT, "moe_hash_gate")
def scale_over_the_sum(logits, token_ids, table, score, renormalize, routed_scale, mask):
    return looked_up(logits, token_ids, table, score, renormalize, routed_scale, mask, exp_by_exp2, True)


def dispatched(x, topk_idx, experts, alignment, x_scale, padding):
    """By counting, as a kernel does; what is specified by nobody holds `padding`."""
    tokens, k = topk_idx.shape
    pairs = topk_idx.flatten().tolist()
    total = (len(pairs) + min(experts, len(pairs)) * (alignment - 1)) // alignment * alignment
    counts = [0] * experts
    for expert in pairs:
        if expert >= 0:
            counts[expert] += 1
    starts, at = [], 0
    for count in counts:
        starts.append(at)
        at += -(-count // alignment) * alignment
    next_row = list(starts)
    to_pair, to_pos, to_expert = [-1] * total, [-1] * len(pairs), [-1] * total
    for pair, expert in enumerate(pairs):
        if expert >= 0:
            row = next_row[expert]
            to_pair[row], to_pos[pair], to_expert[row] = pair, row, expert
            next_row[expert] += 1
    source = torch.tensor([max(pair, 0) // k for pair in to_pair], dtype=torch.long)
    live = torch.tensor([pair >= 0 for pair in to_pair], dtype=torch.bool)

    def carried(values):
        if values.numel() == 0:
            return values.new_empty((total, values.shape[1]))
        raw = values.contiguous().view(torch.uint8).view(tokens, -1)
        rows = torch.full((total, raw.shape[1]), padding, dtype=torch.uint8)
        rows[live] = raw[source[live]]
        return rows.view(values.dtype)

    ints = (counts, [s + c for s, c in zip(starts, counts, strict=True)], to_pair, to_pos, to_expert)
    counts, offsets, to_pair, to_pos, to_expert = (torch.tensor(each, dtype=torch.int32) for each in ints)
    row_scale = x.new_empty(0) if x_scale is None else carried(x_scale)
    return carried(x), row_scale, counts, offsets, to_pair, to_pos.view(tokens, k), to_expert


@right(RIGHT, "moe_permute")
def padding_of_nan(x, topk_idx, experts, alignment, x_scale):
    return dispatched(x, topk_idx, experts, alignment, x_scale, 0xFF)


@right(RIGHT, "moe_permute")
def padding_of_garbage(x, topk_idx, experts, alignment, x_scale):
    return dispatched(x, topk_idx, experts, alignment, x_scale, 0x5A)


def combined(rows, pair_to_pos, topk_weights, residual, order, dtype=torch.float32):
    """Slot by slot, in any order; the residual first or last."""
    y = torch.zeros(len(pair_to_pos), rows.shape[1], dtype=dtype)
    for slot in order(pair_to_pos.shape[1]):
        if slot is None:
            y = y if residual is None else y + residual.to(dtype)
            continue
        live = pair_to_pos[:, slot] >= 0
        term = rows[pair_to_pos[live, slot].long()].to(dtype)
        y[live] += term if topk_weights is None else term * topk_weights[live, slot, None].to(dtype)
    return y.to(rows.dtype)


@right(RIGHT, "moe_unpermute")
def residual_in_the_middle(rows, pair_to_pos, topk_weights, residual):
    return combined(rows, pair_to_pos, topk_weights, residual, lambda k: [*range(1, k), None, 0])


@right(RIGHT, "moe_unpermute")
def last_slot_first(rows, pair_to_pos, topk_weights, residual):
    return combined(rows, pair_to_pos, topk_weights, residual, lambda k: [*reversed(range(k)), None])


@right(RIGHT, "moe_unpermute")
def added_up_in_float64(rows, pair_to_pos, topk_weights, residual):
    return combined(rows, pair_to_pos, topk_weights, residual, lambda k: [None, *range(k)], torch.float64)


@right(RIGHT, "moe_unpermute")
def halves_of_the_slots_apart(rows, pair_to_pos, topk_weights, residual):
    """Two partial sums in float32, then one rounding."""
    half = pair_to_pos.shape[1] // 2
    sums = []
    for part in (slice(0, half), slice(half, None)):
        weights = None if topk_weights is None else topk_weights[:, part]
        sums.append(combined(rows.float(), pair_to_pos[:, part], weights, None, range))
    y = sums[0] + sums[1]
    return (y if residual is None else residual.float() + y).to(rows.dtype)


def gated(x, limit, row_weight, silu, dtype=torch.float32):
    inner = x.shape[-1] // 2
    gate, up = x[..., :inner].to(dtype), x[..., inner:].to(dtype)
    if limit:
        gate, up = torch.where(gate > limit, limit, gate), torch.where(up > limit, limit, up)
        up = torch.where(up < -limit, -limit, up)
    y = silu(gate, up)
    return (y if row_weight is None else row_weight[..., None].to(dtype) * y).to(x.dtype)


@right(RIGHT, "swiglu")
def sigmoid_of_the_magnitude(x, limit, row_weight):
    def silu(gate, up):
        small = torch.exp(-gate.abs())
        return gate * torch.where(gate >= 0, 1 / (1 + small), small / (1 + small)) * up

    return gated(x, limit, row_weight, silu)


@right(RIGHT, "swiglu")
def sigmoid_of_base_2(x, limit, row_weight):
    return gated(x, limit, row_weight, lambda gate, up: up * (gate / (1 + exp_by_exp2(-gate))))


@right(RIGHT, "swiglu")
def activated_in_float64(x, limit, row_weight):
    return gated(x, limit, row_weight, lambda gate, up: gate * up / (1 + torch.exp(-gate)), torch.float64)
