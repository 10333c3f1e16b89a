"""`isolith bisect MODULE:CALLABLE [--check MODULE:CALLABLE]`: the kernels that make the difference."""

import argparse
import importlib
import sys
from collections.abc import Callable
from textwrap import fill
from typing import Any

from isolith.bisect import bisect
from isolith.commands.command import Command, width
from isolith.errors import ConfigError, nearest
from isolith.plugins import whole_reason


def find(text: str) -> Callable[..., Any]:  # Any: a user's own signature
    """The callable that MODULE:CALLABLE names; modules of the folder that one stands in are found too."""
    module, colon, name = text.partition(":")
    if not module or not colon or not name:
        raise ConfigError(f"bisect: a callable is written MODULE:CALLABLE; got {text!r}.")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise ConfigError(f"bisect: {module} cannot be imported: {whole_reason(error)}.") from error
    for part in name.split("."):
        if not hasattr(found, part):
            public = [word for word in vars(found) if not word.startswith("_")] if hasattr(found, "__dict__") else []
            raise ConfigError(f"bisect: {module} has no {name!r}; {nearest(name, public)}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"bisect: {text} is no callable; got {type(found).__name__}.")
    run: Callable[..., Any] = found
    return run


def answer(options: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """Run the bisection, telling of every run on standard error."""
    run = find(options.run)
    check = find(options.check) if options.check else None
    made = bisect(run, check, tell=lambda line: print(line, file=sys.stderr, flush=True))
    return {**made.as_dict(), "text": str(made)}


def text(answer: dict[str, Any]) -> str:  # Any: JSON
    """For people."""
    return "\n".join(fill(line, width(), subsequent_indent="    ") for line in answer["text"].splitlines())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`bisect MODULE:CALLABLE [--check MODULE:CALLABLE]`."""
    parser.add_argument(
        "run",
        metavar="MODULE:CALLABLE",
        help="runs what is wrong; without --check it returns False or raises where it is wrong",
    )
    parser.add_argument(
        "--check",
        metavar="MODULE:CALLABLE",
        help="gets what the first returns; returns False or raises where that is wrong",
    )


COMMAND = Command(
    name="bisect",
    summary="the kernels that make the difference between a wrong result and a right one",
    add_arguments=add_arguments,
    answer=answer,
    text=text,
)
