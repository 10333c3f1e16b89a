"""Values of quantised codes with one scale a block.

    y[..., n, k] = code[..., n, k] * scale[..., n // block_n, k // block_k]

Codes are e4m3, int8 or packed e2m1 (uint8 [..., N, K/2], the even column in the low nibble); scales are e8m0 or
float32, and only their value counts. The last blocks may be short. The blocks are as given whatever the codes:
activations have block_n = 1 and block_k = the group, e2m1 weights 1 and 32, int8 weights 1 and K. The product is taken
in float32 (float64 for out_dtype "float64") and rounded to out_dtype, or rounded once; with e8m0 scales it is exact in
bfloat16 and float32, down to the subnormal numbers.

Source: DeepSeek-V3 inference/kernel.py, weight_dequant; DeepGEMM 54e2261 deep_gemm/utils/math.py (e2m1 packing).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from isolith.dtypes import E4M3, FLOAT_NAMES, INT8, PACKED, SCALE, widen
from isolith.errors import ArgumentError
from isolith.numerics.codes import check_at_least_one, check_out_dtype, decode, groups_of, spread_scale
from isolith.numerics.scaled_matmul import inner_of
from isolith.operator import Cost, Operator
from isolith.sample import ErrorSample, Make, Sample


def reference(q: Tensor, scale: Tensor, block_n: int = 128, block_k: int = 128, out_dtype: str = "bfloat16") -> Tensor:
    wide = widen(FLOAT_NAMES[out_dtype])
    values = decode(q, wide)
    spread = spread_scale(scale, values.shape[-2], values.shape[-1], block_n, block_k)
    return (values * spread.to(wide)).to(FLOAT_NAMES[out_dtype]).contiguous()


def one_rounding(
    q: Tensor, scale: Tensor, block_n: int = 128, block_k: int = 128, out_dtype: str = "bfloat16"
) -> Tensor:
    """The exact product, rounded once to out_dtype."""
    values = decode(q, torch.float64)
    spread = spread_scale(scale, values.shape[-2], values.shape[-1], block_n, block_k)
    return (values * spread.to(torch.float64)).to(FLOAT_NAMES[out_dtype]).contiguous()


def fake(q: Tensor, out_dtype: str, **_: object) -> Tensor:
    return q.new_empty((*q.shape[:-1], inner_of(q)), dtype=FLOAT_NAMES[out_dtype])


def check(q: Tensor, scale: Tensor, block_n: int = 128, block_k: int = 128, out_dtype: str = "bfloat16") -> None:
    check_at_least_one("block_dequant", block_n=block_n, block_k=block_k)
    check_out_dtype("block_dequant", out_dtype)
    wanted = (groups_of(q.shape[-2], block_n), groups_of(inner_of(q), block_k))
    if tuple(scale.shape[-2:]) != wanted:
        raise ArgumentError(
            f"block_dequant: scale must have {wanted[0]} x {wanted[1]} blocks; got shape {tuple(scale.shape)}."
        )


def cost(q: Tensor, scale: Tensor, out_dtype: str, **_: object) -> Cost:
    elements = q.nbytes * (2 if q.dtype == torch.uint8 else 1)
    return Cost(
        flops=elements,
        bytes_read=q.nbytes + scale.nbytes,
        bytes_written=elements * FLOAT_NAMES[out_dtype].itemsize,
    )


def e4m3_codes(make: Make, *shape: int) -> Tensor:
    """e4m3 values of all sizes."""
    return make.normal(*shape, std=16.0, dtype=torch.float32).to(torch.float8_e4m3fn)


def powers(make: Make, low: int, high: int, *shape: int) -> Tensor:
    """e8m0 scales, 2^low..2^high."""
    return make.integers(low + 127, high + 128, *shape, dtype=torch.uint8).view(torch.float8_e8m0fnu)


def samples(make: Make) -> Iterator[Sample]:
    out = str(make.dtype).removeprefix("torch.")
    q, scale = make.integers(-128, 128, 6, 40, dtype=torch.int8), make.uniform(6, 1, dtype=torch.float32)
    yield Sample("int8_rows", q=q, scale=scale, block_n=1, block_k=40, out_dtype=out)
    q, scale = make.integers(0, 256, 6, 80, dtype=torch.uint8), make.uniform(6, 5, dtype=torch.float32)
    yield Sample("e2m1", q=q, scale=scale, block_n=1, block_k=32, out_dtype=out)
    scale = make.uniform(2, 3, low=1e-3, high=1.0, dtype=torch.float32)
    yield Sample("float32_scales", q=e4m3_codes(make, 256, 384), scale=scale, out_dtype=out)
    # Scales of the same value: the outputs are equal.
    q, scale = e4m3_codes(make, 64, 96), powers(make, -6, 0, 2, 3)
    for name, same in (("e8m0", scale), ("float32", scale.to(torch.float32))):
        blocks = {"block_n": 32, "block_k": 32, "out_dtype": out}
        yield Sample(f"powers_of_two_in_{name}", "exact", q=q, scale=same, **blocks)
    # N = K: blocks the other way round fit.
    yield Sample("ragged_blocks", q=e4m3_codes(make, 200, 200), scale=powers(make, -6, 0, 2, 2), out_dtype=out)
    scale = make.uniform(5, 2, dtype=torch.float32)
    yield Sample("activations", q=e4m3_codes(make, 5, 200), scale=scale, block_n=1, out_dtype=out)
    yield Sample(
        "experts", q=e4m3_codes(make, 3, 40, 48), scale=powers(make, -6, 0, 3, 2, 1), block_n=32, out_dtype=out
    )
    q = make.tensor([[code | (15 - code) << 4 for code in range(16)]], torch.uint8)
    yield Sample("every_e2m1_code", "exact", q=q, scale=powers(make, 0, 0, 1, 1), block_n=1, block_k=32, out_dtype=out)
    one = {"scale": powers(make, 0, 0, 1, 1), "block_n": 1, "block_k": 256, "out_dtype": out}
    yield Sample("every_int8_code", "exact", q=make.tensor([list(range(-128, 128))], torch.int8), **one)
    codes = torch.arange(256, dtype=torch.uint8)[torch.arange(256) % 128 != 127]  # but NaN
    yield Sample("every_e4m3_code", "exact", q=codes[None].to(make.device).view(torch.float8_e4m3fn), **one)
    # 2^-127, which is subnormal in float32, times 256: a normal number, but in float16.
    tiny = {"q": make.full(256.0, 1, 4, dtype=torch.float8_e4m3fn), "scale": powers(make, -127, -127, 1, 1)}
    yield Sample("smallest_scale", "exact", **tiny, out_dtype=out)
    # Scales near both ends of the range, where results are still normal numbers.
    q = make.tensor([[1.0, -2.0], [0.5, 1.5]], torch.float8_e4m3fn)
    reach = 14 if make.dtype == torch.float16 else 125
    ends = torch.exp2(make.tensor([[-reach, 0.5 * reach], [1 - reach, reach]], torch.float64)).to(torch.float8_e8m0fnu)
    yield Sample("ends_of_the_range", "exact", q=q, scale=ends, block_n=1, block_k=1, out_dtype=out)
    q, scale = e4m3_codes(make, 96, 64).mT, powers(make, -6, 0, 3, 2).mT
    yield Sample("permuted_axes", q=q, scale=scale, block_n=32, block_k=32, out_dtype=out)
    yield Sample("no_rows", q=e4m3_codes(make, 0, 128), scale=powers(make, 0, 0, 0, 1), out_dtype=out)
    q, scale = e4m3_codes(make, 1024, 1024), powers(make, -12, -6, 8, 8)
    yield Sample("wq_a_of_flash_tile", "model", q=q, scale=scale, out_dtype=out)


def errors(make: Make) -> Iterator[ErrorSample]:
    q, scale = e4m3_codes(make, 130, 128), powers(make, 0, 0, 2, 1)
    says = "block_dequant: scale must have 2 x 1 blocks; got shape (1, 1)."
    yield ErrorSample("scale_shape", q=q, scale=scale[:1], says=says)
    says = "block_dequant: scale must have 5 x 8 blocks; got shape (2, 1)."
    packed = make.integers(0, 256, 5, 128, dtype=torch.uint8)
    yield ErrorSample("packed_columns", q=packed, scale=scale, block_n=1, block_k=32, says=says)
    says = "block_dequant: leading axes are (3,) in q but () in scale."
    yield ErrorSample("leading_axes", q=e4m3_codes(make, 3, 130, 128), scale=scale, says=says)
    says = "block_dequant: block_n must be at least 1; got 0."
    yield ErrorSample("zero_block_n", q=q, scale=scale, block_n=0, says=says)
    says = "block_dequant: block_k must be at least 1; got -1."
    yield ErrorSample("negative_block_k", q=q, scale=scale, block_k=-1, says=says)
    says = "block_dequant: out_dtype must be 'bfloat16', 'float16', 'float32' or 'float64'; got 'float8'."
    yield ErrorSample("unknown_out_dtype", q=q, scale=scale, out_dtype="float8", says=says)
    says = "block_dequant: q must be float8_e4m3fn, int8 or uint8; got float32."
    yield ErrorSample("float_q", q=q.to(torch.float32), scale=scale, says=says)


block_dequant = Operator(
    name="block_dequant",
    shapes="q[... rows _] scale[... _ _] -> y[... rows _]",
    dtypes={"q": E4M3 + INT8 + PACKED, "scale": SCALE},
    reference=reference,
    variants=(one_rounding,),
    fake=fake,
    check=check,
    cost=cost,
    samples=samples,
    errors=errors,
)
