"""The ACME chip, simulated: what its vendor has before it has heard of isolith.

A program runs on the chip and sees tensors in the chip's memory alone. It works on tiles of float32, ROWS x COLUMNS in
a memory of their own, by the instructions below; there are no others. `load` widens, `store` rounds to the nearest.

    matrix unit   multiplies bfloat16 by bfloat16 exactly and adds up in float32, COLUMNS products at a time, in order
    vector unit   computes in float32; roots and exponentials from a guess and corrections
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from isolith.simulated import on_device

ROWS, COLUMNS = 64, 128

LACKS = ("aten::sort", "aten::topk")
"""Operators of torch that the vendor's extension of torch has no kernel for."""

program = on_device
"""Makes a function a program: called with tensors on the chip, it runs there; it refuses tensors of the host."""


def matrix(tensor: Tensor) -> Tensor:
    """The tensor's rows, along its last axis, as a matrix: the same memory where they lie behind one another."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def tiles(start: int, stop: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` from start to stop."""
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


def load(matrix: Tensor, rows: slice, columns: slice) -> Tensor:
    """A tile of a matrix; beyond the slices it is 0."""
    part = matrix[rows, columns]
    tile = fill(0.0)
    tile[: part.shape[0], : part.shape[1]] = part.float()
    return tile


def store(tile: Tensor, matrix: Tensor, rows: slice, columns: slice) -> None:
    """Round what lies within the slices to the matrix's dtype; the rest of the tile is dropped."""
    place = matrix[rows, columns]
    place.copy_(tile[: place.shape[0], : place.shape[1]])


def read(vector: Tensor) -> list[int]:
    """Integers, to count and to address by."""
    return [int(value) for value in vector.tolist()]


def fill(value: float, columns: int = COLUMNS) -> Tensor:
    """A tile of one value."""
    return torch.full((ROWS, columns), value)


def add(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise."""
    return a + b


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise."""
    return a * b


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise."""
    return a / b


def magnitude(a: Tensor) -> Tensor:
    """Elementwise."""
    return a.abs()


def clamp(a: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """Elementwise; NaN stays."""
    return a.clamp(low, high)


def rounded(a: Tensor, dtype: torch.dtype) -> Tensor:
    """Elementwise, to a narrower dtype and back."""
    return a.to(dtype).float()


def sum_of_rows(a: Tensor) -> Tensor:
    """The sum of each row, in each of its columns: halves are added, then halves of these."""
    while a.shape[1] > 1:
        left, right = a.chunk(2, dim=1)
        a = left + right
    return a.expand(ROWS, COLUMNS)


def largest_of_rows(a: Tensor) -> Tensor:
    """The largest of each row, in each of its columns."""
    return a.amax(dim=1, keepdim=True).expand(ROWS, COLUMNS)


def inverse_root(a: Tensor) -> Tensor:
    """1 / sqrt(a): a guess of 8 bits, corrected twice."""
    guess = a.rsqrt().bfloat16().float()
    for _ in range(2):
        guess = guess * (1.5 - 0.5 * a * guess * guess)
    return guess


def exponential(a: Tensor) -> Tensor:
    """e^a: a power of two times a series; beyond float32, 0 and infinity."""
    a = a.clamp(-104.0, 89.0)
    power = (a / math.log(2)).round()
    # 355/512 has few bits, so that its product with the power is exact.
    rest = a - power * (355 / 512) - power * (math.log(2) - 355 / 512)
    series = fill(0.0)
    for degree in range(7, -1, -1):
        series = series * rest + 1 / math.factorial(degree)
    half = (power / 2).floor()  # a power may lie beyond float32 where its product with the series does not
    return torch.ldexp(torch.ldexp(series, half), power - half)


def power_of_two_above(a: Tensor) -> Tensor:
    """The least power of two that is not below a."""
    mantissa, exponent = torch.frexp(a)
    return torch.ldexp(torch.ones_like(a), torch.where(mantissa == 0.5, exponent - 1, exponent))


def multiply_add(sums: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[ROWS, ROWS] plus tile a times tile b transposed, on the matrix unit."""
    return sums + a.bfloat16().float() @ b.bfloat16().float().T
