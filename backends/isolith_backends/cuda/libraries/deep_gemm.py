"""Products, grouped products and indexer scores by DeepGEMM, on sm_90.

Facts (DeepGEMM 54e2261, README, csrc/apis/gemm.hpp, tests/test_attention.py):
`m_grouped_fp8_fp4_gemm_nt_contiguous((x, x_scale), (weight, weight_scale), out, layout)` and its bfloat16 form take the
expert of every row, -1 for a row of none, each expert's rows starting at a multiple of 128; sm_90 has e4m3 with float32
scales of 1 x 128 and 128 x 128 alone. `fp8_fp4_gemm_nt((x, x_scale), (weight, weight_scale), out)` is the same for one
weight. `fp8_fp4_paged_mqa_logits` takes pages of 132 bytes an entry in blocks of 64,
queries in e4m3 whose scales the caller folds into the weights, and a plan made for the lengths by
`get_paged_mqa_logits_metadata`, which reads out of bounds when all lengths are 0; columns behind a length are garbage.
"""

from functools import partial

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT, FLOAT_NAMES
from isolith.numerics.ragged import positions_of_tokens
from isolith.numerics.scaled_matmul import resolve_act_quant
from isolith_backends.cuda.libraries import lacks, library

BLOCK = 128
PAGE = 64
ARCH = "==9.0"
E4M3 = torch.float8_e4m3fn


def expert_of_rows(expert_counts: Tensor, rows: int, alignment: int) -> Tensor:
    """[rows] int32: the expert whose segment a row lies in, else -1."""
    counts = expert_counts.long()
    ends = ((counts + alignment - 1) // alignment * alignment).cumsum(0)
    row = torch.arange(rows, device=counts.device)
    expert = torch.searchsorted(ends, row, right=True).clamp(max=len(counts) - 1)
    start = ends[expert] - (counts[expert] + alignment - 1) // alignment * alignment
    inside = (row >= start) & (row < start + counts[expert])
    return torch.where(inside, expert, -1).int()


def segments_refused(x: Tensor, weight: Tensor, alignment: int, out_dtype: str) -> WhyNot:
    if x.dim() != 2:
        return "x is [experts rows inputs]; takes rows of all experts"
    if alignment % BLOCK:
        return f"alignment={alignment}; takes segments that start at multiples of {BLOCK}"
    if out_dtype != "bfloat16":
        return f"out_dtype={out_dtype}; takes bfloat16"
    if x.shape[1] % BLOCK or weight.shape[1] % BLOCK or not x.shape[1]:
        return f"{weight.shape[1]} outputs, {x.shape[1]} inputs; takes multiples of {BLOCK}"
    return None if x.is_contiguous() and weight.is_contiguous() else "x or weight is not contiguous"


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


def grouped_products_missing() -> WhyNot:
    names = "m_grouped_bf16_gemm_nt_contiguous", "m_grouped_fp8_fp4_gemm_nt_contiguous"
    return next((missing for name in names if (missing := lacks("deep_gemm", name))), None)


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
    if x_scale is None or weight_scale is None:
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(x, weight, out, layout)
    else:
        scales = x_scale.float().contiguous(), weight_scale.float().contiguous()
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
    if not x.numel() or not x.is_contiguous() or not weight.is_contiguous():
        return "x is empty, or x or weight is not contiguous"
    return None


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
    rows = x.flatten(0, -2)
    out = x.new_empty((rows.shape[0], weight.shape[0]), dtype=FLOAT_NAMES[out_dtype])
    scales = x_scale.flatten(0, -2).float().contiguous(), weight_scale.float().contiguous()
    library("deep_gemm").fp8_fp4_gemm_nt((rows, scales[0]), (weight, scales[1]), out)
    return out.view(*x.shape[:-1], -1)


def indexer_score_refused(q: Tensor, k_cache: Tensor, max_entries: int, **_: object) -> WhyNot:
    if k_cache.dtype != torch.uint8 or k_cache.shape[2] != 132:
        return f"keys are {k_cache.shape[2]} x {k_cache.dtype}; takes entries of 132 bytes"
    if k_cache.shape[1] != PAGE:
        return f"block_size={k_cache.shape[1]}; takes {PAGE}"
    if q.shape[1] not in (32, 64) or q.shape[2] != 128:
        return f"{q.shape[1]} heads of {q.shape[2]}; takes 32 or 64 of 128"
    return "no entries" if max_entries == 0 or q.shape[0] == 0 or k_cache.shape[0] == 0 else None


LOGITS = "fp8_fp4_paged_mqa_logits", "context_lens", "schedule_meta", "clean_logits"


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
    deep_gemm = library("deep_gemm")
    sequence, position = positions_of_tokens(cu_seqlens, start_pos, q.shape[0])
    visible = ((position + 1) // ratio).clamp(max=max_entries)
    factor = weights.float() * softmax_scale
    if q_scale is not None:
        factor = factor * q_scale.float().view(q.shape[:2])
    # An entry whose block is missing is a key of zeros and scores 0; block 0 stands in for it.
    table = block_table[sequence, : -(-max_entries // PAGE)]
    table = torch.nn.functional.pad(table, (0, -(-max_entries // PAGE) - table.shape[1]), value=-1)
    lengths = visible.clamp(min=1).int().unsqueeze(1)
    plan = deep_gemm.get_paged_mqa_logits_metadata(lengths, PAGE, deep_gemm.get_num_sms())
    scores = deep_gemm.fp8_fp4_paged_mqa_logits(
        (q.contiguous().unsqueeze(1), None),
        k_cache.unsqueeze(2),
        factor.contiguous(),
        lengths,
        table.clamp(min=0).int().contiguous(),
        plan,
        max_entries,
        clean_logits=False,
    )
    missing = (table < 0).repeat_interleave(PAGE, dim=1)[:, :max_entries]
    entry = torch.arange(max_entries, device=q.device)
    scores = torch.where(missing, 0.0, scores[:, :max_entries])
    return torch.where(entry < visible[:, None], scores, -torch.inf).to(FLOAT_NAMES[out_dtype])
