"""Output projection of attention in two steps: each group of heads to a low rank, then all groups to the hidden size.

    o[t, a, :] = x[t, a*h .. (a+1)*h - 1, :] flattened                       h = heads/groups heads of group a
    u[t, a, r] = sum_k o[t, a, k] * wo_a[a, r, k]                            rounded to x's dtype
    y[t, n]    = sum_j u[t, :, :].flatten()[j] * wo_b[n, j]                  rounded to x's dtype

Groups are contiguous ranges of heads, and heads must be a multiple of groups. The weights may be of every kind that
quant_linear takes, with its scales, wo_a's by group; activations are quantised as `act_quant_a` and `act_quant_b` say,
by the same rules, a row of the first step being one group of one token. The release dequantises wo_a and leaves the
activations (act_quant_a "none"); stacks that quantise o say "auto" or "fp8". The inverse rotary embedding comes
before and is not part of it. Products and sums in float32, in any order; u may also stay in float32.

Source: arXiv:2606.19348, 2.3.3; DeepSeek-V4 inference/model.py, Attention.forward (wo_a einsum, wo_b).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from isolith.dtypes import E4M3, FLOAT, INT8, PACKED, SCALE, dtype_name, widen
from isolith.errors import ArgumentError
from isolith.materials.relations import joined, reordered, same, scaled, take
from isolith.numerics.codes import check_at_least_one, check_scale_format
from isolith.numerics.scaled_matmul import (
    check_act_quant,
    check_weight_kind,
    dequantise_activation,
    dequantise_weight,
    math_of,
    resolve_act_quant,
)
from isolith.operator import Cost, Operator
from isolith.ops.quant.quant_linear import (
    made_weight,
    quantised,
    quantised_downwards,
    quantised_upwards,
    sum_in_order,
)
from isolith.ops.quant.quant_linear import reference as quant_linear
from isolith.sample import ErrorSample, Make, Relation, Sample
from isolith.variants import Given, variant_of


def reference(
    x: Tensor,
    wo_a: Tensor,
    wo_b: Tensor,
    wo_a_scale: Tensor | None = None,
    wo_b_scale: Tensor | None = None,
    act_quant_a: str = "none",
    act_quant_b: str = "auto",
    act_group: int = 128,
    scale_format: str = "ue8m0",
    block_n: int = 128,
    block_k: int = 128,
) -> Tensor:
    u = first_step(x, wo_a, wo_a_scale, act_quant_a, act_group, scale_format, block_n, block_k).to(x.dtype)
    rules = (act_group, scale_format, block_n, block_k, dtype_name(x.dtype))
    return quant_linear(u.flatten(1), wo_b, wo_b_scale, None, act_quant_b, *rules)


def first_step(
    x: Tensor,
    wo_a: Tensor,
    wo_a_scale: Tensor | None,
    act_quant_a: str,
    act_group: int,
    scale_format: str,
    block_n: int,
    block_k: int,
    quantised: Callable[..., tuple[Tensor, Tensor | None]] = quantised,
) -> Tensor:
    """u [tokens, groups, rank], widened."""
    o, wide = grouped(x, wo_a), widen(x.dtype)
    codes, scale = quantised(o, resolve_act_quant(act_quant_a, wo_a), act_group, scale_format)
    values = dequantise_activation(codes, scale, act_group, wide)
    return torch.einsum("tak,ark->tar", values, dequantise_weight(wo_a, wo_a_scale, block_n, block_k, wide))


def grouped(x: Tensor, wo_a: Tensor) -> Tensor:
    """[tokens, heads, head_dim] -> [tokens, groups, heads/groups * head_dim]."""
    tokens, heads, head_dim = x.shape
    return x.reshape(tokens, wo_a.shape[0], heads // wo_a.shape[0] * head_dim)


def wide_between(
    x: Tensor,
    wo_a: Tensor,
    wo_b: Tensor,
    wo_a_scale: Tensor | None = None,
    wo_b_scale: Tensor | None = None,
    act_quant_a: str = "none",
    act_quant_b: str = "auto",
    act_group: int = 128,
    scale_format: str = "ue8m0",
    block_n: int = 128,
    block_k: int = 128,
) -> Tensor:
    """u in float32, as where both steps are one kernel."""
    u = first_step(x, wo_a, wo_a_scale, act_quant_a, act_group, scale_format, block_n, block_k)
    rules = (act_group, scale_format, block_n, block_k, dtype_name(x.dtype))
    return quant_linear(u.flatten(1), wo_b, wo_b_scale, None, act_quant_b, *rules)


def group_by_group(
    x: Tensor,
    wo_a: Tensor,
    wo_b: Tensor,
    wo_a_scale: Tensor | None = None,
    wo_b_scale: Tensor | None = None,
    act_quant_a: str = "none",
    act_quant_b: str = "auto",
    act_group: int = 128,
    scale_format: str = "ue8m0",
    block_n: int = 128,
    block_k: int = 128,
) -> Tensor:
    """A linear layer for each group, and both steps with other orders of summation."""
    o, steps = grouped(x, wo_a), []
    rules = (act_group, scale_format, block_n, block_k, dtype_name(x.dtype))
    for group in range(wo_a.shape[0]):
        scale = None if wo_a_scale is None else wo_a_scale[group]
        steps.append(sum_in_order(o[:, group], wo_a[group], scale, None, act_quant_a, *rules))
    return sum_in_order(torch.cat(steps, dim=-1), wo_b, wo_b_scale, None, act_quant_b, *rules)


def of_codes(given: Given, quantise: Callable[..., tuple[Tensor, Tensor | None]]) -> Tensor:
    """Both steps with activations quantised in another way."""
    x, (act_group, scale_format) = given["x"], (given["act_group"], given["scale_format"])
    block_n, block_k = given["block_n"], given["block_k"]
    first = (given["act_quant_a"], act_group, scale_format, block_n, block_k)
    u = first_step(x, given["wo_a"], given["wo_a_scale"], *first, quantise).to(x.dtype)
    kind = resolve_act_quant(given["act_quant_b"], given["wo_b"])
    codes, scale = quantise(u.flatten(1), kind, act_group, scale_format)
    rules = (act_group, scale_format, block_n, block_k, dtype_name(x.dtype))
    return quant_linear(codes, given["wo_b"], given["wo_b_scale"], scale, "none", *rules)


@variant_of(reference)
def codes_upwards(given: Given) -> Tensor:
    """Quantise what lies between two codes to the larger."""
    return of_codes(given, quantised_upwards)


@variant_of(reference)
def codes_downwards(given: Given) -> Tensor:
    """Quantise what lies between two codes to the smaller."""
    return of_codes(given, quantised_downwards)


def fake(x: Tensor, wo_b: Tensor, **_: object) -> Tensor:
    return x.new_empty(x.shape[0], wo_b.shape[0])


def check(
    x: Tensor,
    wo_a: Tensor,
    wo_b: Tensor,
    wo_a_scale: Tensor | None = None,
    wo_b_scale: Tensor | None = None,
    act_quant_a: str = "none",
    act_quant_b: str = "auto",
    act_group: int = 128,
    scale_format: str = "ue8m0",
    block_n: int = 128,
    block_k: int = 128,
) -> None:
    name, (groups, rank, _) = "grouped_output_proj", wo_a.shape
    check_at_least_one(name, groups=groups, act_group=act_group, block_n=block_n, block_k=block_k)
    check_act_quant(name, act_quant_a, "act_quant_a")
    check_act_quant(name, act_quant_b, "act_quant_b")
    check_scale_format(name, scale_format)
    heads, head_dim = x.shape[1:]
    if heads % groups:
        raise ArgumentError(f"{name}: heads must be a multiple of wo_a's groups = {groups}; got {heads}.")
    check_weight_kind(name, wo_a, wo_a_scale, block_n, block_k, heads // groups * head_dim, "wo_a")
    check_weight_kind(name, wo_b, wo_b_scale, block_n, block_k, groups * rank, "wo_b")


def cost(
    x: Tensor,
    wo_a: Tensor,
    wo_b: Tensor,
    wo_a_scale: Tensor | None,
    wo_b_scale: Tensor | None,
    act_quant_b: str,
    **_: object,
) -> Cost:
    groups, rank = wo_a.shape[:2]
    tensors = (x, wo_a, wo_b, wo_a_scale, wo_b_scale)
    return Cost(
        flops=2 * x.numel() * rank + 2 * x.shape[0] * groups * rank * wo_b.shape[0],
        bytes_read=sum(tensor.nbytes for tensor in tensors if tensor is not None),
        bytes_written=x.shape[0] * wo_b.shape[0] * x.itemsize,
        math=math_of(x, wo_b, act_quant_b),
    )


def made_weights(
    make: Make,
    kinds: str,
    groups: int,
    rank: int,
    inner: int,
    hidden: int,
    block: int = 128,
    block_k: int = 0,
) -> dict[str, Tensor]:
    """wo_a and wo_b of two kinds, "fp8 fp4" for example, with the scales that they need; block_k 0 = block."""
    kind_a, kind_b = kinds.split()
    wo_a = [made_weight(make, kind_a, rank, inner, block, block_k or block) for _ in range(groups)]
    wo_b = made_weight(make, kind_b, hidden, groups * rank, block, block_k or block)
    weights = {"wo_a": torch.stack([part["weight"] for part in wo_a]), "wo_b": wo_b["weight"]}
    if "weight_scale" in wo_a[0]:
        weights["wo_a_scale"] = torch.stack([part["weight_scale"] for part in wo_a])
    if "weight_scale" in wo_b:
        weights["wo_b_scale"] = wo_b["weight_scale"]
    return weights


def samples(make: Make) -> Iterator[Sample]:
    yield Sample("a_group_a_head", x=make.normal(2, 3, 40), **made_weights(make, "float float", 3, 8, 40, 24))
    for kinds in ("float float", "fp8 fp8", "fp4 int8", "int8 fp4"):
        weights = made_weights(make, kinds, 2, 128, 128, 48)
        yield Sample("_".join((*kinds.split(), "weights")), x=make.normal(3, 4, 64), **weights)
    weights = made_weights(make, "fp8 fp8", 2, 128, 256, 96)
    rules = {"act_quant_a": "auto", "act_group": 64, "scale_format": "float32"}
    yield Sample("quantised_before_both", x=make.normal(3, 8, 64), **weights, **rules)
    rules = {"act_quant_a": "int8", "act_quant_b": "none"}
    yield Sample("weight_only_after_int8", x=make.normal(3, 8, 64), **weights, **rules)
    # Groups of sizes far apart: a row of the first step is one group, so that an int8 scale serves it alone.
    x = make.normal(4, 4, 32) * make.tensor([[64.0], [64.0], [2.0**-6], [2.0**-6]])
    yield Sample("groups_of_all_sizes", x=x, **made_weights(make, "int8 float", 2, 32, 64, 24), act_quant_a="auto")
    # A rank that no block divides.
    yield Sample("one_group", x=make.normal(2, 3, 40), **made_weights(make, "float fp8", 1, 72, 120, 56))
    weights = made_weights(make, "fp8 fp8", 2, 64, 96, 64, 32, 64)
    yield Sample("blocks_of_32_by_64", x=make.normal(3, 4, 48), **weights, block_n=32, block_k=64)
    # The last group of activations is short: one that reached into the next heads would lose them.
    rules = {"act_quant_a": "fp8", "act_quant_b": "none", "act_group": 64}
    x = make.normal(3, 4, 48) * make.tensor([[1.0], [64.0], [2.0**-12], [2.0**-12]])
    weights = made_weights(make, "fp8 float", 2, 48, 96, 40)
    weights["wo_b"][:, 48:] *= 2.0**12
    yield Sample("short_last_groups", x=x, **weights, **rules)
    weights = made_weights(make, "int8 int8", 2, 32, 64, 24)
    weights["wo_a"][:, ::3, ::2] = weights["wo_b"][::3, ::2] = -128
    yield Sample(
        "int8_weights_of_minus_128", x=make.normal(3, 4, 32), **weights, act_quant_a="none", act_quant_b="none"
    )
    x = make.normal(4, 3, 64).transpose(0, 1)
    yield Sample("permuted_axes", x=x, **made_weights(make, "float fp8", 2, 128, 128, 48))
    yield Sample("no_tokens", x=make.normal(0, 4, 64), **made_weights(make, "fp8 fp8", 2, 128, 128, 48))
    # One head of each group picked out, and one of its elements: any other order of heads shows.
    wo_a = make.tensor([[[0.0] * 6 + [1.0, 0.0]], [[0.0] * 5 + [2.0, 0.0, 0.0]]])
    wo_b = make.tensor([[1.0, 4.0], [0.0, 1.0]])
    yield Sample("heads_in_order", "exact", x=make.small_integers(5, 4, 4), wo_a=wo_a, wo_b=wo_b)
    a_rank = made_weights(make, "fp8 fp8", 1, 1024, 4096, 512)
    yield Sample("a_rank_of_flash", "model", x=make.normal(2, 8, 512), **a_rank)


def errors(make: Make) -> Iterator[ErrorSample]:
    x, plain = make.normal(2, 4, 16), made_weights(make, "float float", 2, 32, 32, 8)
    fp8 = made_weights(make, "fp8 fp8", 2, 32, 32, 8)
    choices = "must be 'auto', 'none', 'fp8' or 'int8'; got 'fp4'."
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (  # Any: arguments of several types
        ("heads", {"x": x[:, :3]}, "heads must be a multiple of wo_a's groups = 2; got 3."),
        ("no_groups", {"wo_a": plain["wo_a"][:0]}, "groups must be at least 1; got 0."),
        ("columns_of_wo_a", {"x": x[..., :8]}, "wo_a must have 16 columns; got shape (2, 32, 32)."),
        ("columns_of_wo_b", {"wo_b": plain["wo_b"][:, :32]}, "wo_b must have 64 columns; got shape (8, 32)."),
        ("no_scale", {"wo_a": fp8["wo_a"]}, "wo_a_scale must be given where wo_a is float8_e4m3fn; got None."),
        ("scale", {"wo_b_scale": x[0]}, "wo_b_scale must be None where wo_b is float32; got a Tensor."),
        ("blocks", {**fp8, "block_n": 4}, "wo_a_scale must be [2, 8, 1] for float8_e4m3fn wo_a; got shape (2, 1, 1)."),
        ("groups_of_scale", {**fp8, "wo_a_scale": fp8["wo_a_scale"][:1]}, "groups is 2 in wo_a but 1 in wo_a_scale."),
        ("unknown_act_quant_a", {"act_quant_a": "fp4"}, f"act_quant_a {choices}"),
        ("unknown_act_quant_b", {"act_quant_b": "fp4"}, f"act_quant_b {choices}"),
        ("unknown_scale_format", {"scale_format": "e8"}, "scale_format must be 'ue8m0' or 'float32'; got 'e8'."),
        ("zero_act_group", {"act_group": 0}, "act_group must be at least 1; got 0."),
        ("zero_block_n", {"block_n": 0}, "block_n must be at least 1; got 0."),
        ("zero_block_k", {"block_k": 0}, "block_k must be at least 1; got 0."),
        ("x_rank", {"x": x[0]}, "x must be [tokens heads head_dim], 3 axes; got shape (4, 16)."),
    )
    for name, arguments, says in cases:
        yield ErrorSample(name, **{"x": x, **plain, **arguments}, says=f"grouped_output_proj: {says}")


def relations(make: Make) -> Iterator[Relation]:
    call = {"x": make.normal(7, 6, 16), **made_weights(make, "float float", 2, 24, 48, 40)}
    yield scaled("x_times_8", call, {"x": 3}, [3])
    yield joined("tokens_apart", call, [1, 4], ["x"])
    yield reordered("outputs_reordered", call, make.permutation(40), {"wo_b": 0}, {0: 1})
    # The second group first: its heads, its rows of wo_a, and the columns of wo_b that it meets.
    heads, columns = torch.arange(6).roll(3), torch.arange(48).roll(24)
    exchanged = {"x": take(call["x"], heads, 1), "wo_a": call["wo_a"].flip(0), "wo_b": take(call["wo_b"], columns, 1)}
    yield same("groups_exchanged", call, exchanged)


grouped_output_proj = Operator(
    name="grouped_output_proj",
    shapes="x[tokens heads head_dim] wo_a[groups rank _] wo_b[hidden _] wo_a_scale?[groups _ _] wo_b_scale?[_ _]"
    " -> y[tokens hidden]",
    dtypes={
        "x": FLOAT,
        "wo_a": FLOAT + E4M3 + PACKED + INT8,
        "wo_b": FLOAT + E4M3 + PACKED + INT8,
        "wo_a_scale": SCALE,
        "wo_b_scale": SCALE,
    },
    reference=reference,
    variants=(wide_between, group_by_group, codes_upwards, codes_downwards),
    fake=fake,
    check=check,
    cost=cost,
    samples=samples,
    errors=errors,
    relations=relations,
)
