"""Right rotations, computed otherwise than the references."""

import math

import torch
from variation import right

RIGHT = []


def places(x, pairs, interleaved, rope_first):
    """Indices of both halves of every pair."""
    start = 0 if rope_first else x.shape[-1] - 2 * pairs
    first = torch.arange(pairs)
    return (start + 2 * first, start + 2 * first + 1) if interleaved else (start + first, start + first + pairs)


def angles(x, positions, table):
    rows = table[positions.long()]
    return rows if x.dim() == 2 else rows[:, None]


def turned(x, positions, cos_table, sin_table, inverse, interleaved, rope_first, rotate, wide=torch.float32):
    first, second = places(x, cos_table.shape[1], interleaved, rope_first)
    cos, sin = angles(x, positions, cos_table).to(wide), angles(x, positions, sin_table).to(wide)
    a, b = rotate(x[..., first].to(wide), x[..., second].to(wide), cos, -sin if inverse else sin)
    y = x.clone(memory_format=torch.contiguous_format)
    y[..., first], y[..., second] = a.to(x.dtype), b.to(x.dtype)
    return y


@right(RIGHT, "rope")
def products_then_sums(**call):
    return turned(**call, rotate=lambda a, b, cos, sin: (-(b * sin) + a * cos, b * cos + a * sin))


@right(RIGHT, "rope")
def turned_in_float64(**call):
    return turned(**call, rotate=lambda a, b, cos, sin: (a * cos - b * sin, a * sin + b * cos), wide=torch.float64)


@right(RIGHT, "rope")
def fused_over_sine(**call):
    """The product with the cosine rounded, that with the sine not."""

    def rotate(a, b, cos, sin):
        a_cos, b_cos = (a * cos).double(), (b * cos).double()
        return (a_cos - b.double() * sin.double()).float(), (b_cos + a.double() * sin.double()).float()

    return turned(**call, rotate=rotate)


@right(RIGHT, "rope")
def complex_product(**call):
    def rotate(a, b, cos, sin):
        z = torch.complex(a, b) * torch.complex(cos.expand(a.shape), sin.expand(a.shape))
        return z.real, z.imag

    return turned(**call, rotate=rotate)


@right(RIGHT, "rope")
def neighbours_swapped_and_signed(x, positions, cos_table, sin_table, inverse, interleaved, rope_first):
    """x*cos + rotated(x)*sin with every column of the tables twice, on a copy in chunks of two tokens."""
    first, second = places(x, cos_table.shape[1], interleaved, rope_first)
    y = x.contiguous().clone()
    for start in range(0, x.shape[0], 2):
        part, at = x[start : start + 2], positions[start : start + 2]
        cos, sin = angles(part, at, cos_table), angles(part, at, sin_table) * (-1.0 if inverse else 1.0)
        both = torch.cat((first, second))
        values, partners = part[..., both].float(), part[..., torch.cat((second, first))].float()
        signs = torch.cat((-torch.ones(len(first)), torch.ones(len(first))))
        y[start : start + 2, ..., both] = (
            values * torch.cat((cos, cos), -1) + partners * torch.cat((sin, sin), -1) * signs
        ).to(x.dtype)
    return y


def recursive(x):
    """H of n in terms of H of n/2: the sums, then the differences, of both halves."""
    n = x.shape[-1]
    if n == 1:
        return x
    low, high = x[..., : n // 2], x[..., n // 2 :]
    return torch.cat((recursive(low + high), recursive(low - high)), -1)


def matrix(n, dtype=torch.float32):
    index = torch.arange(n)
    shared = index[:, None] & index
    parity = sum((shared >> bit) & 1 for bit in range(max(n.bit_length(), 1))) % 2
    return 1 - 2 * parity.to(dtype)


@right(RIGHT, "hadamard")
def by_halves(x):
    return (recursive(x.float()) * (1 / math.sqrt(x.shape[-1]))).to(x.dtype)


@right(RIGHT, "hadamard")
def divided_by_the_root(x):
    return (recursive(x.float()) / math.sqrt(x.shape[-1])).to(x.dtype)


@right(RIGHT, "hadamard")
def halved_at_every_second_step(x):
    y, bits = x.float(), x.shape[-1].bit_length() - 1
    for bit in range(bits):
        low, high = y.unflatten(-1, (-1, 2, 1 << bit)).unbind(-2)
        y = torch.stack((low + high, low - high), -2).flatten(-3) * (0.5 if bit % 2 else 1.0)
    return (y * (math.sqrt(0.5) if bits % 2 else 1.0)).to(x.dtype)


@right(RIGHT, "hadamard")
def by_the_scaled_matrix(x):
    return (x.float() @ (matrix(x.shape[-1]) / math.sqrt(x.shape[-1]))).to(x.dtype)


@right(RIGHT, "hadamard")
def by_two_small_matrices(x):
    """H of n is the Kronecker product of two smaller ones: a product on the left, one on the right."""
    n = x.shape[-1]
    rows = 1 << ((n.bit_length() - 1) // 2)
    block = x.float().unflatten(-1, (rows, n // rows))
    return (matrix(rows) @ (block @ matrix(n // rows)) / math.sqrt(n)).flatten(-2).to(x.dtype)


@right(RIGHT, "hadamard")
def columns_from_the_last(x):
    total, signs = torch.zeros(x.shape), matrix(x.shape[-1])
    for column in reversed(range(x.shape[-1])):
        total = total + x[..., column, None].float() * signs[column]
    return (total / math.sqrt(x.shape[-1])).to(x.dtype)


@right(RIGHT, "hadamard")
def rotated_in_float64(x):
    return (x.double() @ matrix(x.shape[-1], torch.float64) / math.sqrt(x.shape[-1])).to(x.dtype)
