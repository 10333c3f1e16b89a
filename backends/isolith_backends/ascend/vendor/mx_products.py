"""Products of e4m3 with a scale for every 32 elements, or for tiles of 128, on the newest chips.

Source: Ascend/op-plugin docs of npu_quant_matmul and npu_grouped_matmul, with the shapes of CANN's aclnnQuantMatmulV5
and aclnnGroupedMatmulV5 (MX: scales of K in pairs, ceil(K / 64) of them; weight and scale transposed alike);
vllm-ascend 182b75ea vllm_ascend/quantization/methods (w8a8_mxfp8.py, fp8.py: group_sizes [1, 1, 32], scale dtypes 293).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from isolith_backends.ascend.vendor.rules import need, need_dtype, need_shape
from isolith_backends.ascend.vendor.soc import current

BLOCK, TILE, E8M0 = 32, 128, 293
OUTPUTS = {5: torch.float16, 6: torch.float32, 15: torch.bfloat16}


def values(codes: Tensor, scales: Tensor) -> Tensor:
    """[.., K] codes times 2^(byte - 127) of [.., pairs, 2] bytes, in float32; byte 255 is no number."""
    exponents = scales.view(torch.uint8).int() - 127
    powers = torch.ldexp(torch.ones(exponents.shape), exponents)
    powers = torch.where(exponents == 128, float("nan"), powers).flatten(-2)
    return codes.float() * powers.repeat_interleave(BLOCK, dim=-1)[..., : codes.shape[-1]]


def is_transposed(tensor: Tensor, first: int, second: int) -> bool:
    """Whether a tensor is a view of a dense one with two axes exchanged."""
    return tensor.transpose(first, second).is_contiguous()


def check(name: str, x: Tensor, weight: Tensor, scale: Tensor, of_rows: Tensor, dtypes: Sequence[int | None]) -> None:
    """The rules of operands [M, K] and [.., K, N] and of their scales."""
    need(name, current().name == "A5", f"x is {x.dtype}")
    need_dtype(name, "x", x, (torch.float8_e4m3fn,))
    need_dtype(name, "weight", weight, (torch.float8_e4m3fn,))
    need(name, tuple(dtypes) == (E8M0, E8M0), f"dtypes of scales are {tuple(dtypes)}, not {E8M0}")
    need(name, x.dim() == 2 and x.numel() > 0 and weight.numel() > 0, f"{tuple(x.shape)} by {tuple(weight.shape)}")
    need(name, x.is_contiguous() and x.shape[1] == weight.shape[-2], f"{tuple(x.shape)} by {tuple(weight.shape)}")
    pairs = -(-x.shape[1] // (2 * BLOCK))
    for which, tensor in (("scale", scale), ("the scale of rows", of_rows)):
        need_dtype(name, which, tensor, (torch.uint8, torch.float8_e8m0fnu))
    need_shape(name, "scale", scale, (*weight.shape[:-2], pairs, weight.shape[-1], 2))
    need_shape(name, "the scale of rows", of_rows, (x.shape[0], pairs, 2))
    need(name, of_rows.is_contiguous(), f"the strides of the scale of rows are {of_rows.stride()}")
    whole = weight.is_contiguous() and scale.is_contiguous()
    turned = is_transposed(weight, -1, -2) and is_transposed(scale, -2, -3)
    need(name, whole or turned, "weight and scale are transposed alike, or neither is")


def mx_matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    of_rows: Tensor,
    dtypes: Sequence[int | None],
    groups: Sequence[int] | None,
    output: int | None,
) -> Tensor:
    """npu_quant_matmul of e4m3."""
    name = "npu_quant_matmul"
    need(name, list(groups or ()) in ([1, 1, BLOCK], [0, 0, BLOCK]), f"group_sizes is {groups}")
    need(name, output in OUTPUTS, f"output_dtype is {output}")
    check(name, x, weight, scale, of_rows, dtypes)
    product = values(x, of_rows) @ values(weight.T, scale.transpose(0, 1)).T
    return product.to(OUTPUTS[output or 0])


def mx_grouped_matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    of_rows: Tensor,
    dtypes: Sequence[int | None],
    output: int | None,
    sizes: Sequence[int],
) -> Tensor:
    """npu_grouped_matmul of e4m3, over rows in segments; what is behind them is not written."""
    name = "npu_grouped_matmul"
    need(name, output in OUTPUTS, f"output_dtype is {output}")
    check(name, x, weight, scale, of_rows, dtypes)
    out = torch.full((x.shape[0], weight.shape[2]), float("nan"), dtype=OUTPUTS[output or 0])
    wide, start = values(x, of_rows), 0
    for expert, size in enumerate(sizes):
        at = slice(start, start + size)
        if size:
            matrix = values(weight[expert].T, scale[expert].transpose(0, 1)).T
            out[at] = (wide[at] @ matrix).to(out.dtype)
        start += size
    return out


def tiled_grouped_matmul(
    x: Tensor, weight: Tensor, scale: Tensor, of_rows: Tensor, output: int | None, sizes: Sequence[int]
) -> Tensor:
    """npu_grouped_matmul of e4m3 with float32 scales for 128 by 128 of a weight and for 128 columns of a row."""
    name, (rows, inner), (experts, _, columns) = "npu_grouped_matmul", x.shape, weight.shape
    need(name, current().name == "A5" and output in OUTPUTS, f"x is {x.dtype}, output_dtype {output}")
    need_dtype(name, "weight", weight, (x.dtype,))
    need(name, x.numel() > 0 and weight.numel() > 0 and inner == weight.shape[1], f"{x.shape} by {weight.shape}")
    tiles = [-(-size // TILE) for size in (inner, columns)]
    for which, tensor, shape in (("scale", scale, (experts, *tiles)), ("per_token_scale", of_rows, (rows, tiles[0]))):
        need_dtype(name, which, tensor, (torch.float32,))
        need_shape(name, which, tensor, shape)
    whole = weight.is_contiguous() and scale.is_contiguous()
    turned = is_transposed(weight, -1, -2) and is_transposed(scale, -1, -2)
    need(name, whole or turned, "weight and scale are transposed alike, or neither is")
    out = torch.full((rows, columns), float("nan"), dtype=OUTPUTS[output or 0])
    k, n = (torch.arange(size) // TILE for size in (inner, columns))
    wide, start = x.float() * of_rows[:, k], 0
    for expert, size in enumerate(sizes):
        at = slice(start, start + size)
        if size:
            out[at] = (wide[at] @ (weight[expert].float() * scale[expert][k][:, n])).to(out.dtype)
        start += size
    return out
