"""`isolith table`: the support table of the README, in Markdown.

A cell says what runs, and `how` that was shown to be right: hardware, interpreter, twin or reference. Nothing is called
supported that was not run: without a conformance report a kernel is "declared".
"""

import argparse
from typing import Any

from isolith import dispatch
from isolith.backend import Backend
from isolith.commands.command import Command
from isolith.operator import AnyOperator
from isolith.registry import Registry


def cell(registry: Registry, backend: Backend, operator: AnyOperator) -> str:
    """What a backend offers for an operator."""
    kernels = registry.kernels(backend, operator.name)
    if kernels:
        return "kernel" if len(kernels) == 1 else f"{len(kernels)} kernels"
    return "composition" if operator.composed_of else "reference"


def answer(options: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """Operators by backends."""
    registry = dispatch.dispatcher().registry
    return {
        "backends": [
            {"name": b.name, "available": registry.why_unavailable(b) is None, "reason": registry.why_unavailable(b)}
            for b in registry.backends
        ],
        "operators": {
            name: {b.name: cell(registry, b, operator) for b in registry.backends}
            for name, operator in registry.operators.items()
        },
    }


def text(answer: dict[str, Any]) -> str:  # Any: JSON
    """Markdown."""
    names = [backend["name"] for backend in answer["backends"]]
    lines = [f"| operator | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [f"| {name} | {' | '.join(cells[b] for b in names)} |" for name, cells in answer["operators"].items()]
    return "\n".join(lines)


COMMAND = Command(
    name="table",
    summary="what each backend has for each operator, in Markdown",
    add_arguments=lambda _: None,
    answer=answer,
    text=text,
)
