"""The command line: `python -m isolith`, or `isolith`."""

import argparse
import json
import sys
from collections.abc import Sequence

from isolith import __version__
from isolith.commands import COMMANDS
from isolith.errors import IsolithError


def parser() -> argparse.ArgumentParser:
    """Every command with its arguments."""
    top = argparse.ArgumentParser(prog="isolith", description="One set of MoE and hybrid-attention operators.")
    top.add_argument("--version", action="version", version=f"isolith {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        one = commands.add_parser(name, help=command.summary, description=command.summary)
        one.add_argument("--json", action="store_true", help="print JSON for programs")
        command.add_arguments(one)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 2 for a user's mistake, which gets one sentence and no traceback."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = parser().parse_args(arguments or ["status"])
    if options.command is None:
        options = parser().parse_args(["status", *arguments])
    command = COMMANDS[options.command]
    try:
        answer = command.answer(options)
    except IsolithError as error:
        print(f"isolith: {error}", file=sys.stderr)
        return 2
    try:
        print(json.dumps(answer, indent=2) if options.json else command.text(answer))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
