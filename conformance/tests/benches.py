"""What tests of the benchmark are made of: tiny models, a clock that keeps no time off, a record of one row."""

import itertools
import sys
import types

from isolith import Backend, implements
from isolith.config import Settings
from isolith.dispatch import Dispatcher
from isolith.models import V4, V32
from isolith.ops import OPERATORS
from isolith.plugins import Plugin
from isolith.registry import Registry
from isolith_conformance.bench.clock import Clock
from isolith_conformance.bench.measure import Bench, measure
from isolith_conformance.bench.record import BenchRun, Limits, PeerTime, Row, Timing, bench_of
from isolith_conformance.bench.workloads import Setting, workloads
from isolith_conformance.report import BackendRecord, Environment, Suite

COUNTER = itertools.count()  # what a module's kernels are is remembered by its name
SIZES = {"title": "tiny", "hidden": 256, "heads": 2, "q_rank": 64, "index_topk": 16, "experts_per_token": 2}
SIZES |= {"inter": 128, "vocab": 500, "index_heads": 4}
TINY_V4 = V4(name="tiny-v4", groups=1, ratios=(0, 4, 128), experts=8, o_rank=64, **SIZES)
TINY_V32 = V32(name="tiny-v3.2", experts=16, **SIZES)
LIMITS = Limits(
    read_gbs=10.0,
    copy_gbs=8.0,
    gflops={"float32": 50.0, "bfloat16": 100.0},
    assumed={"float8": "no product", "int8": "no product", "float4": "no product"},
    launch_us=None,
    how="made up",
)


def setting(model=TINY_V4, phase="decode", context=256, tokens=3, experts=0):
    """A step of a tiny model."""
    return Setting(model=model, phase=phase, context=context, tokens=tokens, experts=experts or model.experts)


def workload(at, operator, label=""):
    """The first call of an operator."""
    return next(one for one in workloads(at) if one.operator.name == operator and label in one.label)


def dispatcher_of(kernel=None, operator=None):
    """A dispatcher with one kernel for host tensors, or with none."""
    module = types.ModuleType(f"kernels_of_a_bench_test_{next(COUNTER)}")
    if kernel is not None:
        kernel.__module__ = module.__name__
        module.kernel = implements(operator)(kernel)
    sys.modules[module.__name__] = module
    backend = Backend(
        name="toy",
        device_type="cpu",
        api_version=1,
        why_unavailable=lambda: None,
        kernels=(module.__name__,),
        reference_is_native=True,
    )
    plugin = Plugin(name="toy", distribution="toy", version="1", target="toy", backend=backend)
    return Dispatcher(Registry(operators=OPERATORS, plugins=(plugin,)), Settings(fallback="allow"))


def row_of(at, operator, label="", kernel=None, **more):
    """The row of one call, with this kernel."""
    found = workload(at, operator, label)
    dispatcher = dispatcher_of(kernel, found.operator)
    known = {"clock": Clock(buffer_bytes=0), "limits": LIMITS, "seconds": 0.005, "peers": ()} | more
    return measure(Bench(dispatcher=dispatcher, **known), at, found)


TIME = Timing(median=2e-3, lower=1e-3, upper=4e-3, repeats=5)


def a_row(**changes):
    """A row of a right kernel, with what the test changes."""
    made = {
        "operator": "rms_norm",
        "label": "hidden",
        "note": "",
        "phase": "decode",
        "context": 4096,
        "tokens": 1,
        "experts": 256,
        "kernel": "cpu.rms_norm",
        "ran": ("cpu.rms_norm",),
        "fallback": False,
        "time": TIME,
        "flops": 4000,
        "bytes_read": 2000,
        "bytes_written": 1000,
        "math": "float32",
        "roofline_s": 1e-3,
        "bound": "memory",
        "percent": 50.0,
        "extra_bytes": 4096,
        "reference": TIME,
        "reference_note": "",
        "ratio": 1.0,
        "state": "RIGHT",
        "checked": "the reference",
        "statistics": {"d": 1e-9},
        "peers": (PeerTime(name="torch", computes="the same", time=TIME, ratio=1.0),),
    }
    return Row(**made | changes)


def a_bench(*rows, complete=True, limits=LIMITS):
    """A record of these rows, or of one right row."""
    return bench_of(
        suite=Suite(version="0.1.0", commit="0123456789abcdef", clean=True),
        run=BenchRun(
            command="python -m isolith_conformance bench",
            started="2026-01-02T03:04:05+00:00",
            seconds=1.5,
            model="v4-flash",
            phase="decode",
            contexts=tuple(dict.fromkeys(row.context for row in rows)) or (4096,),
            tokens=tuple(dict.fromkeys(row.tokens for row in rows)) or (1,),
            experts=tuple(dict.fromkeys(row.experts for row in rows)) or (256,),
            caches="cold",
            threads=1,
            complete=complete,
        ),
        environment=Environment(python="3.11", platform="linux", processor="x86", cores=2, torch="2.13"),
        backend=BackendRecord(name="cpu", distribution="isolith", version="0.1.0", device="x86"),
        limits=limits,
        rows=rows or (a_row(),),
    )
