"""`isolith table [REPORT …]`: the support table of the README, in Markdown.

A cell says what runs and how conformance reports say that it was shown to be right: hardware, interpreter, twin or
reference. Nothing is called supported that was not run: without a report a cell says "declared".
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

Proofs = dict[tuple[str, str], dict[str, Counter[str]]]
"""Verdicts by how they were found, by (backend, operator)."""


def proofs(reports: Iterable[Path]) -> Proofs:
    """What conformance reports say; ConfigError for a file that is none."""
    found: Proofs = {}
    for path in reports:
        try:
            cases = json.loads(path.read_text())["cases"]
            for case in cases:
                by_how = found.setdefault((case["backend"], case["operator"]), {})
                by_how.setdefault(case["how"], Counter())[case["verdict"]] += 1
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is no conformance report: {error}.") from error
    return found


def proof(verdicts: dict[str, Counter[str]]) -> str:
    """How it was shown to be right, or how many cases failed."""
    said = []
    for how, counted in verdicts.items():
        failed = counted.total() - counted["PASS"] - counted["NOT-CLAIMED"]
        if failed:
            said.append(f"{failed} of {counted.total()} failed ({how})")
        elif counted["PASS"]:
            said.append(how)
    return " and ".join(said) or "declared"


def cell(registry: Registry, backend: Backend, operator: AnyOperator, found: Proofs) -> str:
    """What a backend offers for an operator, and how that was shown to be right."""
    kernels = registry.kernels(backend, operator.name)
    shown = proof(found.get((backend.name, operator.name), {}))
    if kernels:
        return f"{'kernel' if len(kernels) == 1 else f'{len(kernels)} kernels'}, {shown}"
    return f"{'composition' if operator.composed_of else 'reference'}, {shown}"


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
