"""Launching: on a GPU, in Triton's interpreter, or, with tensors that have no memory, noting what would be launched.

Functions of this backend read no value of a tensor, so the same function that launches kernels on a GPU says on tensors
of the "meta" device which kernels, with which types and constants, it would launch. `build` compiles those, without a
GPU; and what runs there can be captured in a CUDA graph, since it neither waits for the device nor copies from it.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch that was noted: a kernel with its arguments in order, its constants and its options."""

    kernel: Any  # Any: triton.jit gives no type
    grid: tuple[int, ...]
    args: tuple[Any, ...]  # Any: tensors and numbers
    constants: dict[str, Any]  # Any: numbers, flags and dtypes
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True)
class Notes:
    """What was noted for one compute capability."""

    capability: int
    launches: list[Launch]


interpreting = threading.Lock()
"""Triton's interpreter keeps the number of the program that runs in a global."""
notes: ContextVar[Notes | None] = ContextVar("isolith_cuda_notes", default=None)
elsewhere: ContextVar[Mapping[str, Any] | None] = ContextVar("isolith_launch_options", default=None)
"""Options of a launch on a device that is no GPU, where another backend calls a kernel of this one."""


@contextmanager
def noting(capability: int) -> Iterator[list[Launch]]:
    """Collect the launches of a block as they would be on a GPU of a capability, such as 90."""
    noted = Notes(capability=capability, launches=[])
    token = notes.set(noted)
    try:
        yield noted.launches
    finally:
        notes.reset(token)


def capability(device: torch.device) -> int:
    """The compute capability to choose types and tiles for, such as 90; in the interpreter 90."""
    noted = notes.get()
    if noted is not None:
        return noted.capability
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(
    kernel: Any,  # Any: triton.jit gives no type
    grid: Sequence[int],
    *args: Tensor | float | None,
    warps: int = 4,
    stages: int = 3,
    **constants: Any,  # Any: numbers, flags and dtypes
) -> None:
    """Launch a kernel over a grid; an empty grid launches nothing.

    Args:
        kernel: What `triton.jit` made.
        grid: Programs along up to three axes; the second and third at most 65,535.
        args: Tensors and numbers, in the kernel's order.
        warps: Warps of 32 threads in a program.
        stages: Steps of a loop in flight.
        constants: The kernel's `tl.constexpr` parameters.
    """
    if 0 in grid:
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == "meta":
        noted = notes.get()
        if noted is not None:
            made = Launch(kernel=kernel, grid=tuple(grid), args=args, constants=constants, warps=warps, stages=stages)
            noted.launches.append(made)
        return
    # Contraction to fused multiply-adds is asked for, so that it does not depend on Triton's version.
    options = elsewhere.get() or {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    run: Callable[..., Any] = kernel[tuple(grid)]
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            run(*args, **constants, **options)
        return
    if device.type == "cpu":
        with interpreting:
            run(*args, **constants)
        return
    run(*args, **constants, **options)


def ceil_div(count: int, size: int) -> int:
    """How many pieces of a size cover a count."""
    return -(-count // size)


def power_of_two(count: int, least: int = 1, most: int = 1 << 30) -> int:
    """The smallest power of two that is not below a count, within bounds."""
    return min(max(1 << max(count - 1, 0).bit_length(), least), most)
