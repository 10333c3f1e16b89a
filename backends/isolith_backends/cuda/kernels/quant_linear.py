"""A product with one weight, or with one weight for each of several batches of rows: a tile of the result per program.

Tiles are numbered in bands of a few rows of tiles, column by column within a band, so that programs that run together
read the same rows and the same columns from the cache. One token reads the weight once and nothing else: there the
columns are divided until every multiprocessor streams a part of it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith import WhyNot
from isolith.numerics.scaled_matmul import blocks_of, inner_of, resolve_act_quant
from isolith_backends.cuda.kernels import act_quant_fp8 as fp8
from isolith_backends.cuda.kernels import act_quant_int8 as int8
from isolith_backends.cuda.kernels.formats import FLOORS, constants_of, format_of, reachable, stored_scale, tile_for
from isolith_backends.cuda.kernels.grouped_gemm import strides_of
from isolith_backends.cuda.kernels.scaled_matmul import product_of_tile
from isolith_backends.cuda.kernels.tensors import ROW, dense, stored
from isolith_backends.cuda.launch import capability, ceil_div, launch

BAND = 8  # rows of tiles that share the columns they read


@triton.jit(do_not_specialize=["rows"])
def quant_linear_tiles(
    X,
    XS,
    W,
    WS,
    Y,
    rows,
    N,
    K,
    x_b,
    x_m,
    xs_b,
    xs_m,
    xs_k,
    w_b,
    w_n,
    w_k,
    ws_b,
    ws_n,
    ws_k,
    y_b,
    y_m,
    x_group,
    w_rows,
    w_group,
    BAND: tl.constexpr,
    X_KIND: tl.constexpr,
    W_KIND: tl.constexpr,
    X_SCALE: tl.constexpr,
    W_SCALE: tl.constexpr,
    X_FOLD: tl.constexpr,
    W_FOLD: tl.constexpr,
    DOT: tl.constexpr,
    NATIVE: tl.constexpr,
    EVEN_K: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    tile = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    down = tl.cdiv(rows, BM)
    band = tile // (BAND * tl.cdiv(N, BN))
    tall = tl.minimum(down - band * BAND, BAND)
    place = tile % (BAND * tl.cdiv(N, BN))
    n0 = (place // tall) * BN
    row = (band * BAND + place % tall).to(tl.int64) * BM + tl.arange(0, BM)
    inside = row < rows
    made = product_of_tile(
        X + batch * x_b,
        XS + batch * xs_b if XS is not None else XS,
        W + batch * w_b,
        WS + batch * ws_b if WS is not None else WS,
        row * x_m,
        row * xs_m,
        inside,
        n0,
        N,
        K,
        w_n,
        w_k,
        ws_n,
        ws_k,
        xs_k,
        x_group,
        w_rows,
        w_group,
        X_KIND,
        W_KIND,
        X_SCALE,
        W_SCALE,
        X_FOLD,
        W_FOLD,
        DOT,
        NATIVE,
        EVEN_K,
        ONE_SCALE,
        BM,
        BN,
        BK,
    )
    column = n0 + tl.arange(0, BN)
    at = batch * y_b + row[:, None] * y_m + column[None, :]
    tl.store(Y + at, made.to(Y.dtype.element_ty), mask=inside[:, None] & (column < N)[None, :])


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How activations are quantised and weights divided into blocks, as operators say it."""

    act_quant: str
    act_group: int
    scale_format: str
    block_n: int
    block_k: int


def quantised(x: Tensor, weight: Tensor, rules: Rules) -> tuple[Tensor, Tensor | None]:
    """Float activations as this weight wants them, and their scale."""
    kind = resolve_act_quant(rules.act_quant, weight)
    if kind == "fp8":
        return fp8.act_quant_fp8(x, rules.act_group, rules.scale_format, FLOORS["fp8"])
    return int8.act_quant_int8(x, None, FLOORS["int8"]) if kind == "int8" else (x, None)


def quantising_refused(weight: Tensor, act_quant: str, act_group: int) -> WhyNot:
    """Why activations of this weight cannot be quantised: a program holds a whole group of them."""
    kind, inputs = resolve_act_quant(act_quant, weight), inner_of(weight)
    group = inputs if kind == "int8" else min(inputs, act_group)
    return (
        f"groups of {group} to quantise; a program holds one of at most {ROW}"
        if kind != "none" and group > ROW
        else None
    )


def batched_product(
    x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor | None, rules: Rules, y: Tensor
) -> None:
    """y[m, b, n] = sum_k x[m, b, k] weight[b, n, k], by their values; strides are free, but y's last is 1."""
    arch = capability(x.device)
    rows, batches, outputs = y.shape
    if y.numel() == 0:
        return
    inputs = inner_of(weight)
    x, weight = dense(x), reachable(weight)
    made = format_of(x, weight, x_scale, weight_scale, rules.act_group, rules.block_k, arch)
    tile = tile_for(rows, outputs, inputs, made, batches, arch)
    w_rows = blocks_of(weight, rules.block_n, rules.block_k)[0]
    xs_m, xs_b, xs_k = strides_of(x_scale, 3)
    launch(
        quant_linear_tiles,
        (ceil_div(rows, tile.rows) * ceil_div(outputs, tile.columns), batches),
        stored(x),
        stored_scale(x_scale),
        stored(weight),
        stored_scale(weight_scale),
        y,
        rows,
        outputs,
        inputs,
        x.stride(1),
        x.stride(0),
        xs_b,
        xs_m,
        xs_k,
        *weight.stride(),
        *strides_of(weight_scale, 3),
        y.stride(1),
        y.stride(0),
        made.x.group,
        w_rows,
        made.weight.group,
        warps=tile.warps,
        stages=tile.stages,
        BAND=BAND,
        **constants_of(x, weight, made, tile, w_rows),
    )


def linear_of_codes(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    rules: Rules,
    out_dtype: torch.dtype,
) -> Tensor:
    """Rows of the last axis of x, as they are, times a weight [N, K]."""
    shape, inputs = x.shape[:-1], x.shape[-1]
    rows, outputs = shape.numel(), weight.shape[0]
    y = torch.empty((*shape, outputs), dtype=out_dtype, device=x.device)
    batched_product(
        x.reshape(rows, 1, inputs),
        None if x_scale is None else stored(x_scale).reshape(rows, 1, x_scale.shape[-1]),
        weight[None],
        None if weight_scale is None else weight_scale[None],
        rules,
        y.view(rows, 1, outputs),
    )
    return y


def quant_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    x_scale: Tensor | None,
    rules: Rules,
    out_dtype: torch.dtype,
) -> Tensor:
    """Rows of the last axis times a weight [N, K] of any kind, quantised before where the rules say so."""
    if x_scale is None:
        x, x_scale = quantised(x, weight, rules)
    return linear_of_codes(x, x_scale, weight, weight_scale, rules, out_dtype)
