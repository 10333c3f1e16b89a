"""Tokens to experts: routing of torch_npu.

Source: Ascend/op-plugin 517f2e7d docs of npu_moe_init_routing_v2 (with its numpy equivalent) and npu_moe_token_permute.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from isolith_backends.ascend.vendor.rules import FLOATS, need, need_dtype, need_shape, per_token, poison
from isolith_backends.ascend.vendor.soc import current

NONE, STATIC, DYNAMIC = -1, 0, 1
MOST_OF_A_ROW, MOST_INDICES = 512, 16777215


def check(x: Tensor, expert_idx: Tensor, expert_num: int, drop_pad_mode: int, row_idx_type: int, kind: int) -> None:
    """The rules that hold in every mode."""
    name = "npu_moe_init_routing_v2"
    wide = (torch.float16, torch.float32) if current().name == "310P" else (*FLOATS, torch.int8)
    need_dtype(name, "x", x, wide)
    need_dtype(name, "expert_idx", expert_idx, (torch.int32,))
    need(name, x.dim() == 2 and expert_idx.dim() == 2, f"x is {tuple(x.shape)}, expert_idx {tuple(expert_idx.shape)}")
    need(name, x.shape[0] == expert_idx.shape[0], f"{x.shape[0]} rows of x, {expert_idx.shape[0]} of expert_idx")
    need(name, x.numel() > 0 and expert_idx.numel() > 0, "nothing may be empty")
    need(name, expert_num > 0, f"expert_num is {expert_num}")
    need(name, drop_pad_mode in (0, 1), f"drop_pad_mode is {drop_pad_mode}")
    need(name, row_idx_type in (0, 1), f"row_idx_type is {row_idx_type}")
    need(name, kind in (0, 1, 2), f"expert_tokens_num_type is {kind}")


def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    active_num: int,
    expert_capacity: int,
    expert_num: int,
    drop_pad_mode: int,
    expert_tokens_num_type: int,
    expert_tokens_num_flag: bool,
    quant_mode: int,
    active_expert_range: Sequence[int],
    row_idx_type: int,
    x_dtype: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    name = "npu_moe_init_routing_v2"
    check(x, expert_idx, expert_num, drop_pad_mode, row_idx_type, expert_tokens_num_type)
    need(name, x_dtype is None, "x_dtype is for packed formats")
    small = current().name == "310P"
    need(name, not small or (drop_pad_mode == 0 and quant_mode == NONE), "310P neither drops nor quantises")
    need(name, quant_mode in (NONE, STATIC, DYNAMIC), f"quant_mode is {quant_mode}; this twin knows -1, 0 and 1")
    start, end = active_expert_range or (0, expert_num)
    need(name, 0 <= start < end <= expert_num, f"active_expert_range is [{start}, {end}) of {expert_num}")
    flat = expert_idx.flatten()
    active = (flat >= start) & (flat < end)
    order = torch.argsort(torch.where(active, flat, expert_num), stable=True)
    sizes = torch.bincount(flat[active].long() - start, minlength=end - start)
    kind = 0 if small else expert_tokens_num_type
    counted = counts_of(sizes, start, expert_num, kind if expert_tokens_num_flag else None)
    if drop_pad_mode == 1:
        legal = row_idx_type == 0 and expert_tokens_num_type == 1 and (start, end) == (0, expert_num)
        need(name, legal, "drop_pad_mode 1 needs row_idx_type 0, expert_tokens_num_type 1 and all experts")
        need(name, 0 < expert_capacity < x.shape[0], f"expert_capacity is {expert_capacity} of {x.shape[0]} tokens")
        need(name, quant_mode == NONE and scale is None, "this twin neither drops nor pads quantised rows")
        rows, places = padded(x, flat, order, sizes, expert_capacity, expert_idx.shape[1])
        return rows, places, counted, poison((rows.shape[0] * expert_capacity,), torch.float32)
    count = int(active.sum())
    places = poison((flat.numel(),), torch.int32)
    if row_idx_type == 0:
        places = torch.full_like(places, -1)
        places[order[:count]] = torch.arange(count, dtype=torch.int32)
    else:
        places[:count] = order[:count].int()
    length = min(active_num, flat.numel()) if active_num > 0 else flat.numel()
    tokens = order[: min(count, length)] // expert_idx.shape[1]
    expert_of_row = (flat[order[: min(count, length)]] - start).long()
    rows, scales = quantised(x, tokens, expert_of_row, scale, offset, quant_mode, end - start)
    return tailed(rows, length), places, counted, tailed(scales, length)


def tailed(rows: Tensor, length: int) -> Tensor:
    """The rows, and memory that was never written behind them."""
    return torch.cat((rows, poison((length - rows.shape[0], *rows.shape[1:]), rows.dtype)))


def counts_of(sizes: Tensor, start: int, expert_num: int, kind: int | None) -> Tensor:
    """expert_tokens: cumulated, counted, or as pairs (expert, count) of the experts that have tokens."""
    if kind is None:
        return poison(sizes.shape, torch.int64)
    if kind < 2:
        return sizes.cumsum(0) if kind == 0 else sizes
    busy = sizes.nonzero().flatten()
    return tailed(torch.stack((busy + start, sizes[busy]), dim=1), expert_num)


def padded(x: Tensor, flat: Tensor, order: Tensor, sizes: Tensor, capacity: int, k: int) -> tuple[Tensor, Tensor]:
    """(rows in a bin of fixed size for each expert, zero where there is none; expert * capacity + place, or -1)."""
    rows = x.new_zeros((sizes.shape[0], capacity, x.shape[1]))
    places = torch.full((flat.numel(),), -1, dtype=torch.int32)
    before = sizes.cumsum(0) - sizes
    for place, slot in enumerate(order[: int(sizes.sum())].tolist()):
        expert = int(flat[slot])
        at = place - int(before[expert])
        if at < capacity:
            rows[expert, at] = x[slot // k]
            places[slot] = expert * capacity + at
    return rows, places


def quantised(
    x: Tensor,
    tokens: Tensor,
    experts: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    quant_mode: int,
    active: int,
) -> tuple[Tensor, Tensor]:
    """(rows, their scales)."""
    name = "npu_moe_init_routing_v2"
    rows = x[tokens]
    if scale is not None:
        need_dtype(name, "scale", scale, (torch.float32,))
    if quant_mode == NONE:
        if scale is None:
            return rows, poison((rows.shape[0],), torch.float32)
        need_shape(name, "scale", scale, (x.shape[0],))
        return rows, scale[tokens]
    need_dtype(name, "x", x, FLOATS)
    if quant_mode == STATIC:
        need(name, scale is not None and offset is not None, "quant_mode 0 needs scale and offset")
        assert scale is not None
        assert offset is not None
        need_shape(name, "scale", scale, (1,))
        need_shape(name, "offset", offset, (1,))
        codes = (rows.float() * scale + offset).round().clamp(-128, 127).to(torch.int8)
        return codes, poison((rows.shape[0],), torch.float32)
    wide = rows.float()
    if scale is not None:
        need(name, tuple(scale.shape) in ((1, x.shape[1]), (active, x.shape[1])), f"scale is {tuple(scale.shape)}")
        wide = wide * (scale if scale.shape[0] == 1 else scale[experts])
    return per_token(wide)


def npu_moe_token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None, padded_mode: bool
) -> tuple[Tensor, Tensor]:
    name = "npu_moe_token_permute"
    need_dtype(name, "tokens", tokens, (torch.bfloat16,))
    need_dtype(name, "indices", indices, (torch.int32, torch.int64))
    need(name, not padded_mode, "padded_mode is not there")
    need(name, indices.dim() in (1, 2) and tokens.dim() == 2, f"indices have {indices.dim()} axes")
    k = indices.shape[1] if indices.dim() == 2 else 1
    need(name, indices.shape[0] == tokens.shape[0] and k <= MOST_OF_A_ROW, f"indices are {tuple(indices.shape)}")
    need(name, indices.numel() < MOST_INDICES, f"{indices.numel()} indices")
    order = torch.argsort(indices.flatten(), stable=True)
    places = torch.empty_like(order, dtype=torch.int32)
    places[order] = torch.arange(order.numel(), dtype=torch.int32)
    return tokens[order // k][: num_out_tokens or order.numel()], places


def npu_moe_token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None,
    padded_mode: bool,
    restore_shape: Sequence[int] | None,
) -> Tensor:
    name = "npu_moe_token_unpermute"
    need_dtype(name, "permuted_tokens", permuted_tokens, (torch.bfloat16,))
    need_dtype(name, "sorted_indices", sorted_indices, (torch.int32,))
    need(name, not padded_mode and restore_shape is None, "padded_mode is not there")
    k = 1
    if probs is not None:
        need_dtype(name, "probs", probs, (torch.bfloat16,))
        need(name, probs.dim() == 2 and probs.numel() == sorted_indices.numel(), f"probs are {tuple(probs.shape)}")
        k = probs.shape[1]
    rows = gathered(permuted_tokens, sorted_indices).unflatten(0, (-1, k))
    weights = torch.ones(rows.shape[:2]) if probs is None else probs.float()
    out: Tensor = (rows * weights[..., None]).sum(1)
    return out.to(permuted_tokens.dtype)


def gathered(rows: Tensor, places: Tensor) -> Tensor:
    """The rows in float32; a place outside of them reads memory of others."""
    flat = places.flatten().long()
    legal = (flat >= 0) & (flat < rows.shape[0])
    found = rows.float()[torch.where(legal, flat, 0)] if rows.shape[0] else torch.zeros(flat.numel(), rows.shape[1])
    return torch.where(legal[:, None], found, float("nan"))


def npu_moe_finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int,
    k: int,
) -> Tensor:
    """Modes 0 and 1 read the index k-major (idx[j*T + t]), modes 2 and 3 row-major; 1 and 3 take bins [E, C, H]."""
    name = "npu_moe_finalize_routing"
    rows, index = expanded_permuted_rows, expanded_src_to_dst_row
    need_dtype(name, "expanded_permuted_rows", rows, FLOATS)
    need_dtype(name, "expanded_src_to_dst_row", index, (torch.int32,))
    need(name, drop_pad_mode in (0, 1, 2, 3), f"drop_pad_mode is {drop_pad_mode}")
    drops = drop_pad_mode % 2 == 1
    need(name, rows.dim() == 2 + drops and index.dim() == 1, f"rows are {tuple(rows.shape)} in mode {drop_pad_mode}")
    need(name, rows.numel() > 0 and index.numel() > 0, "nothing may be empty")
    need(name, skip1 is not None or skip2 is None, "skip2 needs skip1")
    if scales is not None:
        need_dtype(name, "scales", scales, (rows.dtype,))
        need(name, scales.dim() == 2 and scales.numel() == index.numel(), f"scales are {tuple(scales.shape)}")
    count = scales.shape[1] if scales is not None else 1
    need(name, not drops or rows.shape[0] >= count, f"{rows.shape[0]} experts, {count} of them for a token")
    tokens = index.numel() // count
    order = index.view(tokens, count) if drop_pad_mode >= 2 else index.view(count, tokens).T
    found = gathered(rows.flatten(0, -2), order)
    if drops:
        found = torch.where(order.flatten()[:, None] == -1, 0.0, found)
    found = found.unflatten(0, (tokens, count))
    if bias is not None:
        need(name, export_for_source_row is not None, "bias needs export_for_source_row")
        assert export_for_source_row is not None
        need_dtype(name, "bias", bias, (rows.dtype,))
        need_shape(name, "export_for_source_row", export_for_source_row, (tokens, count))
        found = found + bias.float()[export_for_source_row.long()]
    out: Tensor = (found * (1.0 if scales is None else scales.float()[..., None])).sum(1)
    for which, skip in (("skip1", skip1), ("skip2", skip2)):
        if skip is not None:
            need_dtype(name, which, skip, (rows.dtype,))
            need_shape(name, which, skip, (tokens, rows.shape[-1]))
            out = out + skip.float()
    return out.to(rows.dtype)
