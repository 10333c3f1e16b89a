"""How many bytes a call needs, and how many there are; a request beyond that is refused before anything is made."""

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isolith_conformance.bench.clock import Clock
from isolith_conformance.bench.fill import Fill
from isolith_conformance.bench.record import BenchError
from isolith_conformance.bench.workloads import Setting, Workload, workloads
from isolith_conformance.execute import leaves

MARGIN = 0.9
"""Of the free memory, for a call's own use."""


def bytes_needed(workload: Workload) -> int:
    """Bytes of a call: arguments, copies of what it writes in place, two sets of results, and room to work in."""
    operator = workload.operator
    given = operator.arguments(**workload.make(Fill("meta")))
    outputs = leaves(operator.fake(**given))
    mutated = [given[name] for name in operator.mutates]
    arguments = [value for value in given.values() if isinstance(value, Tensor)]
    room = max((matrix_in_float32(tensor) for tensor in arguments), default=0)
    return room + sum(int(tensor.nbytes) for tensor in (*arguments, *mutated, *mutated, *outputs, *outputs))


def matrix_in_float32(tensor: Tensor) -> int:
    """Bytes that a reference takes to widen one matrix of a tensor; of codes it widens values, scales, and product."""
    if tensor.dim() < 2 or not tensor.numel() or tensor.itemsize > 2:
        return 0
    elements: int = tensor.shape[-2] * tensor.shape[-1] * (2 if tensor.dtype == torch.uint8 else 1)
    each = 3 * 4 if tensor.itemsize == 1 else 4
    return elements * each


def check_memory(setting: Setting, chosen: Iterable[Workload], free: int) -> None:
    """Refuse a setting of which a call needs more than is free.

    Raises:
        BenchError: with the bytes and the option that lowers them.
    """
    for one in chosen:
        needed = bytes_needed(one)
        if needed > MARGIN * free:
            raise BenchError(
                f"bench: {one.operator.name} ({one.label}) at context {setting.context} needs {needed:,} bytes, and "
                f"{int(MARGIN * free):,} are free; {way_out(setting, one, needed)}"
            )


def way_out(setting: Setting, one: Workload, needed: int) -> str:
    """The option that lowers the need the most."""
    smaller = {
        "--experts": replace(setting, experts=max(setting.experts // 2, least_experts(setting))),
        "--tokens": replace(setting, tokens=max(setting.tokens // 2, 1)),
        "--context": replace(setting, context=max(setting.context // 2, setting.new)),
    }
    found = {
        option: bytes_needed(same)
        for option, less in smaller.items()
        if less != setting and (same := the_same(one, less)) is not None
    }
    option = min(found, key=lambda name: found[name], default="")
    if not option or found[option] >= needed:
        return "no option lowers that: leave the operator out with --op."
    return f"{option} lowers that."


def the_same(one: Workload, setting: Setting) -> Workload | None:
    """The same call in another setting; its label may tell a number that has changed."""
    rows = [row for row in workloads(setting) if row.operator is one.operator]
    by_label = [row for row in rows if row.label == one.label]
    return next(iter(by_label or rows), None)


def least_experts(setting: Setting) -> int:
    """The fewest experts with which every call of the model is legal."""
    from isolith.models import V4
    from isolith_conformance.bench.workloads import GROUPS, TOPK_GROUPS

    k = setting.model.experts_per_token
    return k if isinstance(setting.model, V4) else GROUPS * -(-k // TOPK_GROUPS)


def peak_extra(clock: Clock, call: Callable[[], Any]) -> int | None:  # Any: what an operator returns
    """Bytes that a call takes at its peak, its results among them; None where the machine cannot say."""
    if clock.module is not None:
        if not hasattr(clock.module, "max_memory_allocated"):
            return None
        clock.synchronise()
        clock.module.reset_peak_memory_stats()
        before = clock.module.memory_allocated()
        call()
        clock.synchronise()
        return int(clock.module.max_memory_allocated() - before)
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = resident("VmRSS")
        call()
        return max(resident("VmHWM") - before, 0)
    except (OSError, AttributeError):
        return None


def resident(field: str) -> int:
    """A figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))
