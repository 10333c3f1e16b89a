"""One matrix product per expert, over the segments that moe_permute makes.

    y[r, n] = sum_k X[r, k] * W[e(r), n, k]

W and X are the dequantised values: code times scale. x [P,K] holds the segment of expert e in rows start_e ..
start_e + expert_counts[e] - 1, start_e = sum over j < e of A*ceil(expert_counts[j]/A), A = alignment; x [E,Mmax,K]
holds it in rows 0 .. expert_counts[e] - 1 of x[e], and `alignment` says nothing. Rows outside every segment are zero
here, unspecified in a kernel, and are not read: NaN there does not show, nor in the weight of an expert without rows.

The dtype of `weight` tells its kind, N = outputs, K = inputs: float (no weight_scale), e4m3 with weight_scale
[E, ceil(N/block_n), ceil(K/block_k)], uint8 [E, N, K/2] packed e2m1 with [E, N, K/32] (K a multiple of 32), int8 with
[E, N, 1]. The dtype of x tells its own: float (no x_scale; weight-only where the weight is quantised), e4m3 with
x_scale [.., ceil(K/act_group)], int8 with [.., 1]. Scales are e8m0 or float32, and only their value counts; last blocks
may be short. Nothing is quantised here.

Products and sums in float32, in any order, one rounding to out_dtype; scales may multiply each element, each block's
sum or, for int8, the int32 sum. K = 0 gives zeros.

Source: DeepGEMM 54e2261 README (contiguous and masked grouped GEMM, scales) and deep_gemm/utils/math.py (packing);
DeepSeek-V4 inference/kernel.py, fp8_gemm, fp4_gemm.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isolith.dtypes import E4M3, FLOAT, FLOAT_NAMES, INT8, INTEGER, PACKED, SCALE, dtype_name, widen
from isolith.errors import ArgumentError
from isolith.materials.codes import every_code
from isolith.materials.relations_products import relations_of_grouped_gemm
from isolith.materials.weights import quantised_activations, quantised_weight
from isolith.numerics.codes import check_at_least_one, check_out_dtype
from isolith.numerics.scaled_matmul import (
    check_activation_kind,
    check_weight_kind,
    dequantise_activation,
    dequantise_weight,
    math_of,
)
from isolith.operator import Cost, Operator
from isolith.ops.quant.quant_linear import scaled_sums
from isolith.sample import ErrorSample, Make, Relation, Sample

Rows = slice | tuple[int, slice]
"""Where an expert's rows are: in the rows of a 2-d x, or in x[e] of a 3-d one."""


def reference(
    x: Tensor,
    weight: Tensor,
    expert_counts: Tensor,
    alignment: int = 1,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    act_group: int = 128,
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: str = "bfloat16",
) -> Tensor:
    wide = torch.float64 if out_dtype == "float64" else widen(x.dtype)
    values = dequantise_activation(x, x_scale, act_group, wide)
    y = torch.zeros((*x.shape[:-1], weight.shape[1]), dtype=wide, device=x.device)
    for expert, rows in segments(x, expert_counts, alignment):
        scale = None if weight_scale is None else weight_scale[expert]
        y[rows] = values[rows] @ dequantise_weight(weight[expert], scale, block_n, block_k, wide).T
    return y.to(FLOAT_NAMES[out_dtype])


def segments(x: Tensor, expert_counts: Tensor, alignment: int) -> Iterator[tuple[int, Rows]]:
    """Every expert that has rows, and which rows they are."""
    start = 0
    for expert, count in enumerate(expert_counts.tolist()):
        if count:
            yield expert, slice(start, start + count) if x.dim() == 2 else (expert, slice(0, count))
        start += -(-count // alignment) * alignment


def in_order(
    x: Tensor,
    weight: Tensor,
    expert_counts: Tensor,
    alignment: int = 1,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    act_group: int = 128,
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: str = "bfloat16",
) -> Tensor:
    """Add the columns one by one, from the first to the last: what a plain loop does."""
    wide = torch.float64 if out_dtype == "float64" else widen(x.dtype)
    values = dequantise_activation(x, x_scale, act_group, wide)
    y = torch.zeros((*x.shape[:-1], weight.shape[1]), dtype=wide, device=x.device)
    for expert, rows in segments(x, expert_counts, alignment):
        scale = None if weight_scale is None else weight_scale[expert]
        matrix = dequantise_weight(weight[expert], scale, block_n, block_k, wide)
        for column in range(x.shape[-1]):
            y[rows] += values[rows][:, column, None] * matrix[:, column]
    return y.to(FLOAT_NAMES[out_dtype])


def scales_after_sums(
    x: Tensor,
    weight: Tensor,
    expert_counts: Tensor,
    alignment: int = 1,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    act_group: int = 128,
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: str = "bfloat16",
) -> Tensor:
    """Sum the codes' products over columns that share their scales, then scale each sum."""
    y = torch.zeros((*x.shape[:-1], weight.shape[1]), dtype=FLOAT_NAMES[out_dtype], device=x.device)
    how = ("none", act_group, "ue8m0", block_n, block_k, out_dtype)
    for expert, rows in segments(x, expert_counts, alignment):
        scale = None if weight_scale is None else weight_scale[expert]
        y[rows] = scaled_sums(x[rows], weight[expert], scale, None if x_scale is None else x_scale[rows], *how)
    return y


def defined(x: Tensor, expert_counts: Tensor, alignment: int, **_: object) -> tuple[Tensor | None, ...]:
    live = torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
    for _expert, rows in segments(x, expert_counts, alignment):
        live[rows] = True
    return (live,)


def fake(x: Tensor, weight: Tensor, out_dtype: str, **_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]), dtype=FLOAT_NAMES[out_dtype])


def check(
    x: Tensor,
    weight: Tensor,
    alignment: int,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    act_group: int,
    block_n: int,
    block_k: int,
    out_dtype: str,
    **_: object,
) -> None:
    sizes = {"alignment": alignment, "act_group": act_group, "block_n": block_n, "block_k": block_k}
    check_at_least_one("grouped_gemm", **sizes)
    check_out_dtype("grouped_gemm", out_dtype)
    if x.dim() not in (2, 3):
        raise ArgumentError(
            f"grouped_gemm: x must be [rows inputs] or [experts rows inputs]; got shape {tuple(x.shape)}."
        )
    if x.dim() == 3 and x.shape[0] != weight.shape[0]:
        raise ArgumentError(f"grouped_gemm: experts is {x.shape[0]} in x but {weight.shape[0]} in weight.")
    check_activation_kind("grouped_gemm", x, x_scale, act_group)
    check_weight_kind("grouped_gemm", weight, weight_scale, block_n, block_k, x.shape[-1])


def check_values(x: Tensor, expert_counts: Tensor, alignment: int, **_: object) -> None:
    counts, end = expert_counts.tolist(), 0
    for count in counts:
        if count < 0:
            raise ArgumentError(f"grouped_gemm: expert_counts must not be negative; got {count}.")
        if count:
            end = count if x.dim() == 3 else -(-end // alignment) * alignment + count
        if end > x.shape[-2]:
            raise ArgumentError(f"grouped_gemm: segments must end within the rows of x, {x.shape[-2]}; got {end}.")


def cost(
    x: Tensor,
    weight: Tensor,
    expert_counts: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    out_dtype: str,
    **_: object,
) -> Cost:
    rows = x.shape[:-1].numel()
    experts, outputs = weight.shape[0], weight.shape[1]
    small = (0 if x_scale is None else x_scale.nbytes) + expert_counts.nbytes
    per_expert = (weight.nbytes + (0 if weight_scale is None else weight_scale.nbytes)) // max(experts, 1)
    return Cost(
        flops=2 * rows * outputs * x.shape[-1],
        # Which experts have rows is not in the metadata: as many as there can be.
        bytes_read=x.nbytes + small + min(experts, rows) * per_expert,
        bytes_written=rows * outputs * FLOAT_NAMES[out_dtype].itemsize,
        math=math_of(x, weight, "none"),
    )


def samples(make: Make) -> Iterator[Sample]:
    yield from layout_samples(make)
    yield from quantised_samples(make)
    yield from number_samples(make)


def layout_samples(make: Make) -> Iterator[Sample]:
    """Where segments lie. Small integers are exact in any order, so a wrong row or column shows to the bit."""
    out = dtype_name(make.dtype)

    def laid(name: str, counts: list[int], rows: int, n: int, k: int, alignment: int = 1) -> Sample:
        """Rows of no segment are NaN, and so are weights of experts without rows."""
        x, weight = make.small_integers(rows, k), make.small_integers(len(counts), n, k)
        expert_counts = make.tensor(counts, torch.int32)
        weight[expert_counts == 0] = float("nan")
        live = torch.zeros(rows, dtype=torch.bool, device=make.device)
        for _, part in segments(x, expert_counts, alignment):
            live[part] = True
        x[~live] = float("nan")
        given = {"x": x, "weight": weight, "expert_counts": expert_counts, "alignment": alignment}
        return Sample(name, "exact", **given, out_dtype=out)

    for pattern in range(8):
        counts = [(pattern >> expert & 1) * (2 + expert) for expert in range(3)]
        yield laid(f"experts_{pattern:03b}", counts, 11, 24, 40)
    yield laid("alignment_4", [0, 3, 0, 6, 5, 0], 20, 8, 33, 4)
    yield laid("alignment_128", [1, 0, 129, 128], 640, 8, 16, 128)
    yield laid("300_rows_to_one", [0, 300, 0], 301, 5, 7)
    yield laid("square", [3, 4], 7, 32, 32)
    yield laid("one_more_than_a_tile", [17, 16, 1], 34, 129, 65)
    yield laid("one_column", [2, 1], 3, 1, 1)
    yield laid("no_rows", [0, 0], 0, 8, 16)
    masked = make.small_integers(4, 5, 24)
    ends = make.tensor([0, 5, 1, 3], torch.int64)
    masked[torch.arange(5, device=make.device) >= ends[:, None]] = float("nan")
    yield Sample(
        "masked",
        "exact",
        x=masked,
        weight=make.small_integers(4, 9, 24),
        expert_counts=ends,
        alignment=4,
        out_dtype=out,
    )


def quantised_samples(make: Make) -> Iterator[Sample]:
    """Every kind of weight with the activations that belong to it, and with float ones (weight-only)."""
    counts = make.tensor([4, 0, 3], torch.int32)
    # Values of this size overflow float16.
    out = "float32" if make.dtype == torch.float16 else dtype_name(make.dtype)
    blocks = {"e4m3_32": 32}
    # N and K that no block divides, where the kind allows it.
    for kind, n, k in (("e4m3", 200, 328), ("e4m3_float32", 130, 129), ("e4m3_32", 40, 72), ("e2m1", 24, 96)):
        block = blocks.get(kind, 128)
        given = {**quantised_weight(make, kind, n, k, 3), "expert_counts": counts, "block_n": block, "block_k": block}
        for group in (128, 32):
            scaled = quantised_activations(make, "e4m3", 9, k, group)
            if kind == "e4m3_float32":
                scaled["x_scale"] = make.uniform(*scaled["x_scale"].shape, low=0.1, dtype=torch.float32)
            yield Sample(f"{kind}_group_{group}", **scaled, **given, act_group=group, out_dtype=out)
        yield Sample(f"{kind}_weight_only", x=make.normal(9, k), **given, out_dtype=out)
    # As engines lay it out for tensor cores: whole blocks, segments at multiples of 128 rows.
    aligned = {"expert_counts": make.tensor([129, 0, 128, 1], torch.int32), "alignment": 128, "out_dtype": out}
    for kind in ("e4m3", "e4m3_float32"):
        given = {**quantised_weight(make, kind, 256, 384, 4), **quantised_activations(make, "e4m3", 512, 384)}
        yield Sample(f"{kind}_aligned", **given, **aligned)
    given = {"x": make.normal(512, 256), "weight": make.normal(4, 128, 256, std=0.1)}
    yield Sample("float_aligned", **given, **aligned)
    given = {**quantised_weight(make, "int8", 33, 1100, 3), "expert_counts": counts, "out_dtype": out}
    yield Sample("int8", **quantised_activations(make, "int8", 7, 1100), **given)
    yield Sample("int8_weight_only", x=make.normal(7, 1100), **given)
    # Blocks of different height and width.
    given = {"weight": make.normal(3, 40, 112, dtype=torch.float8_e4m3fn), "expert_counts": counts, "out_dtype": out}
    powers = torch.exp2(make.integers(-6, 7, 3, 3, 3, dtype=torch.float64))
    given |= {"weight_scale": make.place(powers, torch.float8_e8m0fnu), "block_n": 16, "block_k": 48}
    yield Sample("oblong_blocks", x=make.normal(9, 112), **given)
    yield from every_code(make, out)
    # The smallest scale of act_quant_fp8, and weights whose scale a kernel must not flush.
    tiny = {
        **quantised_weight(make, "e4m3", 24, 128, 3),
        **quantised_activations(make, "e4m3", 7, 128),
        "expert_counts": counts,
    }
    tiny["x_scale"] = make.full(2.0**-22, 7, 1, dtype=torch.float8_e8m0fnu)
    yield Sample("smallest_activation_scale", **tiny, out_dtype="float32")
    tiny["x_scale"] = make.full(2.0**100, 7, 1, dtype=torch.float32)
    tiny["weight_scale"] = make.full(2.0**-120, 3, 1, 1, dtype=torch.float8_e8m0fnu)
    yield Sample("far_apart_scales", **tiny, out_dtype="float32")
    masked = {**quantised_weight(make, "e2m1", 16, 64, 3), "expert_counts": make.tensor([2, 0, 1], torch.int32)}
    masked |= {name: value.view(3, 2, -1) for name, value in quantised_activations(make, "e4m3", 6, 64).items()}
    yield Sample("e2m1_masked", **masked, out_dtype=out)
    model = {**quantised_weight(make, "e2m1", 4096, 2048, 1), **quantised_activations(make, "e4m3", 3, 2048, 32)}
    counts = make.tensor([3], torch.int32)
    yield Sample("flash_down", "model", **model, expert_counts=counts, act_group=32, out_dtype=out)


def number_samples(make: Make) -> Iterator[Sample]:
    """Ordinary numbers, and numbers that a low-precision sum or product spoils."""
    counts, out = make.tensor([5, 0, 6], torch.int32), dtype_name(make.dtype)
    for name in ("bfloat16", "float32"):
        given = {"weight": make.normal(3, 48, 200, std=0.1), "expert_counts": counts}
        yield Sample(f"normal_to_{name}", x=make.normal(12, 200), **given, out_dtype=name)
    # All terms of one sign: a sum kept in bf16 stalls.
    same = {"x": make.uniform(12, 2048, low=0.5, high=1.0), "weight": make.uniform(3, 8, 2048, low=0.01, high=0.02)}
    yield Sample("same_sign", **same, expert_counts=counts, out_dtype=out)
    # Values that a product in TF32 or bf16 cuts off, where the dtype has them at all.
    fine = make.integers(-8, 9, 12, 64, dtype=torch.float64) * 2.0**-13 + 1
    signs = make.small_integers(3, 16, 64)
    yield Sample("fine_values", x=fine.to(make.dtype), weight=signs, expert_counts=counts, out_dtype=out)
    beyond = {"x": make.full(200.0, 12, 4), "weight": make.full(200.0, 3, 8, 4)}
    yield Sample("sum_beyond_float16", **beyond, expert_counts=counts, out_dtype="float16")
    yield Sample("no_inputs", x=make.normal(12, 0), weight=make.normal(3, 8, 0), expert_counts=counts, out_dtype=out)


def errors(make: Make) -> Iterator[ErrorSample]:
    float32 = {
        "x": make.normal(6, 64),
        "weight": make.normal(2, 8, 64),
        "expert_counts": make.tensor([2, 3], torch.int32),
    }
    fp8 = {**float32, **quantised_weight(make, "e4m3", 8, 64, 2), **quantised_activations(make, "e4m3", 6, 64)}
    fp4 = {**fp8, **quantised_weight(make, "e2m1", 8, 64, 2)}
    stacked = float32["x"].view(2, 3, 64)

    def wrong(name: str, says: str, base: Any = None, **changed: Any) -> ErrorSample:  # Any: arguments
        return ErrorSample(name, says=f"grouped_gemm: {says}", **{**(base or float32), **changed})

    for name in ("alignment", "act_group", "block_n", "block_k"):
        yield wrong(f"{name}_zero", f"{name} must be at least 1; got 0.", **{name: 0})
    says = "out_dtype must be 'bfloat16', 'float16', 'float32' or 'float64'; got 'fp32'."
    yield wrong("out_dtype", says, out_dtype="fp32")
    says = "x must be [rows inputs] or [experts rows inputs]; got shape (64,)."
    yield wrong("x_rank", says, x=float32["x"][0])
    yield wrong("x_experts", "experts is 3 in x but 2 in weight.", x=float32["x"].view(3, 2, 64))
    says = "experts is 2 in weight but 3 in expert_counts."
    yield wrong("counts_experts", says, expert_counts=make.integers(0, 2, 3))
    says = "weight must have 63 columns; got shape (2, 8, 64)."
    yield wrong("weight_columns", says, x=float32["x"][:, :63])
    says = "x_scale must be given where x is float8_e4m3fn; got None."
    yield wrong("no_x_scale", says, fp8, x_scale=None)
    says = "x_scale must be None where x is float32; got a Tensor."
    yield wrong("x_scale_for_float", says, x_scale=make.normal(6, 1))
    says = "x_scale must be [6, 2] for float8_e4m3fn x; got shape (6, 1)."
    yield wrong("x_scale_shape", says, fp8, act_group=32)
    for kind, base in (("float8_e4m3fn", fp8), ("uint8", fp4)):
        says = f"weight_scale must be given where weight is {kind}; got None."
        yield wrong(f"no_weight_scale_{kind}", says, base, weight_scale=None)
    says = "weight_scale must be None where weight is float32; got a Tensor."
    yield wrong("weight_scale_for_float", says, weight_scale=make.normal(2, 1, 1))
    says = "weight_scale must be [2, 1, 2] for float8_e4m3fn weight; got shape (2, 1, 1)."
    yield wrong("weight_scale_shape", says, fp8, block_k=32)
    counts = make.tensor([2, -1], torch.int32)
    yield wrong("negative_count", "expert_counts must not be negative; got -1.", expert_counts=counts)
    says = "segments must end within the rows of x, 6; got 7."
    yield wrong("too_many_rows", says, expert_counts=make.tensor([3, 4], torch.int32))
    yield wrong("too_many_padded_rows", says, alignment=4)
    says = "segments must end within the rows of x, 3; got 4."
    yield wrong("too_many_masked_rows", says, x=stacked, expert_counts=make.tensor([4, 0], torch.int32))


def relations(make: Make) -> Iterator[Relation]:
    yield from relations_of_grouped_gemm(make)


grouped_gemm = Operator(
    name="grouped_gemm",
    shapes="x[... inputs] weight[experts outputs _] expert_counts[experts] x_scale?[... _] weight_scale?[experts _ _]"
    " -> y[... outputs]",
    dtypes={
        "x": FLOAT + E4M3 + INT8,
        "weight": FLOAT + E4M3 + INT8 + PACKED,
        "expert_counts": INTEGER,
        "x_scale": SCALE,
        "weight_scale": SCALE,
    },
    reference=reference,
    variants=(in_order, scales_after_sums),
    fake=fake,
    check=check,
    check_values=check_values,
    cost=cost,
    samples=samples,
    errors=errors,
    defined=defined,
    relations=relations,
)
