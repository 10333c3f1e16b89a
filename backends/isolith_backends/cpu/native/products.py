"""Products with weights in C++, packed ones decoded on the way: products.cpp."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT, FLOAT_NAMES
from isolith.numerics.scaled_matmul import QUANTISED, blocks_of, inner_of, resolve_act_quant
from isolith_backends.cpu.moe import order_by_expert
from isolith_backends.cpu.native.library import Library, in_large_pages

library = Library("products")

E8M0 = torch.float8_e8m0fnu
KINDS = {torch.bfloat16: 0, torch.float8_e4m3fn: 1, torch.uint8: 2, torch.int8: 3}
SCALES = {None: 0, E8M0: 1, torch.float32: 2}
STEP, ROWS, MOST_AT_ONCE, MOST_GROUPS = 32, 16, 252, 1024  # as in products.cpp
MOST_INPUTS = 32768
MANY = 16
"""Rows of bfloat16 from which on oneDNN, which packs the weights, is faster."""

WEIGHTS = (torch.bfloat16, *QUANTISED, torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Activations as bfloat16 [rows, inputs], and the scales [rows, groups] that are still to multiply products."""

    values: Tensor
    scales: Tensor | None = None
    group: int = 1

    def at(self, places: Tensor) -> "Rows":
        """Some of them."""
        scales = None if self.scales is None else self.scales.index_select(0, places)
        return Rows(values=self.values.index_select(0, places), scales=scales, group=self.group)


def product_refused(weight: Tensor, quant: str, act_group: int, block_n: int, block_k: int, x: torch.dtype) -> WhyNot:
    """Why the products of a weight are not taken; `quant` says how the activations are quantised."""
    inputs = inner_of(weight)
    if weight.dtype not in KINDS:
        return f"weights of {weight.dtype}; products here are of bfloat16, e4m3, e2m1 and int8"
    if quant == "none" and x != torch.bfloat16:
        return f"activations of {x}; dot products are of bfloat16"
    if inputs % STEP or not 0 < inputs <= MOST_INPUTS:
        return f"{inputs} inputs; takes multiples of {STEP} up to {MOST_INPUTS}"
    group = {"fp8": act_group, "int8": inputs}.get(quant, inputs)
    block = inputs if weight.dtype == torch.bfloat16 else blocks_of(weight, block_n, block_k)[1]
    if inputs % group or inputs % block or group % block or block % STEP or inputs // block > MOST_GROUPS:
        return f"{inputs} inputs in groups of {group} and blocks of {block}; takes whole blocks within whole groups"
    return None


def rows_of(x: Tensor, quant: str, act_group: int, scale_format: str) -> Rows:
    """Activations [rows, inputs], quantised as the operator says."""
    if quant == "none":
        return Rows(values=x.contiguous())
    if quant == "fp8":
        return widened(*ops.quant.act_quant_fp8(x, act_group, scale_format), act_group)
    return widened(*ops.quant.act_quant_int8(x), x.shape[-1])


def widened(codes: Tensor, scale: Tensor, group: int) -> Rows:
    """Codes and their scales as rows."""
    (count, inputs), groups = codes.shape, scale.shape[-1]
    values, scales = torch.empty(count, inputs, dtype=torch.bfloat16), torch.empty(count, groups)
    folded = torch.empty(1, dtype=torch.int64)
    library.call(
        *(
            "widen_codes",
            codes.contiguous(),
            KINDS[codes.dtype],
            scale.contiguous(),
            SCALES[scale.dtype],
            groups,
            group,
        ),
        *(values, scales, folded, count, inputs),
    )
    return Rows(values=values) if folded.item() else Rows(values=values, scales=scales, group=group)


def product(
    rows: Rows,
    weight: Tensor,
    scale: Tensor | None,
    begins: Tensor,
    ends: Tensor,
    out: Tensor,
    blocks: tuple[int, int],
) -> Tensor:
    """Write [rows, outputs] of every expert's rows, begins[e] .. ends[e]-1, with its weight [outputs, inputs]."""
    experts, outputs, inputs = weight.shape[0], weight.shape[1], inner_of(weight)
    block_n, block_k = (1, inputs) if scale is None else blocks_of(weight, *blocks)
    threads = torch.get_num_threads()
    each = 64 * MOST_AT_ONCE * ROWS + 2 * ROWS * inputs + 4 * ROWS * -(-inputs // block_k)
    room = torch.empty(threads, -(-each // 64) * 64, dtype=torch.uint8)
    groups = 1 if rows.scales is None else rows.scales.shape[1]
    scale = None if scale is None else scale.contiguous()
    turned = None if weight.dtype in (torch.bfloat16, torch.int8) else torch.empty_like(rows.values)
    library.call(
        *(
            "grouped_product",
            rows.values,
            turned,
            rows.scales,
            groups,
            rows.group,
            weight.contiguous(),
            KINDS[weight.dtype],
        ),
        *(scale, SCALES[None if scale is None else scale.dtype], block_n, block_k, begins, ends),
        *(experts, outputs, inputs, in_large_pages(out), out.dtype, room, room.shape[1]),
    )
    return out


def one(count: int) -> tuple[Tensor, Tensor]:
    """The bounds of all rows."""
    return torch.tensor([0]), torch.tensor([count])


# ---- linear layers ---------------------------------------------------------------------------------------------------


def linear_refused(
    x: Tensor, weight: Tensor, act_quant: str, act_group: int, block_n: int, block_k: int, out_dtype: str, **_: object
) -> WhyNot:
    if out_dtype == "float64":
        return "out_dtype is float64; float32 sums would not do"
    quant = quant_of(x, weight, act_quant)
    return product_refused(weight, quant, act_group, block_n, block_k, x.dtype)


def quant_of(x: Tensor, weight: Tensor, act_quant: str) -> str:
    """How the activations of a product are quantised, before the call or in it."""
    given = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}.get(x.dtype)
    return given or resolve_act_quant(act_quant, weight)


@implements(
    ops.quant.quant_linear,
    requires=Requires(dtypes={"x": (*DEVICE_FLOAT, *QUANTISED), "weight": WEIGHTS}, missing=library.missing),
    why_not=linear_refused,
)
def quant_linear_native(
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
    flat, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], weight.shape[0])
    if weight.dtype == torch.bfloat16 and x.dtype == torch.bfloat16 and out_dtype == "bfloat16" and len(flat) >= MANY:
        quant = quant_of(x, weight, act_quant)
        if quant == "none":
            return linear(x, weight).contiguous()
    if x_scale is None:
        rows = rows_of(flat, quant_of(x, weight, act_quant), act_group, scale_format)
    else:
        rows = widened(flat, x_scale.reshape(len(flat), -1), act_group if x.dtype != torch.int8 else x.shape[-1])
    out = torch.empty(len(flat), weight.shape[0], dtype=FLOAT_NAMES[out_dtype])
    scale = None if weight_scale is None else weight_scale[None]
    return product(rows, weight[None], scale, *one(len(flat)), out, (block_n, block_k)).view(shape)


def projection_refused(
    x: Tensor,
    wo_a: Tensor,
    wo_b: Tensor,
    act_quant_a: str,
    act_quant_b: str,
    act_group: int,
    block_n: int,
    block_k: int,
    **_: object,
) -> WhyNot:
    for weight, act_quant in ((wo_a, act_quant_a), (wo_b, act_quant_b)):
        quant = resolve_act_quant(act_quant, weight)
        if why := product_refused(weight, quant, act_group, block_n, block_k, x.dtype):
            return why
    return None


@implements(
    ops.attention.grouped_output_proj,
    requires=Requires(dtypes={"x": DEVICE_FLOAT, "wo_a": WEIGHTS, "wo_b": WEIGHTS}, missing=library.missing),
    why_not=projection_refused,
)
def grouped_output_proj_native(
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
    tokens, (groups, rank, _) = x.shape[0], wo_a.shape
    inputs, quant = x.numel() // max(tokens * groups, 1), resolve_act_quant(act_quant_a, wo_a)
    if wo_a.dtype == x.dtype and quant == "none" and tokens >= MANY:
        by_group = x.reshape(tokens, groups, inputs).transpose(0, 1)
        u = torch.bmm(by_group, wo_a.transpose(1, 2)).transpose(0, 1).reshape(tokens, groups * rank)
    else:
        # Groups are experts, each with all tokens.
        by_group = x.reshape(tokens, groups, inputs).transpose(0, 1).reshape(groups * tokens, inputs)
        rows = rows_of(by_group, quant, act_group, scale_format)
        begins = torch.arange(groups) * tokens
        out = torch.empty(groups * tokens, rank, dtype=x.dtype)
        out = product(rows, wo_a, wo_a_scale, begins, begins + tokens, out, (block_n, block_k))
        u = out.view(groups, tokens, rank).transpose(0, 1).reshape(tokens, groups * rank)
    out_dtype = str(x.dtype).removeprefix("torch.")
    return quant_linear_native.fn(
        u, wo_b, wo_b_scale, None, act_quant_b, act_group, scale_format, block_n, block_k, out_dtype
    )


# ---- experts ---------------------------------------------------------------------------------------------------------


def grouped_refused(
    x: Tensor, weight: Tensor, act_group: int, block_n: int, block_k: int, out_dtype: str, **_: object
) -> WhyNot:
    if out_dtype == "float64":
        return "out_dtype is float64; float32 sums would not do"
    quant = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}.get(x.dtype, "none")
    rows = x.numel() // max(x.shape[-1], 1)
    if weight.dtype == torch.bfloat16 and quant == "none" and rows >= MANY * weight.shape[0]:
        return f"{rows} rows of {weight.shape[0]} experts; oneDNN is faster"
    return product_refused(weight, quant, act_group, block_n, block_k, x.dtype)


@implements(
    ops.moe.grouped_gemm,
    requires=Requires(dtypes={"x": (torch.bfloat16, *QUANTISED), "weight": WEIGHTS}, missing=library.missing),
    why_not=grouped_refused,
)
def grouped_gemm_native(
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
    y = torch.empty((*x.shape[:-1], weight.shape[1]), dtype=FLOAT_NAMES[out_dtype])
    flat = x.reshape(-1, x.shape[-1])
    if x_scale is None:
        rows = Rows(values=flat.contiguous())
    else:
        group = x.shape[-1] if x.dtype == torch.int8 else act_group
        rows = widened(flat, x_scale.reshape(len(flat), -1), group)
    begins, ends = bounds_of(x, expert_counts, alignment)
    product(rows, weight, weight_scale, begins, ends, y.view(-1, weight.shape[1]), (block_n, block_k))
    return y


def bounds_of(x: Tensor, expert_counts: Tensor, alignment: int) -> tuple[Tensor, Tensor]:
    """Where each expert's rows begin and end, in [rows, inputs]."""
    counts = expert_counts.long()
    if x.dim() == 3:
        begins = torch.arange(x.shape[0]) * x.shape[1]
    else:
        padded = (counts + alignment - 1) // alignment * alignment
        begins = padded.cumsum(0) - padded
    return begins, begins + counts


def moe_refused(
    x: Tensor,
    topk_idx: Tensor,
    w13: Tensor,
    w2: Tensor,
    shared_w13: Tensor | None,
    shared_w2: Tensor | None,
    act_quant: str,
    act_group: int,
    block_n: int,
    block_k: int,
    **_: object,
) -> WhyNot:
    rows = topk_idx.numel() // max(min(w13.shape[0], topk_idx.numel()), 1)
    for weight in (w13, w2, shared_w13, shared_w2):
        if weight is None:
            continue
        quant = resolve_act_quant(act_quant, weight)
        if weight.dtype == torch.bfloat16 and rows >= MANY:
            return f"{rows} rows an expert; oneDNN is faster"
        if quant == "none" and weight.dtype != x.dtype:
            return f"weights of {weight.dtype} beside activations that are not quantised; those between are float32"
        if why := product_refused(weight, quant, act_group, block_n, block_k, x.dtype):
            return why
    return None


@implements(
    ops.moe.fused_moe,
    requires=Requires(
        dtypes={"x": DEVICE_FLOAT, **dict.fromkeys(("w13", "w2", "shared_w13", "shared_w2"), WEIGHTS)},
        missing=library.missing,
    ),
    why_not=moe_refused,
)
def fused_moe_native(
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
    how, blocks = (act_group, scale_format), (block_n, block_k)

    def step(rows: Rows, weight: Tensor, scale: Tensor | None, bounds: tuple[Tensor, Tensor]) -> Tensor:
        """A product, in bfloat16 where everything is, as a linear layer has it; else in float32."""
        plain = weight.dtype == x.dtype
        out = torch.empty(len(rows.values), weight.shape[1], dtype=x.dtype if plain else torch.float32)
        return product(rows, weight, scale, *bounds, out, blocks)

    pair, counted = order_by_expert(topk_idx, w13.shape[0])
    counts = torch.tensor(counted)
    ends = counts.cumsum(0)
    bounds, k = (ends - counts, ends), topk_idx.shape[1]
    weights = topk_weights.float().flatten()[pair]
    rows = rows_of(x, resolve_act_quant(act_quant, w13), *how).at(pair // k)
    hidden = step(rows, w13, w13_scale, bounds)
    hidden = ops.moe.swiglu(hidden, swiglu_limit, weights if weight_before_down else None)
    down = step(rows_of(hidden, resolve_act_quant(act_quant, w2), *how), w2, w2_scale, bounds)

    shared = None
    if shared_w13 is not None and shared_w2 is not None:
        whole = one(len(x))
        rows = rows_of(x, resolve_act_quant(act_quant, shared_w13), *how)
        hidden = step(
            rows, shared_w13[None], shared_w13_scale if shared_w13_scale is None else shared_w13_scale[None], whole
        )
        hidden = ops.moe.swiglu(hidden, swiglu_limit)
        rows = rows_of(hidden, resolve_act_quant(act_quant, shared_w2), *how)
        shared = step(
            rows, shared_w2[None], shared_w2_scale if shared_w2_scale is None else shared_w2_scale[None], whole
        )
    places = torch.full((topk_idx.numel(),), -1)
    places[pair] = torch.arange(len(pair))
    combined = ops.moe.moe_unpermute(
        down.float(), places.view(topk_idx.shape), None if weight_before_down else topk_weights.float(), shared
    )
    return combined.to(x.dtype)
