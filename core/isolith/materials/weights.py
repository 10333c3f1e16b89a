"""What samples of operators with quantised weights are made of."""

import torch
from torch import Tensor

from isolith.numerics.scaled_matmul import scale_shape
from isolith.sample import Make


def quantised_weight(
    make: Make, kind: str, n: int, k: int, *experts: int, low: int = -6, high: int = 6
) -> dict[str, Tensor]:
    """A `weight` [*experts, n, k] with codes of every size and its `weight_scale`, from 2^low to 2^high.

    Kinds: "e4m3" (blocks of 128, e8m0 scales), "e4m3_float32" (float32 scales, no powers of two), "e4m3_32" (the same
    in blocks of 32), "e2m1" (e8m0) and "int8" (float32).
    """
    if kind == "int8":
        weight = make.integers(-128, 128, *experts, n, k, dtype=torch.int8)
    elif kind == "e2m1":
        weight = make.integers(0, 256, *experts, n, k // 2, dtype=torch.uint8)
    else:
        weight = make.normal(*experts, n, k, dtype=torch.float8_e4m3fn)
    shape = scale_shape(weight, *((32, 32) if kind == "e4m3_32" else (128, 128)))
    scale = torch.exp2(make.integers(low, high + 1, *shape, dtype=torch.float64))
    if kind in ("e2m1", "e4m3"):
        return {"weight": weight, "weight_scale": make.place(scale, torch.float8_e8m0fnu)}
    mantissa = make.uniform(*shape, low=0.5, high=1.0, dtype=torch.float64)
    return {"weight": weight, "weight_scale": make.place(scale * mantissa, torch.float32)}


def quantised_activations(make: Make, kind: str, rows: int, k: int, act_group: int = 128) -> dict[str, Tensor]:
    """Quantised activations `x` [rows, k], "e4m3" or "int8", with an `x_scale` of many sizes."""
    if kind == "int8":
        x = make.integers(-127, 128, rows, k, dtype=torch.int8)
        return {"x": x, "x_scale": make.uniform(rows, 1, low=1e-3, high=1.0, dtype=torch.float32)}
    exponent = make.integers(-6, 7, rows, -(-k // act_group), dtype=torch.float64)
    x = make.normal(rows, k, std=20.0, dtype=torch.float8_e4m3fn)
    return {"x": x, "x_scale": make.place(torch.exp2(exponent), torch.float8_e8m0fnu)}
