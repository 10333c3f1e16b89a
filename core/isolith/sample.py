"""Samples: the calls that an operator's file offers for checking any kernel of it."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Sample:
    """One legal call: a name, tags, and the arguments.

    Tags: "exact" (every legal rounding gives the same bits), "model" (a real model's layer shape), "slow" (more than
    a second in the reference), "device" (too large for a host), "invariants" (many or large: judged by the operator's
    invariants alone, since gold would take too long).
    """

    def __init__(self, name: str, /, *tags: str, **arguments: Any) -> None:  # Any: an operator's arguments
        self.name = name
        self.tags = frozenset(tags)
        self.arguments = arguments

    def __repr__(self) -> str:
        return f"Sample({self.name})"


class ErrorSample(Sample):
    """One illegal call, and the whole message that it must get."""

    def __init__(self, name: str, /, *tags: str, says: str, **arguments: Any) -> None:  # Any: an operator's arguments
        super().__init__(name, *tags, **arguments)
        self.says = says


@dataclass(frozen=True, kw_only=True)
class Relation:
    """A metamorphic relation: the results of one call, made of the results of others; it needs no gold.

    Args:
        name: A few words that say what holds: "values_times_8", "decode_is_prefill".
        whole: The arguments of the call whose results are made.
        parts: The arguments of the other calls, in order.
        assemble: From the results of the parts (of each: outputs, then mutated arguments) those of `whole`; it moves,
            merges or scales by powers of two, and looks at nothing else.
        carry: Mutated arguments that every part takes from the part before it.
        exact: Whether the results are equal to the bit whatever the legal rounding; else the assembled ones must
            pass for results of `whole`.
    """

    name: str
    whole: Mapping[str, Any]  # Any: an operator's arguments
    parts: tuple[Mapping[str, Any], ...]
    assemble: Callable[[list[list[Tensor]]], list[Tensor]]
    carry: tuple[str, ...] = ()
    exact: bool = False


@dataclass(frozen=True, kw_only=True)
class Pages:
    """A paged pool for a batch: which blocks each sequence has, and how many blocks there are."""

    block_table: Tensor
    blocks: int
    block_size: int


class Make:
    """Makes the tensors of samples: values drawn in float64 on the host, rounded once to their dtype.

    Args:
        dtype: The floating dtype under test; what `normal` and `uniform` return unless told otherwise.
        device: Where the tensors go.
        seed: Equal seeds give equal bytes on every device.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int | str = 0) -> None:
        self.dtype = dtype
        self.device = torch.device(device)
        number = seed if isinstance(seed, int) else zlib.crc32(seed.encode())
        self.generator = torch.Generator().manual_seed(number)

    def normal(self, *shape: int, std: float = 1.0, mean: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values."""
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return self.place(drawn * std + mean, dtype or self.dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Uniform values in low..high."""
        drawn = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return self.place(drawn * (high - low) + low, dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Integers in low..high-1."""
        return self.place(torch.randint(low, high, shape, generator=self.generator), dtype)

    def small_integers(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Values -1, 0 and 1: sums of them are exact in any order."""
        return self.place(torch.randint(-1, 2, shape, generator=self.generator), dtype or self.dtype)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros."""
        return self.full(0.0, *shape, dtype=dtype)

    def full(self, value: float, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """One value everywhere."""
        return self.place(torch.full(shape, value, dtype=torch.float64), dtype or self.dtype)

    def tensor(self, values: Any, dtype: torch.dtype | None = None) -> Tensor:  # Any: nested lists of numbers
        """The values given."""
        return self.place(torch.tensor(values, dtype=torch.float64), dtype or self.dtype)

    def permutation(self, count: int) -> Tensor:
        """The integers 0..count-1 in a random order, int64, on the host."""
        return torch.randperm(count, generator=self.generator)

    def batch(self, tokens: Sequence[int], start: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """(cu_seqlens, start_pos) of sequences with so many tokens each in this call and before it."""
        cumulative = torch.tensor([0, *tokens]).cumsum(0)
        return self.place(cumulative, torch.int32), self.tensor(start or [0] * len(tokens), torch.int32)

    def pages(self, items: Sequence[int], block_size: int, spare: int = 1) -> Pages:
        """A shuffled block table that gives every sequence the blocks that its items need; -1 behind them.

        `spare` blocks belong to nobody: fill them with NaN to see that nothing reads them.
        """
        needs = [-(-count // block_size) for count in items]
        blocks = sum(needs) + spare
        free = self.permutation(blocks).tolist()
        table = torch.full((len(items), max(needs, default=0)), -1)
        for row, need in enumerate(needs):
            for column in range(need):
                table[row, column] = free.pop()
        return Pages(block_table=self.place(table, torch.int32), blocks=blocks, block_size=block_size)

    def place(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Round to `dtype` and move to the device."""
        return values.to(dtype).to(self.device)
