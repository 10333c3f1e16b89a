"""Writing rows into paged caches.

Source: vllm-ascend 182b75ea csrc scatter_nd_update_no_sort.h; cann-recipes-infer fbc225d2, scatter_nd_update_asc.
"""

import torch
from torch import Tensor

from isolith_backends.ascend.vendor.rules import need, need_dtype, need_shape

INDICES = (torch.int32, torch.int64)
ROWS = (1, 128, 512)


def npu_scatter_nd_update_v2(var: Tensor, indices: Tensor, update: Tensor) -> None:
    """The pair is flattened first, and the flat index alone is looked at: [3, -1] is the last row of block 2."""
    name = "npu_scatter_nd_update_v2"
    need(name, var.dim() >= 3 and var.is_contiguous(), f"var must be contiguous, not {tuple(var.shape)} {var.stride()}")
    need_dtype(name, "indices", indices, INDICES)
    need_dtype(name, "update", update, (var.dtype,))
    need_shape(name, "indices", indices, (-1, 2))
    need_shape(name, "update", update, (indices.shape[0], *var.shape[2:]))
    need(name, update.numel() > 0 and var.numel() > 0, "nothing may be empty")
    rows = var.shape[0] * var.shape[1]
    flat = indices[:, 0].long() * var.shape[1] + indices[:, 1].long()
    legal = (flat >= 0) & (flat < rows)
    var.view(rows, *var.shape[2:])[flat[legal]] = update[legal]


def scatter_nd_update_asc(var: Tensor, indices: Tensor, update: Tensor) -> None:
    """Flat slots; a negative one is skipped."""
    name = "scatter_nd_update_asc"
    need(name, var.dim() == 2 and var.is_contiguous(), f"var must be 2-D and contiguous, not {tuple(var.shape)}")
    need(name, var.shape[1] in ROWS, f"rows have {var.shape[1]} elements, not {ROWS}")
    need_dtype(name, "indices", indices, INDICES)
    need_dtype(name, "update", update, (var.dtype,))
    need_shape(name, "indices", indices, (-1, 1))
    need_shape(name, "update", update, (indices.shape[0], var.shape[1]))
    need(name, 0 < update.shape[0] <= var.shape[0], f"{update.shape[0]} rows for a cache of {var.shape[0]}")
    slots = indices[:, 0].long()
    need(name, bool((slots < var.shape[0]).all()), f"slot {int(slots.max())} of {var.shape[0]} (aicore exception)")
    var[slots[slots >= 0]] = update[slots >= 0]
