import json
import struct

import pytest
import safetensors.torch
import torch

from isolith_conformance.bundle_tensors import DTYPES, BundleError, read_tensors, tensor_bytes, tensors_of
from isolith_conformance.report_json import JsonError


def file_of(header, body=b""):
    """A file with this header, be it a text or an object."""
    words = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return bytearray(struct.pack("<Q", len(words)) + words + body)


def entry(dtype="U8", shape=(4,), first=0, behind=4):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, behind]}


def refusal(data):
    with pytest.raises(JsonError) as caught:
        tensors_of(data)
    return str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_tensor_is_the_same_after_a_file(dtype):
    tensor = torch.arange(2, dtype=torch.float32).reshape(1, 2).to(dtype)
    read = tensors_of(bytearray(tensor_bytes({"x": tensor})))["x"]
    assert (read.dtype, read.shape, tensor_bytes({"x": read})) == (dtype, (1, 2), tensor_bytes({"x": tensor}))


def test_library_reads_what_we_write():
    tensors = {"b": torch.randn(3, 5).bfloat16(), "a": torch.arange(7), "empty": torch.zeros(0, 4)}
    read = safetensors.torch.load(tensor_bytes(tensors))
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_we_read_what_the_library_writes():
    tensors = {"b": torch.randn(3, 5).bfloat16(), "a": torch.arange(7), "empty": torch.zeros(0, 4)}
    read = tensors_of(bytearray(safetensors.torch.save(tensors, metadata={"format": "pt"})))
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_equal_tensors_give_equal_bytes():
    one, two = torch.zeros(3), torch.ones(2)
    assert tensor_bytes({"a": one, "b": two}) == tensor_bytes({"b": two, "a": one})


def test_transposed_tensor_is_written_in_its_own_order():
    tensor = torch.arange(6).reshape(2, 3).T
    assert torch.equal(tensors_of(bytearray(tensor_bytes({"x": tensor})))["x"], tensor)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (bytearray(b"1234567"), "the file is too short for a header"),
        (bytearray(b"\xff" * 8), "a header of 18446744073709551615 bytes does not fit the file"),
        (file_of("[]"), "the header must be an object; got []"),
        (file_of('{"a":1,"a":2}'), "the key 'a' stands twice in one object"),
        (file_of({"x": 1}), "tensor 'x' must have dtype, shape and data_offsets alone; got 1"),
        (file_of({"x": entry() | {"more": 1}}, b"1234"), "tensor 'x' must have dtype, shape and data_offsets alone"),
        (file_of({"x": entry(dtype="F9")}, b"1234"), "tensor 'x' must be F64, F32,"),
        (file_of({"x": entry(dtype=["U8"])}, b"1234"), "tensor 'x' must be F64, F32,"),
        (file_of({"x": entry(shape=(-4,))}, b"1234"), "tensor 'x' must have up to 16 axes of at most 4294967296"),
        (file_of({"x": entry(shape=(True,))}, b"1"), "tensor 'x' must have up to 16 axes of at most 4294967296"),
        (file_of({"x": entry(shape=(1,) * 17)}, b"1"), "tensor 'x' must have up to 16 axes of at most 4294967296"),
        (file_of({"x": entry(shape=(0, 2**32, 2))}), "tensor 'x' of shape [0, 4294967296, 2] is larger than any file"),
        (file_of({"x": entry(shape=(3,))}, b"1234"), "tensor 'x' of shape [3] does not have bytes 0 to 4"),
        (file_of({"x": entry(first=1, behind=5)}, b"12345"), "tensor 'x' starts at byte 1; 0 is due"),
        (file_of({"x": entry(), "y": entry(first=2, behind=6)}, b"123456"), "tensor 'y' starts at byte 2; 4 is due"),
        (file_of({"x": entry(), "y": entry()}, b"1234"), "tensor 'y' starts at byte 0; 4 is due"),
        (file_of({"x": entry()}, b"123"), "the tensors have 4 bytes, the file has 3"),
        (file_of({"x": entry()}, b"12345"), "the tensors have 4 bytes, the file has 5"),
        (file_of({"x": entry(dtype="BOOL")}, b"\0\1\2\1"), "a boolean is neither 0 nor 1"),
        (file_of({"é": entry()}, b"1234"), "tensor '\\xe9' must be named in 1 to 256 printable ASCII characters"),
        (file_of({"__metadata__": {"x": 1}}), "__metadata__.'x' must be text; got 1"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_file_that_does_not_add_up_is_refused(data, says):
    assert refusal(data).startswith(says)


def test_file_of_another_size_than_due_is_not_read(tmp_path):
    (tmp_path / "x").write_bytes(tensor_bytes({"x": torch.zeros(8)}))
    with pytest.raises(BundleError, match=r"bytes, at most 10 are due"):
        read_tensors(tmp_path / "x", 10)
