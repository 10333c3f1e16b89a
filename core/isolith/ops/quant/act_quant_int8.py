"""Quantise activations to int8, one scale a row.

    v[..., j]  = x[..., j] * smooth[j]                  v = x without smooth
    scale[...] = max(amax_floor, max_j |v[..., j]|) / 127
    q[..., j]  = clamp(round(v[..., j] / scale[...]), -127, 127)

Everything is computed in float32, for float64 input too; round goes to nearest, ties to even. There is no zero point
and no code -128. A row of zeros, or of no columns, has q = 0 and the scale of the floor, 1e-10/127. NaN and infinite
input: unspecified in its own row. A scale may be one ulp off (amax times the inverse of 127) and so may the quotient
(v times 127/amax): a code next to a rounding boundary differs.

Source: Cambricon torch_mlu_ops, scaled_quantize (smooth multiplies); Ascend npu_dynamic_quant; the floor is this
project's, where the vendors divide 0 by 0 or give a scale of 0.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from isolith.dtypes import FLOAT
from isolith.materials.relations import joined, reordered, scaled
from isolith.numerics.codes import INT8_MAX, check_amax_floor
from isolith.operator import Cost, Operator
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(x: Tensor, smooth: Tensor | None = None, amax_floor: float = 1e-10) -> tuple[Tensor, Tensor]:
    values = smoothed(x, smooth)
    scale = amax_of_rows(values, amax_floor) / INT8_MAX
    return codes(values / scale[..., None]), scale[..., None]


def smoothed(x: Tensor, smooth: Tensor | None) -> Tensor:
    """x times smooth, in float32."""
    wide = x.contiguous().to(torch.float32)
    return wide if smooth is None else wide * smooth.to(torch.float32)


def amax_of_rows(values: Tensor, amax_floor: float) -> Tensor:
    """[..., N] -> [...]."""
    # A zero more, so that a row without a column has an amax.
    return torch.nn.functional.pad(values.abs(), (0, 1)).amax(-1).clamp(min=amax_floor)


def codes(quotient: Tensor) -> Tensor:
    """To nearest, ties to even, within -127..127: a quotient one ulp beyond 127 rounds to it."""
    return quotient.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)


def by_inverses(x: Tensor, smooth: Tensor | None = None, amax_floor: float = 1e-10) -> tuple[Tensor, Tensor]:
    """Multiply by 127/amax, and by the inverse of 127 for the scale."""
    values = smoothed(x, smooth)
    amax = amax_of_rows(values, amax_floor)
    inverse = torch.tensor(1 / INT8_MAX, dtype=torch.float32, device=x.device)
    return codes(values * (INT8_MAX / amax)[..., None]), (amax * inverse)[..., None]


def unrounded(x: Tensor, smooth: Tensor | None, amax_floor: float, **_: object) -> tuple[Tensor, Tensor]:
    """(quotients, scales) in float64; NaN in rows that hold NaN or infinity."""
    values = smoothed(x, smooth)
    scale = amax_of_rows(values, amax_floor)[..., None].double() / INT8_MAX
    scale = scale.masked_fill(~scale.isfinite(), torch.nan)
    return values.double() / scale, scale


def fake(x: Tensor, smooth: Tensor | None = None, amax_floor: float = 1e-10) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def check(x: Tensor, smooth: Tensor | None = None, amax_floor: float = 1e-10) -> None:
    check_amax_floor("act_quant_int8", amax_floor, INT8_MAX)


def cost(x: Tensor, smooth: Tensor | None = None, amax_floor: float = 1e-10) -> Cost:
    return Cost(
        flops=4 * x.numel() + (0 if smooth is None else x.numel()),  # magnitude, maximum, division, rounding
        bytes_read=x.nbytes + (0 if smooth is None else smooth.nbytes),
        bytes_written=x.numel() + 4 * (x.numel() // max(x.shape[-1], 1)),
    )


def samples(make: Make) -> Iterator[Sample]:
    yield Sample("hidden_4096", "model", x=make.normal(8, 4096))
    smooth = make.uniform(4096, low=0.1, high=2.0, dtype=torch.float32)
    yield Sample("smooth_4096", "model", x=make.normal(8, 4096), smooth=smooth)
    yield Sample("odd_width", x=make.normal(3, 129))
    yield Sample("three_axes", x=make.normal(2, 3, 64), smooth=make.uniform(64, low=0.5, high=2.0))
    yield Sample("one_column", x=make.normal(4, 1))
    yield Sample("one_vector", x=make.normal(64))
    yield Sample("permuted_axes", x=make.normal(3, 5, 64).transpose(0, 1), smooth=make.uniform(64, low=0.5, high=2.0))
    yield Sample("no_rows", x=make.normal(0, 64))
    # Rows far apart in size, the extremes of both signs in each.
    rows = make.normal(12, 32) * torch.exp2(torch.arange(-6.0, 6.0))[:, None].to(make.device).to(make.dtype)
    yield Sample("rows_of_all_sizes", x=rows)
    # The largest of a row is its first or its last.
    ends = make.normal(3, 65)
    ends[0, 0], ends[1, 64], ends[2, 63] = 64, -64, 64
    yield Sample("amax_at_the_ends", x=ends)
    # scale 2: every code, and halves, which go to the even code.
    halves = (torch.arange(-254, 255, dtype=torch.float64)).tolist()
    yield Sample("codes_and_ties", "exact", x=make.tensor([halves]))
    yield Sample("negative_extreme", "exact", x=make.tensor([[-127.0, 126.0, 0.0, -0.0], [-254.0, -2.0, 5.0, 3.0]]))
    # 127 * 2^j and one ulp beside: the extreme code is 127, never 128.
    ulp = 64 * torch.finfo(make.dtype).eps
    beside = [[(127.0 + step) * 2.0**j, 2.0**j] for j in (-8, 0, 5) for step in (-ulp, 0.0, ulp)]
    yield Sample("amax_beside_127", x=make.tensor(beside))
    yield Sample("zero_rows", x=make.tensor([[0.0, 0.0], [1.0, -1.0], [-0.0, 0.0]]))
    yield Sample("below_the_floor", x=make.normal(4, 32, std=1e-3), amax_floor=0.5)
    # smooth decides which element is the largest.
    smooth = make.tensor([1.0, 100.0, 0.01, -1.0])
    yield Sample("smooth_moves_the_amax", x=make.tensor([[1.0, 1.0, 50.0, -2.0], [0.0, 0.5, 3.0, 4.0]]), smooth=smooth)


def errors(make: Make) -> Iterator[ErrorSample]:
    x = make.normal(2, 64)
    says = "act_quant_int8: hidden is 64 in x but 63 in smooth."
    yield ErrorSample("smooth_width", x=x, smooth=make.normal(63), says=says)
    says = "act_quant_int8: amax_floor must be at least 127*2^-126; got 0.0."
    yield ErrorSample("no_floor", x=x, amax_floor=0.0, says=says)
    says = "act_quant_int8: x must be bfloat16, float16, float32 or float64; got int8."
    yield ErrorSample("integer_x", x=x.to(torch.int8), says=says)


def relations(make: Make) -> Iterator[Relation]:
    call = {"x": make.normal(7, 300), "smooth": make.uniform(300, low=0.5, high=2.0, dtype=torch.float32)}
    yield scaled("x_times_8", call, {"x": 3}, [0, 3])
    yield scaled("smooth_times_8", call, {"smooth": 3}, [0, 3])
    yield reordered("columns_reordered", call, make.permutation(300), {"x": 1, "smooth": 0}, {0: 1})
    yield joined("rows_apart", call, [1, 4], ["x"])
    yield scaled("v3_width_times_8", {"x": make.normal(3, 7168)}, {"x": 3}, [0, 3])


act_quant_int8 = Operator(
    name="act_quant_int8",
    shapes="x[... hidden] smooth?[hidden] -> q[... hidden] scale[... 1]",
    dtypes={"x": FLOAT, "smooth": FLOAT},
    reference=reference,
    variants=(by_inverses,),
    fake=fake,
    check=check,
    cost=cost,
    samples=samples,
    errors=errors,
    unrounded=unrounded,
    relations=relations,
)
