"""Pools of quantised entries for samples: bytes that mean ordinary numbers."""

import torch
from torch import Tensor

from isolith.numerics.pages import FORMATS, ROPE, views
from isolith.sample import Make


def byte_pool(make: Make, entry: int, blocks: int, block_size: int, spread: int = 2) -> Tensor:
    """A uint8 pool of normal values with scales of 2^-spread..2^spread; 584-byte ones in pages padded to 576."""
    layout = FORMATS[entry]
    page = -(-block_size * entry // 576) * 576 if entry == 584 else block_size * entry
    pages = make.integers(0, 256, blocks, page, dtype=torch.uint8)
    cache: Tensor = pages[:, : block_size * entry].unflatten(1, (block_size, entry))
    data, scales = views(cache, layout)
    if entry != 68:  # every byte is two e2m1 codes, but not an e4m3 code
        codes = make.normal(blocks, block_size, layout.quantised, dtype=torch.float8_e4m3fn)
        data[..., : layout.code_bytes] = codes.view(torch.uint8)
    if layout.dim > layout.quantised:
        rope = make.normal(blocks, block_size, ROPE, dtype=torch.bfloat16)
        data[..., -2 * ROPE :] = rope.view(torch.uint8)
    factor = (
        make.integers(-spread, spread + 1, blocks, block_size, layout.scales, dtype=torch.float32)
        .exp2()
        .to(layout.scale_dtype)
    )
    scales[..., : layout.scales * layout.scale_dtype.itemsize] = factor.view(torch.uint8)
    return cache
