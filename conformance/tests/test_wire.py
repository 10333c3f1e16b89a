"""What crosses the wire comes out as it went in, and nothing else comes out."""

import random

import pytest
import torch

from isolith_conformance import wire
from isolith_conformance.wire import WireError


def crossed(message):
    frame = wire.encode(message)
    header, body = wire.lengths(frame[: wire.PREFIX.size])
    start = wire.PREFIX.size
    assert len(frame) == start + header + body
    return wire.decode(frame[start : start + header], bytearray(frame[start + header :]))


@pytest.mark.parametrize("dtype", wire.DTYPES.values(), ids=str)
def test_every_dtype_crosses_with_its_bytes(dtype):
    value = torch.arange(24, dtype=torch.uint8).view(torch.uint8).repeat_interleave(dtype.itemsize).view(dtype)
    value = value.reshape(2, 3, 4) if dtype != torch.bool else torch.tensor([True, False])
    other = crossed({"x": value})["x"]
    assert (other.dtype, other.shape) == (value.dtype, value.shape)
    assert torch.equal(other.view(torch.uint8), value.view(torch.uint8))


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(4, 6).t(),
        torch.randn(1, 3).expand(5, 3),
        torch.randn(8, 10)[:, ::3],
        torch.empty(0, 4),
        torch.tensor(3.0),
        torch.zeros(2, 0),
    ],
    ids=["transposed", "expanded", "strided", "no_rows", "scalar", "no_columns"],
)
def test_strides_cross(value):
    other = crossed({"x": value})["x"]
    assert torch.equal(other, value)
    assert other.stride() == value.stride() or not value.numel()


def test_values_beside_tensors_cross():
    message = {"a": [1, 2.5, None, True, "text"], "b": {"c": torch.ones(2)}}
    other = crossed(message)
    assert (other["a"], other["b"]["c"].tolist()) == (message["a"], [1.0, 1.0])


def test_a_text_that_looks_like_a_tensor_is_refused():
    with pytest.raises(WireError, match="may not start with"):
        wire.encode({"x": "tensor:0"})


def frame_of(header, body=b""):
    return wire.decode(header, bytearray(body))


@pytest.mark.parametrize(
    ("header", "body", "says"),
    [
        (b"[]", b"", "message and tensors"),
        (b"{", b"", "not JSON"),
        (b"[" * 100000, b"", "not JSON"),
        (b'{"message":{},"tensors":[{"dtype":"float32","shape":[2],"strides":[1]}]}', b"1234", "ends at byte 8 of 4"),
        (b'{"message":{},"tensors":[]}', b"1234", "belong to no tensor"),
        (b'{"message":{},"tensors":[{"dtype":"object","shape":[],"strides":[]}]}', b"", "do not cross"),
        (b'{"message":{},"tensors":[{"dtype":"int8","shape":[-1],"strides":[1]}]}', b"", "lie in 0"),
        (b'{"message":{},"tensors":[{"dtype":"int8","shape":[2],"strides":[99999999]}]}', b"12", "spread a tensor"),
        (b'{"message":{"x":"tensor:1"},"tensors":[]}', b"", "there is no"),
        (b'{"message":[],"tensors":[]}', b"", "a message is an object"),
    ],
)
def test_a_frame_that_does_not_add_up_is_refused(header, body, says):
    with pytest.raises(WireError, match=says):
        frame_of(header, body)


def test_no_damaged_frame_gives_anything_but_a_message_or_a_refusal():
    frame, chance = wire.encode({"x": torch.randn(4, 4), "words": ["a", "b"], "n": 3}), random.Random(0)
    for _ in range(3000):
        damaged = bytearray(frame)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            header, body = wire.lengths(bytes(damaged[: wire.PREFIX.size]))
            rest = damaged[wire.PREFIX.size :]
            assert isinstance(wire.decode(bytes(rest[:header]), rest[header : header + body]), dict)
        except WireError:
            pass
