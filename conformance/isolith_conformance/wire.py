"""What crosses between the suite and a backend's process: JSON with tensors as typed bytes, never pickles.

A frame is a magic word, the length of its header and of its body, the header (JSON: the message, and of each tensor
dtype, shape and strides) and the body (the tensors' elements in row-major order, one tensor after the other). The
reader believes nothing that the header says before it has checked it.
"""

import ctypes
import json
import math
import struct
from typing import Any

import torch
from torch import Tensor

from isolith_conformance.buffers import place, span_of

Message = dict[str, Any]  # Any: JSON values and tensors

MAGIC = b"ISOLITH1"
PREFIX = struct.Struct("<8sIQ")
LONGEST_HEADER = 1 << 24
LONGEST_BODY = 1 << 36
MOST_TENSORS = 4096
MOST_AXES = 16
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.float8_e8m0fnu, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
LARGEST_SPREAD = 256
"""How much larger than its elements the memory may be that a strided tensor reaches over."""
MARK = "tensor:"


class WireError(Exception):
    """A frame that is not one."""


def encode(message: Message) -> bytes:
    """The frame of a message: JSON values, with tensors anywhere among them."""
    tensors: list[Tensor] = []
    words = json.dumps({"message": without_tensors(message, tensors), "tensors": [described(t) for t in tensors]})
    header = words.encode()
    bodies = [bytes_of(tensor) for tensor in tensors]
    return b"".join((PREFIX.pack(MAGIC, len(header), sum(map(len, bodies))), header, *bodies))


def without_tensors(value: Any, tensors: list[Tensor]) -> Any:  # Any: JSON values and tensors
    """The value with a mark in the place of each tensor, which is added to the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return f"{MARK}{len(tensors) - 1}"
    if isinstance(value, dict):
        return {name: without_tensors(part, tensors) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_tensors(part, tensors) for part in value]
    if isinstance(value, str) and value.startswith(MARK):
        raise WireError(f"a text may not start with {MARK!r}")
    return value


def described(tensor: Tensor) -> Message:
    """What the header says of a tensor."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise WireError(f"tensors of {dtype} do not cross")
    return {"dtype": dtype, "shape": list(tensor.shape), "strides": list(tensor.stride())}


def bytes_of(tensor: Tensor) -> bytes:
    """The elements in row-major order."""
    flat = tensor.detach().cpu().contiguous()
    return ctypes.string_at(flat.data_ptr(), flat.nbytes) if flat.numel() else b""


def lengths(prefix: bytes) -> tuple[int, int]:
    """Of a frame's first bytes: how long header and body are."""
    magic, header, body = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise WireError("the stream does not start with a frame")
    if header > LONGEST_HEADER or body > LONGEST_BODY:
        raise WireError(f"a frame of {header} + {body} bytes; at most {LONGEST_HEADER} + {LONGEST_BODY}")
    return header, body


def decode(header: bytes, body: bytearray) -> Message:
    """The message of a frame whose prefix has been read; WireError for anything that does not add up."""
    try:
        outer = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the header is not JSON: {error}") from None
    if not isinstance(outer, dict) or outer.keys() != {"message", "tensors"}:
        raise WireError("the header must hold message and tensors")
    rows = outer["tensors"]
    if not isinstance(rows, list) or len(rows) > MOST_TENSORS:
        raise WireError(f"tensors must be a list of at most {MOST_TENSORS}")
    tensors: list[Tensor] = []
    start = 0
    for row in rows:
        dtype, shape, strides = checked(row)
        end = start + math.prod(shape) * dtype.itemsize
        if end > len(body):
            raise WireError(f"tensor {len(tensors)} ends at byte {end} of {len(body)}")
        tensors.append(strided(tensor_of(body, start, end, dtype, shape), strides))
        start = end
    if start != len(body):
        raise WireError(f"{len(body) - start} bytes belong to no tensor")
    message = with_tensors(outer["message"], tensors)
    if not isinstance(message, dict):
        raise WireError("a message is an object")
    return message


def checked(row: Any) -> tuple[torch.dtype, list[int], list[int]]:  # Any: whatever the JSON holds
    """Dtype, shape and strides of a tensor as the header gives them."""
    if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "strides"}:
        raise WireError("a tensor has dtype, shape and strides")
    dtype, shape, strides = row["dtype"], row["shape"], row["strides"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise WireError(f"tensors of {str(dtype)[:40]!r} do not cross")
    for sizes in (shape, strides):
        if not isinstance(sizes, list) or len(sizes) > MOST_AXES or len(sizes) != len(shape):
            raise WireError(f"a tensor has one size and one stride for each of at most {MOST_AXES} axes")
        if not all(type(size) is int and 0 <= size <= LONGEST_BODY for size in sizes):
            raise WireError(f"sizes and strides lie in 0..{LONGEST_BODY}")
    if span_of(shape, strides) > LARGEST_SPREAD * (math.prod(shape) + 1024):
        raise WireError("strides that spread a tensor so far are not accepted")
    return DTYPES[dtype], shape, strides


def strided(tensor: Tensor, strides: list[int]) -> Tensor:
    """The tensor with the strides given."""
    if not tensor.numel() or list(tensor.stride()) == strides:
        return tensor
    return place(tensor, strides, fill=0)[1]


def tensor_of(body: bytearray, start: int, end: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """A tensor with memory of its own from bytes start..end-1."""
    if start == end:
        return torch.empty(shape, dtype=dtype)
    # A copy: the bytes may lie at an address that the dtype cannot be read from.
    flat = torch.frombuffer(body, dtype=torch.uint8, count=end - start, offset=start).clone()
    if dtype == torch.bool:
        flat = flat != 0  # other bit patterns are no booleans
    return flat.view(dtype).reshape(shape)


def with_tensors(value: Any, tensors: list[Tensor]) -> Any:  # Any: JSON values and tensors
    """The value with the tensors back in their places."""
    if isinstance(value, str) and value.startswith(MARK):
        number = value.removeprefix(MARK)
        if not number.isascii() or not number.isdigit() or int(number[:6]) >= len(tensors):
            raise WireError(f"there is no {value[:40]!r}")
        return tensors[int(number[:6])]
    if isinstance(value, dict):
        return {name: with_tensors(part, tensors) for name, part in value.items()}
    if isinstance(value, list):
        return [with_tensors(part, tensors) for part in value]
    return value
