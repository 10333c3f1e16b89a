"""Paged pools: where an entry lies, and the byte formats of quantised entries.

A pool is [blocks, block_size, entry]; logical item i of sequence b is in slot
block_table[b, i // block_size] * block_size + i % block_size. A uint8 pool holds quantised entries whose number of
bytes names the format; its page is the bytes of one block read flat:

    584  448 e4m3 (groups of 64) | 64 bfloat16, per entry; after all entries 8 bytes each: 7 ue8m0 scales, 1 unused
    656  512 e4m3 (groups of 128) | 4 float32 scales | 64 bfloat16, per entry
    132  128 e4m3 per entry; after all entries one float32 scale each
     68  64 bytes of e2m1 (groups of 32) per entry; after all entries 4 ue8m0 scales each

Source: FlashMLA 9241ae3 tests/quant.py (584, 656), DeepGEMM 54e2261 tests/test_attention.py (68, 132).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from isolith.errors import ArgumentError
from isolith.numerics.codes import decode

ROPE = 64
"""Trailing dimensions that the 584 and 656 formats keep in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """The byte format of a quantised entry.

    Args:
        entry: Bytes of an entry, on average over its page.
        dim: Elements of an entry.
        quantised: Leading elements that are quantised; the rest is bfloat16.
        group: Elements that share a scale.
        scale_dtype: float8_e8m0fnu or float32.
        scales_apart: Whether scales stand behind all entries of the page, rather than in each.
        scale_bytes: Bytes that the scales of one entry take, padding included.
    """

    entry: int
    dim: int
    quantised: int
    group: int
    scale_dtype: torch.dtype
    scales_apart: bool
    scale_bytes: int

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of one entry."""
        return self.quantised // 2 if self.entry == 68 else self.quantised

    @property
    def data_bytes(self) -> int:
        """Bytes of one entry without scales that stand apart."""
        return self.entry - self.scale_bytes if self.scales_apart else self.entry

    @property
    def scales(self) -> int:
        """Scales of one entry."""
        return self.quantised // self.group


E8M0 = torch.float8_e8m0fnu
FORMATS = {
    layout.entry: layout
    for layout in (
        Format(entry=584, dim=512, quantised=448, group=64, scale_dtype=E8M0, scales_apart=True, scale_bytes=8),
        Format(
            entry=656, dim=576, quantised=512, group=128, scale_dtype=torch.float32, scales_apart=False, scale_bytes=16
        ),
        Format(
            entry=132, dim=128, quantised=128, group=128, scale_dtype=torch.float32, scales_apart=True, scale_bytes=4
        ),
        Format(entry=68, dim=128, quantised=128, group=32, scale_dtype=E8M0, scales_apart=True, scale_bytes=4),
    )
}


def format_of(cache: Tensor) -> Format | None:
    """The byte format of a uint8 pool; None for a pool of floats."""
    return FORMATS[int(cache.shape[-1])] if cache.dtype == torch.uint8 else None


def entry_dim(cache: Tensor) -> int:
    """Elements of an entry, whatever its format."""
    layout = format_of(cache)
    return cache.shape[-1] if layout is None else layout.dim


def check_cache(operator: str, name: str, cache: Tensor) -> None:
    """Raise ArgumentError for a uint8 pool that has no known format or whose pages are not whole."""
    if cache.dtype != torch.uint8:
        return
    entry = int(cache.shape[-1])
    if entry not in FORMATS:
        raise ArgumentError(f"{operator}: a uint8 {name} has entries of 584, 656, 132 or 68 bytes; got {entry}.")
    whole = cache.stride(2) == 1 and (cache.stride(1) == entry or cache.shape[1] == 1)
    if cache.shape[0] and cache.shape[1] and not whole:
        raise ArgumentError(
            f"{operator}: a page of {name} is one run of bytes, strides (any, {entry}, 1); got {tuple(cache.stride())}."
        )


def check_slots(operator: str, name: str, slots: Tensor, cache: Tensor) -> None:
    """Raise ArgumentError for a slot beyond the pool; reads values."""
    size = cache.shape[0] * cache.shape[1]
    if slots.numel() and int(slots.max()) >= size:
        raise ArgumentError(f"{operator}: {name} must be below blocks*block_size = {size}; got {int(slots.max())}.")


def check_block_table(operator: str, name: str, block_table: Tensor, cache: Tensor) -> None:
    """Raise ArgumentError for a block beyond the pool; reads values."""
    if block_table.numel() and int(block_table.max()) >= cache.shape[0]:
        raise ArgumentError(
            f"{operator}: {name} must be below blocks = {cache.shape[0]}; got {int(block_table.max())}."
        )


def slots_of_items(block_table: Tensor, sequence: Tensor, items: Tensor, block_size: int) -> Tensor:
    """Physical slots of logical items, -1 where there is none: below 0, behind the table, or without a block.

    Args:
        block_table: [B, max_blocks], -1 = no block.
        sequence: The row of the table that each item is found in; broadcasts against `items`.
        items: Logical items, any shape.
        block_size: Items of a block.
    """
    items, sequence = torch.broadcast_tensors(items.long(), sequence.long())
    width = block_table.shape[1]
    if width == 0 or block_table.shape[0] == 0:
        return torch.full_like(items, -1)
    column = items.div(block_size, rounding_mode="floor")
    block = block_table.long()[sequence, column.clamp(0, width - 1)]
    known = (items >= 0) & (column < width) & (block >= 0)
    return torch.where(known, block * block_size + items % block_size, -1)


def check_held(operator: str, name: str, cache: Tensor, block_table: Tensor, sequence: Tensor, items: Tensor) -> None:
    """Raise ArgumentError where items [N] of a sequence share a slot, as in a ring that is too short; reads values."""
    slots = slots_of_items(block_table, sequence, items, cache.shape[1])
    known = slots >= 0
    places = (sequence * cache.shape[0] * cache.shape[1] + slots)[known]
    order = places.argsort()
    shared = places[order[1:]] == places[order[:-1]]
    if bool(shared.any()):
        row = int(sequence[known][order[1:][shared]].min())
        mine = sequence == row
        raise ArgumentError(
            f"{operator}: {name} must hold positions {int(items[mine].min())}..{int(items[mine].max())} of sequence "
            f"{row} at once; got {len(slots[mine & known].unique())} rows."
        )


def views(cache: Tensor, layout: Format) -> tuple[Tensor, Tensor]:
    """(data [blocks, block_size, data_bytes], scales [blocks, block_size, scale_bytes]) of a uint8 pool, as views."""
    block_size = cache.shape[1]
    flat = cache.view(cache.shape[0], block_size * layout.entry)
    split = block_size * layout.data_bytes
    data = flat[:, :split].unflatten(1, (block_size, layout.data_bytes))
    if layout.scales_apart:
        return data, flat[:, split:].unflatten(1, (block_size, layout.scale_bytes))
    return data, data[..., layout.code_bytes : layout.code_bytes + layout.scale_bytes]


def write_rows(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Write [N, entry] rows to the slots [N] of a pool of floats, in place; negative slots are skipped."""
    kept = slots >= 0
    slot = slots[kept].long()
    cache[slot // cache.shape[1], slot % cache.shape[1]] = rows[kept].to(cache.dtype)


def write_entries(cache: Tensor, slots: Tensor, codes: Tensor, scales: Tensor, rope: Tensor) -> None:
    """Write quantised entries to the slots [N] of a uint8 pool, in place; negative slots are skipped.

    Args:
        cache: Bytes outside the entries written, the unused scale byte of 584 included, stay as they are.
        slots: Physical slots, each at most once.
        codes: [N, quantised] e4m3, or [N, quantised/2] packed e2m1.
        scales: [N, quantised/group] in the format's dtype.
        rope: [N, dim - quantised]; rounded to bfloat16.
    """
    layout = FORMATS[int(cache.shape[-1])]
    kept = slots >= 0
    slot = slots[kept].long()
    block, row = slot // cache.shape[1], slot % cache.shape[1]
    data_view, scale_view = views(cache, layout)
    scale_bytes = scales[kept].contiguous().view(torch.uint8)
    data_view[..., : layout.code_bytes][block, row] = codes[kept].contiguous().view(torch.uint8)
    scale_view[..., : scale_bytes.shape[-1]][block, row] = scale_bytes
    if layout.dim > layout.quantised:
        rope_bytes = rope[kept].to(torch.bfloat16).contiguous().view(torch.uint8)
        data_view[..., layout.data_bytes - 2 * ROPE :][block, row] = rope_bytes


def read_entries(cache: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """The entries in `slots`, dequantised: [..] -> [.., dim]; zeros where a slot is negative, whatever the pool has."""
    if cache.shape[0] * cache.shape[1] == 0:
        return torch.zeros((*slots.shape, entry_dim(cache)), dtype=dtype, device=cache.device)
    slot = slots.long().clamp(min=0)
    block, row = slot // cache.shape[1], slot % cache.shape[1]
    layout = format_of(cache)
    if layout is None:
        values = cache[block, row].to(dtype)
    else:
        data, scales = views(cache, layout)
        values = dequantise(data[block, row], scales[block, row], layout, dtype)
    return torch.where((slots >= 0)[..., None], values, torch.zeros((), dtype=dtype, device=cache.device)).contiguous()


def dequantise(data: Tensor, scales: Tensor, layout: Format, dtype: torch.dtype) -> Tensor:
    """Entries from their bytes: data [.., data_bytes] and scales [.., scale_bytes] -> [.., dim]."""
    codes = data[..., : layout.code_bytes]
    codes = codes if layout.entry == 68 else codes.contiguous().view(torch.float8_e4m3fn)
    width = layout.scales * layout.scale_dtype.itemsize
    # The bfloat16 product is what the sources store; float32 holds it exactly, and arbitrary float32 scales better.
    factor = scales[..., :width].contiguous().view(layout.scale_dtype).to(torch.promote_types(dtype, torch.float32))
    values = decode(codes, factor.dtype).unflatten(-1, (layout.scales, layout.group)) * factor[..., None]
    parts = [values.flatten(-2).to(dtype)]
    if layout.dim > layout.quantised:
        rope = data[..., layout.data_bytes - 2 * ROPE :].contiguous().view(torch.bfloat16)
        parts.append(rope.to(dtype))
    return torch.cat(parts, dim=-1)
