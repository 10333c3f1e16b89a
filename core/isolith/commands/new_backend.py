"""`isolith new-backend NAME`: a new vendor's repository, from nothing."""

import argparse
from pathlib import Path
from typing import Any

from isolith.commands.command import Command, entries
from isolith.new.repository import new_backend


def answer(options: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """The files written."""
    written = new_backend(options.name, Path())
    return {"name": options.name, "folder": f"isolith-{options.name}", "files": [str(path) for path in written]}


def text(answer: dict[str, Any]) -> str:  # Any: JSON
    """The files, and what to do next."""
    folder = answer["folder"]
    steps = [
        (f"pip install -e ./{folder}", "isolith finds it from then on: isolith status"),
        (f"cd {folder} && pytest", "its conformance run; nothing is claimed yet"),
        (f"{folder}/isolith_{answer['name']}/norm.py", "the place of the first kernel: isolith ops rms_norm"),
    ]
    return "\n".join([*(f"wrote {path}" for path in answer["files"]), "", "Next:", entries(steps, widest=40)])


COMMAND = Command(
    name="new-backend",
    summary="write a new vendor's repository into ./isolith-NAME",
    add_arguments=lambda parser: parser.add_argument(
        "name", metavar="NAME", help="the backend's name, which is its torch device type too"
    ),
    answer=answer,
    text=text,
)
