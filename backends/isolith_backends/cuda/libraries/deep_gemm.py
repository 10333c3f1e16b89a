"""Products, grouped products and indexer scores by DeepGEMM, on sm_90; `deep_gemm_sm100` has the rest.

Facts (DeepGEMM 54e2261, 2.6.1: README, csrc/apis, csrc/jit_kernels/impls/runtime_utils.hpp, tests/test_attention.py):
- `m_grouped_fp8_fp4_gemm_nt_contiguous((x, x_scale), (weight, weight_scale), out, layout)` and its bfloat16 form take
  the expert of every row, -1 for a row of none. The expert of a block of rows is that of its first one, so that each
  expert's rows start at a multiple of `get_mk_alignment_for_contiguous_layout()`, 128 unless the process sets another.
  sm_90 has e4m3 with float32 scales of 1 x 128 and 128 x 128 alone. `fp8_fp4_gemm_nt((x, x_scale), (weight,
  weight_scale), out)` is the same for one weight.
- The library reads strides along axes of 1, too, and loads by TMA, which takes memory from multiples of 16 bytes on.
- `fp8_fp4_paged_mqa_logits` takes pages of 132 bytes an entry in blocks of 64, queries in e4m3 whose scales the caller
  folds into the weights, and a plan made for the lengths by `get_paged_mqa_logits_metadata`, which reads out of bounds
  when all lengths are 0 and holds 4 bytes a token (8 on sm_100) in 227 KiB of shared memory; columns behind a length
  are garbage.
- All of these come from pybind11. 2.8 has the products' parameters, but its scores have no `logits_dtype`: on sm_100
  they take weights and add heads in bfloat16 (sgl-deep-gemm 0.2.5, include/deep_gemm/impls/sm100_mqa_logits.cuh), which
  the contract does in float32. They are refused.
"""

from functools import partial

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT, FLOAT_NAMES
from isolith.numerics.ragged import positions_of_tokens
from isolith.numerics.scaled_matmul import resolve_act_quant
from isolith_backends.cuda.libraries import lacks, library
from isolith_backends.cuda.libraries.tile_kernels import whole

BLOCK = 128
PAGE = 64
ENTRY = 132
HEADS = (32, 64)
HEAD_DIM = 128
ARCH = "==9.0"
E4M3 = torch.float8_e4m3fn
UNIT = 16  # bytes
PLAN = 227 * 1024
"""Bytes of shared memory, in which the plan of the scores holds what it knows of each token."""


def plain(tensor: Tensor) -> Tensor:
    """Contiguous, from a multiple of 16 bytes on, and with the strides that say so along axes of 1 as well."""
    return whole(tensor).flatten().view(tensor.shape)


def expert_of_rows(expert_counts: Tensor, rows: int, alignment: int) -> Tensor:
    """[rows] int32: the expert whose segment a row lies in, else -1."""
    counts = expert_counts.long()
    ends = ((counts + alignment - 1) // alignment * alignment).cumsum(0)
    row = torch.arange(rows, device=counts.device)
    expert = torch.searchsorted(ends, row, right=True).clamp(max=len(counts) - 1)
    start = ends[expert] - (counts[expert] + alignment - 1) // alignment * alignment
    inside = (row >= start) & (row < start + counts[expert])
    return torch.where(inside, expert, -1).int()


def weight_refused(weight: Tensor, unit: int = UNIT) -> WhyNot:
    """What TMA asks of a weight, which is not copied as activations are: to start at a multiple of `unit` bytes."""
    if not weight.is_contiguous():
        return f"weight is not contiguous; strides {tuple(weight.stride())}"
    behind = weight.storage_offset() * weight.itemsize % unit
    return f"weight starts {behind} bytes behind a multiple of {unit}; takes multiples" if behind else None


def segments_refused(x: Tensor, weight: Tensor, alignment: int, out_dtype: str) -> WhyNot:
    if x.dim() != 2:
        return "x is [experts rows inputs]; takes rows of all experts"
    block: int = library("deep_gemm").get_mk_alignment_for_contiguous_layout()
    if alignment % block and weight.shape[0] > 1:
        return f"alignment={alignment}; takes segments that start at multiples of {block}"
    if out_dtype != "bfloat16":
        return f"out_dtype={out_dtype}; takes bfloat16"
    if x.shape[1] % BLOCK or weight.shape[1] % BLOCK or not x.shape[1] or not weight.numel():
        return f"weight {tuple(weight.shape)}, {x.shape[1]} inputs; takes multiples of {BLOCK} outputs and inputs"
    return weight_refused(weight)


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
    if x.dtype == E4M3 and (act_group, block_n, block_k) != (BLOCK, BLOCK, BLOCK):
        return f"scales for {act_group}, {block_n} x {block_k}; takes 128, 128 x 128"
    if x.dtype != weight.dtype:
        return f"x is {x.dtype}, weight {weight.dtype}; takes them alike"
    return segments_refused(x, weight, alignment, out_dtype)


def grouped_products_missing(*recipes: str) -> WhyNot:
    products = "a", "b", "d", "grouped_layout"
    for name, parameters in (
        ("get_mk_alignment_for_contiguous_layout", ()),
        ("m_grouped_bf16_gemm_nt_contiguous", products),
        ("m_grouped_fp8_fp4_gemm_nt_contiguous", (*products, *recipes)),
    ):
        if missing := lacks("deep_gemm", name, *parameters):
            return missing
    return None


@implements(
    ops.moe.grouped_gemm,
    requires=Requires(
        dtypes={"x": (torch.bfloat16, E4M3), "weight": (torch.bfloat16, E4M3)},
        arch=ARCH,
        missing=grouped_products_missing,
    ),
    why_not=grouped_gemm_refused,
)
def grouped_gemm_deep_gemm(
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
    x, weight = plain(x), plain(weight)
    if x_scale is None or weight_scale is None:
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(x, weight, out, layout)
    else:
        scales = plain(x_scale.float()), plain(weight_scale.float())
        deep_gemm.m_grouped_fp8_fp4_gemm_nt_contiguous((x, scales[0]), (weight, scales[1]), out, layout)
    return out


def quant_linear_refused(
    x: Tensor,
    weight: Tensor,
    act_quant: str,
    act_group: int,
    block_n: int,
    block_k: int,
    out_dtype: str,
    **_: object,
) -> WhyNot:
    if x.dtype != E4M3 and resolve_act_quant(act_quant, weight) != "fp8":
        return f"act_quant={act_quant}; takes activations in e4m3, or quantises them so"
    if (act_group, block_n, block_k) != (BLOCK, BLOCK, BLOCK):
        return f"scales for {act_group}, {block_n} x {block_k}; takes 128, 128 x 128"
    if weight.shape[0] % BLOCK or weight.shape[1] % BLOCK or not weight.numel():
        return f"weight is {tuple(weight.shape)}; takes multiples of {BLOCK}"
    if out_dtype not in ("bfloat16", "float32"):
        return f"out_dtype={out_dtype}; takes bfloat16, float32"
    if not x.numel():
        return f"x is {tuple(x.shape)}; takes no empty ones"
    return weight_refused(weight)


@implements(
    ops.quant.quant_linear,
    requires=Requires(
        dtypes={"x": (E4M3, *DEVICE_FLOAT), "weight": (E4M3,)},
        arch=ARCH,
        missing=partial(lacks, "deep_gemm", "fp8_fp4_gemm_nt", "a", "b", "d"),
    ),
    why_not=quant_linear_refused,
)
def quant_linear_deep_gemm(
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
    assert weight_scale is not None, "e4m3 weights have scales"
    rows = plain(x).view(-1, x.shape[-1])
    out = x.new_empty((rows.shape[0], weight.shape[0]), dtype=FLOAT_NAMES[out_dtype])
    scales = plain(x_scale.float()).view(rows.shape[0], -1), plain(weight_scale.float())
    library("deep_gemm").fp8_fp4_gemm_nt((rows, scales[0]), (plain(weight), scales[1]), out)
    return out.view(*x.shape[:-1], -1)


def indexer_score_refused(q: Tensor, k_cache: Tensor, max_entries: int, out_dtype: str, **_: object) -> WhyNot:
    if k_cache.dtype != torch.uint8 or k_cache.shape[2] != ENTRY:
        return f"keys are {k_cache.shape[2]} x {k_cache.dtype}; takes entries of {ENTRY} bytes"
    if k_cache.shape[1] != PAGE:
        return f"block_size={k_cache.shape[1]}; takes {PAGE}"
    if q.shape[1] not in HEADS or q.shape[2] != HEAD_DIM:
        return f"{q.shape[1]} heads of {q.shape[2]}; takes {HEADS} of {HEAD_DIM}"
    return scores_refused(q, k_cache, max_entries, out_dtype, PLAN // 4)


def scores_refused(q: Tensor, k_cache: Tensor, max_entries: int, out_dtype: str, tokens: int) -> WhyNot:
    """What relates to no format: `tokens` is how many a plan holds."""
    if out_dtype == "float64":
        return "out_dtype=float64; it computes in float32"
    if 0 in (max_entries, q.shape[0], k_cache.shape[0]):
        return f"max_entries={max_entries}, {q.shape[0]} tokens, {k_cache.shape[0]} blocks; takes at least one of each"
    if q.shape[0] > tokens:
        return f"{q.shape[0]} tokens; takes at most {tokens}"
    if k_cache.stride(0) % UNIT or k_cache.storage_offset() % UNIT:
        return f"pages start {k_cache.storage_offset()} + i*{k_cache.stride(0)} bytes; takes multiples of {UNIT}"
    return None


LOGITS = "fp8_fp4_paged_mqa_logits", "q", "kv_cache", "context_lens", "schedule_meta", "clean_logits", "logits_dtype"


@implements(
    ops.attention.indexer_score,
    requires=Requires(dtypes=(E4M3,), arch=ARCH, missing=partial(lacks, "deep_gemm", *LOGITS)),
    why_not=indexer_score_refused,
)
def indexer_score_deep_gemm(
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
    factor = folded(weights, softmax_scale, q_scale)
    tokens = cu_seqlens, start_pos, ratio, max_entries
    return paged_scores((q, None), factor, k_cache, block_table, *tokens).to(FLOAT_NAMES[out_dtype])


def folded(weights: Tensor, softmax_scale: float, q_scale: Tensor | None) -> Tensor:
    """[tokens heads] float32: the weights, with the scale of the softmax and those of e4m3 heads."""
    factor = weights.float() * softmax_scale
    return plain(factor if q_scale is None else factor * q_scale.float().view(factor.shape))


def paged_scores(
    queries: tuple[Tensor, Tensor | None],
    factor: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    max_entries: int,
) -> Tensor:
    """[tokens max_entries] float32: the scores by pages of any format, every token as a sequence of its own.

    Args:
        queries: Codes [tokens heads _], and [tokens heads] of four scales each where the codes are e2m1.
        factor: What `folded` makes.
        k_cache: As `indexer_score` takes it, and so are the others.
    """
    deep_gemm, page = library("deep_gemm"), k_cache.shape[1]
    codes, scales = (None if part is None else plain(part).unsqueeze(1) for part in queries)
    sequence, position = positions_of_tokens(cu_seqlens, start_pos, factor.shape[0])
    visible = ((position + 1) // ratio).clamp(max=max_entries)
    # An entry whose block is missing is a key of zeros and scores 0; block 0 stands in for it.
    table = block_table[sequence, : -(-max_entries // page)]
    table = torch.nn.functional.pad(table, (0, -(-max_entries // page) - table.shape[1]), value=-1)
    lengths = plain(visible.clamp(min=1).int().unsqueeze(1))
    plan = deep_gemm.get_paged_mqa_logits_metadata(lengths, page, deep_gemm.get_num_sms())
    scores = deep_gemm.fp8_fp4_paged_mqa_logits(
        (codes, scales),
        k_cache.unsqueeze(2),
        factor,
        lengths,
        plain(table.clamp(min=0).int()),
        plan,
        max_entries,
        clean_logits=False,
        logits_dtype=torch.float32,
    )
    missing = (table < 0).repeat_interleave(page, dim=1)[:, :max_entries]
    entry = torch.arange(max_entries, device=table.device)
    scores = torch.where(missing, 0.0, scores[:, :max_entries])
    return torch.where(entry < visible[:, None], scores, -torch.inf)
