"""Lightning indexers: which keys a query looks at.

Source: Ascend/op-plugin 517f2e7d docs and golden of npu_lightning_indexer (masked keys fill the tail before -1);
vllm-ascend 182b75ea csrc (npu_vllm_quant_lightning_indexer: lengths of keys uncompressed, divided by cmp_ratio).
"""

from typing import Any

import torch
from torch import Tensor

from isolith_backends.ascend.vendor.paged import Queries, rows_of_pages
from isolith_backends.ascend.vendor.rules import HALVES, need, need_dtype, need_shape, poison
from isolith_backends.ascend.vendor.soc import current

HEAD, MOST_HEADS = 128, 64
HEADS_A5 = (8, 16, 24, 32, 64)
QUERY_LAYOUTS, KEY_LAYOUTS = ("BSND", "TND"), ("BSND", "TND", "PA_BSND")
MAGIC, LENGTH = 0x15012, 1024


class KeyRows:
    """Keys in pages, packed one request behind the other, or padded."""

    def __init__(self, name: str, key: Tensor, layout: str, lengths: Tensor | None, table: Tensor | None) -> None:
        need(name, layout in KEY_LAYOUTS, f"layout_key is {layout!r}, not one of {KEY_LAYOUTS}")
        need(name, key.shape[-2] == 1, f"the key has {key.shape[-2]} heads; only 1")
        need(name, key.numel() > 0, "nothing may be empty")
        self.key, self.layout, self.table = key, layout, table
        if layout == "PA_BSND":
            need(name, key.dim() == 4 and key.shape[1] % 16 == 0 and key.shape[1] <= 1024, f"pages are {key.shape}")
            need(name, key.is_contiguous(), f"the key's strides are {key.stride()}")
            need(name, table is not None and lengths is not None, "pages need block_table and lengths of keys")
            assert table is not None
            need_dtype(name, "block_table", table, (torch.int32,))
        if lengths is None:
            self.lengths = [key.shape[1]] * key.shape[0]
            return
        need_dtype(name, "the lengths of keys", lengths, (torch.int32,))
        self.lengths = lengths.tolist()
        if layout == "TND":
            self.lengths = torch.diff(lengths, prepend=lengths.new_zeros(1)).tolist()

    def rows(self, request: int, positions: Tensor) -> Tensor:
        """The rows at positions of a request."""
        if self.layout == "PA_BSND":
            assert self.table is not None
            return rows_of_pages(self.key, self.table[request], positions).float()
        if self.layout == "BSND":
            return self.key[request, positions].flatten(1).float()
        return self.key[sum(self.lengths[:request]) + positions].flatten(1).float()


def selected(scores: Tensor, limit: int, count: int, total: int, tail_of_masked: bool) -> tuple[Tensor, Tensor]:
    """The best of the first `limit` keys, ascending by index since no order is promised, then the tail."""
    best = torch.argsort(scores[:limit], descending=True, stable=True)[:count].sort().values
    chosen = torch.full((count,), -1, dtype=torch.int32)
    chosen[: best.numel()] = best.int()
    if tail_of_masked:
        masked = torch.arange(limit, total, dtype=torch.int32)[: count - best.numel()]
        chosen[best.numel() : best.numel() + masked.numel()] = masked
    values = poison((count,), torch.float32)
    values[: best.numel()] = scores[best]
    return chosen, values


def npu_lightning_indexer(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    actual_seq_lengths_query: Tensor | None,
    actual_seq_lengths_key: Tensor | None,
    block_table: Tensor | None,
    layout_query: str,
    layout_key: str,
    sparse_count: int,
    sparse_mode: int,
    return_value: bool,
    **ignored: Any,
) -> tuple[Tensor, Tensor]:
    """Causal in units of keys: there is no compression here."""
    name = "npu_lightning_indexer"
    need_dtype(name, "query", query, HALVES)
    need_dtype(name, "key", key, (query.dtype,))
    need_dtype(name, "weights", weights, (query.dtype, torch.float32))
    heads = query.shape[-2]
    need(name, layout_query in QUERY_LAYOUTS, f"layout_query is {layout_query!r}")
    need(name, query.shape[-1] == key.shape[-1] == HEAD, f"D is {query.shape[-1]} and {key.shape[-1]}, not {HEAD}")
    legal = heads in HEADS_A5 if current().name == "A5" else heads <= MOST_HEADS
    need(name, legal and query.numel() > 0, f"the query is {tuple(query.shape)}")
    need_shape(name, "weights", weights, tuple(query.shape[:-1]))
    wide = 3072 <= sparse_count <= 8192 and sparse_count % 1024 == 0
    need(name, 1 <= sparse_count <= 2048 or wide, f"sparse_count is {sparse_count}")
    need(name, sparse_mode in (0, 3), f"sparse_mode is {sparse_mode}")
    queries = Queries.of(name, query, layout_query, actual_seq_lengths_query, None, with_zero=False)
    keys = KeyRows(name, key, layout_key, actual_seq_lengths_key, block_table)
    need(name, len(keys.lengths) == queries.batch, f"{queries.batch} requests, {len(keys.lengths)} lengths of keys")
    chosen = poison((*query.shape[:-2], 1, sparse_count), torch.int32)
    # What is not asked for is empty, as torch_npu's own meta kernel has it.
    values = poison(chosen.shape if return_value else (0,), query.dtype)
    flat, rows_of, gate = query.view(-1, heads, HEAD), chosen.view(-1, sparse_count), weights.reshape(-1, heads)
    for request, row, index in queries.each():
        total = keys.lengths[request]
        limit = total - queries.lengths[request] + index + 1 if sparse_mode == 3 else total
        rows = keys.rows(request, torch.arange(total))
        scores = gate[row].float() @ torch.relu(flat[row].float() @ rows.T)
        rows_of[row], kept = selected(scores, max(limit, 0), sparse_count, total, tail_of_masked=True)
        if return_value:
            values.view(-1, sparse_count)[row] = kept.to(query.dtype)
    return chosen, values


SCALARS = ("num_heads_q", "head_dim", "sparse_count", "sparse_mode", "cmp_ratio")


def quant_metadata(
    actual_seq_lengths_query: Tensor | None, actual_seq_lengths_key: Tensor | None, device: str, **scalars: Any
) -> Tensor:
    """What a call with these numbers needs, anew for every step."""
    name = "npu_vllm_quant_lightning_indexer_metadata"
    need(name, device.startswith("npu"), f"device is {device!r}")
    numbers = [MAGIC, *(int(scalars[part]) for part in SCALARS)]
    for lengths in (actual_seq_lengths_query, actual_seq_lengths_key):
        numbers += [-1] if lengths is None else [lengths.numel(), *lengths.tolist()]
    need(name, len(numbers) <= LENGTH, f"{len(numbers)} numbers; this twin's metadata holds {LENGTH}")
    packed = torch.zeros(LENGTH, dtype=torch.int32)
    packed[: len(numbers)] = torch.tensor(numbers)
    return packed


def check_quantised(
    query: Tensor, key: Tensor, weights: Tensor, query_scale: Tensor, key_scale: Tensor, sparse_count: int
) -> None:
    """The rules of dtypes and shapes: int8 with float16 beside it, on the newest chips e4m3 with float32."""
    name = "npu_vllm_quant_lightning_indexer"
    newest = current().name == "A5"
    codes, wide = (torch.float8_e4m3fn, torch.float32) if newest else (torch.int8, torch.float16)
    for which, tensor, dtype in (
        ("query", query, codes),
        ("key", key, codes),
        ("weights", weights, wide),
        ("query_dequant_scale", query_scale, wide),
        ("key_dequant_scale", key_scale, wide),
    ):
        need_dtype(name, which, tensor, (dtype,))
    need(name, query.shape[-2] == MOST_HEADS or newest, f"{query.shape[-2]} heads; only {MOST_HEADS}")
    need(name, query.shape[-1] == key.shape[-1] == HEAD and query.numel() > 0, f"the query is {tuple(query.shape)}")
    need(name, 1 <= sparse_count <= (512 if newest else 2048), f"sparse_count is {sparse_count}")
    need_shape(name, "weights", weights, tuple(query.shape[:-1]))
    need_shape(name, "query_dequant_scale", query_scale, tuple(query.shape[:-1]))
    need_shape(name, "key_dequant_scale", key_scale, tuple(key.shape[:-1]))


def npu_vllm_quant_lightning_indexer(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    query_dequant_scale: Tensor,
    key_dequant_scale: Tensor,
    query_quant_mode: int,
    key_quant_mode: int,
    actual_seq_lengths_query: Tensor | None,
    actual_seq_lengths_key: Tensor | None,
    block_table: Tensor | None,
    metadata: Tensor | None,
    layout_query: str,
    layout_key: str,
    sparse_count: int,
    sparse_mode: int,
    cmp_ratio: int,
    return_value: bool,
    **ignored: Any,
) -> tuple[Tensor, Tensor]:
    """int8 codes with float16 scales and weights; a query at position p sees (p + 1) // cmp_ratio compressed keys."""
    name = "npu_vllm_quant_lightning_indexer"
    check_quantised(query, key, weights, query_dequant_scale, key_dequant_scale, sparse_count)
    modes = query_quant_mode, key_quant_mode
    need(name, modes == (0, 0), f"quant modes are {modes}; only 0")
    need(name, sparse_mode in (0, 3) and not return_value, f"sparse_mode is {sparse_mode}, return_value {return_value}")
    heads, wide = query.shape[-2], weights.dtype
    need(name, metadata is not None, "metadata must be provided")
    assert metadata is not None
    scalars: dict[str, Any] = {
        "num_heads_q": heads,
        "head_dim": HEAD,
        "sparse_count": sparse_count,
        "sparse_mode": sparse_mode,
    }
    lengths = actual_seq_lengths_query, actual_seq_lengths_key
    due = quant_metadata(*lengths, device="npu", cmp_ratio=cmp_ratio, **scalars)
    need(name, torch.equal(metadata, due), "metadata was made for another call (aicore exception)")
    queries = Queries.of(name, query, layout_query, actual_seq_lengths_query, None, with_zero=False)
    keys = KeyRows(name, key, layout_key, actual_seq_lengths_key, block_table)
    scales = KeyRows(name, key_dequant_scale[..., None], layout_key, actual_seq_lengths_key, block_table)
    chosen = poison((*query.shape[:-2], 1, sparse_count), torch.int32)
    flat, out = query.view(-1, heads, HEAD), chosen.view(-1, sparse_count)
    gate = (weights.float() * query_dequant_scale.float()).to(wide).float().view(-1, heads)
    for request, row, index in queries.each():
        total = keys.lengths[request]
        position = total - queries.lengths[request] + index if sparse_mode == 3 else total - 1
        limit = max((position + 1) // cmp_ratio, 0)
        at = torch.arange(limit)
        products = torch.relu(flat[row].float() @ keys.rows(request, at).T * scales.rows(request, at).T)
        out[row], _ = selected(gate[row] @ products, limit, sparse_count, limit, tail_of_masked=False)
    return chosen, poison((0,), torch.float32)
