"""Linear layer without bias whose weight, activations or both may be quantised.

    y[..., n] = sum_k X[..., k] * W[n, k]

W and X are the dequantised values: code times scale. The dtype of `weight` tells its kind, N = outputs, K = inputs:
float (no weight_scale), e4m3 with weight_scale [ceil(N/block_n), ceil(K/block_k)], uint8 [N, K/2] packed e2m1 with
[N, K/32] (K a multiple of 32), int8 with [N, 1]. Scales are e8m0 or float32, and only their value counts; last blocks
may be short. Float activations are quantised first, per row, as `act_quant` says: "fp8" is act_quant_fp8 (act_group,
scale_format), "int8" is act_quant_int8, "none" leaves them (weight-only), "auto" follows the weight: e4m3 and e2m1 ask
for "fp8", int8 for "int8", float for "none". With x_scale, x is quantised already and taken as it is: e4m3 with
x_scale [..., ceil(K/act_group)], int8 with [..., 1]; act_quant must then not ask for anything.

Products and sums in float32, in any order, one rounding to out_dtype; scales may multiply each element, each block's
sum or, for int8, the int32 sum. K = 0 gives zeros. Without scales it is x W^T, the router's projection too
(out_dtype "float32").

Source: DeepSeek-V4 inference/model.py, linear; DeepSeek-V3 inference/kernel.py, fp8_gemm; DeepGEMM 54e2261 README.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from isolith.dtypes import E4M3, FLOAT, FLOAT_NAMES, INT8, PACKED, SCALE, dtype_name, widen
from isolith.errors import ArgumentError
from isolith.materials.relations_products import relations_of_linear
from isolith.numerics.codes import check_at_least_one, check_out_dtype, check_scale_format, decode, spread_groups
from isolith.numerics.scaled_matmul import (
    QUANTISED,
    blocks_of,
    check_act_quant,
    check_activation_kind,
    check_weight_kind,
    dequantise_activation,
    dequantise_weight,
    math_of,
    resolve_act_quant,
    scale_shape,
)
from isolith.operator import Cost, Operator
from isolith.ops.quant.act_quant_fp8 import codes as e4m3_codes
from isolith.ops.quant.act_quant_fp8 import reference as act_quant_fp8
from isolith.ops.quant.act_quant_int8 import codes as int8_codes
from isolith.ops.quant.act_quant_int8 import reference as act_quant_int8
from isolith.sample import ErrorSample, Make, Relation, Sample
from isolith.variants import Given, variant_of


def reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    act_quant: str = "auto",
    act_group: int = 128,
    scale_format: str = "ue8m0",
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: str = "bfloat16",
) -> Tensor:
    wide = compute_dtype(x, out_dtype)
    if x_scale is None:
        x, x_scale = quantised(x, resolve_act_quant(act_quant, weight), act_group, scale_format)
    values = dequantise_activation(x, x_scale, act_group, wide)
    y = values @ dequantise_weight(weight, weight_scale, block_n, block_k, wide).T
    return y.to(FLOAT_NAMES[out_dtype])


def quantised(x: Tensor, act_quant: str, act_group: int, scale_format: str) -> tuple[Tensor, Tensor | None]:
    """Float activations quantised as "none", "fp8" or "int8" says, and their scale."""
    if act_quant == "fp8":
        return act_quant_fp8(x, act_group, scale_format)
    return act_quant_int8(x) if act_quant == "int8" else (x, None)


def quantised_nearby(
    x: Tensor, kind: str, act_group: int, scale_format: str, part: float
) -> tuple[Tensor, Tensor | None]:
    """As `quantised`, with quotients larger by `part` of themselves before they are rounded.

    Dividing by a scale and multiplying by its inverse give quotients that differ in their last bits, so that one
    between two codes becomes either. Nothing differs where scales are powers of two.
    """
    codes, scale = quantised(x, kind, act_group, scale_format)
    if scale is None or (kind == "fp8" and scale_format == "ue8m0"):
        return codes, scale
    group = act_group if kind == "fp8" else max(x.shape[-1], 1)
    quotients = x.to(torch.float32) / spread_groups(scale, x.shape[-1], group) * (1 + part)
    return (e4m3_codes if kind == "fp8" else int8_codes)(quotients), scale


quantised_upwards = functools.partial(quantised_nearby, part=2.0**-22)
quantised_downwards = functools.partial(quantised_nearby, part=-(2.0**-22))


def compute_dtype(x: Tensor, out_dtype: str) -> torch.dtype:
    """float64 where the input or the output is; else float32."""
    return torch.float64 if out_dtype == "float64" else widen(x.dtype)


def sum_in_order(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    act_quant: str = "auto",
    act_group: int = 128,
    scale_format: str = "ue8m0",
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: str = "bfloat16",
) -> Tensor:
    """Add one product after the other."""
    wide = compute_dtype(x, out_dtype)
    if x_scale is None:
        x, x_scale = quantised(x, resolve_act_quant(act_quant, weight), act_group, scale_format)
    values = dequantise_activation(x, x_scale, act_group, wide)
    weights = dequantise_weight(weight, weight_scale, block_n, block_k, wide)
    y = values.new_zeros((*x.shape[:-1], weight.shape[0]))
    for element, column in zip(values.split(1, dim=-1), weights.unbind(-1), strict=True):
        y += element * column
    return y.to(FLOAT_NAMES[out_dtype])


def scaled_sums(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    act_quant: str = "auto",
    act_group: int = 128,
    scale_format: str = "ue8m0",
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: str = "bfloat16",
) -> Tensor:
    """Sum products of codes where both scales are constant, multiply the sum by them, then add the blocks."""
    wide = compute_dtype(x, out_dtype)
    if x_scale is None:
        x, x_scale = quantised(x, resolve_act_quant(act_quant, weight), act_group, scale_format)
    inputs, (rows, columns) = x.shape[-1], blocks_of(weight, block_n, block_k)
    group = act_group if x.dtype == torch.float8_e4m3fn else max(inputs, 1)
    step = math.gcd(group, columns if weight_scale is not None else group)
    values, weights = x.to(wide), decode(weight, wide)
    y = values.new_zeros((*x.shape[:-1], weight.shape[0]))
    for start in range(0, inputs, step):
        total = values[..., start : start + step] @ weights[:, start : start + step].T
        if x_scale is not None:
            total = total * x_scale[..., start // group, None].to(wide)
        if weight_scale is not None:
            scale = weight_scale[:, start // columns].to(wide)
            total = total * scale.repeat_interleave(rows)[: weight.shape[0]]
        y += total
    return y.to(FLOAT_NAMES[out_dtype])


def of_codes(given: Given, quantise: Callable[..., tuple[Tensor, Tensor | None]]) -> Tensor:
    """The product of activations quantised in another way."""
    if given["x_scale"] is None:
        kind = resolve_act_quant(given["act_quant"], given["weight"])
        given["x"], given["x_scale"] = quantise(given["x"], kind, given["act_group"], given["scale_format"])
    return reference(**given)


@variant_of(reference)
def codes_upwards(given: Given) -> Tensor:
    """Quantise what lies between two codes to the larger."""
    return of_codes(given, quantised_upwards)


@variant_of(reference)
def codes_downwards(given: Given) -> Tensor:
    """Quantise what lies between two codes to the smaller."""
    return of_codes(given, quantised_downwards)


def fake(x: Tensor, weight: Tensor, out_dtype: str, **_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=FLOAT_NAMES[out_dtype])


def check(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    act_quant: str = "auto",
    act_group: int = 128,
    scale_format: str = "ue8m0",
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: str = "bfloat16",
) -> None:
    check_at_least_one("quant_linear", act_group=act_group, block_n=block_n, block_k=block_k)
    check_act_quant("quant_linear", act_quant)
    check_scale_format("quant_linear", scale_format)
    check_out_dtype("quant_linear", out_dtype)
    check_activation_kind("quant_linear", x, x_scale, act_group)
    if x_scale is not None and act_quant in ("fp8", "int8"):
        raise ArgumentError(
            f"quant_linear: act_quant must be 'auto' or 'none' where x is quantised already; got {act_quant!r}."
        )
    check_weight_kind("quant_linear", weight, weight_scale, block_n, block_k, x.shape[-1])


def cost(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    x_scale: Tensor | None,
    act_quant: str,
    out_dtype: str,
    **_: object,
) -> Cost:
    rows = x.numel() // max(x.shape[-1], 1)
    scales = sum(scale.nbytes for scale in (weight_scale, x_scale) if scale is not None)
    return Cost(
        flops=2 * x.numel() * weight.shape[0],
        bytes_read=x.nbytes + weight.nbytes + scales,
        bytes_written=rows * weight.shape[0] * FLOAT_NAMES[out_dtype].itemsize,
        math=math_of(x, weight, act_quant),
    )


def made_weight(
    make: Make, kind: str, outputs: int, inputs: int, block_n: int = 128, block_k: int = 128, scale: str = "ue8m0"
) -> dict[str, Tensor]:
    """A weight of a kind, with a scale where it needs one; scales spread over 2^-8..2^-3."""
    if kind == "float":
        return {"weight": make.normal(outputs, inputs, std=inputs**-0.5)}
    if kind == "fp8":
        codes = make.normal(outputs, inputs, std=8.0, dtype=torch.float32).to(torch.float8_e4m3fn)
    elif kind == "fp4":
        codes = make.integers(0, 256, outputs, inputs // 2, dtype=torch.uint8)
    else:
        codes = make.integers(-127, 128, outputs, inputs, dtype=torch.int8)
    shape = scale_shape(codes, block_n, block_k)
    if scale == "ue8m0":
        return {"weight": codes, "weight_scale": made_ue8m0(make, *shape)}
    return {"weight": codes, "weight_scale": make.uniform(*shape, low=2.0**-8, high=2.0**-3, dtype=torch.float32)}


def made_ue8m0(make: Make, *shape: int) -> Tensor:
    """Powers of two in 2^-8..2^-3."""
    return make.integers(119, 125, *shape, dtype=torch.uint8).view(torch.float8_e8m0fnu)


def samples(make: Make) -> Iterator[Sample]:
    wide = "float32"
    for kind in ("float", "fp8", "fp4", "int8"):
        yield Sample(f"{kind}_weight", x=make.normal(5, 256), **made_weight(make, kind, 192, 256))
        weight = made_weight(make, kind, 96, 64, scale=wide)
        yield Sample(f"{kind}_weight_only", x=make.normal(3, 64), **weight, act_quant="none", out_dtype=wide)
    # N = K: a transposed weight fits. Last blocks are short both ways.
    yield Sample("ragged_blocks", x=make.normal(3, 200), **made_weight(make, "fp8", 200, 200))
    blocks = {"block_n": 32, "block_k": 32}
    yield Sample("blocks_of_32", x=make.normal(2, 3, 160), **made_weight(make, "fp8", 72, 160, 32, 32), **blocks)
    blocks = {"block_n": 64, "block_k": 32}
    yield Sample("blocks_of_64_by_32", x=make.normal(3, 160), **made_weight(make, "fp8", 72, 160, 64, 32), **blocks)
    square = made_weight(make, "fp8", 96, 96)
    square["weight"] = square["weight"].mT
    yield Sample("permuted_axes", x=make.normal(4, 3, 96).transpose(0, 1), **square)
    # Every product has one sign: an accumulator that is too narrow shows.
    positive = make.uniform(11, 2048, low=0.5, high=1.5)
    yield Sample("same_sign", x=positive[:3], weight=positive[3:])
    yield Sample("act_group_32", x=make.normal(4, 256), **made_weight(make, "fp4", 64, 256), act_group=32)
    groups = torch.exp2(torch.arange(-6.0, 6.0)).repeat_interleave(32)
    rows = {"x": make.normal(4, 384) * groups.to(make.dtype), "act_group": 32}
    yield Sample("spread_groups_float32_scale", **rows, **made_weight(make, "fp8", 24, 384), scale_format=wide)
    plain = made_weight(make, "float", 40, 130)
    yield Sample("float_weight_fp8_activations", x=make.normal(3, 130), **plain, act_quant="fp8", out_dtype="float16")
    yield Sample(
        "fp8_weight_int8_activations", x=make.normal(3, 64), **made_weight(make, "fp8", 8, 64), act_quant="int8"
    )
    yield Sample("no_tokens", x=make.normal(0, 64), **made_weight(make, "fp8", 16, 64))
    yield Sample("no_outputs", x=make.normal(2, 64), **made_weight(make, "fp8", 0, 64))
    yield from quantised_samples(make)
    yield from exact_samples(make)
    gate = made_weight(make, "float", 256, 4096)
    yield Sample("gate_of_flash", "model", x=make.normal(4, 4096), **gate, out_dtype=wide)
    yield Sample("wq_a_of_flash", "model", x=make.normal(4, 4096), **made_weight(make, "fp8", 1024, 4096))


def quantised_samples(make: Make) -> Iterator[Sample]:
    """x quantised already."""
    x = make.normal(4, 200, std=8.0, dtype=torch.float32).to(torch.float8_e4m3fn)
    weight = made_weight(make, "fp8", 136, 200)
    yield Sample("fp8_x", x=x, **weight, x_scale=made_ue8m0(make, 4, 2))
    x_scale = make.uniform(4, 7, dtype=torch.float32)
    yield Sample("fp8_x_float32_scale", x=x, **weight, x_scale=x_scale, act_group=32, out_dtype="float32")
    x, x_scale = make.integers(-127, 128, 4, 96, dtype=torch.int8), make.uniform(4, 1, dtype=torch.float32)
    weight = made_weight(make, "int8", 48, 96, scale="float32")
    yield Sample("int8_x", x=x, **weight, x_scale=x_scale, out_dtype="float32")
    # The extreme codes, -128 too: a weight may have it.
    x, codes = make.full(127, 2, 64, dtype=torch.int8), make.full(-128, 3, 64, dtype=torch.int8)
    scale, x_scale = made_ue8m0(make, 3, 1), made_ue8m0(make, 2, 1)
    yield Sample("int8_extremes", "exact", x=x, weight=codes, weight_scale=scale, x_scale=x_scale)


def exact_samples(make: Make) -> Iterator[Sample]:
    """Sums that are exact in every order."""
    # K is one more than a tile.
    x, weight = make.small_integers(7, 129), make.small_integers(24, 129)
    yield Sample("exact_float", "exact", x=x, weight=weight, out_dtype="float32")
    # Sums beyond the largest float16, on both sides: infinite there, and not in the other dtypes.
    x, weight = make.full(256.0, 2, 4), make.tensor([[256.0] * 4, [-256.0] * 4, [0.25] * 4])
    yield Sample("large_sums", "exact", x=x, weight=weight, out_dtype=dtype_name(make.dtype))
    # Two columns picked out: one with the low nibbles, one with the high ones, of every byte.
    x = make.tensor([[1.0] + [0.0] * 31, [0.0] * 31 + [1.0]])
    weight = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16).to(make.device)
    scale = make.full(127, 256, 1, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    arguments = {"x": x, "weight": weight, "weight_scale": scale, "act_quant": "none"}
    yield Sample("every_e2m1_code", "exact", **arguments, out_dtype="float32")
    # Scales near the ends of float32: one that is flushed to zero shows.
    x, x_scale = make.small_integers(3, 64, dtype=torch.float8_e4m3fn), make.full(2.0**100, 3, 1, dtype=torch.float32)
    weight, scale = (
        make.small_integers(8, 64, dtype=torch.float8_e4m3fn),
        make.full(2.0**-120, 1, 1, dtype=torch.float32),
    )
    scales = {"weight_scale": scale, "x_scale": x_scale}
    yield Sample("tiny_and_huge_scales", "exact", x=x, weight=weight, **scales, out_dtype="float32")


def errors(make: Make) -> Iterator[ErrorSample]:
    x, scale, plain = make.normal(2, 64), make.zeros(2, 1, dtype=torch.float32), make.normal(8, 64)
    fp8, fp4, int8 = (made_weight(make, kind, 8, 64) for kind in ("fp8", "fp4", "int8"))
    e4m3, e2m1, codes = fp8["weight"], fp4["weight"], int8["weight"]
    given, missing = "must be None where weight is float32; got a Tensor.", "must be given where weight is"
    quantised_x = {**int8, "x": codes[:2], "x_scale": scale}
    e4m3_x = {**fp8, "x": e4m3[:2], "x_scale": scale.expand(2, 2)}
    twice = "act_quant must be 'auto' or 'none' where x is quantised already; got 'int8'."
    choices = "act_quant must be 'auto', 'none', 'fp8' or 'int8'; got 'fp4'."
    dtypes = "out_dtype must be 'bfloat16', 'float16', 'float32' or 'float64'; got 'bf16'."
    narrow = {"x": x[:, :48], "weight": e2m1[:, :24], "weight_scale": fp4["weight_scale"]}
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (  # Any: arguments of several types
        ("columns", {"weight": plain[:, :57]}, "weight must have 64 columns; got shape (8, 57)."),
        ("bytes", {**fp4, "weight": e2m1[:, :8]}, "weight must have 64 columns, two a byte; got shape (8, 8)."),
        ("half_a_group", narrow, "weight in e2m1 needs columns in multiples of 32; got 48."),
        ("scale_for_float", {"weight": plain, "weight_scale": scale}, f"weight_scale {given}"),
        ("no_scale_for_fp8", {"weight": e4m3}, f"weight_scale {missing} float8_e4m3fn; got None."),
        ("no_scale_for_fp4", {"weight": e2m1}, f"weight_scale {missing} uint8; got None."),
        ("no_scale_for_int8", {"weight": codes}, f"weight_scale {missing} int8; got None."),
        ("blocks", {**fp8, "block_k": 32}, "weight_scale must be [1, 2] for float8_e4m3fn weight; got shape (1, 1)."),
        ("groups", {**fp4, "weight_scale": scale}, "weight_scale must be [8, 2] for uint8 weight; got shape (2, 1)."),
        ("rows", {**int8, "weight_scale": scale}, "weight_scale must be [8, 1] for int8 weight; got shape (2, 1)."),
        ("scale_for_float_x", {**fp8, "x_scale": scale}, "x_scale must be None where x is float32; got a Tensor."),
        ("no_scale_for_x", {**int8, "x": codes[:2]}, "x_scale must be given where x is int8; got None."),
        ("x_groups", e4m3_x, "x_scale must be [2, 1] for float8_e4m3fn x; got shape (2, 2)."),
        ("quantised_twice", {**quantised_x, "act_quant": "int8"}, twice),
        ("unknown_act_quant", {**fp8, "act_quant": "fp4"}, choices),
        (
            "unknown_scale_format",
            {**fp8, "scale_format": "fp32"},
            "scale_format must be 'ue8m0' or 'float32'; got 'fp32'.",
        ),
        ("unknown_out_dtype", {**fp8, "out_dtype": "bf16"}, dtypes),
        ("zero_act_group", {**fp8, "act_group": 0}, "act_group must be at least 1; got 0."),
        ("zero_block_n", {**fp8, "block_n": 0}, "block_n must be at least 1; got 0."),
        ("zero_block_k", {**fp8, "block_k": 0}, "block_k must be at least 1; got 0."),
        ("weight_rank", {"weight": plain[0]}, "weight must be [outputs _], 2 axes; got shape (64,)."),
    )
    for name, arguments, says in cases:
        yield ErrorSample(name, **{"x": x, **arguments}, says=f"quant_linear: {says}")


def relations(make: Make) -> Iterator[Relation]:
    yield from relations_of_linear(make)


quant_linear = Operator(
    name="quant_linear",
    shapes="x[... inputs] weight[outputs _] weight_scale?[_ _] x_scale?[... _] -> y[... outputs]",
    dtypes={
        "x": FLOAT + QUANTISED,
        "weight": FLOAT + E4M3 + PACKED + INT8,
        "weight_scale": SCALE,
        "x_scale": SCALE,
    },
    reference=reference,
    variants=(sum_in_order, scaled_sums, codes_upwards, codes_downwards),
    fake=fake,
    check=check,
    cost=cost,
    samples=samples,
    errors=errors,
    relations=relations,
)
