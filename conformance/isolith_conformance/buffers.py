"""Where the tensors of a call lie: in buffers of their own, between guard zones, with strides as a check wants them.

Both sides use this module: a backend's process to place the arguments on its device, the suite to know what every
byte of the buffers must be afterwards.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

HOST = torch.device("cpu")

GUARD = 4096
"""Bytes of a guard zone, before and behind a tensor; a page, so that the tensor keeps its alignment."""

NAN_BYTES = 0xFF
"""Fills memory with NaN in every float format, and with -1 in every integer."""
LARGE_BYTES = 0x7B
"""Fills memory with large finite floats (61,280 in float16, 1.3e36 in bfloat16) and large integers."""

Layout = Literal["as_is", "padded", "offset"]
"""as_is: the sample's own strides; padded: rows 128 elements longer and every other axis by one, no axis dense;
offset: the sample's strides, from an odd element on."""


def strides_in(tensor: Tensor, layout: Layout) -> tuple[int, ...]:
    """The strides that a layout gives a tensor."""
    if layout != "padded" or not tensor.dim():
        return tensor.stride()
    sizes = [*(size + 1 for size in tensor.shape[:-1]), tensor.shape[-1] + 128]
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    return tuple(2 * stride for stride in strides) if tensor.dim() == 1 else tuple(strides)


def span_of(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements of memory a tensor reaches over."""
    return 0 if 0 in shape else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def reserve(
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    fill: int,
    device: torch.device,
    layout: Layout = "as_is",
) -> tuple[Tensor, Tensor]:
    """A tensor between guard zones, every byte of it the same: (the whole buffer as bytes, the tensor in it)."""
    start = GUARD + (dtype.itemsize if layout == "offset" else 0)
    span = span_of(shape, strides) * dtype.itemsize
    buffer = torch.full((start + span + GUARD,), fill, dtype=torch.uint8, device=device)
    if not span:
        return buffer, torch.empty_strided(tuple(shape), tuple(strides), dtype=dtype, device=device)
    return buffer, buffer[start : start + span].view(dtype).as_strided(tuple(shape), tuple(strides))


def place(
    tensor: Tensor, strides: Sequence[int], fill: int, layout: Layout = "as_is", device: torch.device = HOST
) -> tuple[Tensor, Tensor]:
    """Copy a tensor into a reserved one: (the whole buffer as bytes, the tensor in it)."""
    buffer, placed = reserve(tensor.shape, strides, tensor.dtype, fill, device, layout)
    if tensor.numel():
        # Along an axis of stride 0 all elements are one.
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)
        placed[once].copy_(tensor[once])
    return buffer, placed


def place_all(
    arguments: Mapping[str, Any],  # Any: a call's own values
    fill: int = NAN_BYTES,
    layout: Layout = "as_is",
    device: torch.device = HOST,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Place every tensor of a call: (the buffers by name, the arguments)."""
    buffers, placed = {}, dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            buffers[name], placed[name] = place(value, strides_in(value, layout), fill, layout, device)
    return buffers, placed
