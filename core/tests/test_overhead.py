"""The budgets of a call, as ratios to work of the same kind that is timed in the same run.

The budgets are in nanoseconds of a machine on which reading shape, dtype and device of four tensors and one look-up
take 800; `scale` is how much slower this run is. `ROOM` is for noise: the least of many short rounds is compared.
"""

import importlib.util
import subprocess
import sys
import timeit
from pathlib import Path

import pytest
import torch

import isolith

SPEC = importlib.util.spec_from_file_location(
    "call_overhead", Path(__file__).parents[2] / "benchmarks" / "call_overhead.py"
)
call_overhead = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(call_overhead)
ROOM = 1.5
ROUNDS = 300


def least_ns(statement, **names):
    return min(timeit.repeat(statement, globals=names, number=100, repeat=ROUNDS)) / 100 * 1e9


@pytest.fixture(scope="module")
def scale():
    tensors = [torch.zeros(2, 3) for _ in range(4)]

    def read(a, b, c, d):
        return table.get(
            (
                a.shape,
                a.dtype,
                a.device,
                b.shape,
                b.dtype,
                b.device,
                c.shape,
                c.dtype,
                c.device,
                d.shape,
                d.dtype,
                d.device,
            )
        )

    table = {}
    return least_ns("read(*tensors)", read=read, tensors=tensors) / 800


@pytest.mark.parametrize("name", ["rms_norm", "hc_post", "sparse_attn"])
def test_a_full_call_keeps_its_budget(name, scale):
    row = call_overhead.measure(isolith.OPERATORS[name], repeats=ROUNDS, number=100, ways=("direct", "call"))
    assert row["over_direct_ns"]["call"] <= row["call_budget_ns"] * scale * ROOM


def test_a_bound_handle_keeps_its_budget(scale):
    row = call_overhead.measure(isolith.rms_norm, repeats=ROUNDS, number=100, ways=("direct", "bound"))
    assert row["over_direct_ns"]["bound"] <= call_overhead.BUDGET["bound_ns"] * scale * ROOM


def test_an_eager_call_costs_less_than_a_custom_op():
    row = call_overhead.measure(isolith.rms_norm, repeats=ROUNDS, number=100, ways=("direct", "call", "custom_op"))
    assert row["over_direct_ns"]["call"] < row["over_direct_ns"]["custom_op"]


@pytest.mark.parametrize("name", ["rms_norm", "sparse_attn", "fused_moe"])
def test_a_call_executes_five_frames_and_one_look_up_in_a_dictionary(name):
    ways = ("direct", "bound", "call")
    counted = call_overhead.measure(isolith.OPERATORS[name], repeats=1, number=1, ways=ways)["executed"]
    assert counted["bound"] == counted["direct"]
    # The operator, whether Dynamo traces, the call, its key, the kernel; what was chosen for that key.
    assert (counted["call"]["frames"], counted["call"]["dictionaries"]) == (5, 1)
    assert counted["call"]["globals"] - counted["direct"]["globals"] <= 4


def test_a_frame_and_a_look_up_more_would_be_seen():
    table = {}

    def one_more(value):
        return inner(value)

    def inner(value):
        return table.get(value), len

    counted = call_overhead.executed(one_more, (1,))
    assert counted == {"frames": 2, "dictionaries": 1, "globals": 1, "attributes": 1}


def test_import_takes_a_small_part_of_importing_torch():
    # Without the garbage collector, whose pass over all that torch has made falls into one import or another.
    code = """
import gc, time
gc.disable()
start = time.perf_counter()
import torch
middle = time.perf_counter()
import isolith
print((time.perf_counter() - middle) / (middle - start))
"""
    runs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) for _ in range(3)
    ]
    # torch takes a second or more where isolith may take 50 ms.
    assert min(runs) <= 0.05 * ROOM
