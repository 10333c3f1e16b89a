"""The lightning indexer, by the decode form of tmo's selection with a row for each token.

The call gives slots of the cache to attend to. With blocks of one entry and a table in which entry i is block i, slots
are the entries of the token's own sequence, as the operator's. Columns behind a row's count are undefined. A visible
entry without a block is a key of zeros, for which the call has no form: every sequence's keys are gathered first.

Source: domesticated_torch_mlu_ops 9fbf7df6 _ops.py (32 or 64 heads of 128; lengths before compression); vllm-mlu
b9925203 (lengths after compression).
"""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import dtype_name
from isolith.kernel import in_range
from isolith.numerics.pages import read_entries, slots_of_items
from isolith.numerics.ragged import positions_of_tokens
from isolith_backends import cambricon
from isolith_backends.cambricon.calls import BY_KEYWORD, DAY0, HALF, PACKAGE, int32, is_day0, tmo, why_not

SELECT = tmo(
    "masked_indexer_select_paged_kv",
    by_name=(
        *("query", "k_cache", "weights", "kv_cache_block_table", "cu_seq_q_lens", "cu_seq_k_lens", "k_context_lens"),
        *("k_cache_block_table", "is_prefill", "index_topk", "kv_cache_block_size", "softmax_scale", "q_scale"),
        *("k_scale_cache", "sparse_block_table", "sparse_context_lens", "is_score_float", "compress_ratio"),
        "kv_cache_block_table_offset",
    ),
)
HEADS, DIM, PAGE = (32, 64), 128, 16
SCORES = {"float32": True, "bfloat16": False}
"""out_dtype -> is_score_float."""


def missing_select() -> WhyNot:
    """The call, in a release whose lengths are known to be those before or after compression."""
    release = cambricon.versions().get(PACKAGE, "0")
    if not in_range(release, DAY0) and not in_range(release, BY_KEYWORD):
        return f"{PACKAGE}={release}; whether its lengths are those before compression is known of 1.8 and from 1.12 on"
    return SELECT.missing()


def why_not_indexer(
    q: Tensor,
    weights: Tensor,
    k_cache: Tensor,
    q_scale: Tensor | None,
    out_dtype: str,
    candidates: Tensor | None,
    **_: object,
) -> WhyNot:
    heads, dim = q.shape[1:]
    if dim != DIM or heads not in HEADS:
        return f"heads={heads}, head_dim={dim}; masked_indexer_select_paged_kv takes 32 or 64 of {DIM}"
    if k_cache.dtype != q.dtype or q_scale is not None:
        kinds = f"k_cache is {dtype_name(k_cache.dtype)} and q {dtype_name(q.dtype)}"
        return f"{kinds}; bfloat16 and float16 are adapted, both alike and without scales"
    if candidates is not None:
        return "candidates are given; masked_indexer_select_paged_kv ranks every key"
    return None if out_dtype in SCORES else f"out_dtype is {out_dtype}; the call ranks float32 or bfloat16 scores"


def keys_of_sequences(k_cache: Tensor, block_table: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """(pool, table): the keys of so many entries of each sequence, in pages of their own; zeros where there is none."""
    sequences, columns = block_table.shape[0], -(-entries // PAGE)
    item = torch.arange(columns * PAGE, device=block_table.device)
    sequence = torch.arange(sequences, device=block_table.device)[:, None]
    keys = read_entries(k_cache, slots_of_items(block_table, sequence, item, k_cache.shape[1]), k_cache.dtype)
    table = torch.arange(sequences * columns, device=block_table.device).view(sequences, columns)
    return keys.view(-1, 1, PAGE, k_cache.shape[2]), table


@implements(
    ops.attention.lightning_indexer,
    requires=Requires(
        dtypes={"q": HALF, "weights": (torch.float32, *HALF)},
        missing=missing_select,
    ),
    why_not=why_not(why_not_indexer),
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
    if max_entries == 0:
        nothing = torch.full((tokens, k), -1, dtype=torch.int32, device=q.device)
        return nothing, torch.zeros(tokens, dtype=torch.int32, device=q.device)
    sequence, position = positions_of_tokens(cu_seqlens, start_pos, tokens)
    entries = torch.arange(max_entries, dtype=torch.int32, device=q.device)
    keys, table = keys_of_sequences(k_cache, block_table, max_entries)
    slots, lengths = SELECT(
        query=q.contiguous()[:, None],
        k_cache=keys,
        weights=(weights.float() if weights.dtype == torch.float16 else weights).contiguous()[:, None, :, None],
        kv_cache_block_table=entries.expand(tokens, max_entries).contiguous(),
        cu_seq_q_lens=None,
        cu_seq_k_lens=None,
        k_context_lens=int32((position + 1) // ratio if is_day0() else position + 1),
        k_cache_block_table=int32(table[sequence]),
        is_prefill=False,
        index_topk=k,
        kv_cache_block_size=1,
        softmax_scale=softmax_scale,  # inside: weights are not scaled before
        q_scale=None,
        k_scale_cache=None,
        sparse_block_table=None,
        sparse_context_lens=None,
        is_score_float=SCORES[out_dtype],
        compress_ratio=ratio,
        kv_cache_block_table_offset=None,
    )
    column = torch.arange(k, device=q.device)
    return torch.where(column < lengths[:, None], slots.view(tokens, k), -1), lengths
