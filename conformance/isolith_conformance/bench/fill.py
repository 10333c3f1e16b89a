"""Tensors of a benchmark: legal values, made fast, or no memory at all on the device "meta".

A few million values are drawn and repeated. Their number is a prime, so that rows differ.
"""

import math

import torch
from torch import Tensor

from isolith.numerics.pages import FORMATS, ROPE, views

BF16, FP32, E4M3, UINT8, E8M0 = torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.uint8, torch.float8_e8m0fnu

DRAWN = 4_194_301
"""The largest prime below 2^22."""
BLOCK = 64  # entries of a cache page
NO_NAN = 0xBF
"""Bits of an e4m3 code to keep: without the exponent's first there is no NaN, and nothing beyond 1.875."""


class Fill:
    """Makes the tensors of one call.

    Args:
        device: Where they go; on "meta" they have shapes and no memory.
        seed: Equal seeds give equal values.
    """

    def __init__(self, device: str = "cpu", seed: int = 0) -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def is_meta(self) -> bool:
        """Whether nothing is drawn."""
        return self.device.type == "meta"

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor whose values come later."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def repeat(self, drawn: Tensor, *shape: int) -> Tensor:
        """The drawn values over and over, in this shape."""
        made = torch.empty(math.prod(shape), dtype=drawn.dtype, device=self.device)
        source = drawn.to(self.device)
        for start in range(0, made.numel(), max(len(source), 1)):
            part = made[start : start + len(source)]
            part.copy_(source[: len(part)])
        return made.view(shape)

    def count(self, *shape: int) -> int:
        """How many values to draw for a shape."""
        return min(math.prod(shape), DRAWN)

    def normal(self, *shape: int, std: float = 1.0, mean: float = 0.0, dtype: torch.dtype = BF16) -> Tensor:
        """Normal values."""
        if self.is_meta:
            return self.empty(*shape, dtype=dtype)
        drawn = torch.randn(self.count(*shape), generator=self.generator) * std + mean
        return self.repeat(drawn.to(dtype), *shape)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype = FP32) -> Tensor:
        """Uniform values in low..high."""
        if self.is_meta:
            return self.empty(*shape, dtype=dtype)
        drawn = torch.rand(self.count(*shape), generator=self.generator) * (high - low) + low
        return self.repeat(drawn.to(dtype), *shape)

    def bytes(self, *shape: int, keep: int = 0xFF) -> Tensor:
        """Bytes of which only the bits in `keep` are random; as they are, two e2m1 codes each."""
        if self.is_meta:
            return self.empty(*shape, dtype=UINT8)
        drawn = torch.randint(0, 256, (self.count(*shape),), generator=self.generator, dtype=UINT8)
        return self.repeat(drawn & keep, *shape)

    def codes(self, *shape: int) -> Tensor:
        """e4m3 codes of values up to 1.875."""
        return self.bytes(*shape, keep=NO_NAN).view(E4M3)

    def int8(self, *shape: int) -> Tensor:
        """int8 codes; -128 is none."""
        if self.is_meta:
            return self.empty(*shape, dtype=torch.int8)
        drawn = torch.randint(-127, 128, (self.count(*shape),), generator=self.generator, dtype=torch.int8)
        return self.repeat(drawn, *shape)

    def scales(self, *shape: int, exponent: int, dtype: torch.dtype = E8M0) -> Tensor:
        """Powers of two within one step of 2^exponent."""
        if self.is_meta:
            return self.empty(*shape, dtype=dtype)
        steps = torch.randint(-1, 2, (self.count(*shape),), generator=self.generator)
        drawn = torch.exp2((steps + exponent).float()).to(dtype)
        if dtype == E8M0:
            return self.repeat(drawn.view(UINT8), *shape).view(E8M0)
        return self.repeat(drawn, *shape)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Integers in 0..high-1."""
        if self.is_meta:
            return self.empty(*shape, dtype=dtype)
        drawn = torch.randint(0, high, (self.count(*shape),), generator=self.generator, dtype=dtype)
        return self.repeat(drawn, *shape)

    def given(self, values: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
        """Values that are known; on "meta" their shape."""
        return values.to(dtype).to(self.device)

    def permutation(self, count: int) -> Tensor:
        """0..count-1 in a random order, on the host."""
        return torch.randperm(count, generator=self.generator)

    def angles(self, length: int, pairs: int) -> tuple[Tensor, Tensor]:
        """(cosines, sines) of random angles, in the shape of rotary tables."""
        if self.is_meta:
            return self.empty(length, pairs, dtype=FP32), self.empty(length, pairs, dtype=FP32)
        drawn = torch.rand(self.count(length, pairs), generator=self.generator) * (2 * math.pi)
        return self.repeat(drawn.cos(), length, pairs), self.repeat(drawn.sin(), length, pairs)

    def pool(self, items: int, entry: int) -> Tensor:
        """A byte pool for so many entries; their values are of order 1."""
        blocks = max(-(-items // BLOCK), 1)
        layout = FORMATS[entry]
        cache = self.bytes(blocks, BLOCK, entry, keep=0xFF if entry == 68 else NO_NAN)
        if self.is_meta:
            return cache
        data, scales = views(cache, layout)
        width = layout.scales * layout.scale_dtype.itemsize
        factors = self.scales(blocks, BLOCK, layout.scales, exponent=0, dtype=layout.scale_dtype)
        scales[..., :width] = factors.view(UINT8)
        if layout.dim > layout.quantised:
            data[..., layout.data_bytes - 2 * ROPE :] = self.normal(blocks, BLOCK, ROPE).view(UINT8)
        return cache

    def table(self, sequences: int, items: int) -> Tensor:
        """A block table that gives every sequence blocks of its own, in a random order."""
        width = max(-(-items // BLOCK), 1)
        return self.given(self.permutation(sequences * width).view(sequences, width))

    def ring(self, sequences: int, items: int, held: int) -> Tensor:
        """A block table of so many items, of which any `held` in a row have rows of their own."""
        width, own = -(-items // BLOCK), ring_blocks(items, held)
        return self.given(torch.arange(width) % own + own * torch.arange(sequences)[:, None])

    def chosen(self, limits: Tensor, count: int, base: Tensor | None = None) -> Tensor:
        """For each row `count` of 0..limits-1, spread over them, each once and in a random order; -1 where too few.

        Args:
            limits: [rows], on the host.
            count: Columns.
            base: [rows], added to what is chosen.
        """
        rows = limits.long()[:, None]
        first = (torch.rand(len(limits), 1, generator=self.generator) * rows).long()
        order = self.permutation(count)
        picked = (first + order * (rows // max(count, 1)).clamp(min=1)) % rows.clamp(min=1)
        moved = picked if base is None else picked + base[:, None]
        return self.given(torch.where(order < rows, moved, -1))


def ring_blocks(items: int, held: int) -> int:
    """Blocks of a ring in which any `held` items in a row have rows of their own."""
    return min(-(-held // BLOCK) + 1, -(-items // BLOCK))
