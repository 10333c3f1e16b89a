"""What the machine's devices call themselves."""

import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from isolith.simulated import is_simulated


@cache
def device_name(device_type: str) -> str:
    """What the first device of a type calls itself; the host goes by its processor."""
    if is_simulated(torch.device(device_type)):
        return f"a simulated {device_type}"
    if device_type == "cpu":
        return processor()
    named: Callable[[], str] | None = getattr(torch.get_device_module(device_type), "get_device_name", None)
    return str(named()) if named else device_type


def processor() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
