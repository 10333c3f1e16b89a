"""Right quantisations, values and products, computed otherwise than the references."""

import math

import torch
from variation import right

RIGHT = []
E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def in_groups(x, size):
    """[..., groups, size] with zeros behind the last."""
    return torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def power_of_two_at_least(ratio):
    mantissa, exponent = torch.frexp(ratio)
    return torch.ldexp(torch.ones_like(ratio), exponent - (mantissa == 0.5).int())


def nearest_e4m3(values):
    """By rounding to multiples of the step of the value's binade."""
    exponent = (torch.frexp(values.abs())[1] - 1).clamp(min=-6)
    step = torch.ldexp(torch.ones_like(values), exponent - 3)
    return ((values / step).round() * step).clamp(-448, 448).to(torch.float8_e4m3fn)


def fp8(x, group_size, scale_format, amax_floor, quotient):
    """Codes and scales; `quotient` takes groups, scales and amax."""
    if not x.numel():
        shape = (*x.shape[:-1], -(-x.shape[-1] // group_size))
        dtype = torch.float8_e8m0fnu if scale_format == "ue8m0" else torch.float32
        return x.to(torch.float8_e4m3fn), torch.empty(shape).to(dtype)
    groups = in_groups(x, group_size)
    amax = torch.maximum(groups.amax(-1), -groups.amin(-1)).clamp(min=amax_floor)
    scale = amax / 448
    if scale_format == "ue8m0":
        scale = power_of_two_at_least(scale)
    q = nearest_e4m3(quotient(groups, scale[..., None], amax[..., None])).flatten(-2)[..., : x.shape[-1]]
    return q.contiguous(), scale.to(torch.float8_e8m0fnu if scale_format == "ue8m0" else torch.float32)


@right(RIGHT, "act_quant_fp8")
def fp8_divided(**call):
    return fp8(**call, quotient=lambda groups, scale, amax: groups / scale)


@right(RIGHT, "act_quant_fp8")
def fp8_times_the_inverse(**call):
    return fp8(**call, quotient=lambda groups, scale, amax: groups * (1 / scale))


@right(RIGHT, "act_quant_fp8")
def fp8_divided_by_amax_first(scale_format, **call):
    def quotient(groups, scale, amax):
        return groups / scale if scale_format == "ue8m0" else groups * (448 / amax)

    return fp8(**call, scale_format=scale_format, quotient=quotient)


@right(RIGHT, "act_quant_fp8")
def fp8_with_scales_by_the_inverse_of_448(x, group_size, scale_format, amax_floor):
    q, scale = fp8(x, group_size, scale_format, amax_floor, lambda groups, scale, amax: groups / scale)
    if scale_format == "ue8m0" or not x.numel():
        return q, scale
    groups = in_groups(x, group_size)
    amax = groups.abs().amax(-1).clamp(min=amax_floor)
    scale = amax * torch.tensor(1 / 448)
    return nearest_e4m3(groups / scale[..., None]).flatten(-2)[..., : x.shape[-1]].contiguous(), scale


@right(RIGHT, "act_quant_fp8")
def fp8_row_after_row(x, **call):
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x
    if not x.numel():
        return fp8_divided(x=x, **call)
    made = [fp8_times_the_inverse(x=row, **call) for row in rows]
    scales = torch.stack([scale.view(torch.uint8) for _, scale in made]).view(made[0][1].dtype)
    return torch.stack([q for q, _ in made]).view(x.shape), scales.view(*x.shape[:-1], -1)


def fp4(x, group_size, amax_floor, encode):
    groups = in_groups(x, group_size)
    scale = power_of_two_at_least(groups.abs().amax(-1).clamp(min=amax_floor) / 6)
    codes = encode(groups * (1 / scale)[..., None]).flatten(-2)
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8), scale.to(torch.float8_e8m0fnu)


def by_steps(values):
    """To a multiple of 1/2 below 2, of 1 below 4, of 2 above: torch's round takes ties to the even multiple."""
    magnitude = values.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    rounded = (magnitude / step).round() * step
    code = torch.searchsorted(E2M1, rounded.contiguous())
    return torch.where(values < 0, code + 8, code)


def by_distance(values):
    """The nearest of the table; between two at the same distance the even code. Zero has no sign."""
    distance = (values.abs()[..., None].double() - E2M1.double()).abs()
    odd = torch.arange(8) % 2
    code = (distance + 1e-12 * odd).argmin(-1)
    return torch.where((values < 0) & (code > 0), code + 8, code)


@right(RIGHT, "act_quant_fp4")
def fp4_by_steps(**call):
    return fp4(**call, encode=by_steps)


@right(RIGHT, "act_quant_fp4")
def fp4_by_distance(**call):
    return fp4(**call, encode=by_distance)


@right(RIGHT, "act_quant_fp4")
def fp4_by_bits(**call):
    """In a pattern whose mantissa keeps one bit: add half a unit, and the lowest bit kept."""

    def encode(values):
        # Times 2^-1022 a value below 1 is subnormal in float64, as it is in e2m1, and keeps its 24 bits.
        bits = (values.abs().double() * 2.0**-1022).view(torch.int64)
        code = (bits + (1 << 50) - 1 + ((bits >> 51) & 1)) >> 51
        return torch.where(torch.signbit(values), code + 8, code)

    return fp4(**call, encode=encode)


def int8(x, smooth, amax_floor, quotient):
    values = x.float() if smooth is None else x.float() * smooth.float()
    amax = (
        values.abs().amax(-1, True).clamp(min=amax_floor) if x.shape[-1] else torch.full((*x.shape[:-1], 1), amax_floor)
    )
    scale = amax / 127
    return quotient(values, scale, amax).round().to(torch.int8), scale


@right(RIGHT, "act_quant_int8")
def int8_divided(**call):
    return int8(**call, quotient=lambda values, scale, amax: values / scale)


@right(RIGHT, "act_quant_int8")
def int8_times_the_inverse(**call):
    return int8(**call, quotient=lambda values, scale, amax: values * (1 / scale))


@right(RIGHT, "act_quant_int8")
def int8_times_127_over_amax(**call):
    return int8(**call, quotient=lambda values, scale, amax: values * (127 / amax))


@right(RIGHT, "act_quant_int8")
def int8_scaled_by_the_inverse_of_127(x, smooth, amax_floor):
    q, scale = int8(x, smooth, amax_floor, lambda values, scale, amax: values / (amax * torch.tensor(1 / 127)))
    return q, (scale * 127) * torch.tensor(1 / 127)


@right(RIGHT, "act_quant_int8")
def int8_rounded_by_a_large_number(x, smooth, amax_floor):
    """1.5 * 2^23 has no bits behind the point: adding it rounds to nearest, ties to even."""
    return int8(x, smooth, amax_floor, lambda values, scale, amax: (values / scale + 12582912.0) - 12582912.0)


def values_of(q, dtype=torch.float32):
    if q.dtype != torch.uint8:
        return q.to(dtype)
    codes = torch.empty(*q.shape[:-1], 2 * q.shape[-1], dtype=torch.long)
    codes[..., 0::2], codes[..., 1::2] = q & 15, q >> 4
    return torch.cat((E2M1, -E2M1)).to(dtype)[codes]


def scale_at(scale, rows, columns, block_n, block_k, dtype=torch.float32):
    """The scale of every element, by its indices."""
    row, column = torch.arange(rows) // block_n, torch.arange(columns) // block_k
    return scale.to(dtype)[..., row[:, None], column]


@right(RIGHT, "block_dequant")
def by_index(q, scale, block_n, block_k, out_dtype):
    values = values_of(q)
    return (values * scale_at(scale, *values.shape[-2:], block_n, block_k)).to(FLOATS[out_dtype])


@right(RIGHT, "block_dequant")
def by_index_in_float64(q, scale, block_n, block_k, out_dtype):
    values = values_of(q, torch.float64)
    return (values * scale_at(scale, *values.shape[-2:], block_n, block_k, torch.float64)).to(FLOATS[out_dtype])


@right(RIGHT, "block_dequant")
def block_after_block(q, scale, block_n, block_k, out_dtype):
    values = values_of(q)
    y = torch.empty(values.shape, dtype=FLOATS[out_dtype])
    for i in range(scale.shape[-2]):
        for j in range(scale.shape[-1]):
            part = (..., slice(i * block_n, (i + 1) * block_n), slice(j * block_k, (j + 1) * block_k))
            y[part] = scale[..., i, j, None, None].float() * values[part]
    return y


def quantised_rows(x, act_quant, weight, act_group, scale_format):
    """Float activations as codes and scales, as the argument or the weight asks."""
    wanted = act_quant
    if wanted == "auto":
        wanted = "int8" if weight.dtype == torch.int8 else "none" if weight.is_floating_point() else "fp8"
        wanted = "fp8" if weight.dtype == torch.float8_e4m3fn else wanted
    if wanted == "fp8":
        return fp8_divided(x=x, group_size=act_group, scale_format=scale_format, amax_floor=1e-4)
    return int8_divided(x=x, smooth=None, amax_floor=1e-10) if wanted == "int8" else (x, None)


def operands(
    x, weight, weight_scale, x_scale, act_quant, act_group, scale_format, block_n, block_k, dtype=torch.float32
):
    """Values of both sides."""
    if x_scale is None:
        x, x_scale = quantised_rows(x, act_quant, weight, act_group, scale_format)
    values, weights = x.to(dtype), values_of(weight, dtype)
    rows, columns = weights.shape
    if weight.dtype == torch.uint8:
        block_n, block_k = 1, 32
    if weight.dtype == torch.int8:
        block_n, block_k = 1, max(columns, 1)
    if weight_scale is not None:
        weights = weights * scale_at(weight_scale, rows, columns, block_n, block_k, dtype)
    if x_scale is not None:
        group = max(columns, 1) if x.dtype == torch.int8 else act_group
        values = values * x_scale.to(dtype)[..., torch.arange(columns) // group]
    return values, weights


def linear(out_dtype, multiply, **call):
    values, weights = operands(**call)
    return multiply(values, weights).to(FLOATS[out_dtype])


def one_by_one(values, weights):
    total = torch.zeros(*values.shape[:-1], weights.shape[0])
    for k in range(values.shape[-1]):
        total = total + values[..., k, None] * weights[:, k]
    return total


def in_blocks(values, weights, size):
    total = torch.zeros(*values.shape[:-1], weights.shape[0])
    for start in range(0, values.shape[-1], size):
        total = total + values[..., start : start + size] @ weights[:, start : start + size].T
    return total


@right(RIGHT, "quant_linear")
def inputs_one_by_one(**call):
    return linear(**call, multiply=one_by_one)


@right(RIGHT, "quant_linear")
def inputs_from_the_last(**call):
    return linear(**call, multiply=lambda values, weights: one_by_one(values.flip(-1), weights.flip(-1)))


@right(RIGHT, "quant_linear")
def blocks_of_16(**call):
    return linear(**call, multiply=lambda values, weights: in_blocks(values, weights, 16))


@right(RIGHT, "quant_linear")
def blocks_of_64(**call):
    return linear(**call, multiply=lambda values, weights: in_blocks(values, weights, 64))


@right(RIGHT, "quant_linear")
def eight_splits(**call):
    def multiply(values, weights):
        size = max(math.ceil(values.shape[-1] / 8), 1)
        parts = [in_blocks(a, b, 64) for a, b in zip(values.split(size, -1), weights.split(size, -1), strict=True)]
        return sum(reversed(parts))

    return linear(**call, multiply=multiply)


@right(RIGHT, "quant_linear")
def padded_to_whole_tiles(**call):
    def multiply(values, weights):
        outputs, tail = weights.shape[0], -values.shape[-1] % 64
        values = torch.nn.functional.pad(values, (0, tail))
        weights = torch.nn.functional.pad(weights, (0, tail, 0, -outputs % 64))
        return in_blocks(values, weights, 64)[..., :outputs]

    return linear(**call, multiply=multiply)


@right(RIGHT, "quant_linear")
def token_after_token(**call):
    def multiply(values, weights):
        rows = [weights @ row for row in values.reshape(-1, values.shape[-1])]
        return torch.stack(rows).view(*values.shape[:-1], -1) if rows else torch.zeros(*values.shape[:-1], len(weights))

    return linear(**call, multiply=multiply)


@right(RIGHT, "quant_linear")
def linear_in_float64(out_dtype, **call):
    values, weights = operands(**call, dtype=torch.float64)
    return (values @ weights.T).to(FLOATS[out_dtype])
