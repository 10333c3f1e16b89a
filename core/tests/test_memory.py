"""A call whose results the host has no room for is refused, with the bytes and what lowers them."""

import resource

import pytest
import torch

import isolith
from isolith import memory
from isolith.ops import OPERATORS

POSITIONS = torch.arange(2**16)
WINDOW = 2**30  # int32 results of 2^48 bytes


def peak_kib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_the_refusal_names_the_bytes_and_the_argument():
    before = peak_kib()
    with pytest.raises(isolith.OutOfMemoryError) as refused:
        isolith.window_indices(POSITIONS, WINDOW)
    said = str(refused.value)
    assert said.startswith("window_indices: results take 281,47")
    assert f"{2**48:,}"[:7] in said
    assert "a smaller window or a call with fewer tokens lowers that" in said
    assert peak_kib() - before < 100_000


def test_a_handle_is_refused_too():
    with pytest.raises(isolith.OutOfMemoryError):
        isolith.bind(isolith.window_indices, POSITIONS, WINDOW)


def test_it_is_a_memory_error_for_those_who_catch_these():
    assert issubclass(isolith.OutOfMemoryError, MemoryError)


def test_what_fits_is_not_asked_about(monkeypatch):
    monkeypatch.setattr(memory, "bytes_free", lambda device: pytest.fail("asked"))
    isolith.window_indices(POSITIONS[:4], 8)


def test_what_is_free_decides(monkeypatch):
    monkeypatch.setattr(memory, "WORTH_ASKING", 1)
    operator = OPERATORS["window_indices"]
    call = operator.arguments(POSITIONS[:4], 8)
    needed = operator.cost(**call).bytes_written
    monkeypatch.setattr(memory, "bytes_free", lambda device: needed)
    memory.check_room(operator, call, "cpu")
    monkeypatch.setattr(memory, "bytes_free", lambda device: needed - 1)
    with pytest.raises(isolith.OutOfMemoryError):
        memory.check_room(operator, call, "cpu")
    memory.check_room(operator, call, "cuda")  # its allocator says so itself


def test_no_operator_names_an_argument_that_does_not_lower_it():
    for operator in OPERATORS.values():
        sample = next(iter(operator.samples(isolith.Make(torch.float32))))
        call = operator.arguments(**sample.arguments)
        needed = operator.cost(**call).bytes_written
        for way in memory.ways_out(operator, call, needed):
            name = way.removeprefix("a smaller ")
            if name in call:
                assert operator.cost(**{**call, name: call[name] // 2}).bytes_written < needed


def test_the_host_says_how_much_is_free():
    assert 2**20 < memory.bytes_free("cpu") < 2**50
