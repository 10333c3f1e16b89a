"""A new operator: its file with its eight parts, and the lines that export it."""

import ast
import keyword
import re
from pathlib import Path

import isolith
from isolith import plugins
from isolith.errors import ConfigError, nearest
from isolith.new.templates import filled
from isolith.ops import FAMILIES

FAMILY_NAMES = tuple(family.__name__.rpartition(".")[2] for family in FAMILIES)
LONGEST_LINE = 120


def new_operator(name: str, family: str, checkout: Path) -> tuple[Path, ...]:
    """Write an operator's file into a checkout of isolith and export it; gives the files written, the new one first.

    Raises:
        ConfigError: for a name that is illegal or taken, an unknown family, or a folder that is no checkout; nothing is
            written.
    """
    check_name(name, family)
    package = checkout / "core" / "isolith"
    folder = package / "ops" / family
    if not (folder / "__init__.py").is_file():
        raise ConfigError(f"new-op: {folder} is not here; run it in the folder of isolith's repository.")
    if (folder / f"{name}.py").exists():
        raise ConfigError(f"new-op: {folder / name}.py exists; nothing was written.")
    texts = {
        folder / f"{name}.py": filled("operator", "operator.py", name=name),
        folder / "__init__.py": exported_by_family((folder / "__init__.py").read_text(), name, family),
        package / "__init__.py": exported_by_isolith((package / "__init__.py").read_text(), name, family),
    }
    for path, text in texts.items():
        path.write_text(text)
    return tuple(texts)


def check_name(name: str, family: str) -> None:
    """Raise ConfigError for a name that no operator can have, or a family that there is not."""
    if family not in FAMILY_NAMES:
        raise ConfigError(f"new-op: there is no family {family!r}; {nearest(family, FAMILY_NAMES)}")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise ConfigError(
            f"new-op: a name has lower-case letters and digits, with single _ between them; got {name!r}."
        )
    if name in isolith.OPERATORS:
        raise ConfigError(f"new-op: there is an operator {name} already.")
    if hasattr(isolith, name):
        raise ConfigError(f"new-op: isolith.{name} is something else; choose another name.")
    if any(row.name == name for row in plugins.discover()):
        raise ConfigError(f"new-op: {name} is the name of a backend.")


def exported_by_family(source: str, name: str, family: str) -> str:
    """The family's __init__.py with the operator's line, in order."""
    head, _, imports = source.partition("\n\n")
    lines = [*imports.splitlines(), f"from isolith.ops.{family}.{name} import {name} as {name}"]
    return "\n".join([head, "", *sorted(lines)]) + "\n"


def exported_by_isolith(source: str, name: str, family: str) -> str:
    """isolith's __init__.py with the operator among the family's imports and in __all__, in order."""
    lines, tree = source.splitlines(), ast.parse(source)
    module = f"isolith.ops.{family}"
    names = next(node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == module)
    public = next(
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    # From the end, so that line numbers stay right.
    exported = [*ast.literal_eval(public.value), name]
    # Constants first, then classes, then functions: the linter's order.
    exported.sort(key=lambda word: (not word.isupper(), word[0].islower(), word))
    replace_lines(lines, public, ["__all__ = [", *(f'    "{word}",' for word in exported), "]"])
    replace_lines(lines, names, import_of(module, sorted([*(alias.name for alias in names.names), name])))
    return "\n".join(lines) + "\n"


def import_of(module: str, names: list[str]) -> list[str]:
    """An import on one line, or on one a name where that is too long."""
    line = f"from {module} import {', '.join(names)}"
    return [line] if len(line) <= LONGEST_LINE else [f"from {module} import (", *(f"    {n}," for n in names), ")"]


def replace_lines(lines: list[str], node: ast.stmt, new: list[str]) -> None:
    """Put lines where a statement was."""
    assert node.end_lineno is not None, "it was parsed"
    lines[node.lineno - 1 : node.end_lineno] = new
