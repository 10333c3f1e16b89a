"""`isolith table [REPORT …]`: the support table of the README, in Markdown.

A cell says what runs and how conformance reports say that it was shown to be right: hardware, interpreter, twin or
reference, with (quick) behind where samples were left out. Nothing is called supported that was not run: a kernel
without a report is "declared".
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from isolith import dispatch
from isolith.backend import Backend
from isolith.commands.command import Command
from isolith.errors import ConfigError
from isolith.operator import AnyOperator
from isolith.registry import Registry

Verdicts = dict[str, dict[str, Counter[str]]]
"""Verdicts by how they were found, by kernel."""
Proofs = dict[tuple[str, str], Verdicts]
"""Verdicts by (backend, operator)."""


def proofs(reports: Iterable[Path]) -> Proofs:
    """What conformance reports say; ConfigError for a file that is none."""
    found: Proofs = {}
    for path in reports:
        try:
            report = json.loads(path.read_text())
            quick = " (quick)" if report["run"]["scope"] == "quick" else ""
            for case in report["cases"]:
                by_kernel = found.setdefault((case["backend"], case["operator"]), {})
                by_how = by_kernel.setdefault(case["kernel"], {})
                by_how.setdefault(case["how"] + quick, Counter())[case["verdict"]] += 1
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is no conformance report: {error}.") from error
    return found


def proof(verdicts: Verdicts) -> str:
    """How it was shown to be right, or how many cases failed."""
    total: dict[str, Counter[str]] = {}
    for by_how in verdicts.values():
        for how, counted in by_how.items():
            total.setdefault(how, Counter()).update(counted)
    said = []
    for how, counted in total.items():
        failed = counted.total() - counted["PASS"] - counted["NOT-CLAIMED"]
        if failed:
            said.append(f"{failed} of {counted.total()} failed ({how})")
        elif counted["PASS"]:
            said.append(how)
    return " and ".join(said) or "declared"


def cell(registry: Registry, backend: Backend, operator: AnyOperator, found: Proofs) -> str:
    """What a backend offers for an operator, and how that was shown to be right."""
    kernels = [kernel.full_name for kernel in registry.kernels(backend, operator.name)]
    verdicts = found.get((backend.name, operator.name), {})
    if not kernels:
        return f"{'composition' if operator.composed_of else 'reference'}, {proof(verdicts)}"
    shown = proof({name: counted for name, counted in verdicts.items() if name in kernels})
    number = "kernel" if len(kernels) == 1 else f"{len(kernels)} kernels"
    without = [name for name in kernels if not any(counted["PASS"] for counted in verdicts.get(name, {}).values())]
    rest = f"; {len(without)} declared" if 0 < len(without) < len(kernels) else ""
    return f"{number}, {shown}{rest}"


def answer(options: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """Operators by backends."""
    registry, found = dispatch.dispatcher().registry, proofs(options.reports)
    return {
        "backends": [
            {"name": b.name, "available": registry.why_unavailable(b) is None, "reason": registry.why_unavailable(b)}
            for b in registry.backends
        ],
        "operators": {
            name: {b.name: cell(registry, b, operator, found) for b in registry.backends}
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
    summary="what each backend has for each operator and how it was shown to be right, in Markdown",
    add_arguments=lambda parser: parser.add_argument(
        "reports", nargs="*", type=Path, metavar="REPORT", help="conformance reports that say how it was shown"
    ),
    answer=answer,
    text=text,
)
