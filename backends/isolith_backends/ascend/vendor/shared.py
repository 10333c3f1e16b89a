"""Attention over a window and compressed rows with one softmax and a sink, keys and values being the same rows.

The metadata tensor is opaque to a caller. Here it holds what it was computed from, and the attention compares: a real
one would split its work by stale numbers and say nothing.

Source: vllm-ascend 182b75ea csrc/attention/sparse_attn_sharedkv (tiling rules; scfa_block_vector.h for which rows are
visible); cann-recipes-infer fbc225d2 ops/ascendc; sgl-project/sgl-kernel-npu f425bdf1 tests (windows of any width).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isolith_backends.ascend.vendor.paged import Queries, rows_of_pages
from isolith_backends.ascend.vendor.rules import HALVES, need, need_dtype, need_shape, poison

MAGIC, LENGTH, HEAD = 0x15011, 1024, 512
RATIOS = (4, 128)
LAYOUTS = ("BSND", "TND")
SCALARS = (
    *("num_heads_q", "num_heads_kv", "head_dim", "batch_size", "max_seqlen_q", "max_seqlen_kv", "ori_topk", "cmp_topk"),
    *("cmp_ratio", "ori_mask_mode", "cmp_mask_mode", "ori_win_left", "ori_win_right", "has_ori_kv", "has_cmp_kv"),
    *("kv_quant_mode", "tile_size", "rope_head_dim"),
)


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the operator for unquantised rows and that for packed ones differ in.

    Args:
        name: Of the operator.
        heads: Whether it takes so many.
        topk: How many compressed rows a query may choose.
        dtype: Of the rows as stored; None means that of the queries.
        width: Of a row as stored.
        opened: The rows in float32, as keys and values.
    """

    name: str
    heads: Callable[[int], bool]
    topk: tuple[int, ...]
    dtype: torch.dtype | None
    width: int
    opened: Callable[[Tensor], Tensor]


PLAIN = Form(
    name="npu_sparse_attn_sharedkv",
    heads=lambda heads: heads % 4 == 0 and heads <= 128,
    topk=(512,),
    dtype=None,
    width=HEAD,
    opened=Tensor.float,
)


@dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments of a call, as its schema names them."""

    q: Tensor
    ori_kv: Tensor | None
    cmp_kv: Tensor | None
    ori_sparse_indices: Tensor | None
    cmp_sparse_indices: Tensor | None
    ori_block_table: Tensor | None
    cmp_block_table: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_ori_kv: Tensor | None
    cu_seqlens_cmp_kv: Tensor | None
    seqused_q: Tensor | None
    seqused_kv: Tensor | None
    sinks: Tensor | None
    metadata: Tensor | None
    softmax_scale: float
    cmp_ratio: int
    ori_mask_mode: int
    cmp_mask_mode: int
    ori_win_left: int
    ori_win_right: int
    layout_q: str
    layout_kv: str
    return_softmax_lse: bool


def npu_sparse_attn_sharedkv_metadata(
    cu_seqlens_q: Tensor | None,
    cu_seqlens_ori_kv: Tensor | None,
    cu_seqlens_cmp_kv: Tensor | None,
    seqused_q: Tensor | None,
    seqused_kv: Tensor | None,
    layout_q: str,
    layout_kv: str,
    device: str,
    **scalars: int,
) -> Tensor:
    name = "npu_sparse_attn_sharedkv_metadata"
    need(name, device.startswith("npu"), f"device is {device!r}")
    need(name, layout_q in LAYOUTS and layout_kv == "PA_ND", f"layouts are {layout_q!r} and {layout_kv!r}")
    packed = torch.zeros(LENGTH, dtype=torch.int32)
    numbers = [MAGIC, LAYOUTS.index(layout_q), *(int(scalars.get(part, 0)) for part in SCALARS)]
    for which, lengths in (("cu_seqlens_q", cu_seqlens_q), ("seqused_q", seqused_q), ("seqused_kv", seqused_kv)):
        if lengths is not None:
            need_dtype(name, which, lengths, (torch.int32,))
        numbers += [-1] if lengths is None else [lengths.numel(), *lengths.tolist()]
    need(name, len(numbers) <= LENGTH, f"{len(numbers)} numbers; this twin's metadata holds {LENGTH}")
    packed[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64).to(torch.int32)
    return packed


def unpacked(name: str, metadata: Tensor) -> dict[str, Any]:
    """What the metadata was computed from."""
    need_dtype(name, "metadata", metadata, (torch.int32,))
    need_shape(name, "metadata", metadata, (LENGTH,))
    numbers = metadata.tolist()
    need(name, numbers[0] == MAGIC, "metadata was not made by npu_sparse_attn_sharedkv_metadata (aicpu exception)")
    found: dict[str, Any] = {"layout_q": LAYOUTS[numbers[1]], **dict(zip(SCALARS, numbers[2:], strict=False))}
    at = 2 + len(SCALARS)
    for which in ("cu_seqlens_q", "seqused_q", "seqused_kv"):
        count = numbers[at]
        found[which] = None if count < 0 else numbers[at + 1 : at + 1 + count]
        at += 1 + max(count, 0)
    return found


def check(form: Form, call: Call) -> None:
    """The rules of the tiling."""
    name, q = form.name, call.q
    need_dtype(name, "q", q, HALVES)
    heads = q.shape[-2]
    need(name, q.shape[-1] == HEAD and q.numel() > 0, f"q is {tuple(q.shape)}; D is {HEAD}, nothing empty")
    need(name, form.heads(heads), f"{heads} heads")
    layouts = call.layout_q in LAYOUTS and call.layout_kv == "PA_ND"
    need(name, layouts, f"layouts are {call.layout_q!r} and {call.layout_kv!r}")
    masks = call.ori_mask_mode, call.cmp_mask_mode
    need(name, masks == (4, 3), f"mask modes are {masks}, not 4 and 3")
    need(name, min(call.ori_win_left, call.ori_win_right) >= 0, f"the window is {call.ori_win_left} and more")
    for which in ("sinks", "metadata", "seqused_kv", "ori_kv"):
        need(name, getattr(call, which) is not None, f"{which} must be provided")
    assert call.sinks is not None
    assert call.ori_kv is not None
    need_dtype(name, "sinks", call.sinks, (torch.float32,))
    need_shape(name, "sinks", call.sinks, (heads,))
    pool(form, "ori", call.ori_kv, call.ori_block_table, q.dtype)
    if call.cmp_kv is not None:
        need(name, call.cmp_ratio in RATIOS, f"cmp_ratio is {call.cmp_ratio}, not one of {RATIOS}")
        pool(form, "cmp", call.cmp_kv, call.cmp_block_table, q.dtype)
    if call.cmp_sparse_indices is not None:
        chosen = call.cmp_sparse_indices
        need(name, call.cmp_kv is not None, "cmp_sparse_indices without cmp_kv")
        need_dtype(name, "cmp_sparse_indices", chosen, (torch.int32,))
        need_shape(name, "cmp_sparse_indices", chosen, (*q.shape[:-2], 1, -1))
        need(name, chosen.shape[-1] in form.topk, f"cmp_sparse_indices has {chosen.shape[-1]} a query, not {form.topk}")


def pool(form: Form, which: str, kv: Tensor, table: Tensor | None, dtype: torch.dtype) -> None:
    """The rules of a pool of pages."""
    name = form.name
    need_dtype(name, f"{which}_kv", kv, (form.dtype or dtype,))
    need_shape(name, f"{which}_kv", kv, (-1, -1, 1, form.width))
    need(name, kv.numel() > 0 and kv.is_contiguous(), f"{which}_kv {tuple(kv.shape)} {kv.stride()} is not whole")
    need(name, kv.shape[1] % 16 == 0 and kv.shape[1] <= 1024, f"{which}_kv has pages of {kv.shape[1]} rows")
    need(name, table is not None, f"{which}_block_table must be provided")
    assert table is not None
    need_dtype(name, f"{which}_block_table", table, (torch.int32,))
    need(name, table.dim() == 2, f"{which}_block_table is {tuple(table.shape)}")


def check_metadata(name: str, call: Call, longest: int, more: dict[str, Any]) -> None:
    """That the metadata was made for this call."""
    assert call.metadata is not None
    assert call.seqused_kv is not None
    expected = {
        "num_heads_q": call.q.shape[-2],
        "num_heads_kv": 1,
        "head_dim": HEAD,
        "cmp_topk": 0 if call.cmp_sparse_indices is None else call.cmp_sparse_indices.shape[-1],
        "has_ori_kv": 1,
        "has_cmp_kv": int(call.cmp_kv is not None),
        "cu_seqlens_q": None if call.cu_seqlens_q is None else call.cu_seqlens_q.tolist(),
        "seqused_q": None if call.seqused_q is None else call.seqused_q.tolist(),
        "seqused_kv": call.seqused_kv.tolist(),
        **{
            part: getattr(call, part)
            for part in ("layout_q", "ori_win_left", "ori_win_right", "ori_mask_mode", "cmp_mask_mode")
        },
        **more,
    }
    if call.cmp_kv is not None:
        expected["cmp_ratio"] = call.cmp_ratio
    found = unpacked(name, call.metadata)
    for part, value in expected.items():
        need(name, found[part] == value, f"metadata has {part} {found[part]}, the call {value} (aicore exception)")
    need(name, found["max_seqlen_q"] >= longest, f"metadata has max_seqlen_q {found['max_seqlen_q']}, q {longest}")


def attend(form: Form, call: Call, **more: Any) -> tuple[Tensor, Tensor]:
    """Ignored: the cumulated lengths of keys, with pages; ori_sparse_indices, by the documents."""
    check(form, call)
    queries = Queries.of(form.name, call.q, call.layout_q, call.cu_seqlens_q, call.seqused_q, with_zero=True)
    assert call.seqused_kv is not None
    assert call.sinks is not None
    need_dtype(form.name, "seqused_kv", call.seqused_kv, (torch.int32,))
    need_shape(form.name, "seqused_kv", call.seqused_kv, (queries.batch,))
    check_metadata(form.name, call, max(queries.lengths), more)
    heads, used = call.q.shape[-2], call.seqused_kv.tolist()
    out = poison(call.q.shape, call.q.dtype)
    rows_of_q, rows_of_out = (part.reshape(-1, heads, HEAD) for part in (call.q, out))
    for request, row, index in queries.each():
        position = used[request] - queries.lengths[request] + index
        end = min(position + call.ori_win_right + 1, used[request])
        window = torch.arange(max(0, position - call.ori_win_left), max(end, 0))
        rows = form.opened(visible(call, request, row, window, position))
        logits = rows_of_q[row].float() @ rows.T * call.softmax_scale
        shares = torch.cat((logits, call.sinks[:, None]), dim=1).softmax(1)[:, :-1]
        rows_of_out[row] = (shares @ rows).to(out.dtype)
    return out, poison(out.shape[:-1] if call.return_softmax_lse else (0,), torch.float32)


def visible(call: Call, request: int, row: int, window: Tensor, position: int) -> Tensor:
    """The rows of the window, then those of compressed rows that are closed and, with a list, in it."""
    assert call.ori_kv is not None
    assert call.ori_block_table is not None
    found = rows_of_pages(call.ori_kv, call.ori_block_table[request], window)
    if call.cmp_kv is None:
        return found
    assert call.cmp_block_table is not None
    limit, chosen = (position + 1) // call.cmp_ratio, call.cmp_sparse_indices
    indices = torch.arange(limit) if chosen is None else chosen.reshape(-1, chosen.shape[-1])[row].long()
    indices = indices[(indices >= 0) & (indices < limit)]
    return torch.cat((found, rows_of_pages(call.cmp_kv, call.cmp_block_table[request], indices)))


def npu_sparse_attn_sharedkv(**given: Any) -> tuple[Tensor, Tensor]:
    """Rows of the queries' dtype, which are keys and values."""
    return attend(PLAIN, Call(**given))
