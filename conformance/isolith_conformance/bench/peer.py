"""What a peer is: another way to compute what an operator computes.

A peer says what it computes, since that is seldom the same to the last rule; its results are not judged. A peer is a
function of the call's arguments that gives the function to time, or None where it does not take this call.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Arguments = dict[str, Any]  # Any: an operator's arguments
Run = Callable[[], Any]  # Any: tensors
Prepare = Callable[[Arguments], Run | None]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One way.

    Args:
        operator: The operator that it is beside.
        name: Whose it is.
        computes: What it computes, where that differs from the operator.
        prepare: From the call's arguments the function to time; what it does beforehand is not timed.
        module: What must be installed.
    """

    operator: str
    name: str
    computes: str
    prepare: Prepare
    module: str = "torch"

    @property
    def installed(self) -> bool:
        """Whether its module is."""
        return importlib.util.find_spec(self.module) is not None


def floating(value: Any) -> bool:  # Any: an argument
    """Whether an argument is a tensor of floats that torch multiplies."""
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16, torch.float32)


def clamped(gate_up: Tensor, limit: float) -> Tensor:
    """The activation by torch's parts."""
    gate, up = gate_up.chunk(2, dim=-1)
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return functional.silu(gate) * up
