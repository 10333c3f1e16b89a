"""Whether the host has room for a call's results: a request beyond that is refused before anything is allocated.

Linux promises memory that it does not have, and ends the process that writes it. Devices have allocators that refuse.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from isolith.errors import OutOfMemoryError

if TYPE_CHECKING:
    from isolith.operator import AnyOperator

WORTH_ASKING = 2**28
"""Bytes of results from which on the host is asked; below, asking would cost more than it is worth."""


def check_room(operator: "AnyOperator", arguments: Mapping[str, Any], device: str) -> None:  # Any: a call's own values
    """Refuse a call on the host whose results do not fit into what is free.

    Raises:
        OutOfMemoryError: with both numbers of bytes, and what lowers the need.
    """
    if device != "cpu" or (needed := operator.cost(**arguments).bytes_written) < WORTH_ASKING:
        return
    if needed > (free := bytes_free(device)):
        ways = " or ".join(ways_out(operator, arguments, needed)) or "no argument"
        raise OutOfMemoryError(
            f"{operator.name}: results take {needed:,} bytes, and {free:,} are free on the host; {ways} lowers that."
        )


def ways_out(operator: "AnyOperator", arguments: Mapping[str, Any], needed: int) -> Iterator[str]:
    """The arguments of which less takes less memory: whole numbers by half, then the first axis of the results."""
    for name, value in arguments.items():
        if type(value) is int and value > 1:
            try:
                less = operator.cost(**{**arguments, name: value // 2}).bytes_written
            except (ArithmeticError, RuntimeError, ValueError):  # half of it is no legal value
                continue
            if less < needed:
                yield f"a smaller {name}"
    axes = {shape.axes[0] for shape in operator.parsed_shapes.outputs if shape.axes and shape.axes[0].isidentifier()}
    yield from (f"a call with fewer {axis}" for axis in sorted(axes & {"tokens", "rows", "pairs"}))


def bytes_free(device: str) -> int:
    """Bytes that a device has left; on the host what the machine or its control group can give."""
    if device != "cpu":
        return int(torch.get_device_module(device).mem_get_info()[0])
    known = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        known = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")] or known
        known += list(control_group_bytes())
    except (OSError, ValueError):
        pass
    return min(known)


def control_group_bytes() -> Iterator[int]:
    """What a control group leaves of the machine."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        most, now = (Path("/sys/fs/cgroup") / name for name in (limit, used))
        if most.is_file() and now.is_file() and (text := most.read_text().strip()).isdigit():
            yield int(text) - int(now.read_text())
