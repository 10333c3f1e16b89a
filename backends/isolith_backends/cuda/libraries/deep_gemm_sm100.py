"""Products, grouped products and indexer scores by DeepGEMM, on sm_100: e4m3 and packed e2m1 with e8m0 scales.

Facts (DeepGEMM 54e2261, 2.6.1: csrc/apis, csrc/utils/layout.hpp, csrc/jit_kernels/impls, deep_gemm/utils/math.py),
beside those of `deep_gemm`:
- e2m1 is int8, the even column in the low nibble, as here; it is sm_100's alone, and takes a multiple of 128 inputs
  from a multiple of 32 bytes on.
- `recipe_a` and `recipe_b` are (rows, columns) that share a scale, 32 or 128 columns each.
- A scale is a byte of ue8m0. Four that follow each other along the inputs make an int32, the first lowest; the int32
  lie [words, rows] with rows padded to a multiple of 4 and are handed over as [rows, words]; each output has its own.
  The library checks all of this. Its own `transform_sf_into_required_layout` makes it from float32 alone, four times
  the bytes, so that it is made here, in every call: of e2m1 weights the scales are 1/16 of the bytes. Of float32 scales
  the library keeps the exponent, whatever the rest is: only e8m0 scales are taken.
- Scores of e2m1 take pages of 68 bytes an entry, and an int32 of four scales for each head of a query; blocks of 32 or
  64, and 8, 16, 32 or 64 heads, there and for entries of 132 bytes.
"""

from functools import partial

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT, FLOAT_NAMES
from isolith.numerics.scaled_matmul import blocks_of, inner_of, resolve_act_quant
from isolith_backends.cuda.libraries import lacks, library
from isolith_backends.cuda.libraries.deep_gemm import (
    E4M3,
    HEAD_DIM,
    LOGITS,
    PLAN,
    expert_of_rows,
    folded,
    grouped_products_missing,
    paged_scores,
    plain,
    scores_refused,
    segments_refused,
    weight_refused,
)

ARCH = "==10.x"
E8M0 = torch.float8_e8m0fnu
PACKED = torch.uint8
WORD = 4  # bytes of an int32, and the rows that TMA reads at once
SHARED = (32, 128)
"""Columns that may share a scale."""
INPUTS, OUTPUTS = 128, 64
E2M1_UNIT = 32  # bytes
PAGES, HEADS = (32, 64), (8, 16, 32, 64)
ENTRIES = {E4M3: 132, PACKED: 68}
RECIPES = "recipe_a", "recipe_b"


def packed_scales(scale: Tensor, rows: int, block: int = 1) -> Tensor:
    """[*, ceil(rows/block), groups] e8m0 -> [*, rows, ceil(groups/4)] int32, as the module says that they lie."""
    codes = plain(scale).view(torch.uint8)
    if short := -codes.shape[-1] % WORD:
        codes = torch.nn.functional.pad(codes, (0, short))
    words = codes.view(torch.int32)
    if block > 1:
        words = words.repeat_interleave(block, dim=-2)[..., :rows, :]
    lain = words.new_empty((*words.shape[:-2], words.shape[-1], -(-rows // WORD) * WORD))
    return lain[..., :rows].mT.copy_(words)


def operands(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, act_group: int, block_n: int, block_k: int
) -> dict[str, tuple[Tensor, Tensor] | tuple[int, int]]:
    """The arguments a, b, recipe_a and recipe_b of a product of x [rows, inputs]."""
    rows, columns = blocks_of(weight, block_n, block_k)
    codes = plain(weight)
    return {
        "a": (plain(x), packed_scales(x_scale, x.shape[0])),
        "b": (
            codes.view(torch.int8) if weight.dtype == PACKED else codes,
            packed_scales(weight_scale, weight.shape[-2], rows),
        ),
        "recipe_a": (1, act_group),
        "recipe_b": (1, columns),
    }


def groups_refused(weight: Tensor, act_group: int, block_n: int, block_k: int) -> WhyNot:
    columns = blocks_of(weight, block_n, block_k)[1]
    if act_group not in SHARED or columns not in SHARED:
        return f"scales for {act_group} and {columns} inputs; takes 32 or 128"
    return weight_refused(weight, E2M1_UNIT) if weight.dtype == PACKED else None


def grouped_gemm_refused(
    x: Tensor,
    weight: Tensor,
    alignment: int,
    act_group: int,
    block_n: int,
    block_k: int,
    out_dtype: str,
    **_: object,
) -> WhyNot:
    if weight.dtype != x.dtype and (x.dtype, weight.dtype) != (E4M3, PACKED):
        return f"x is {x.dtype}, weight {weight.dtype}; takes them alike, or e4m3 and packed e2m1"
    refused = segments_refused(x, weight, alignment, out_dtype)
    if refused is None and x.dtype == E4M3:
        return groups_refused(weight, act_group, block_n, block_k)
    return refused


@implements(
    ops.moe.grouped_gemm,
    requires=Requires(
        dtypes={
            "x": (torch.bfloat16, E4M3),
            "weight": (torch.bfloat16, E4M3, PACKED),
            "x_scale": (E8M0,),
            "weight_scale": (E8M0,),
        },
        arch=ARCH,
        missing=partial(grouped_products_missing, *RECIPES),
    ),
    why_not=grouped_gemm_refused,
)
def grouped_gemm_deep_gemm_sm100(
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
    deep_gemm = library("deep_gemm")
    out = x.new_empty((x.shape[0], weight.shape[1]), dtype=torch.bfloat16)
    layout = expert_of_rows(expert_counts, x.shape[0], alignment)
    if x_scale is None or weight_scale is None:
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(plain(x), plain(weight), out, layout)
    else:
        given = operands(x, weight, x_scale, weight_scale, act_group, block_n, block_k)
        deep_gemm.m_grouped_fp8_fp4_gemm_nt_contiguous(**given, d=out, grouped_layout=layout)
    return out


def quant_linear_refused(
    x: Tensor,
    weight: Tensor,
    act_quant: str,
    act_group: int,
    scale_format: str,
    block_n: int,
    block_k: int,
    out_dtype: str,
    **_: object,
) -> WhyNot:
    if x.dtype != E4M3:
        if resolve_act_quant(act_quant, weight) != "fp8":
            return f"act_quant={act_quant}; takes activations in e4m3, or quantises them so"
        if scale_format != "ue8m0":
            return f"scale_format={scale_format}; takes ue8m0"
    if weight.shape[0] % OUTPUTS or inner_of(weight) % INPUTS or not weight.numel():
        return f"weight is {weight.shape[0]} x {inner_of(weight)}; takes multiples of {OUTPUTS} x {INPUTS}"
    if out_dtype not in ("bfloat16", "float32"):
        return f"out_dtype={out_dtype}; takes bfloat16, float32"
    if not x.numel():
        return f"x is {tuple(x.shape)}; takes no empty ones"
    return weight_refused(weight) or groups_refused(weight, act_group, block_n, block_k)


@implements(
    ops.quant.quant_linear,
    requires=Requires(
        dtypes={
            "x": (E4M3, *DEVICE_FLOAT),
            "weight": (E4M3, PACKED),
            "x_scale": (E8M0,),
            "weight_scale": (E8M0,),
        },
        arch=ARCH,
        missing=partial(lacks, "deep_gemm", "fp8_fp4_gemm_nt", "a", "b", "d", *RECIPES),
    ),
    why_not=quant_linear_refused,
)
def quant_linear_deep_gemm_sm100(
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
    if x_scale is None:
        x, x_scale = ops.quant.act_quant_fp8(x, act_group, scale_format)
    assert weight_scale is not None, "quantised weights have scales"
    out = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=FLOAT_NAMES[out_dtype])
    rows, scales = plain(x).view(-1, x.shape[-1]), plain(x_scale).view(-1, x_scale.shape[-1])
    given = operands(rows, weight, scales, weight_scale, act_group, block_n, block_k)
    library("deep_gemm").fp8_fp4_gemm_nt(**given, d=out.view(-1, weight.shape[0]))
    return out


def indexer_score_refused(
    q: Tensor, k_cache: Tensor, max_entries: int, q_scale: Tensor | None, out_dtype: str, **_: object
) -> WhyNot:
    entry, dim = ENTRIES[q.dtype], inner_of(q)
    if k_cache.dtype != PACKED or k_cache.shape[2] != entry:
        return f"keys are {k_cache.shape[2]} x {k_cache.dtype}; takes entries of {entry} bytes for {q.dtype} queries"
    if k_cache.shape[1] not in PAGES:
        return f"block_size={k_cache.shape[1]}; takes {PAGES}"
    if q.shape[1] not in HEADS or dim != HEAD_DIM:
        return f"{q.shape[1]} heads of {dim}; takes {HEADS} of {HEAD_DIM}"
    if q.dtype == PACKED and q_scale is not None and q_scale.dtype != E8M0:
        return f"q_scale of packed e2m1 is {q_scale.dtype}; takes {E8M0}"
    return scores_refused(q, k_cache, max_entries, out_dtype, PLAN // 8)


@implements(
    ops.attention.indexer_score,
    requires=Requires(dtypes=(E4M3, PACKED), arch=ARCH, missing=partial(lacks, "deep_gemm", *LOGITS)),
    why_not=indexer_score_refused,
)
def indexer_score_deep_gemm_sm100(
    q: Tensor,
    weights: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    max_entries: int,
    softmax_scale: float = 1.0,
    q_scale: Tensor | None = None,
    out_dtype: str = "float32",
) -> Tensor:
    tokens = cu_seqlens, start_pos, ratio, max_entries
    if q.dtype == PACKED:
        assert q_scale is not None, "packed queries have scales"
        queries = q.view(torch.int8), plain(q_scale).view(torch.int32).squeeze(-1)
        factor = folded(weights, softmax_scale, None)
        scores = paged_scores(queries, factor, k_cache, block_table, *tokens)
    else:
        scores = paged_scores((q, None), folded(weights, softmax_scale, q_scale), k_cache, block_table, *tokens)
    return scores.to(FLOAT_NAMES[out_dtype])
