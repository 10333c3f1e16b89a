"""Walsh-Hadamard rotation of the last axis.

    y[..., i] = N^-0.5 * sum_j (-1)^popcount(i & j) * x[..., j]

N, the size of the axis, is a power of two; rows are in natural (Sylvester) order. Computed in float32, rounded once;
N^-0.5 multiplies once, before or behind the sums, or as halves between them.
Symmetric and orthogonal: applied twice it gives x back, and a dot product of two rotated vectors is the vectors' own.
It comes after the rotary embedding and before the quantisation, whose error it spreads. N = 1 gives a copy of x.

Source: DeepSeek-V4 inference/model.py, rotate_activation; Fino & Algazi 1976, doi:10.1109/TC.1976.1674569 (the steps).
"""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from isolith.dtypes import FLOAT, widen
from isolith.errors import ArgumentError
from isolith.materials.relations import joined, scaled
from isolith.operator import Cost, Operator
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(x: Tensor) -> Tensor:
    y = x.to(widen(x.dtype))
    for bit in range(bits_of(x)):
        y = butterfly(y, bit)
    return (y * scale_of(x)).to(x.dtype).contiguous()


def bits_of(x: Tensor) -> int:
    """log2 of the last axis."""
    return int(x.shape[-1]).bit_length() - 1


def scale_of(x: Tensor) -> float:
    return 1 / math.sqrt(x.shape[-1])


def butterfly(x: Tensor, bit: int) -> Tensor:
    """Replace every two elements whose indices differ in this bit alone by their sum and their difference."""
    n, stride = x.shape[-1], 1 << bit
    low, high = x.unflatten(-1, (n // (2 * stride), 2, stride)).unbind(-2)
    return torch.stack((low + high, low - high), dim=-2).flatten(-3)


def scaled_first(x: Tensor) -> Tensor:
    """Scale first, and take the bits from the highest to the lowest."""
    y = x.to(widen(x.dtype)) * scale_of(x)
    for bit in reversed(range(bits_of(x))):
        y = butterfly(y, bit)
    return y.to(x.dtype).contiguous()


def sum_in_order(x: Tensor) -> Tensor:
    """Multiply by the matrix, adding one column after the other."""
    wide = x.to(widen(x.dtype))
    terms = (column[..., None] * row for column, row in zip(wide.unbind(-1), signs(x, wide.dtype), strict=True))
    total: Tensor = functools.reduce(torch.add, terms)
    return (total * scale_of(x)).to(x.dtype).contiguous()


def scaled_then_in_order(x: Tensor) -> Tensor:
    """The scale within the matrix, as a matrix unit has it, and one column after the other."""
    wide = x.to(widen(x.dtype))
    matrix = signs(x, wide.dtype) * scale_of(x)
    terms = (column[..., None] * row for column, row in zip(wide.unbind(-1), matrix, strict=True))
    total: Tensor = functools.reduce(torch.add, terms)
    return total.to(x.dtype).contiguous()


def signs(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix of entries +1 and -1."""
    matrix = torch.ones(1, 1, dtype=dtype, device=x.device)
    while matrix.shape[0] < x.shape[-1]:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def check(x: Tensor) -> None:
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ArgumentError(f"hadamard: the last axis of x must be a power of two; got {n}.")


def cost(x: Tensor) -> Cost:
    return Cost(flops=(bits_of(x) + 1) * x.numel(), bytes_read=x.nbytes, bytes_written=x.nbytes)  # adds, a scale


def samples(make: Make) -> Iterator[Sample]:
    yield Sample("indexer_query", "model", x=make.normal(8, 64, 128))
    yield Sample("indexer_key", "model", x=make.normal(16, 128))
    for n in (1, 2, 8, 512):
        yield Sample(f"width_{n}", x=make.normal(3, n))
    yield Sample("no_leading_axis", x=make.normal(128))
    yield Sample("four_axes", x=make.normal(2, 3, 2, 32))
    yield Sample("permuted_axes", x=make.normal(3, 5, 16).transpose(0, 1))
    yield Sample("no_rows", x=make.normal(0, 128))
    # Unit vectors give the rows of the matrix: another order of rows shows. 1/4 and 1/8 are exact scales.
    yield Sample("unit_vectors", "exact", x=make.tensor(torch.eye(16).tolist()))
    yield Sample("small_integers", "exact", x=make.small_integers(5, 64))
    # A constant row meets in one element; in float16 its unscaled sum overflows.
    yield Sample("constant", "exact", x=make.full(4096.0, 2, 64))
    outlier = make.normal(4, 128, std=0.5)
    outlier[:, 7] = 200.0
    yield Sample("outlier", x=outlier)
    # Neighbours of equal size cancel: what a narrow sum has lost does not come back.
    alternating = make.normal(4, 128, std=2.0**-8)
    alternating[:, 0::2] += 1.0
    alternating[:, 1::2] -= 1.0
    yield Sample("cancelling", x=alternating)


def errors(make: Make) -> Iterator[ErrorSample]:
    says = "hadamard: the last axis of x must be a power of two; got 12."
    yield ErrorSample("width_12", x=make.normal(3, 12), says=says)
    says = "hadamard: the last axis of x must be a power of two; got 0."
    yield ErrorSample("width_0", x=make.normal(3, 0), says=says)
    says = "hadamard: x must be bfloat16, float16, float32 or float64; got int8."
    yield ErrorSample("integer_x", x=make.small_integers(3, 8, dtype=torch.int8), says=says)


def relations(make: Make) -> Iterator[Relation]:
    yield scaled("x_times_8", {"x": make.normal(9, 64)}, {"x": 3}, [3])
    yield joined("rows_apart", {"x": make.normal(9, 64)}, [1, 4], ["x"])
    # Of the unit vectors come the rows of the matrix, which are its columns.
    unit = {"x": make.place(torch.eye(256), make.dtype)}
    yield Relation(
        name="the_matrix_is_symmetric",
        whole=unit,
        parts=(unit,),
        assemble=lambda parts: [parts[0][0].T.contiguous()],
        exact=True,
    )
    yield scaled("flash_times_8", {"x": make.normal(4, 64, 128)}, {"x": 3}, [3])


hadamard = Operator(
    name="hadamard",
    shapes="x[... n] -> y[... n]",
    dtypes={"x": FLOAT},
    reference=reference,
    variants=(scaled_first, sum_in_order, scaled_then_in_order),
    fake=fake,
    check=check,
    cost=cost,
    samples=samples,
    errors=errors,
    relations=relations,
)
