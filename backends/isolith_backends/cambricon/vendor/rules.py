"""What every vendor function of the twin refuses, and how it marks what it leaves undefined."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from isolith_backends.cambricon.vendor.profile import Profile

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
"""The largest magnitude that a dtype's scale is made for."""

STRIDED = {
    "apply_rotary": ("input", "output"),
    "moe_active": ("input", "output"),
    "moe_quantize": ("x", "output", "output_scale"),
    "group_gemm": ("a", "d"),
    "smooth_quant_group_gemm": ("a", "a_scale", "d"),
    "fused_compress_single_kv": ("state_cache", "kv_cache"),
    "fused_compress_multi_kv": ("state_cache",),
}
"""Arguments that stacks pass with gaps between rows. All others are dense (tmo's wrappers ask for it)."""


def need(holds: bool, sentence: str) -> None:
    """Raise what tmo raises."""
    if not holds:
        raise RuntimeError(f"torch_mlu_ops.{sentence}")


def need_dtype(call: str, dtypes: Iterable[torch.dtype], **tensors: Tensor | None) -> None:
    """Refuse other dtypes."""
    legal = tuple(dtypes)
    for name, tensor in tensors.items():
        if tensor is not None:
            need(tensor.dtype in legal, f"{call}: {name} must be one of {legal}, but is {tensor.dtype}.")


def need_int32(call: str, **tensors: Tensor | None) -> None:
    """Refuse indices, positions, lengths and slots that are not int32."""
    need_dtype(call, (torch.int32,), **tensors)


def need_shape(call: str, **tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Refuse other shapes; -1 stands for any size."""
    for name, (tensor, shape) in tensors.items():
        if tensor is not None:
            fits = tensor.dim() == len(shape) and all(a in (b, -1) for a, b in zip(shape, tensor.shape, strict=True))
            need(fits, f"{call}: {name} must have shape {shape}, but has {tuple(tensor.shape)}.")


def need_none(call: str, **values: object) -> None:
    """Refuse what the twin does not simulate, since no public source says what it does."""
    for name, value in values.items():
        if value is not None:
            raise NotImplementedError(f"torch_mlu_ops.{call}: the twin does not simulate {name}; got {value!r}.")


def need_within(call: str, limit: int, **indices: Tensor) -> None:
    """Refuse indices outside 0..limit-1, where the device would touch memory that is not its own."""
    for name, index in indices.items():
        fits = index.numel() == 0 or bool((index >= 0).all() and (index < limit).all())
        need(fits, f"{call}: {name} must lie in [0, {limit}), but spans {extent(index)}.")


def extent(index: Tensor) -> str:
    """Smallest and largest value, as text."""
    return f"[{index.min().item()}, {index.max().item()}]" if index.numel() else "nothing"


def refuse_by_card(call: str, arguments: Mapping[str, Any], profile: Profile) -> None:  # Any: a call's own values
    """Refuse dtypes that the card lacks, and tensors whose rows are not dense."""
    major = profile.capability[0]
    for name, value in arguments.items():
        dtype = value.dtype if isinstance(value, Tensor) else value
        if isinstance(dtype, torch.dtype):
            need(dtype != torch.float64, f"{call}: {name} is float64, which the device has not.")
            need(dtype != torch.bfloat16 or major >= 5, f"{call}: {name} is bfloat16; capability {major} has none.")
            need(dtype not in FP8 or major >= 6, f"{call}: {name} is {dtype}; capability {major} has no fp8.")
        if isinstance(value, Tensor) and value.dim() and value.numel():
            dense = value.is_contiguous() if name not in STRIDED.get(call, ()) else value.stride(-1) == 1
            need(dense, f"{call}: {name} must be contiguous, but has strides {tuple(value.stride())}.")


def fill_undefined(tensor: Tensor) -> Tensor:
    """Overwrite what a kernel leaves undefined: NaN, or a large negative integer that no index is."""
    if tensor.dtype in FP8:
        tensor.view(torch.uint8).fill_(0x7F)
    elif tensor.is_floating_point():
        tensor.fill_(torch.nan)
    else:
        tensor.fill_({torch.int8: -128, torch.uint8: 0x80}.get(tensor.dtype, -0x7F7F7F7F))
    return tensor


def undefined(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """A new tensor of which nothing is defined yet."""
    return fill_undefined(torch.empty(tuple(shape), dtype=dtype))


def slots_of(call: str, cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """(block, offset) of flat slots of a cache [blocks, heads, block_size, dim] or [blocks, block_size, dim]."""
    size = cache.shape[-2]
    need_within(call, cache.shape[0] * size, slot_mapping=slots)
    return slots.long() // size, slots.long() % size
