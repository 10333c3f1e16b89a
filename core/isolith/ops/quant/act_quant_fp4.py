"""Quantise activations to e2m1, two codes a byte, in groups along the last axis.

    amax[..., b]  = max(amax_floor, max_j |x[..., j]|)                      over the columns j of group b
    scale[..., b] = 2^ceil(log2(amax[..., b] / 6))
    code[..., j]  = e2m1(x[..., j] / scale[..., j // group_size]) = sign << 3 | index into {0, .5, 1, 1.5, 2, 3, 4, 6}
    q[..., i]     = code[..., 2i] | code[..., 2i+1] << 4                    the even column in the low nibble

Everything is computed in float32, for float64 input too. e2m1 rounds to nearest, ties to the even code: .25 -> 0,
.75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4. Nothing exceeds 6 * scale, so nothing saturates. A group of
zeros has q = 0 and the scale of the floor. NaN and infinite input: unspecified in its own group. The sign of a value
that rounds to zero is kept here (code 8); a kernel may clear it, and the samples hold no such value.

Source: TileKernels 36d9e45 tile_kernels/quant, convert_to_e2m1_bits (rounding, floor); DeepSeek-V4 inference/kernel.py,
fp4_act_quant; OCP Microscaling Formats v1.0, 5.3.3 (e2m1); DeepGEMM 54e2261 deep_gemm/utils/math.py (packing).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from isolith.dtypes import FLOAT
from isolith.errors import ArgumentError
from isolith.materials.relations import joined, scaled
from isolith.numerics.codes import (
    E2M1_MAX,
    amax_of_groups,
    ceil_power_of_two,
    check_amax_floor,
    encode_e2m1,
    groups_of,
    pack_nibbles,
    spread_groups,
)
from isolith.operator import Cost, Operator
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(x: Tensor, group_size: int = 32, amax_floor: float = 6 * 2.0**-126) -> tuple[Tensor, Tensor]:
    wide = x.contiguous().to(torch.float32)
    scale = ceil_power_of_two(amax_of_groups(wide, group_size).clamp(min=amax_floor) / E2M1_MAX)
    codes = encode_e2m1(wide / spread_groups(scale, x.shape[-1], group_size))
    return pack_nibbles(codes), scale.to(torch.float8_e8m0fnu)


def unrounded(x: Tensor, group_size: int, amax_floor: float, **_: object) -> tuple[Tensor, Tensor]:
    """(quotients, scales) in float64; NaN in groups that hold NaN or infinity."""
    wide = x.contiguous().to(torch.float32)
    amax = amax_of_groups(wide, group_size).clamp(min=amax_floor)
    scale = ceil_power_of_two(amax.nan_to_num(amax_floor, amax_floor) / E2M1_MAX).double()
    scale = scale.masked_fill(~amax.isfinite(), torch.nan)
    return wide.double() / spread_groups(scale, x.shape[-1], group_size), scale


def fake(x: Tensor, group_size: int = 32, amax_floor: float = 6 * 2.0**-126) -> tuple[Tensor, Tensor]:
    *leading, hidden = x.shape
    return (
        x.new_empty((*leading, hidden // 2), dtype=torch.uint8),
        x.new_empty((*leading, groups_of(hidden, group_size)), dtype=torch.float8_e8m0fnu),
    )


def check(x: Tensor, group_size: int = 32, amax_floor: float = 6 * 2.0**-126) -> None:
    if group_size < 2 or group_size % 2:
        raise ArgumentError(f"act_quant_fp4: group_size must be even, at least 2; got {group_size}.")
    if x.shape[-1] % group_size:
        raise ArgumentError(
            f"act_quant_fp4: x must have columns in multiples of group_size = {group_size}; got {x.shape[-1]}."
        )
    check_amax_floor("act_quant_fp4", amax_floor, E2M1_MAX)


def cost(x: Tensor, group_size: int = 32, amax_floor: float = 6 * 2.0**-126) -> Cost:
    return Cost(
        flops=4 * x.numel(),  # magnitude, maximum, division, rounding
        bytes_read=x.nbytes,
        bytes_written=x.numel() // 2 + x.numel() // group_size,
    )


def without_negative_zeros(x: Tensor, group_size: int = 32) -> Tensor:
    """x with the negative values that may round to zero made positive: a kernel may keep or clear their sign."""
    groups = x.unflatten(-1, (-1, group_size)) if x.numel() else x[..., None]
    small = groups.abs() * 12 <= groups.abs().amax(-1, keepdim=True)  # scale/4, and scale < amax/3
    return torch.where(small, groups.abs(), groups).reshape(x.shape)


def samples(make: Make) -> Iterator[Sample]:
    yield Sample("indexer_queries", "model", x=without_negative_zeros(make.normal(4, 64, 128)))
    yield Sample("one_vector", x=without_negative_zeros(make.normal(64)))
    yield Sample("group_16", x=without_negative_zeros(make.normal(3, 48), 16), group_size=16)
    x = without_negative_zeros(make.normal(3, 5, 64))
    yield Sample("permuted_axes", x=x.transpose(0, 1))
    yield Sample("no_rows", x=make.normal(0, 64))
    # Groups far apart in size: a scale on the wrong axis shows.
    spread = torch.exp2(torch.arange(-6.0, 6.0, dtype=torch.float64)).repeat_interleave(32).to(make.device)
    rows = make.normal(4, 384, dtype=torch.float64) * spread
    yield Sample("groups_of_all_sizes", x=without_negative_zeros(rows.to(make.dtype)))
    # The largest of a group is its first or its last.
    ends = make.normal(4, 64).abs()
    ends[0, 31], ends[1, 32], ends[2, 63], ends[3, 0] = 64, -64, -64, 64
    yield Sample("amax_at_the_ends", x=ends)
    # All codes but -0, in an order that swapped nibbles change; then the halves, which go to the even code.
    codes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, -6.0]
    yield Sample("codes_and_ties", "exact", x=make.tensor([codes + ties, ties + codes]))
    # Beside the ties: one ulp decides.
    ulp = torch.finfo(make.dtype).eps
    beside = [0.25 * (1 + ulp), 0.25 * (1 - ulp), -0.75 * (1 - ulp), 1.25 * (1 + ulp), 1.75 * (1 - ulp), -5 * (1 + ulp)]
    yield Sample("beside_the_ties", "exact", x=make.tensor([[*beside, 6.0, 0.0]]), group_size=8)
    # One pair each: the scale steps up one ulp above 6*2^j.
    edges = [[(6.0 + step) * 2.0**j, 2.0**j] for j in (-8, 0, 5) for step in (-4 * ulp, 0.0, 4 * ulp)]
    yield Sample("amax_at_a_power_of_two", "exact", x=make.tensor(edges), group_size=2)
    yield Sample("zero_and_subnormal", "exact", x=make.tensor([[0.0, 0.0], [1e-7, 6e-8], [0.0, 1.0]]), group_size=2)
    floor = without_negative_zeros(make.normal(4, 32, std=1e-5))
    yield Sample("floor_of_deepgemm", x=floor.abs(), amax_floor=1e-4)
    yield Sample("floor_at_a_power_of_two", x=floor.abs(), amax_floor=6 * 2.0**-16)


def errors(make: Make) -> Iterator[ErrorSample]:
    x = make.normal(2, 64)
    says = "act_quant_fp4: x must have columns in multiples of group_size = 32; got 40."
    yield ErrorSample("short_group", x=x[:, :40], says=says)
    says = "act_quant_fp4: group_size must be even, at least 2; got 0."
    yield ErrorSample("zero_group", x=x, group_size=0, says=says)
    says = "act_quant_fp4: group_size must be even, at least 2; got 1."
    yield ErrorSample("odd_group", x=x, group_size=1, says=says)
    says = "act_quant_fp4: amax_floor must be at least 6*2^-126; got 0.0."
    yield ErrorSample("no_floor", x=x, amax_floor=0.0, says=says)
    says = "act_quant_fp4: x must be bfloat16, float16, float32 or float64; got int8."
    yield ErrorSample("integer_x", x=x.to(torch.int8), says=says)


def relations(make: Make) -> Iterator[Relation]:
    call = {"x": make.normal(7, 320)}
    yield scaled("x_times_8", call, {"x": 3}, [0, 3])
    yield joined("rows_apart", call, [1, 4], ["x"])
    yield scaled("flash_times_8", {"x": make.normal(3, 64, 128)}, {"x": 3}, [0, 3])


act_quant_fp4 = Operator(
    name="act_quant_fp4",
    shapes="x[... hidden] -> q[... hidden//2] scale[... hidden//group_size]",
    dtypes={"x": FLOAT},
    reference=reference,
    variants=(),
    fake=fake,
    check=check,
    cost=cost,
    samples=samples,
    errors=errors,
    unrounded=unrounded,
    relations=relations,
)
