"""Paged caches of floats, [blocks, 1, block_size, dim] to tmo: writing rows, and reading them by slot.

Source: domesticated_torch_mlu_ops 9fbf7df6 _ops.py (reshape_paged_cache skips negative slots and gathers with
direction=True); vllm-mlu b9925203 calls it without a direction.
"""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT, FLOAT_NAMES
from isolith_backends.cambricon.calls import int32, tmo, why_not

ROWS = ("k", "v", "k_cache", "v_cache", "slot_mapping")
WRITE = tmo("reshape_paged_cache", ROWS)
READ = tmo("reshape_paged_cache", ROWS, ("direction",))


def why_not_pool(cache: Tensor, **_: object) -> WhyNot:
    if not cache.is_contiguous():
        return f"cache has strides {tuple(cache.stride())}; reshape_paged_cache takes pools without gaps"
    return None


@implements(
    ops.attention.kv_cache_write,
    requires=Requires(dtypes={"cache": DEVICE_FLOAT, "x": DEVICE_FLOAT}, missing=WRITE.missing),
    why_not=why_not(why_not_pool),
)
def kv_cache_write(
    cache: Tensor, x: Tensor, slot_mapping: Tensor, scale_format: str = "ue8m0", amax_floor: float | None = None
) -> None:
    if 0 in x.shape or cache.numel() == 0:
        return
    rows = x.to(cache.dtype).contiguous()[:, None]
    WRITE(k=rows, v=None, k_cache=cache[:, None], v_cache=None, slot_mapping=int32(slot_mapping))


def why_not_read(out_dtype: str, **_: object) -> WhyNot:
    return "out_dtype is float64, which the device has not" if out_dtype == "float64" else None


@implements(
    ops.attention.kv_cache_read,
    requires=Requires(dtypes={"cache": DEVICE_FLOAT}, missing=READ.missing),
    why_not=why_not(why_not_pool, why_not_read),
)
def kv_cache_read(cache: Tensor, slot_mapping: Tensor, out_dtype: str = "bfloat16") -> Tensor:
    slots = int32(slot_mapping.flatten())
    # Rows of negative slots stay as they are.
    rows = torch.zeros((slots.shape[0], 1, cache.shape[-1]), dtype=cache.dtype, device=cache.device)
    if rows.numel() and cache.numel():
        READ(k=rows, v=None, k_cache=cache[:, None], v_cache=None, slot_mapping=slots, direction=True)
    return rows.to(FLOAT_NAMES[out_dtype]).view(*slot_mapping.shape, cache.shape[-1])
