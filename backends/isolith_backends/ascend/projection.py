"""The indexer of uncompressed keys, and attention's output projection.

Source: Ascend/op-plugin docs of npu_lightning_indexer and npu_transpose_batchmatmul (sizes on A2 and A3); vllm-ascend
182b75ea (the layouts that it passes).
"""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import dtype_name
from isolith.numerics.ragged import positions_of_tokens
from isolith.numerics.scaled_matmul import resolve_act_quant
from isolith_backends.ascend import arch
from isolith_backends.ascend.attention import HALF, RIGHT_DOWN_CAUSAL, why_not_pages
from isolith_backends.vendor_calls import VendorCall

LIGHTNING_INDEXER = VendorCall(
    ("npu::npu_lightning_indexer", "_C_ascend::npu_lightning_indexer"),
    (
        *("query", "key", "weights", "actual_seq_lengths_query", "actual_seq_lengths_key", "block_table"),
        *("layout_query", "layout_key", "sparse_count", "sparse_mode"),
    ),
)
TRANSPOSE_BATCHMATMUL = VendorCall(
    ("npu::npu_transpose_batchmatmul",), ("input", "weight", "perm_x1", "perm_x2", "perm_y")
)
INDEXER_DIM, MOST_HEADS, HEADS_OF_A5 = 128, 64, (8, 16, 24, 32, 64)
ROWS_STEP, ROW_BEHIND = 16, 65536
COUNTS = (range(1, 2049), range(3072, 8193, 1024))


def why_not_indexer(
    q: Tensor,
    weights: Tensor,
    k_cache: Tensor,
    ratio: int,
    k: int,
    softmax_scale: float,
    out_dtype: str,
    candidates: Tensor | None,
    **_: object,
) -> WhyNot:
    heads, dim = q.shape[1:]
    if ratio != 1:
        return f"ratio={ratio}; npu_lightning_indexer knows no compressed keys, and those calls that do take int8 keys"
    if dim != INDEXER_DIM:
        return f"head_dim={dim}; npu_lightning_indexer takes {INDEXER_DIM}"
    if not 0 < heads <= MOST_HEADS or (arch() == "5" and heads not in HEADS_OF_A5):
        return f"heads={heads}; npu_lightning_indexer takes up to 64, on A5 8, 16, 24, 32 or 64"
    if weights.dtype not in (q.dtype, torch.float32):
        kinds = f"weights is {dtype_name(weights.dtype)} and q {dtype_name(q.dtype)}"
        return f"{kinds}; npu_lightning_indexer takes one dtype, or float32 weights"
    if not any(k in counts for counts in COUNTS):
        return f"k={k}; npu_lightning_indexer takes 1..2048 and multiples of 1024 in 3072..8192"
    if not softmax_scale > 0 or out_dtype != "float32":
        return f"softmax_scale={softmax_scale}, out_dtype={out_dtype}; the call ranks unscaled sums"
    if candidates is not None:
        return "candidates are given; npu_lightning_indexer ranks every key"
    return why_not_pages("k_cache", k_cache, q)


@implements(
    ops.attention.lightning_indexer,
    requires=Requires(dtypes=HALF, arch=">=2", missing=LIGHTNING_INDEXER.missing),
    why_not=why_not_indexer,
)
def lightning_indexer(
    q: Tensor,
    weights: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    k: int,
    max_entries: int,
    softmax_scale: float = 1.0,
    q_scale: Tensor | None = None,
    out_dtype: str = "float32",
    candidates: Tensor | None = None,
    candidate_block: int = 1,
) -> tuple[Tensor, Tensor]:
    tokens = q.shape[0]
    if tokens == 0:
        return q.new_empty((0, k), dtype=torch.int32), q.new_empty(0, dtype=torch.int32)
    # A positive scale changes no rank.
    indices, _ = LIGHTNING_INDEXER(
        query=q.contiguous(),
        key=k_cache[:, :, None],
        weights=weights.contiguous(),
        # Running sums without the 0 in front; keys are counted by sequence.
        actual_seq_lengths_query=cu_seqlens[1:].contiguous(),
        actual_seq_lengths_key=(start_pos + cu_seqlens.diff()).to(torch.int32),
        block_table=block_table.clamp(min=0).contiguous(),
        layout_query="TND",
        layout_key="PA_BSND",
        sparse_count=k,
        sparse_mode=RIGHT_DOWN_CAUSAL,
    )
    _, position = positions_of_tokens(cu_seqlens, start_pos, tokens)
    # Keys behind the token may stand in the tail.
    seen = indices.view(tokens, k)
    seen = torch.where(seen <= position[:, None], seen, -1).clamp(min=-1)
    return seen, (position + 1).clamp(max=k).to(torch.int32)


def why_not_projection(
    x: Tensor, wo_a: Tensor, wo_b: Tensor, act_quant_a: str, act_quant_b: str, **_: object
) -> WhyNot:
    if wo_a.dtype != x.dtype:
        return f"wo_a is {dtype_name(wo_a.dtype)} and x {dtype_name(x.dtype)}; npu_transpose_batchmatmul takes one"
    if arch() != "5" and (wo_a.shape[1] % ROWS_STEP or wo_a.shape[2] % ROWS_STEP or max(wo_a.shape) >= ROW_BEHIND):
        sizes = f"multiples of {ROWS_STEP} below {ROW_BEHIND}"
        return f"wo_a is {tuple(wo_a.shape)}; npu_transpose_batchmatmul on A2 and A3 takes {sizes}"
    if resolve_act_quant(act_quant_a, wo_a) != "none":
        return f"act_quant_a is {act_quant_a!r}; npu_transpose_batchmatmul takes unquantised activations"
    activations = resolve_act_quant(act_quant_b, wo_b)
    if (wo_b.dtype, activations) == (x.dtype, "none"):
        return None
    if (wo_b.dtype, activations, x.dtype) == (torch.int8, "int8", torch.bfloat16):
        return None
    return f"wo_b is {dtype_name(wo_b.dtype)} and its activations {activations}; both int8, or as x, are adapted"


@implements(
    ops.attention.grouped_output_proj,
    requires=Requires(dtypes=HALF, arch=">=2", missing=TRANSPOSE_BATCHMATMUL.missing),
    why_not=why_not_projection,
)
def grouped_output_proj(
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
    tokens, groups = x.shape[0], wo_a.shape[0]
    if 0 in (*x.shape, *wo_a.shape, *wo_b.shape):
        return x.new_zeros((tokens, wo_b.shape[0]))
    rows, perm_x1 = x.reshape(tokens, groups, -1).contiguous(), [1, 0, 2]
    if arch() != "5" and x.shape[1] * x.shape[2] >= ROW_BEHIND:
        rows, perm_x1 = rows.transpose(0, 1).contiguous(), [0, 1, 2]  # a whole row is too wide to be taken apart
    u: Tensor = TRANSPOSE_BATCHMATMUL(
        input=rows,
        weight=wo_a.contiguous().transpose(1, 2),
        # Groups lead in the product alone.
        perm_x1=perm_x1,
        perm_x2=[0, 1, 2],
        perm_y=[1, 0, 2],
    )
    u = u.reshape(tokens, -1)
    if wo_b.dtype == torch.int8:
        return ops.quant.quant_linear(u, wo_b, wo_b_scale, out_dtype=dtype_name(x.dtype))
    return torch.nn.functional.linear(u, wo_b)
