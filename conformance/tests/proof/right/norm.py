"""Right norms, computed otherwise than the reference."""

import torch
from variation import right

RIGHT = []


def stored(normed, weight, dtype, round_before_weight):
    """The product with the weight, in the order of roundings that the caller wants."""
    if round_before_weight:
        normed = normed.to(dtype).to(normed.dtype)
    return (normed * weight.to(normed.dtype)).to(dtype)


def one_by_one(squares):
    total = torch.zeros_like(squares[..., :1])
    for channel in range(squares.shape[-1]):
        total = total + squares[..., channel : channel + 1]
    return total


def in_lanes(squares, lanes=32):
    """Every lane adds a stride of columns, then the lanes are added in pairs."""
    padded = torch.nn.functional.pad(squares, (0, -squares.shape[-1] % lanes))
    total = padded.unflatten(-1, (-1, lanes)).sum(-2)
    while total.shape[-1] > 1:
        total = total[..., 0::2] + total[..., 1::2]
    return total


def in_splits(squares, splits=8):
    return torch.stack([part.sum(-1, keepdim=True) for part in squares.chunk(splits, -1)]).flip(0).sum(0)


def newton(values):
    """An estimate of the inverse root by its bits, and four steps of Newton's."""
    estimate = (0x5F3759DF - (values.view(torch.int32) >> 1)).view(torch.float32)
    for _ in range(4):
        estimate = estimate * (1.5 - 0.5 * values * estimate * estimate)
    return estimate


@right(RIGHT, "rms_norm")
def channels_added_one_by_one(x, weight, eps, round_before_weight):
    wide = x.float()
    factor = (one_by_one(wide.square()) / x.shape[-1] + eps).rsqrt()
    return stored(wide * factor, weight, x.dtype, round_before_weight)


@right(RIGHT, "rms_norm")
def channels_added_from_the_last(x, weight, eps, round_before_weight):
    wide = x.float()
    factor = 1 / (one_by_one(wide.flip(-1).square()) * (1 / x.shape[-1]) + eps).sqrt()
    return stored(wide * factor, weight, x.dtype, round_before_weight)


@right(RIGHT, "rms_norm")
def lanes_and_newton(x, weight, eps, round_before_weight):
    wide = x.float()
    factor = newton(in_lanes(wide.square()) / x.shape[-1] + eps)
    return stored(wide * factor, weight, x.dtype, round_before_weight)


@right(RIGHT, "rms_norm")
def splits_and_the_root_of_the_sum(x, weight, eps, round_before_weight):
    wide = x.float()
    # sqrt(n) * x / sqrt(sum + n*eps)
    factor = x.shape[-1] ** 0.5 / (in_splits(wide.square()) + x.shape[-1] * eps).sqrt()
    return stored(wide * factor, weight, x.dtype, round_before_weight)


@right(RIGHT, "rms_norm")
def weight_times_factor_first(x, weight, eps, round_before_weight):
    wide = x.float()
    factor = (in_lanes(wide.square(), 16) / x.shape[-1] + eps).rsqrt()
    if round_before_weight:
        return stored(wide * factor, weight, x.dtype, round_before_weight)
    return (wide * (factor * weight.float())).to(x.dtype)


@right(RIGHT, "rms_norm")
def in_float64(x, weight, eps, round_before_weight):
    wide = x.double()
    return stored(wide / (wide.square().mean(-1, True) + eps).sqrt(), weight, x.dtype, round_before_weight)


@right(RIGHT, "rms_norm")
def row_after_row(x, weight, eps, round_before_weight):
    rows = [channels_added_from_the_last(row[None], weight, eps, round_before_weight) for row in x.flatten(0, -2)]
    return torch.cat(rows).view(x.shape) if rows else torch.empty_like(x)


@right(RIGHT, "head_rms_norm")
def dims_added_one_by_one(x, eps):
    wide = x.float()
    return (wide * (one_by_one(wide.square()) / x.shape[-1] + eps).rsqrt()).to(x.dtype)


@right(RIGHT, "head_rms_norm")
def dims_added_from_the_last(x, eps):
    wide = x.float()
    return (wide / (one_by_one(wide.flip(-1).square()) / x.shape[-1] + eps).sqrt()).to(x.dtype)


@right(RIGHT, "head_rms_norm")
def dims_in_lanes_and_newton(x, eps):
    wide = x.float()
    return (wide * newton(in_lanes(wide.square()) * (1 / x.shape[-1]) + eps)).to(x.dtype)


@right(RIGHT, "head_rms_norm")
def root_of_the_sum(x, eps):
    wide = x.float()
    return (wide * (x.shape[-1] ** 0.5 / (in_splits(wide.square()) + x.shape[-1] * eps).sqrt())).to(x.dtype)


@right(RIGHT, "head_rms_norm")
def heads_in_float64(x, eps):
    wide = x.double()
    return (wide / (wide.square().mean(-1, True) + eps).sqrt()).to(x.dtype)


@right(RIGHT, "head_rms_norm")
def padded_to_512(x, eps):
    """Zeros behind the head, and a mean over the real dims."""
    wide = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % 512))
    return (wide * (in_lanes(wide.square(), 64) / x.shape[-1] + eps).rsqrt())[..., : x.shape[-1]].to(x.dtype)
