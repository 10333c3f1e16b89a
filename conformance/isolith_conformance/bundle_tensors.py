"""Tensor files in the safetensors format, believed in nothing that has not been checked.

Eight bytes: the header's length, little-endian. The header: JSON, of each tensor its dtype, shape and the offsets of
its first byte and of the one behind its last. Then the bytes, without gap or overlap.

Source: github.com/huggingface/safetensors, README, "Format". We read it ourselves since we accept less: only the dtypes
that operators have, names of printable ASCII, and no byte that belongs to none of them.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from isolith_conformance.report_json import JsonError, Value, as_text, decode, parse, read_bytes, shown
from isolith_conformance.wire import bytes_of

LARGEST_FILE = 2**32
LARGEST_HEADER = 2**20
MOST_TENSORS = 4096
MOST_AXES = 16
LONGEST_NAME = 256
LENGTH = struct.Struct("<Q")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class BundleError(ValueError):
    """A bundle that cannot be believed; the message is a sentence that names the file."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a header says of one tensor, checked."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    behind: int


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The file that holds the tensors: equal tensors give equal bytes."""
    header: dict[str, Value] = {}
    parts: list[bytes] = []
    offset = 0
    for name in sorted(tensors):
        data = bytes_of(tensors[name])
        shape, dtype = list(tensors[name].shape), NAMES[tensors[name].dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        parts.append(data)
        offset += len(data)
    words = json.dumps(header, separators=(",", ":")).encode()
    words += b" " * (-len(words) % 8)  # the format asks that the bytes start at a multiple of eight
    return b"".join((LENGTH.pack(len(words)), words, *parts))


def read_tensors(path: Path, size: int | None = None) -> dict[str, Tensor]:
    """The tensors of a file; BundleError unless every byte of it is accounted for.

    Args:
        path: Where it lies.
        size: How many bytes it must have, where that is known.
    """
    try:
        return tensors_of(read_bytes(path, LARGEST_FILE if size is None else size))
    except JsonError as error:
        raise BundleError(f"{path}: {error}.") from error


def tensors_of(data: bytearray) -> dict[str, Tensor]:
    """The tensors that lie in a file's bytes; JsonError unless every byte is accounted for."""
    if len(data) < LENGTH.size:
        raise JsonError("the file is too short for a header")
    (length,) = LENGTH.unpack_from(data)
    if length > min(LARGEST_HEADER, len(data) - LENGTH.size):
        raise JsonError(f"a header of {length} bytes does not fit the file")
    words = as_text(data[LENGTH.size : LENGTH.size + length])
    start = LENGTH.size + length
    return {name: tensor_in(data, start, entry) for name, entry in entries_of(words, len(data) - start).items()}


def entries_of(words: str, size: int) -> dict[str, Entry]:
    """What the header says, where it fits `size` bytes without gap or overlap."""
    header = parse(words)
    if not isinstance(header, dict):
        raise JsonError(f"the header must be an object; got {shown(header)}")
    decode(Mapping[str, str], header.pop("__metadata__", {}), "__metadata__")  # other programs' notes: read past
    if len(header) > MOST_TENSORS:
        raise JsonError(f"the header has {len(header)} tensors, at most {MOST_TENSORS}")
    entries = {name: entry_of(name, value) for name, value in header.items()}
    due = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].first, item[1].behind)):
        if entry.first != due:
            raise JsonError(f"tensor {shown(name)} starts at byte {entry.first}; {due} is due")
        due = entry.behind
    if due != size:
        raise JsonError(f"the tensors have {due} bytes, the file has {size}")
    return entries


def entry_of(name: str, value: Value) -> Entry:
    """One entry of the header, whose parts agree with each other."""
    where = f"tensor {shown(name)}"
    if not (name.isascii() and name.isprintable() and 0 < len(name) <= LONGEST_NAME):
        raise JsonError(f"{where} must be named in 1 to {LONGEST_NAME} printable ASCII characters")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise JsonError(f"{where} must have dtype, shape and data_offsets alone; got {shown(value)}")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise JsonError(f"{where} must be {', '.join(DTYPES)}; got {shown(value['dtype'])}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not is_counts(shape) or len(shape) > MOST_AXES:
        raise JsonError(f"{where} must have up to {MOST_AXES} axes of at most {LARGEST_FILE}; got {shown(shape)}")
    if not is_counts(offsets) or len(offsets) != 2:
        raise JsonError(f"{where} must have two offsets; got {shown(offsets)}")
    if math.prod(max(1, count) for count in shape) > LARGEST_FILE:
        raise JsonError(f"{where} of shape {shown(shape)} is larger than any file")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise JsonError(f"{where} of shape {shape} does not have bytes {offsets[0]} to {offsets[1]}")
    return Entry(dtype=dtype, shape=tuple(shape), first=offsets[0], behind=offsets[1])


def is_counts(value: Value) -> bool:
    """Whether it is a list of numbers that a file could count with."""
    return isinstance(value, list) and all(type(count) is int and 0 <= count <= LARGEST_FILE for count in value)


def tensor_in(data: bytearray, start: int, entry: Entry) -> Tensor:
    """The tensor whose bytes stand there; it shares them where they are aligned."""
    if entry.first == entry.behind:
        return torch.empty(entry.shape, dtype=entry.dtype)
    offset = start + entry.first
    if entry.dtype == torch.bool and any(data[offset : start + entry.behind].translate(None, b"\0\1")):
        raise JsonError("a boolean is neither 0 nor 1")
    flat = torch.frombuffer(data, dtype=torch.uint8, offset=offset, count=entry.behind - entry.first)
    if offset % entry.dtype.itemsize:
        flat = flat.clone()
    return flat.view(entry.dtype).reshape(entry.shape)
