"""`isolith new-op NAME --family FAMILY`: an operator's file, from nothing."""

import argparse
from pathlib import Path
from typing import Any

from isolith.commands.command import Command, entries
from isolith.new.operator_file import FAMILY_NAMES, new_operator


def answer(options: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """The file written, and the files that export it."""
    made, *changed = new_operator(options.name, options.family, Path())
    return {"name": options.name, "family": options.family, "file": str(made), "changed": [str(p) for p in changed]}


def text(answer: dict[str, Any]) -> str:  # Any: JSON
    """What was written, and what a new operator needs besides."""
    name, family = answer["name"], answer["family"]
    steps = [
        (answer["file"], "formula, edges and source; then each of the eight parts, which are those of a scaling now"),
        (
            f"conformance/tests/proof/mutants/{family}*.py",
            "references with one mistake each, which the judge must kill",
        ),
        (f"conformance/tests/proof/right/{family}*.py", "kernels that compute otherwise and are right"),
        ("conformance/isolith_conformance/bench/workloads*.py", "a model that calls it, at the shapes of its layers"),
        ("README.md", "python core/tests/test_readme.py writes the table with the operator's row"),
        ("CHANGELOG.md", "a line under Added"),
        ("./dev test", f"-k {name} for its own samples and errors alone"),
    ]
    written = [f"wrote {answer['file']}", *(f"exported it in {path}" for path in answer["changed"])]
    return "\n".join([*written, "", "Next:", entries(steps, widest=40)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`new-op NAME --family FAMILY`."""
    parser.add_argument("name", metavar="NAME", help="the operator's name, as its source calls it")
    parser.add_argument("--family", required=True, metavar="FAMILY", help=", ".join(FAMILY_NAMES))


COMMAND = Command(
    name="new-op",
    summary="write a new operator's file into this checkout of isolith, and export it",
    add_arguments=add_arguments,
    answer=answer,
    text=text,
)
