"""The clock: how long a call takes once its caches are cold."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isolith_conformance.bench.record import Timing

Call = Callable[[], Any]  # Any: what an operator returns

CACHE_PATTERN = "/sys/devices/system/cpu/cpu0/cache/index{level}/size"
UNKNOWN_CACHE = 64 * 2**20
"""Bytes of a last-level cache whose size nobody tells."""
TIMES_CACHE = 4
LARGEST_BUFFER = 2**30
WARM_UP_SHARE = 0.05
"""Of the budget, for calls that are not counted."""
MOST_REPEATS = 1000


class Clock:
    """Times calls on one device.

    Args:
        device: The torch device.
        buffer_bytes: What is read between repeats; four times the last-level cache where it is None, 0 for nothing.
    """

    def __init__(self, device: str = "cpu", buffer_bytes: int | None = None) -> None:
        self.device = torch.device(device)
        size = min(TIMES_CACHE * cache_bytes(device), LARGEST_BUFFER) if buffer_bytes is None else buffer_bytes
        self.buffer: Tensor = torch.zeros(size // 4, dtype=torch.float32, device=device)
        self.module: Any = None if device == "cpu" else torch.get_device_module(device)  # Any: a vendor's module

    @property
    def has_events(self) -> bool:
        """Whether the device tells times by events of its own."""
        return self.module is not None and hasattr(self.module, "Event")

    def synchronise(self) -> None:
        """Wait until the device has done everything."""
        if self.module is not None:
            self.module.synchronize()

    def cool(self) -> None:
        """Fill the caches with something else."""
        if self.buffer.numel():
            self.buffer.sum()

    def once(self, call: Call) -> tuple[float, Any]:  # Any: what the call returns
        """(seconds, result) of one call."""
        self.cool()
        if self.has_events:
            # The buffer's read is still running, so that the call's launches are queued behind it, not waited for.
            begin, end = (self.module.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = call()
            end.record()
            self.module.synchronize()
            return max(begin.elapsed_time(end) / 1e3, 1e-9), result
        self.synchronise()
        started = time.perf_counter()
        result = call()
        self.synchronise()
        return max(time.perf_counter() - started, 1e-9), result

    def measure(
        self, call: Call, seconds: float, least: int = 3, before: Call | None = None, warm_up: bool = True
    ) -> tuple[Timing, Any]:  # Any: what the call returns
        """(times, result of the last call): calls within a budget of seconds, after uncounted ones.

        Args:
            call: What is timed.
            seconds: The budget, warm-up included; the repeats are at least `least` whatever it is.
            least: Repeats.
            before: What makes each call like the first, untimed.
            warm_up: Whether there are uncounted calls.
        """
        ready = before or (lambda: None)
        started, result = time.perf_counter(), None
        taken: list[float] = []
        while warm_up:
            ready()
            call()
            self.synchronise()
            warm_up = time.perf_counter() - started < WARM_UP_SHARE * seconds
        while len(taken) < least or (time.perf_counter() - started < seconds and len(taken) < MOST_REPEATS):
            ready()
            result = None  # its memory serves the next call
            one, result = self.once(call)
            taken.append(one)
        return timing(taken), result


def timing(taken: list[float]) -> Timing:
    """The median and quartiles of times."""
    if len(taken) == 1:
        return Timing(median=taken[0], lower=taken[0], upper=taken[0], repeats=1)
    lower, median, upper = statistics.quantiles(taken, n=4, method="inclusive")
    return Timing(median=median, lower=lower, upper=upper, repeats=len(taken))


def cache_bytes(device: str) -> int:
    """Bytes of the last-level cache."""
    if device != "cpu":
        module = torch.get_device_module(device)
        properties = module.get_device_properties(module.current_device())
        return int(getattr(properties, "L2_cache_size", 0)) or UNKNOWN_CACHE
    for level in (4, 3, 2):
        try:
            text = Path(CACHE_PATTERN.format(level=level)).read_text().strip()
        except OSError:
            continue
        if text[:-1].isdigit() and text[-1:] in ("K", "M"):
            return int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]]
    return UNKNOWN_CACHE
