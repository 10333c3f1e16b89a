"""A whole mixture-of-experts layer after its router: dispatch, both projections, combination, shared expert.

    y[t, :] = round( sum over slots of topk_weights[t, s] * expert_{topk_idx[t, s]}(x[t, :]) + shared(x[t, :]) )
    expert_e(v) = w2[e] swiglu(w13[e] v; swiglu_limit),   shared(v) = shared_w2 swiglu(shared_w13 v; swiglu_limit)

It is the composition of moe_permute, grouped_gemm, swiglu, grouped_gemm and moe_unpermute (quant_linear and swiglu for
the shared expert), in float32 between them and rounded once. Rounding to the dtype of x between the parts is legal. w13
is [gate | up]: rows of w1, then of w3. With `weight_before_down` the routing weight multiplies the activated row,
inside the quantisation that follows; without it, the row that the down projection gives. Where nothing is quantised the
two are equal but for rounding, and either is legal.

Kinds of weights and scales are those of grouped_gemm, for routed and shared weights independently; e4m3 blocks are
(block_n, block_k) in all of them. Activations that enter a product are quantised per token by `act_quant`: "fp8" is
act_quant_fp8 (act_group, scale_format), "int8" is act_quant_int8, "none" leaves them, "auto" follows each weight: e4m3
and e2m1 ask for "fp8", int8 for "int8", float for "none". A slot with expert -1 adds nothing, a token without a live
slot gets the shared expert's output or zeros, an expert named twice is run and added twice.

Source: DeepSeek-V4 inference/model.py, MoE.forward and Expert.forward; DeepGEMM 54e2261 tests/test_mega_moe.py (the
unfused pipeline).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from isolith.dtypes import E4M3, FLOAT, INT8, INTEGER, PACKED, SCALE, WIDE, dtype_name, widen
from isolith.errors import ArgumentError
from isolith.materials.experts import (
    EXPONENTS,
    in_oblong_blocks,
    layer_of_integers,
    layer_of_uneven_groups,
    mixed_experts,
    moe_layer,
    quantised_experts,
    shared_expert,
)
from isolith.materials.relations_fused_moe import relations_of_experts
from isolith.numerics.codes import check_at_least_one, check_scale_format
from isolith.numerics.routing import check_topk_idx
from isolith.numerics.scaled_matmul import check_act_quant, check_weight_kind, math_of, resolve_act_quant
from isolith.operator import Cost, Operator
from isolith.ops.moe.grouped_gemm import grouped_gemm, in_order
from isolith.ops.moe.moe_permute import moe_permute
from isolith.ops.moe.moe_unpermute import moe_unpermute
from isolith.ops.moe.swiglu import swiglu
from isolith.ops.quant.act_quant_fp8 import act_quant_fp8
from isolith.ops.quant.act_quant_int8 import act_quant_int8
from isolith.ops.quant.quant_linear import codes_downwards as linear_of_codes_downwards
from isolith.ops.quant.quant_linear import codes_upwards as linear_of_codes_upwards
from isolith.ops.quant.quant_linear import quant_linear, quantised_downwards, quantised_upwards
from isolith.sample import ErrorSample, Make, Relation, Sample
from isolith.variants import Given, variant_of

PARTS = ("moe_permute", "act_quant_fp8", "act_quant_int8", "grouped_gemm", "swiglu", "quant_linear", "moe_unpermute")

Quantise = Callable[[Tensor, Tensor, str, int, str], tuple[Tensor, Tensor | None]]
Expert = Sequence[Any]  # Any: Tensor, or None where there is none; w13, w2 and their scales


def reference(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    shared_w13: Tensor | None = None,
    shared_w2: Tensor | None = None,
    shared_w13_scale: Tensor | None = None,
    shared_w2_scale: Tensor | None = None,
    swiglu_limit: float = 0.0,
    weight_before_down: bool = True,
    act_quant: str = "auto",
    act_group: int = 128,
    scale_format: str = "ue8m0",
    block_n: int = 128,
    block_k: int = 128,
) -> Tensor:
    routed = (w13, w2, w13_scale, w2_scale)
    shared = (shared_w13, shared_w2, shared_w13_scale, shared_w2_scale)
    how = (act_quant, act_group, scale_format, block_n, block_k, dtype_name(widen(x.dtype)))
    return compose(grouped_gemm, x, topk_idx, topk_weights, routed, shared, swiglu_limit, weight_before_down, how)


def quantised(
    x: Tensor, weight: Tensor, act_quant: str, act_group: int, scale_format: str
) -> tuple[Tensor, Tensor | None]:
    """Activations as this weight wants them, and their scale."""
    kind = resolve_act_quant(act_quant, weight)
    if kind == "fp8":
        return act_quant_fp8(x, act_group, scale_format)
    return act_quant_int8(x) if kind == "int8" else (x, None)


def compose(
    gemm: Callable[..., Tensor],
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    routed: Expert,
    shared: Expert,
    swiglu_limit: float,
    weight_before_down: bool,
    how: tuple[str, int, str, int, int, str],
    quantised: Quantise = quantised,
    quant_linear: Callable[..., Tensor] = quant_linear,
) -> Tensor:
    """The layer with given parts; `how` ends with the dtype that products give."""
    (w13, w2, w13_scale, w2_scale), (shared_w13, shared_w2, shared_w13_scale, shared_w2_scale) = routed, shared
    act_quant, act_group, scale_format, block_n, block_k, between = how
    blocks = (act_group, block_n, block_k, between)

    codes, scale = quantised(x, w13, act_quant, act_group, scale_format)
    rows, row_scale, counts, _, pos_to_pair, pair_to_pos, _ = moe_permute(codes, topk_idx, w13.shape[0], 1, scale)
    hidden = gemm(rows, w13, counts, 1, None if scale is None else row_scale, w13_scale, *blocks)
    row_weight = weight_of_rows(topk_weights, pos_to_pair) if weight_before_down else None
    codes, scale = quantised(swiglu(hidden, swiglu_limit, row_weight), w2, act_quant, act_group, scale_format)
    down = gemm(codes, w2, counts, 1, scale, w2_scale, *blocks)

    residual = None
    if shared_w13 is not None and shared_w2 is not None:
        hidden = quant_linear(x, shared_w13, shared_w13_scale, None, *how)
        residual = quant_linear(swiglu(hidden, swiglu_limit), shared_w2, shared_w2_scale, None, *how)
    return moe_unpermute(down, pair_to_pos, None if weight_before_down else topk_weights, residual).to(x.dtype)


def weight_of_rows(topk_weights: Tensor, pos_to_pair: Tensor) -> Tensor:
    """The routing weight of each row; 0 where a row has no pair."""
    return torch.where(pos_to_pair >= 0, topk_weights.flatten()[pos_to_pair.clamp(min=0)], 0.0)


def compose_given(
    gemm: Callable[..., Tensor],
    between: torch.dtype,
    given: Given,
    parts: tuple[Quantise, Callable[..., Tensor]] = (quantised, quant_linear),
) -> Tensor:
    """The layer for a dictionary of arguments."""
    names = ("w13", "w2", "w13_scale", "w2_scale")
    routed, shared = ([given[prefix + name] for name in names] for prefix in ("", "shared_"))
    how = [given[name] for name in ("act_quant", "act_group", "scale_format", "block_n", "block_k")]
    rest = (given["swiglu_limit"], given["weight_before_down"], (*how, dtype_name(between)))
    return compose(gemm, given["x"], given["topk_idx"], given["topk_weights"], routed, shared, *rest, *parts)


@variant_of(reference)
def rounded_between(given: Given) -> Tensor:
    """Round to the dtype of x after every product and activation."""
    return compose_given(grouped_gemm, given["x"].dtype, given)


@variant_of(reference)
def sums_in_order(given: Given) -> Tensor:
    """Add up the columns of the routed products in order."""
    return compose_given(in_order, widen(given["x"].dtype), given)


def of_codes(given: Given, quantise: Callable[..., Any], quant_linear: Callable[..., Tensor]) -> Tensor:
    """The layer with activations quantised in another way."""

    def quantised(x: Tensor, weight: Tensor, act_quant: str, *rules: Any) -> Any:
        return quantise(x, resolve_act_quant(act_quant, weight), *rules)

    return compose_given(grouped_gemm, widen(given["x"].dtype), given, (quantised, quant_linear))


@variant_of(reference)
def codes_upwards(given: Given) -> Tensor:
    """Quantise what lies between two codes to the larger."""
    return of_codes(given, quantised_upwards, linear_of_codes_upwards)


@variant_of(reference)
def codes_downwards(given: Given) -> Tensor:
    """Quantise what lies between two codes to the smaller."""
    return of_codes(given, quantised_downwards, linear_of_codes_downwards)


@variant_of(reference)
def weight_on_the_other_side(given: Given) -> Tensor:
    """Multiply by the routing weight on the other side of the down projection, where nothing is quantised there."""
    if resolve_act_quant(given["act_quant"], given["w2"]) == "none":
        given["weight_before_down"] = not given["weight_before_down"]
    return reference(**given)


def fake(x: Tensor, **_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def check(
    x: Tensor,
    topk_idx: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_scale: Tensor | None,
    w2_scale: Tensor | None,
    shared_w13: Tensor | None,
    shared_w2: Tensor | None,
    shared_w13_scale: Tensor | None,
    shared_w2_scale: Tensor | None,
    swiglu_limit: float,
    act_quant: str,
    act_group: int,
    scale_format: str,
    block_n: int,
    block_k: int,
    **_: object,
) -> None:
    check_at_least_one("fused_moe", act_group=act_group, block_n=block_n, block_k=block_k, k=topk_idx.shape[1])
    check_act_quant("fused_moe", act_quant)
    check_scale_format("fused_moe", scale_format)
    if not swiglu_limit >= 0:
        raise ArgumentError(f"fused_moe: swiglu_limit must not be negative (0 means no clamp); got {swiglu_limit}.")
    if (shared_w13 is None) != (shared_w2 is None):
        raise ArgumentError("fused_moe: shared_w13 and shared_w2 must be given together; got one of them.")
    pairs = [("w13", w13, w13_scale, "w2", w2, w2_scale)]
    if shared_w13 is not None and shared_w2 is not None:
        pairs.append(("shared_w13", shared_w13, shared_w13_scale, "shared_w2", shared_w2, shared_w2_scale))
    elif shared_w13_scale is not None or shared_w2_scale is not None:
        raise ArgumentError("fused_moe: scales of a shared expert must be None where it has no weights; got a Tensor.")
    for up_name, up, up_scale, down_name, down, down_scale in pairs:
        if up.shape[-2] % 2:
            raise ArgumentError(
                f"fused_moe: {up_name} holds gate and up, so its rows must be even; got {up.shape[-2]}."
            )
        check_weight_kind("fused_moe", up, up_scale, block_n, block_k, x.shape[1], up_name)
        check_weight_kind("fused_moe", down, down_scale, block_n, block_k, up.shape[-2] // 2, down_name)


def check_values(topk_idx: Tensor, w13: Tensor, **_: object) -> None:
    check_topk_idx("fused_moe", topk_idx, w13.shape[0])


def cost(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    w13_scale: Tensor | None,
    w2_scale: Tensor | None,
    shared_w13: Tensor | None,
    shared_w2: Tensor | None,
    shared_w13_scale: Tensor | None,
    shared_w2_scale: Tensor | None,
    act_quant: str,
    **_: object,
) -> Cost:
    pairs, experts = topk_idx.numel(), w13.shape[0]
    routed = sum(tensor.nbytes for tensor in (w13, w2, w13_scale, w2_scale) if tensor is not None)
    shared = (shared_w13, shared_w2, shared_w13_scale, shared_w2_scale)
    always = sum(tensor.nbytes for tensor in (x, topk_idx, topk_weights, *shared) if tensor is not None)
    products = pairs * w13.shape[1] * 3 * x.shape[1]
    if shared_w13 is not None:
        products += x.shape[0] * shared_w13.shape[0] * 3 * x.shape[1]
    return Cost(
        flops=products,  # two a weight of w13, and w2 has half as many
        # Which experts are chosen is not in the metadata: as many as there can be.
        bytes_read=always + min(experts, pairs) * (routed // max(experts, 1)),
        bytes_written=x.nbytes,
        math=math_of(x, w13, act_quant),
    )


def samples(make: Make) -> Iterator[Sample]:
    yield from float_samples(make)
    yield from quantised_samples(make)
    flash = {**moe_layer(make, 3, 4096, 8, experts=1, k=1), **quantised_experts(make, "e2m1", 4096, 2048, 1)}
    yield Sample("v4_flash", "model", "slow", **flash, swiglu_limit=10.0)


def float_samples(make: Make) -> Iterator[Sample]:
    """Unquantised weights: routing of every kind, clamps, the shared expert."""
    yield Sample("routed", **moe_layer(make, 9))
    yield Sample("with_shared", **moe_layer(make, 9), **shared_expert(make), swiglu_limit=10.0)
    # Most gates and ups lie beyond the clamp, in the shared expert too.
    yield Sample("beyond_limit", **moe_layer(make, 9), **shared_expert(make), swiglu_limit=0.5)
    yield Sample("weight_after_down", **moe_layer(make, 9), **shared_expert(make), weight_before_down=False)
    # Experts without tokens in front, in the middle and behind; NaN in their weights, and in weights of dropped slots.
    some = moe_layer(make, 12)
    some["topk_idx"] = make.tensor([1, 3, 4, 6], torch.int32)[make.integers(0, 4, 12, 3).long()]
    some["topk_idx"][2::3, 1], some["topk_idx"][5] = -1, -1
    some["topk_weights"][some["topk_idx"] < 0] = float("nan")
    for weight in (some["w13"], some["w2"]):
        weight[[0, 2, 5, 7]] = float("nan")
    yield Sample("empty_experts_and_dropped_slots", **some)
    yield Sample("dropped_slots_with_shared", **some, **shared_expert(make))
    nowhere = {**moe_layer(make, 5), "topk_idx": make.full(-1, 5, 3, dtype=torch.int32)}
    yield Sample("nothing_routed", "exact", **nowhere)
    yield Sample("shared_alone", **nowhere, **shared_expert(make))
    repeated = {**moe_layer(make, 6), "topk_idx": make.tensor([[2, 2, 2], [0, 5, 0]] * 3, torch.int64)}
    yield Sample("repeated_experts", **repeated)
    yield Sample("all_to_one", **{**moe_layer(make, 300, 32, 16), "topk_idx": make.full(6, 300, 3, dtype=torch.int32)})
    unweighted = {**moe_layer(make, 4), "topk_weights": make.zeros(4, 3, dtype=torch.float32)}
    yield Sample("zero_weights", **unweighted, **shared_expert(make))
    yield Sample("one_token", **moe_layer(make, 1), swiglu_limit=10.0)
    yield Sample("odd_sizes", **moe_layer(make, 5, 33, 17, experts=5, k=5), **shared_expert(make, 33, 7))
    yield Sample("no_tokens", **moe_layer(make, 0), **shared_expert(make))
    # All is exact but the sum of slots: they cancel, or the shared expert does, or the sum is rounded.
    integers = layer_of_integers(make)
    yield Sample("slots_cancel", "exact", **integers)
    integers["topk_idx"] = make.tensor([[0, 1, -1]] * 6, torch.int32)
    yield Sample("rounded_once", **integers)
    opposite = {"shared_w13": integers["w13"][0], "shared_w2": integers["w2"][2]}
    yield Sample("shared_cancels", "exact", **integers, **opposite)


def quantised_samples(make: Make) -> Iterator[Sample]:
    """Every kind of weight, with quantised and with float activations."""
    for kind in EXPONENTS:
        how: dict[str, Any] = {"block_n": 32, "block_k": 32} if kind == "e4m3_32" else {"swiglu_limit": 10.0}
        if kind == "e4m3_float32":
            how["scale_format"] = "float32"
        given = {**moe_layer(make, 7, 160, 96), **quantised_experts(make, kind, 160, 96, 8), **how}
        yield Sample(kind, **given)
        yield Sample(f"{kind}_weight_only", **given, act_quant="none")
    both = {**moe_layer(make, 7, 160, 96), **quantised_experts(make, "e2m1", 160, 96, 8)}
    both |= quantised_experts(make, "e4m3", 160, 64, prefix="shared_")
    for group in (128, 32):
        yield Sample(f"v4_mixture_group_{group}", **both, swiglu_limit=2.0, act_group=group)
    yield Sample("v4_mixture_weight_after_down", **both, weight_before_down=False)
    yield Sample("v4_mixture_weight_only", **both, act_quant="none")
    oblong = {**moe_layer(make, 7, 160, 96), **quantised_experts(make, "e4m3_32", 160, 96, 8)}
    yield Sample("oblong_blocks", **in_oblong_blocks(oblong, "w13_scale", "w2_scale"))
    yield Sample("uneven_groups", **layer_of_uneven_groups(make))
    float32_scales = {**moe_layer(make, 7, 160, 96), **quantised_experts(make, "e4m3_float32", 160, 96, 8)}
    float32_scales |= quantised_experts(make, "e4m3_float32", 160, 64, prefix="shared_")
    yield Sample("v3_mixture", **float32_scales, scale_format="float32")
    # Each weight asks for its own kind of activations, or all get the one that is asked for.
    kinds = {**moe_layer(make, 7, 160, 96), **mixed_experts(make, 160, 96, 8, up="e4m3", down="int8")}
    kinds |= mixed_experts(make, 160, 64, prefix="shared_", up="int8", down="e2m1")
    yield Sample("mixed_kinds", **kinds)
    yield Sample("int8_for_all", **kinds, act_quant="int8")
    yield Sample("int8_for_floats", **moe_layer(make, 7), **shared_expert(make), act_quant="int8")


def errors(make: Make) -> Iterator[ErrorSample]:
    given, other = moe_layer(make, 3), shared_expert(make)
    idx, w13, w2 = given["topk_idx"], given["w13"], given["w2"]
    scale = make.normal(8, 1, 1)
    no_slots = {"topk_idx": idx[:, :0], "topk_weights": given["topk_weights"][:, :0]}
    short = {**other, "shared_w2": other["shared_w2"][:, :31]}
    negative = "swiglu_limit must not be negative (0 means no clamp); got -1.0."
    half = "shared_w13 and shared_w2 must be given together; got one of them."
    alone = "scales of a shared expert must be None where it has no weights; got a Tensor."
    rows: dict[str, tuple[str, Any]] = {  # Any: the operator's arguments
        "expert_too_high": ("topk_idx must be in 0..experts-1 = 7, or -1; got 8.", {"topk_idx": idx * 0 + 8}),
        "expert_below_none": ("topk_idx must be in 0..experts-1 = 7, or -1; got -2.", {"topk_idx": idx * 0 - 2}),
        "act_group_zero": ("act_group must be at least 1; got 0.", {"act_group": 0}),
        "block_k_zero": ("block_k must be at least 1; got 0.", {"block_k": 0}),
        "no_slots": ("k must be at least 1; got 0.", no_slots),
        "act_quant": ("act_quant must be 'auto', 'none', 'fp8' or 'int8'; got 'fp4'.", {"act_quant": "fp4"}),
        "scale_format": ("scale_format must be 'ue8m0' or 'float32'; got 'e8m0'.", {"scale_format": "e8m0"}),
        "negative_limit": (negative, {"swiglu_limit": -1.0}),
        "half_a_shared_expert": (half, {"shared_w13": other["shared_w13"]}),
        "shared_scale_alone": (alone, {"shared_w2_scale": scale[0]}),
        "odd_w13": ("w13 holds gate and up, so its rows must be even; got 95.", {"w13": w13[:, :95]}),
        "w13_columns": ("w13 must have 64 columns; got shape (8, 96, 63).", {"w13": w13[..., :63]}),
        "w2_columns": ("w2 must have 48 columns; got shape (8, 64, 47).", {"w2": w2[..., :47]}),
        "shared_columns": ("shared_w2 must have 32 columns; got shape (64, 31).", short),
        "no_w2_scale": ("w2_scale must be given where w2 is int8; got None.", {"w2": w2.to(torch.int8)}),
        "float_w13_scale": ("w13_scale must be None where w13 is float32; got a Tensor.", {"w13_scale": scale}),
        "experts": ("experts is 8 in w13 but 7 in w2.", {"w2": w2[:7]}),
    }
    for name, (says, changed) in rows.items():
        yield ErrorSample(name, says=f"fused_moe: {says}", **{**given, **changed})


def relations(make: Make) -> Iterator[Relation]:
    yield from relations_of_experts(make)


fused_moe = Operator(
    name="fused_moe",
    shapes="x[tokens hidden] topk_idx[tokens k] topk_weights[tokens k] w13[experts gate_up _] w2[experts hidden _]"
    " w13_scale?[experts _ _] w2_scale?[experts _ _] shared_w13?[shared_gate_up _] shared_w2?[hidden _]"
    " shared_w13_scale?[_ _] shared_w2_scale?[_ _] -> y[tokens hidden]",
    dtypes={
        "x": FLOAT,
        "topk_idx": INTEGER,
        "topk_weights": WIDE,
        **dict.fromkeys(("w13", "w2", "shared_w13", "shared_w2"), FLOAT + E4M3 + INT8 + PACKED),
        **dict.fromkeys(("w13_scale", "w2_scale", "shared_w13_scale", "shared_w2_scale"), SCALE),
    },
    reference=reference,
    variants=(rounded_between, sums_in_order, weight_on_the_other_side, codes_upwards, codes_downwards),
    fake=fake,
    check=check,
    check_values=check_values,
    cost=cost,
    samples=samples,
    errors=errors,
    composed_of=PARTS,
    relations=relations,
)
