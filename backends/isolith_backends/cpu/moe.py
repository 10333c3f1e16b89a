"""Mixture of experts on a host: the weights of experts that have tokens are streamed once, and never copied whole.

At a few tokens a layer is as fast as memory gives its weights: each active expert is one product over the tokens that
chose it, and a quantised weight is dequantised in pieces that stay in cache.
"""

import functools
import itertools

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT, FLOAT_NAMES
from isolith.numerics.codes import decode, spread_scale
from isolith.numerics.scaled_matmul import QUANTISED, blocks_of, dequantise_activation, inner_of, resolve_act_quant
from isolith.ops.moe.grouped_gemm import segments
from isolith.ops.moe.moe_permute import row_count

PIECE = 2 << 20  # bytes of a dequantised weight at a time: what a second-level cache about holds

Segments = list[tuple[int, slice]]
"""Experts that have rows, and which rows they are."""


def linear(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """rows @ weight.T in their common dtype."""
    # torch gives float32 products to MKL, which packs the whole weight first: at 2 to 32 rows on an AMD host oneDNN,
    # which torch uses for bfloat16, was 2 to 5 times as fast.
    if rows.dtype == torch.float32 and rows.shape[0] > 1 and rows.numel() and has_onednn_linear():
        out.copy_(torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], ""))
    elif rows.dtype == torch.bfloat16 and rows.shape[0] == 1:
        # oneDNN streams a weight about a tenth faster for two rows than for one.
        out.copy_(torch.mm(rows.repeat(2, 1), weight.T)[:1])
    else:
        torch.mm(rows, weight.T, out=out)


@functools.cache
def has_onednn_linear() -> bool:
    """Whether this torch has oneDNN's float32 product as an operator, which is a private one."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(
    rows: Tensor, weight: Tensor, scale: Tensor | None, block_n: int, block_k: int, out: Tensor | None = None
) -> Tensor:
    """rows @ (dequantised weight).T: in the dtype of rows where the weight has it too, else in float32."""
    plain = weight.dtype == rows.dtype
    if out is None:
        out = torch.empty((rows.shape[0], weight.shape[0]), dtype=rows.dtype if plain else torch.float32)
    if plain:
        linear(rows, weight, out)
        return out
    wide = rows.float()
    outputs, inputs = weight.shape[0], inner_of(weight)
    unit = blocks_of(weight, block_n, block_k)[0] if scale is not None else 1
    step = max(1, PIECE // (4 * max(inputs, 1) * unit)) * unit
    for low in range(0, outputs, step):
        piece = slice(low, min(low + step, outputs))
        part = None if scale is None else scale[low // unit : -(-piece.stop // unit)]
        linear(wide, values_of(weight[piece], part, block_n, block_k), out[:, piece])
    return out


def values_of(weight: Tensor, scale: Tensor | None, block_n: int, block_k: int) -> Tensor:
    """The float32 values of some rows of a weight."""
    if weight.dtype in (torch.float8_e4m3fn, torch.uint8):
        table = values_of_byte(weight.dtype)
        bits = weight.view(torch.uint8).flatten().int()
        values = table.index_select(0, bits).view(torch.float32).view(weight.shape[0], inner_of(weight))
    else:
        values = weight.float()
    if scale is None:
        return values
    (rows, columns), (n, k) = blocks_of(weight, block_n, block_k), values.shape
    if n % rows or k % columns:
        return values.mul_(spread_scale(scale.float(), n, k, rows, columns))
    values.view(n // rows, rows, k // columns, columns).mul_(scale.float()[:, None, :, None])
    return values


@functools.cache
def values_of_byte(dtype: torch.dtype) -> Tensor:
    """What each byte stands for: 256 values of e4m3, or 256 pairs of e2m1 values, a pair as one float64."""
    every = torch.arange(256, dtype=torch.uint8)
    if dtype == torch.float8_e4m3fn:
        return every.view(dtype).float()
    return decode(every[:, None], torch.float32).view(torch.float64).flatten()


def order_by_expert(topk_idx: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """(pairs of experts sorted by expert, how many each has); dropped pairs are left out."""
    expert = topk_idx.flatten().long()
    counts = torch.bincount(expert + 1, minlength=experts + 1).tolist()
    return expert.sort(stable=True).indices[counts[0] :], counts[1:]


@implements(ops.moe.moe_permute)
def moe_permute(
    x: Tensor, topk_idx: Tensor, experts: int, alignment: int = 1, x_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, k = topk_idx.shape
    total = row_count(tokens * k, experts, alignment)
    pair, counted = order_by_expert(topk_idx, experts)
    counts = torch.tensor(counted)
    padded = (counts + alignment - 1) // alignment * alignment
    start = padded.cumsum(0) - padded
    expert = torch.repeat_interleave(counts)
    position = torch.arange(len(pair))
    if alignment > 1:
        position = position + (start - counts.cumsum(0) + counts)[expert]

    pos_to_pair = torch.full((total,), -1, dtype=torch.int32)
    pos_to_expert = torch.full((total,), -1, dtype=torch.int32)
    pair_to_pos = torch.full((tokens * k,), -1, dtype=torch.int32)
    pos_to_pair[position] = pair.int()
    pos_to_expert[position] = expert.int()
    pair_to_pos[pair] = position.int()
    token = pair // k

    def rows_of(source: Tensor) -> Tensor:
        """Rows of the pairs; the others stay as they are found."""
        rows, end = source.new_empty((total, source.shape[1])), 0
        if alignment == 1:
            torch.index_select(source, 0, token, out=rows[: len(pair)])
            return rows
        for low, count in zip(start.tolist(), counted, strict=True):
            if count:
                torch.index_select(source, 0, token[end : end + count], out=rows[low : low + count])
            end += count
        return rows

    row_scale = x.new_empty(0) if x_scale is None else rows_of(x_scale)
    counts, offsets = counts.int(), (start + counts).int()
    return rows_of(x), row_scale, counts, offsets, pos_to_pair, pair_to_pos.view(tokens, k), pos_to_expert


def why_not_grouped_gemm(out_dtype: str, **_: object) -> WhyNot:
    return "out_dtype is float64; float32 sums would not do" if out_dtype == "float64" else None


@implements(
    ops.moe.grouped_gemm,
    requires=Requires(dtypes={"x": (*DEVICE_FLOAT, *QUANTISED), "weight": (*DEVICE_FLOAT, *QUANTISED, torch.uint8)}),
    why_not=why_not_grouped_gemm,
)
def grouped_gemm(
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
    plain = x.dtype == weight.dtype and x.dtype == y.dtype
    for expert, at in segments(x, expert_counts, alignment):
        rows = x[at]
        if not plain:
            rows = dequantise_activation(rows, None if x_scale is None else x_scale[at], act_group, torch.float32)
        scale = None if weight_scale is None else weight_scale[expert]
        y[at] = product(rows, weight[expert], scale, block_n, block_k)
    return y


def why_not_fused_moe(
    w13: Tensor, w2: Tensor, shared_w13: Tensor | None, shared_w2: Tensor | None, **_: object
) -> WhyNot:
    for name, weight in (("w13", w13), ("w2", w2), ("shared_w13", shared_w13), ("shared_w2", shared_w2)):
        if weight is not None and weight.dtype == torch.float64:
            return f"{name} is float64; takes what float32 sums are enough for"
    return None


@implements(ops.moe.fused_moe, requires=Requires(dtypes=DEVICE_FLOAT), why_not=why_not_fused_moe)
def fused_moe(
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
    pair, counts = order_by_expert(topk_idx, w13.shape[0])
    ends = itertools.accumulate(counts)
    experts = [
        (expert, slice(end - count, end)) for expert, (count, end) in enumerate(zip(counts, ends, strict=True)) if count
    ]
    how, blocks = (act_quant, act_group, scale_format), (block_n, block_k)

    # Few large operations around the products: each small one costs a barrier of all threads.
    weights = topk_weights.float().flatten()[pair][:, None]
    rows = requantised(x, w13, *how).index_select(0, pair // topk_idx.shape[1])
    hidden = products(rows, w13, w13_scale, experts, *blocks)
    hidden = activated(hidden, swiglu_limit, weights if weight_before_down else None)
    down = products(requantised(hidden, w2, *how), w2, w2_scale, experts, *blocks)
    if not weight_before_down:
        down = down.float().mul_(weights)

    y = sum_of_slots(down, pair, topk_idx.shape)
    if shared_w13 is not None and shared_w2 is not None:
        hidden = product(requantised(x, shared_w13, *how), shared_w13, shared_w13_scale, *blocks)
        hidden = activated(hidden, swiglu_limit, None)
        y += product(requantised(hidden, shared_w2, *how), shared_w2, shared_w2_scale, *blocks)
    return y.to(x.dtype)


def products(
    rows: Tensor, weight: Tensor, scale: Tensor | None, experts: Segments, block_n: int, block_k: int
) -> Tensor:
    """The product of every expert's rows, in the dtype that `product` gives."""
    dtype = rows.dtype if weight.dtype == rows.dtype else torch.float32
    y = torch.empty((rows.shape[0], weight.shape[1]), dtype=dtype)
    for expert, at in experts:
        product(rows[at], weight[expert], None if scale is None else scale[expert], block_n, block_k, out=y[at])
    return y


def sum_of_slots(down: Tensor, pair: Tensor, shape: torch.Size) -> Tensor:
    """[T,H] float32: the rows of each token's pairs, added up; shape is that of topk_idx."""
    place = torch.full((shape.numel(),), len(pair))
    place[pair] = torch.arange(len(pair))
    if len(pair) < len(place):  # dropped pairs add a row of zeros
        down = torch.cat((down, down.new_zeros((1, down.shape[1]))))
    return down.index_select(0, place).view(*shape, down.shape[1]).sum(1, dtype=torch.float32)


def activated(hidden: Tensor, limit: float, weight: Tensor | None) -> Tensor:
    """swiglu in float32, rounded to the dtype of hidden, a few rows at a time so that all steps stay in cache."""
    y = hidden.new_empty((hidden.shape[0], hidden.shape[1] // 2))
    step = max(1, PIECE // (4 * max(hidden.shape[1], 1)))
    for low in range(0, hidden.shape[0], step):
        rows = slice(low, low + step)
        gate, up = hidden[rows].float().chunk(2, dim=-1)
        if limit > 0:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        part = torch.nn.functional.silu(gate).mul_(up)
        y[rows] = part if weight is None else part.mul_(weight[rows])
    return y


def requantised(x: Tensor, weight: Tensor, act_quant: str, act_group: int, scale_format: str) -> Tensor:
    """Activations as they enter a product: the values of their codes in float32, or themselves."""
    kind = resolve_act_quant(act_quant, weight)
    if kind == "fp8":
        codes, scale = ops.quant.act_quant_fp8(x, act_group, scale_format)
    elif kind == "int8":
        codes, scale = ops.quant.act_quant_int8(x)
    else:
        return x
    return dequantise_activation(codes, scale, act_group, torch.float32)
