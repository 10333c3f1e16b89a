"""What the device itself can do: streams, products, launches. Rooflines are made of these figures of the same run."""

import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from isolith.operator import Cost
from isolith_conformance.bench.clock import Clock
from isolith_conformance.bench.record import Limits

STREAM_BYTES = {"cpu": 2**29}
DEVICE_STREAM_BYTES = 2**32
PRODUCT_SIZE = {"cpu": 2048}
DEVICE_PRODUCT_SIZE = 8192
LAUNCHES = 1000
SECONDS = 0.6
"""For each figure."""

Made = Callable[[], Any]  # Any: a tensor


def measure_limits(clock: Clock, scale: float = 1.0) -> Limits:
    """Measure every limit; `scale` shrinks the work, for tests."""
    kind = clock.device.type
    stream = int(STREAM_BYTES.get(kind, DEVICE_STREAM_BYTES) * scale)
    size = max(int(PRODUCT_SIZE.get(kind, DEVICE_PRODUCT_SIZE) * scale**0.5) // 128 * 128, 128)
    data = torch.ones(max(stream // 4, 1), dtype=torch.float32, device=clock.device)
    ways: dict[str, Made] = {"sum": data.sum, "largest": data.amax, "product with a vector": vector_product(data)}
    read = {name: data.nbytes / best(clock, way, scale) / 1e9 for name, way in ways.items()}
    fastest = max(read, key=lambda name: read[name])
    copy = 2 * data.nbytes / best(clock, copying(data), scale) / 1e9
    del data, ways
    rates: dict[str, float] = {}
    assumed: dict[str, str] = {}
    for name, make in PRODUCTS.items():
        try:
            product = make(size, clock)
            rates[name] = 2 * size**3 / best(clock, product, scale) / 1e9
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
            assumed[name] = first_words(error)
    assumed["float4"] = "torch has no product of this format"
    how = (
        f"{stream / 2**20:.0f} MiB of float32, read by torch's {fastest}; products of {size} x {size}; "
        "the fastest of several repeats"
    )
    return Limits(
        read_gbs=read[fastest],
        copy_gbs=copy,
        gflops=rates,
        assumed=assumed,
        launch_us=launch_overhead(clock) if kind != "cpu" else None,
        how=how,
    )


def copying(data: Tensor) -> Made:
    """A copy of the stream."""
    copied = torch.empty_like(data)
    return lambda: copied.copy_(data)


def vector_product(data: Tensor) -> Made:
    """A matrix of the stream's bytes times a vector."""
    columns = min(4096, data.numel())
    matrix = data[: data.numel() // columns * columns].view(-1, columns)
    vector = torch.ones(columns, device=data.device)
    return lambda: matrix @ vector


def best(clock: Clock, call: Made, scale: float) -> float:
    """The shortest of several times: a limit is what the machine can do, not what it does on average."""
    call()
    clock.synchronise()
    ended = time.perf_counter() + SECONDS * min(scale, 1.0)
    taken = [clock.once(call)[0] for _ in range(3)]
    while time.perf_counter() < ended:
        taken.append(clock.once(call)[0])
    return min(taken)


def first_words(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]


def plain_product(dtype: torch.dtype) -> Callable[[int, Clock], Made]:
    """A product of two matrices of a dtype."""

    def make(size: int, clock: Clock) -> Made:
        a, b = (torch.ones(size, size, device=clock.device, dtype=dtype) for _ in range(2))
        return lambda: a @ b

    return make


def scaled_product(size: int, clock: Clock) -> Made:
    """A product in e4m3 with one scale a matrix."""
    a, b = (torch.ones(size, size, device=clock.device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=clock.device)
    return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)


def int8_product(size: int, clock: Clock) -> Made:
    """A product of int8 codes."""
    a, b = (torch.ones(size, size, device=clock.device, dtype=torch.int8) for _ in range(2))
    return lambda: torch._int_mm(a, b)


PRODUCTS: dict[str, Callable[[int, Clock], Made]] = {
    "float32": plain_product(torch.float32),
    "bfloat16": plain_product(torch.bfloat16),
    "float8": scaled_product,
    "int8": int8_product,
}


def launch_overhead(clock: Clock) -> float:
    """Microseconds from one launch to the next, of kernels that do next to nothing."""
    one = torch.zeros(1, device=clock.device)
    one.add_(1)
    clock.synchronise()
    started = time.perf_counter()
    for _ in range(LAUNCHES):
        one.add_(1)
    clock.synchronise()
    return (time.perf_counter() - started) / LAUNCHES * 1e6


def rate_of(limits: Limits, math: str) -> float:
    """GFLOP/s of a format: its own, or bfloat16's where that is more, since values can be widened first."""
    wide = limits.gflops.get("bfloat16") or max(limits.gflops.values())
    return limits.gflops["float32"] if math == "float32" else max(limits.gflops.get(math, 0.0), wide)


def roofline(cost: Cost, limits: Limits) -> tuple[float, Literal["memory", "compute"]]:
    """(least seconds, what takes them) of a call: its bytes at the stream's speed, or its FLOPs at the product's.

    As many bytes as are written are taken to be copied, at the copy's speed; the other bytes read to be read.
    """
    copied = min(cost.bytes_read, cost.bytes_written)
    apart = cost.bytes_read - copied
    written = cost.bytes_written - copied
    memory = apart / limits.read_gbs / 1e9 + (2 * copied + written) / limits.copy_gbs / 1e9
    compute = cost.flops / rate_of(limits, cost.math) / 1e9
    return (memory, "memory") if memory >= compute else (compute, "compute")
