"""What a command is, and how its lines are laid out."""

import argparse
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

NARROW, WIDE = 40, 100


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command: its answer is plain data for JSON, and `text` renders that data."""

    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], object]
    answer: Callable[[argparse.Namespace], Any]  # Any: JSON
    text: Callable[[Any], str]


def width() -> int:
    """Columns to fill: the terminal's, within reason."""
    return min(max(shutil.get_terminal_size().columns, NARROW), WIDE)


def entry(name: str, text: str, name_width: int, indent: int = 2) -> str:
    """`name  text`, the text wrapped in a column of its own."""
    head = f"{'':{indent}}{name:{name_width}}  "
    if len(name) > name_width:
        head = f"{'':{indent}}{name}\n{'':{indent + name_width + 2}}"
    body = textwrap.fill(
        text, width(), initial_indent="-" * (indent + name_width + 2), subsequent_indent=" " * (indent + name_width + 2)
    )
    return head + body[indent + name_width + 2 :]


def entries(rows: Sequence[tuple[str, str]], indent: int = 2, widest: int = 24) -> str:
    """Names and texts in two columns."""
    name_width = min(max((len(name) for name, _ in rows), default=0), widest)
    return "\n".join(entry(name, text, name_width, indent) for name, text in rows)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns, the first flush left and the others flush right; the first row is the heading."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if place == 0 else cell.rjust(w)
            for place, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
