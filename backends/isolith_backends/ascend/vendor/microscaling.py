"""Quantisation in blocks, on the newest chips.

Source: Ascend/op-plugin 517f2e7d docs of npu_dynamic_mx_quant (scale_alg 1 rounds amax / 448 up to a power of two, with
max_low_bound below amax), npu_dynamic_block_quant and npu_swiglu_group_quant; the Microscaling formats specification
v1.0 of the Open Compute Project for how a block's scale is chosen (scale_alg 0).
"""

from typing import Any

import torch
from torch import Tensor

from isolith_backends.ascend.vendor.rules import FLOATS, HALVES, need, need_dtype, poison
from isolith_backends.ascend.vendor.swiglu import glu

BLOCK, TILE, LARGEST_BLOCK = 32, 128, 1024
E4M3, E5M2, E2M1 = (24, 292), (23, 291), (296,)
"""Numbers of dtypes, of torch and of torch_npu."""
FP8 = {
    number: dtype for numbers, dtype in ((E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)) for number in numbers
}
LARGEST_EXPONENT = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15, torch.uint8: 2}
HALFWAY = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
"""Between the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4 and 6 of e2m1."""


def exponents(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The shared exponent of each block: that of its largest magnitude less that of the format's."""
    most = values.abs().amax(-1)
    return torch.where(most > 0, torch.frexp(most).exponent - 1 - LARGEST_EXPONENT[dtype], -127).clamp(-127, 127)


def rounded_up(values: Tensor, dtype: torch.dtype, least: float) -> Tensor:
    """The exponent of the power of two that amax / largest is rounded up to."""
    ratio = values.abs().amax(-1).clamp(min=least) / torch.finfo(dtype).max
    mantissa, exponent = torch.frexp(ratio)
    normal = torch.where(mantissa > 0.5, exponent, exponent - 1).clamp(max=127)
    below = torch.where(ratio > 2.0**-127, -126, -127)  # half of the smallest normal number
    return torch.where(ratio >= 2.0**-126, normal, below)


def e2m1(values: Tensor) -> Tensor:
    """Codes of four bits, half to even, two to a byte, the first in the low half."""
    magnitude = values.abs()
    code = torch.bucketize(magnitude, HALFWAY)
    tie = (magnitude[..., None] == HALFWAY).any(-1)
    code = code + (tie & (code % 2 == 1)).long()
    code = (code | (values.signbit().long() << 3)).to(torch.uint8)
    return code[..., ::2] | (code[..., 1::2] << 4)


def npu_dynamic_mx_quant(
    input: Tensor,
    axis: int,
    round_mode: str,
    dst_type: int,
    block_size: int,
    scale_alg: int | None,
    dst_type_max: float,
    max_low_bound: float,
) -> tuple[Tensor, Tensor]:
    """(codes, scales [.., blocks / 2, 2] as bytes); an odd block's neighbour is not written."""
    name = "npu_dynamic_mx_quant"
    need_dtype(name, "x", input, FLOATS)
    need(name, axis in (-1, input.dim() - 1), f"axis {axis} is not in this twin")
    need(name, block_size % BLOCK == 0 and 0 < block_size <= LARGEST_BLOCK, f"blocks of {block_size}")
    narrow = input.dtype != torch.float32 or (block_size == BLOCK and input.shape[-1] >= BLOCK)
    need(name, narrow, f"float32 {tuple(input.shape)} in blocks of {block_size}")
    need(name, dst_type in FP8 or dst_type in E2M1, f"dst_type is {dst_type}")
    algorithms = (None, 0, 1) if dst_type in FP8 else (None, 0)
    need(name, round_mode == "rint" and scale_alg in algorithms, f"round_mode {round_mode!r}, scale_alg {scale_alg}")
    need(name, dst_type_max == 0.0, "dst_type_max is not in this twin")
    need(name, max_low_bound == 0.0 or (scale_alg == 1 and max_low_bound > 0.0), f"max_low_bound is {max_low_bound}")
    need(name, input.numel() > 0 and (dst_type in FP8 or input.shape[-1] % 2 == 0), f"x is {tuple(input.shape)}")
    codes, shared = blocks(
        input.float(), FP8.get(dst_type, torch.uint8), block_size, max_low_bound if scale_alg else None
    )
    scales = poison((*shared.shape[:-1], -(-shared.shape[-1] // 2) * 2), torch.uint8)
    scales[..., : shared.shape[-1]] = (shared + 127).to(torch.uint8)
    return codes, scales.unflatten(-1, (-1, 2))


def blocks(values: Tensor, dtype: torch.dtype, size: int = BLOCK, least: float | None = None) -> tuple[Tensor, Tensor]:
    """(codes, shared exponents) of blocks, the last filled up with zeros; rounded up where there is a least amax."""
    columns = values.shape[-1]
    parts = torch.nn.functional.pad(values, (0, -columns % size)).unflatten(-1, (-1, size))
    shared = exponents(parts, dtype) if least is None else rounded_up(parts, dtype, least)
    scaled = torch.ldexp(parts, -shared[..., None]).flatten(-2)[..., :columns]
    if dtype == torch.uint8:
        return e2m1(scaled), shared
    most = torch.finfo(dtype).max
    return scaled.clamp(-most, most).to(dtype), shared


def npu_dynamic_block_quant(
    x: Tensor,
    min_scale: float,
    round_mode: str,
    dst_type: int,
    row_block_size: int,
    col_block_size: int,
    dst_type_max: float,
) -> tuple[Tensor, Tensor]:
    """fp8 codes and float32 scales amax / 448 of blocks of 1 by 128."""
    name = "npu_dynamic_block_quant"
    need_dtype(name, "x", x, HALVES)
    need(name, (row_block_size, col_block_size) == (1, TILE), f"blocks of {row_block_size} by {col_block_size}")
    need(name, round_mode == "rint" and dst_type_max == 0.0, f"round_mode is {round_mode!r}")
    need(name, dst_type in FP8, f"dst_type is {dst_type}; the default 1 is none of this operator's")
    need(name, x.shape[-1] % TILE == 0, f"x is {tuple(x.shape)}; this twin knows multiples of {TILE}")
    return tiles(x.float(), FP8[dst_type], min_scale)


def tiles(values: Tensor, dtype: torch.dtype, min_scale: float = 0.0) -> tuple[Tensor, Tensor]:
    """(codes, scales) of tiles of 128; a tile of zeros has scale 0 and codes that mean nothing."""
    parts = values.unflatten(-1, (-1, TILE))
    scale = parts.abs().amax(-1) / torch.finfo(dtype).max
    scale = scale.clamp(max=1 / min_scale) if min_scale else scale  # the document's formula, whatever its name
    return (parts / scale[..., None]).to(dtype).flatten(-2), scale


def npu_swiglu_group_quant(
    x: Tensor,
    weight: Tensor | None,
    group_index: Tensor | None,
    dst_type: int,
    quant_mode: int,
    clamp_limit: float,
    output_origin: bool,
    **rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch_npu's: quant_mode 0 by tiles of 128, 1 by microscaling blocks; the weight of a token comes before."""
    name = "npu_swiglu_group_quant"
    need_dtype(name, "x", x, HALVES)
    need(name, rest["scale"] is None and not rest["round_scale"], "scale and round_scale are not in this twin")
    need(name, quant_mode in (0, 1) and dst_type in FP8, f"quant_mode is {quant_mode}, dst_type {dst_type}")
    gate, up = x.float().chunk(2, -1)
    out = glu(gate, up, clamp_limit, 1.0, 0.0)
    if weight is not None:
        out = out * weight.float().view(-1, 1)
    count = x.shape[0]
    if group_index is not None:
        need_dtype(name, "group_index", group_index, (torch.int64,))
        count = int(group_index.sum())
    origin = out.to(x.dtype) if output_origin else poison((0,), x.dtype)
    if quant_mode == 0:
        codes, scale = tiles(out, FP8[dst_type])
    else:
        codes, shared = blocks(out, FP8[dst_type])
        scale = (shared + 127).to(torch.uint8).unflatten(-1, (-1, 2))
    codes.view(torch.uint8)[count:] = 0x7F  # NaN in both formats
    scale[count:] = poison(scale[count:].shape, scale.dtype)
    return codes, scale, origin
