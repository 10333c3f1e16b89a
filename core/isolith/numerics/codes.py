"""Number formats: e2m1 codes, scales, and the power-of-two rule of ue8m0.

"e4m3" is float8_e4m3fn, largest 448. "e2m1" is fp4: 0, .5, 1, 1.5, 2, 3, 4, 6 with a sign, code = sign<<3 | index, two
a byte along the last axis, the even column in the low nibble. "ue8m0" is a scale of value 2^(byte-127).
"""

from itertools import pairwise

import torch
from torch import Tensor

from isolith.dtypes import FLOAT_NAMES, listed
from isolith.errors import ArgumentError

E4M3_MAX = 448.0
E2M1_MAX = 6.0
INT8_MAX = 127.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SCALE_FORMATS = {"ue8m0": torch.float8_e8m0fnu, "float32": torch.float32}
"""What a `scale_format` argument may say, and the dtype that such scales are held in."""
SMALLEST_SCALE = 2.0**-126
"""The smallest normal float32; ue8m0 holds it too. A floor of amax must not lead below it."""


def ceil_power_of_two(ratio: Tensor) -> Tensor:
    """The smallest power of two that is at least `ratio`: float32, positive and normal."""
    bits = ratio.contiguous().view(torch.int32)
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def encode_e2m1(x: Tensor) -> Tensor:
    """float32 -> codes 0..15 (uint8), to nearest, ties to the even code, the sign of zero kept; beyond 6 saturates."""
    magnitude = x.abs()
    # Between neighbours i and i+1 the tie goes to the even code: up where i is odd, down where i is even.
    code = torch.zeros_like(x, dtype=torch.uint8)
    for lower, (low, high) in enumerate(pairwise(E2M1_VALUES)):
        middle = (low + high) / 2
        code += (magnitude >= middle) if lower % 2 else (magnitude > middle)
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def decode_e2m1(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes 0..15 -> values, exact in every float dtype."""
    table = torch.tensor((*E2M1_VALUES, *(-value for value in E2M1_VALUES)), dtype=dtype, device=codes.device)
    return table[codes.long()]


def pack_nibbles(codes: Tensor) -> Tensor:
    """[*, N] codes -> [*, N/2] bytes, the even column in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """[*, N/2] bytes -> [*, N] codes."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def decode(q: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of any kind as values: uint8 is packed e2m1; e4m3, int8 and floats are converted."""
    return decode_e2m1(unpack_nibbles(q), dtype) if q.dtype == torch.uint8 else q.to(dtype)


def spread_scale(scale: Tensor, rows: int, columns: int, block_n: int, block_k: int) -> Tensor:
    """[*, ceil(rows/block_n), ceil(columns/block_k)] -> [*, rows, columns]; the last blocks may be short."""
    if scale.dtype == torch.float8_e8m0fnu:
        scale = scale.to(torch.float32)  # exact, and every device can index it
    wide = scale.repeat_interleave(block_k, dim=-1)[..., :columns]
    return wide.repeat_interleave(block_n, dim=-2)[..., :rows, :]


def groups_of(size: int, group_size: int) -> int:
    """How many groups `size` elements make; the last may be short."""
    return -(-size // group_size)


def amax_of_groups(x: Tensor, group_size: int) -> Tensor:
    """[*, N] -> [*, ceil(N/group_size)]: the largest magnitude of each group, in float32; the last may be short."""
    groups = groups_of(x.shape[-1], group_size)
    padded = torch.nn.functional.pad(x.to(torch.float32).abs(), (0, groups * group_size - x.shape[-1]))
    return padded.reshape(*x.shape[:-1], groups, group_size).amax(-1)


def spread_groups(scale: Tensor, columns: int, group_size: int) -> Tensor:
    """[*, ceil(columns/group_size)] -> [*, columns]: the scale of each element's group."""
    return scale.repeat_interleave(group_size, dim=-1)[..., :columns]


def check_choice(operator: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ArgumentError unless the value of a string argument is one of the choices."""
    if value not in choices:
        raise ArgumentError(f"{operator}: {name} must be {listed(tuple(map(repr, choices)))}; got {value!r}.")


def check_scale_format(operator: str, scale_format: str) -> None:
    """Raise ArgumentError for a scale format that there is not."""
    check_choice(operator, "scale_format", scale_format, tuple(SCALE_FORMATS))


def check_out_dtype(operator: str, out_dtype: str) -> None:
    """Raise ArgumentError for an output dtype that there is not."""
    check_choice(operator, "out_dtype", out_dtype, tuple(FLOAT_NAMES))


def check_amax_floor(operator: str, amax_floor: float, largest: float) -> None:
    """Raise ArgumentError for a floor that would give a scale of 0, or a subnormal one; `largest` is the format's."""
    if not amax_floor >= largest * SMALLEST_SCALE:
        raise ArgumentError(f"{operator}: amax_floor must be at least {largest:g}*2^-126; got {amax_floor}.")


def check_at_least_one(operator: str, **sizes: int) -> None:
    """Raise ArgumentError unless every size given is at least 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ArgumentError(f"{operator}: {name} must be at least 1; got {size}.")
