"""Packed rows of keys and values on the newest chips: 448 codes of e4m3, 64 bfloat16 for rope, 7 scales of e8m0.

The order within a row is open: vllm-ascend's README says rope, codes, scales; cann-recipes' page says codes, rope,
scales. The twin takes the first for layout 1, which vllm-ascend passes; a caller may rely on neither.

Source: vllm-ascend 182b75ea csrc (kv_compress_epilog, npu_kv_quant_sparse_attn_sharedkv).
"""

from typing import Any

import torch
from torch import Tensor

from isolith_backends.ascend.vendor.rules import need, need_dtype, need_shape, poison
from isolith_backends.ascend.vendor.shared import Call, Form, attend

WIDTH, CODES, ROPE, TILE = 640, 448, 64, 64
SCALES = CODES // TILE
E4M3_MAX = 448.0
INDICES = (torch.int32, torch.int64)


def kv_compress_epilog(
    kv_compress_cache: Tensor,
    x: Tensor,
    slot_mapping: Tensor,
    quant_group_size: int,
    quant_mode: int,
    round_scale_flag: bool,
    layout: int,
) -> None:
    """Quantise rows of 512 and store them at flat slots; -1 is skipped."""
    name = "kv_compress_epilog"
    cache = kv_compress_cache
    need_dtype(name, "x", x, (torch.bfloat16,))
    need_shape(name, "x", x, (-1, CODES + ROPE))
    need_dtype(name, "slot_mapping", slot_mapping, INDICES)
    need_shape(name, "slot_mapping", slot_mapping, (x.shape[0],))
    need_dtype(name, "kv_compress_cache", cache, (torch.float8_e4m3fn, torch.uint8))
    need(name, cache.shape[-1] == WIDTH and cache.is_contiguous(), f"the cache is {tuple(cache.shape)}")
    settings = (quant_group_size, quant_mode, round_scale_flag, layout)
    need(name, settings == (TILE, 2, True, 1), f"(group, mode, rounding, layout) is {settings}; (64, 2, True, 1)")
    codes, rope = x.float().split((CODES, ROPE), dim=1)
    tiles = codes.unflatten(1, (SCALES, TILE))
    most = (tiles.abs().amax(-1) / E4M3_MAX).clamp(min=2.0**-126)
    exponent = most.log2().ceil().clamp(-127, 127)
    scaled = torch.ldexp(tiles, -exponent[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    rows = poison((x.shape[0], WIDTH), torch.uint8)
    rows[:, : 2 * ROPE] = rope.bfloat16().view(torch.uint8)
    rows[:, 2 * ROPE : 2 * ROPE + CODES] = scaled.flatten(1).view(torch.uint8)
    rows[:, 2 * ROPE + CODES : 2 * ROPE + CODES + SCALES] = (exponent + 127).to(torch.uint8)
    flat, slots = cache.view(torch.uint8).view(-1, WIDTH), slot_mapping.long()
    need(name, bool((slots < flat.shape[0]).all()), f"slot {int(slots.max())} of {flat.shape[0]} (aicore exception)")
    flat[slots[slots >= 0]] = rows[slots >= 0]


def opened(rows: Tensor) -> Tensor:
    """The 512 numbers of each packed row."""
    raw = rows.view(torch.uint8)
    rope, codes, scales, _ = raw.split((2 * ROPE, CODES, SCALES, WIDTH - 2 * ROPE - CODES - SCALES), dim=1)
    values = codes.contiguous().view(torch.float8_e4m3fn).float().unflatten(1, (SCALES, TILE))
    values = torch.ldexp(values, scales[..., None].int() - 127).flatten(1)
    return torch.cat((values, rope.contiguous().view(torch.bfloat16).float()), dim=1)


PACKED = Form(
    name="npu_kv_quant_sparse_attn_sharedkv",
    heads=lambda heads: heads in (64, 128),
    topk=(512, 1024),
    dtype=torch.float8_e4m3fn,
    width=WIDTH,
    opened=opened,
)


def npu_kv_quant_sparse_attn_sharedkv(
    kv_quant_mode: int, tile_size: int, rope_head_dim: int, **given: Any
) -> tuple[Tensor, Tensor]:
    settings = {"kv_quant_mode": kv_quant_mode, "tile_size": tile_size, "rope_head_dim": rope_head_dim}
    need(PACKED.name, tuple(settings.values()) == (1, TILE, ROPE), f"{settings}; 1, 64 and 64 are needed")
    return attend(PACKED, Call(**given), **settings)
