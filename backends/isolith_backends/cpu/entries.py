"""Reading the entries of a pool in float32, whole blocks or scattered slots, whatever their format.

torch's cast from e4m3, and a gather of e2m1 codes from a table by int64, take about ten times as long as the ways here.
"""

import functools

import torch
from torch import Tensor

from isolith.numerics.codes import decode
from isolith.numerics.pages import ROPE, Format, format_of, views


def entries_of_blocks(cache: Tensor, blocks: Tensor, room: Tensor) -> Tensor:
    """All entries of some blocks in order, in float32; -1 reads block 0, which its owner has to make harmless.

    Args:
        cache: The pool.
        blocks: Physical blocks.
        room: [at least as many, entry_dim] float32, where the result may be put. Memory asked for anew is at times
            given back and fetched again by the allocator: 40 ms of page faults for 128 MiB of keys.
    """
    index, layout, count = blocks.clamp(min=0).long(), format_of(cache), blocks.shape[0] * cache.shape[1]
    if cache.dtype == torch.float32:
        return torch.index_select(cache, 0, index, out=room[:count].view(-1, *cache.shape[1:])).flatten(0, 1)
    pages = cache.index_select(0, index)
    if layout is None:
        return room[:count].copy_(pages.flatten(0, 1))
    return dequantised(*views(pages, layout), layout).flatten(0, 1)


def entries_in_slots(cache: Tensor, slots: Tensor) -> Tensor:
    """The entries in [tokens, n] slots, in float32; -1 gives some entry of the pool."""
    layout, slot = format_of(cache), slots.clamp(min=0)
    if layout is None and cache.is_contiguous():
        rows = cache.view(-1, cache.shape[2]).index_select(0, slot.flatten())
        return rows.float().view(*slots.shape, -1)
    block, row = slot // cache.shape[1], slot % cache.shape[1]
    if layout is None:
        return cache[block, row].float()
    data, scales = views(cache, layout)
    return dequantised(data[block, row], scales[block, row], layout)


def dequantised(data: Tensor, scales: Tensor, layout: Format) -> Tensor:
    """Entries from their bytes, in float32. The two NaN codes of e4m3 read as 480."""
    codes = data[..., : layout.code_bytes]
    factor = scales[..., : layout.scales * layout.scale_dtype.itemsize].contiguous()
    if layout.scale_dtype == torch.float32:
        factor = factor.view(torch.float32)
    else:
        factor = factor.int().bitwise_left_shift_(23).view(torch.float32)  # a ue8m0 byte is a float32 exponent
    if layout.entry == 68:
        values = values_of_e2m1(codes)
    else:
        values, factor = shifted_e4m3(codes), factor * 2.0**8
    values.unflatten(-1, (layout.scales, layout.group)).mul_(factor[..., None])
    if layout.dim == layout.quantised:
        return values
    rope = data[..., layout.data_bytes - 2 * ROPE :].contiguous().view(torch.bfloat16)
    return torch.cat((values, rope.float()), dim=-1)


def shifted_e4m3(codes: Tensor) -> Tensor:
    """The values of e4m3 codes in bytes, times 2^-8.

    A code becomes a float16 by two operations on its bits: sign extended to 16 bits, shifted, and cleared between sign
    and exponent. Exponents of float16 count from 8 more.
    """
    bits = codes.contiguous().view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4001)
    return bits.view(torch.float16).float()


def values_of_e2m1(codes: Tensor) -> Tensor:
    """The values of e2m1 codes, two to a byte: [.., n] -> [.., 2*n].

    One look at a table gives both values of a byte, as the bits of a float64. By shifting bits a 68-byte
    entry takes half as long again.
    """
    pairs = pairs_of_e2m1().index_select(0, codes.int().flatten())
    return pairs.view(torch.float32).view(*codes.shape[:-1], -1)


@functools.cache
def pairs_of_e2m1() -> Tensor:
    """The two values of every byte: [256] float64, each the bits of two float32."""
    codes = torch.arange(256, device="cpu").to(torch.uint8)
    return decode(codes[:, None], torch.float32).view(torch.float64)[:, 0]
