"""Quantise activations to e4m3, in groups along the last axis.

    amax[..., b]  = max(amax_floor, max_j |x[..., j]|)                      over the columns j of group b
    scale[..., b] = 2^ceil(log2(amax[..., b] / 448))                        scale_format "ue8m0"
                  = amax[..., b] / 448                                      scale_format "float32"
    q[..., j]     = e4m3(clamp(x[..., j] / scale[..., j // group_size], -448, 448))

Everything is computed in float32, for float64 input too, and e4m3 rounds to nearest, ties to even. ceil(log2(r)) is
the exponent of r, plus one where its mantissa is not 0. A last group that is short has the amax of what it has. A
group of zeros has q = 0 and the scale of the floor: 2^-22, or 1e-4/448. NaN and infinite input: unspecified in its own
group. With "ue8m0" there is one right answer, to the bit. With "float32" a scale may be one ulp off (amax times the
inverse of 448) and so may the quotient (x times the inverse of the scale, or times 448/amax): a code next to a rounding
boundary differs.

Source: DeepSeek-V4 inference/kernel.py, act_quant (floor, fast_log2_ceil); DeepGEMM 54e2261 deep_gemm/utils/math.py,
per_token_cast_to_fp8 (inverse of the scale, padding of a short group); DeepSeek-V3 inference/kernel.py (float32).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from isolith.dtypes import FLOAT
from isolith.materials.relations import joined, scaled
from isolith.numerics.codes import (
    E4M3_MAX,
    SCALE_FORMATS,
    amax_of_groups,
    ceil_power_of_two,
    check_amax_floor,
    check_at_least_one,
    check_scale_format,
    groups_of,
    spread_groups,
)
from isolith.operator import Cost, Operator
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(
    x: Tensor, group_size: int = 128, scale_format: str = "ue8m0", amax_floor: float = 1e-4
) -> tuple[Tensor, Tensor]:
    wide = x.contiguous().to(torch.float32)
    scale = amax_of_groups(wide, group_size).clamp(min=amax_floor) / E4M3_MAX
    if scale_format == "ue8m0":
        scale = ceil_power_of_two(scale)
    return codes(wide / spread_groups(scale, x.shape[-1], group_size)), scale.to(SCALE_FORMATS[scale_format])


def codes(quotient: Tensor) -> Tensor:
    return quotient.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def by_inverse_scale(
    x: Tensor, group_size: int = 128, scale_format: str = "ue8m0", amax_floor: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Multiply by the inverse of the scale."""
    wide, (_, scale) = x.contiguous().to(torch.float32), reference(x, group_size, scale_format, amax_floor)
    return codes(wide * spread_groups(1 / scale.to(torch.float32), x.shape[-1], group_size)), scale


def by_inverse_amax(
    x: Tensor, group_size: int = 128, scale_format: str = "ue8m0", amax_floor: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Multiply by 448/amax where the scale is amax/448."""
    if scale_format == "ue8m0":
        return by_inverse_scale(x, group_size, scale_format, amax_floor)
    wide = x.contiguous().to(torch.float32)
    amax = amax_of_groups(wide, group_size).clamp(min=amax_floor)
    return codes(wide * spread_groups(E4M3_MAX / amax, x.shape[-1], group_size)), amax / E4M3_MAX


def by_inverses(
    x: Tensor, group_size: int = 128, scale_format: str = "ue8m0", amax_floor: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Multiply by the inverse of 448 (float32 scales) and by the inverse of the scale."""
    wide = x.contiguous().to(torch.float32)
    amax = amax_of_groups(wide, group_size).clamp(min=amax_floor)
    if scale_format == "ue8m0":
        scale = ceil_power_of_two(amax / E4M3_MAX)
    else:
        scale = amax * torch.tensor(1 / E4M3_MAX, dtype=torch.float32, device=x.device)
    return codes(wide * spread_groups(1 / scale, x.shape[-1], group_size)), scale.to(SCALE_FORMATS[scale_format])


def unrounded(x: Tensor, group_size: int, scale_format: str, amax_floor: float, **_: object) -> tuple[Tensor, Tensor]:
    """(quotients, scales) in float64; NaN in groups that hold NaN or infinity."""
    wide = x.contiguous().to(torch.float32)
    scale = amax_of_groups(wide, group_size).clamp(min=amax_floor)
    exact = scale.double() / E4M3_MAX
    if scale_format == "ue8m0":
        exact = ceil_power_of_two(scale.nan_to_num(amax_floor, amax_floor) / E4M3_MAX).double()
    exact = exact.masked_fill(~scale.isfinite(), torch.nan)
    return wide.double() / spread_groups(exact, x.shape[-1], group_size), exact


def fake(
    x: Tensor, group_size: int = 128, scale_format: str = "ue8m0", amax_floor: float = 1e-4
) -> tuple[Tensor, Tensor]:
    groups = groups_of(x.shape[-1], group_size)
    return (
        x.new_empty(x.shape, dtype=torch.float8_e4m3fn),
        x.new_empty((*x.shape[:-1], groups), dtype=SCALE_FORMATS[scale_format]),
    )


def check(x: Tensor, group_size: int = 128, scale_format: str = "ue8m0", amax_floor: float = 1e-4) -> None:
    check_at_least_one("act_quant_fp8", group_size=group_size)
    check_scale_format("act_quant_fp8", scale_format)
    check_amax_floor("act_quant_fp8", amax_floor, E4M3_MAX)


def cost(x: Tensor, group_size: int = 128, scale_format: str = "ue8m0", amax_floor: float = 1e-4) -> Cost:
    rows = x.numel() // max(x.shape[-1], 1)
    groups = rows * groups_of(x.shape[-1], group_size)
    return Cost(
        flops=4 * x.numel(),  # magnitude, maximum, division, clamp
        bytes_read=x.nbytes,
        bytes_written=x.numel() + groups * SCALE_FORMATS[scale_format].itemsize,
    )


def samples(make: Make) -> Iterator[Sample]:
    yield Sample("hidden_4096", "model", x=make.normal(8, 4096))
    yield Sample("hidden_4096_float32_scale", "model", x=make.normal(8, 4096), scale_format="float32")
    yield Sample("latent_group_64", x=make.normal(5, 448), group_size=64)
    yield Sample("group_32", x=make.normal(2, 3, 96), group_size=32)
    short = make.normal(3, 200)
    short[:, 128:] *= 64
    yield Sample("short_last_group", x=short)
    # The largest of a group is its first or its last.
    ends = make.normal(4, 256)
    ends[0, 127], ends[1, 128], ends[2, 255], ends[3, 0] = 64, -64, -64, 64
    yield Sample("amax_at_the_ends", x=ends)
    yield Sample("short_only_group", x=make.normal(3, 5), scale_format="float32")
    yield Sample("one_vector", x=make.normal(256))
    yield Sample("permuted_axes", x=make.normal(3, 5, 64).transpose(0, 1), group_size=32)
    yield Sample("no_rows", x=make.normal(0, 256))
    # Groups far apart in size: a scale on the wrong axis shows.
    spread = torch.exp2(torch.arange(-6.0, 6.0, dtype=torch.float64)).repeat_interleave(32)
    rows = make.normal(4, 384, dtype=torch.float64) * spread.to(make.device)
    yield Sample("groups_of_all_sizes", "exact", x=rows.to(make.dtype), group_size=32)
    # One group each: the scale steps up one ulp above 448*2^j.
    ulp = 256 * torch.finfo(make.dtype).eps
    edges = [[(448.0 + step) * 2.0**j] for j in (-8, 0, 5) for step in (-ulp, 0.0, ulp)]
    yield Sample("amax_at_a_power_of_two", "exact", x=make.tensor(edges))
    yield Sample("zero_and_tiny", "exact", x=make.tensor([[0.0, 0.0], [1e-5, -3e-5], [1e-4, 5e-5], [-0.0, 0.0]]))
    yield Sample("floor_of_flashmla", x=make.normal(4, 64, std=1e-3), amax_floor=448 * 2.0**-13, group_size=64)
    # x/scale on the grid of e4m3, halfway between its neighbours, and in its subnormal range.
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    halfway = torch.cat((grid, (grid[1:] + grid[:-1]) / 2, grid[-1:]))
    codes = torch.stack((halfway, -halfway)).tolist()
    yield Sample("codes_and_ties", "exact", x=make.tensor(codes), group_size=254)


def errors(make: Make) -> Iterator[ErrorSample]:
    x = make.normal(2, 256)
    says = "act_quant_fp8: group_size must be at least 1; got 0."
    yield ErrorSample("zero_group", x=x, group_size=0, says=says)
    says = "act_quant_fp8: scale_format must be 'ue8m0' or 'float32'; got 'e8m0'."
    yield ErrorSample("unknown_scale_format", x=x, scale_format="e8m0", says=says)
    says = "act_quant_fp8: amax_floor must be at least 448*2^-126; got 0.0."
    yield ErrorSample("no_floor", x=x, amax_floor=0.0, says=says)
    says = "act_quant_fp8: x must be bfloat16, float16, float32 or float64; got int8."
    yield ErrorSample("integer_x", x=x.to(torch.int8), says=says)


def relations(make: Make) -> Iterator[Relation]:
    call = {"x": make.normal(7, 300), "group_size": 64}
    yield scaled("x_times_8", call, {"x": 3}, [0, 3])
    yield scaled("float32_scales_times_8", {**call, "scale_format": "float32"}, {"x": 3}, [0, 3])
    yield joined("rows_apart", call, [1, 4], ["x"])
    yield scaled("v3_width_times_8", {"x": make.normal(3, 7168)}, {"x": 3}, [0, 3])


act_quant_fp8 = Operator(
    name="act_quant_fp8",
    shapes="x[... hidden] -> q[... hidden] scale[... (hidden+group_size-1)//group_size]",
    dtypes={"x": FLOAT},
    reference=reference,
    variants=(by_inverses, by_inverse_scale, by_inverse_amax),
    fake=fake,
    check=check,
    cost=cost,
    samples=samples,
    errors=errors,
    unrounded=unrounded,
    relations=relations,
)
