"""`isolith ops`: the operators, their contracts, and who implements them."""

import argparse
from typing import Any

from isolith import dispatch
from isolith.commands.command import Command, entries
from isolith.dtypes import dtype_name
from isolith.errors import ConfigError, nearest
from isolith.operator import AnyOperator


def find(name: str) -> AnyOperator:
    """The operator of that name; ConfigError names the nearest."""
    operators = dispatch.dispatcher().registry.operators
    if name not in operators:
        raise ConfigError(f"there is no operator {name!r}; {nearest(name, operators)}")
    return operators[name]


def implementers(name: str) -> list[str]:
    """Kernels of an operator, by backend, whether or not they can run here."""
    registry = dispatch.dispatcher().registry
    return [kernel.full_name for backend in registry.backends for kernel in registry.kernels(backend, name)]


def row(operator: AnyOperator) -> dict[str, Any]:  # Any: JSON
    """An operator's contract as data."""
    return {
        "name": operator.name,
        "family": operator.family,
        "signature": str(operator.signature),
        "shapes": operator.shapes,
        "dtypes": {name: [dtype_name(dtype) for dtype in dtypes] for name, dtypes in operator.dtypes.items()},
        "mutates": list(operator.mutates),
        "composed_of": list(operator.composed_of),
        "kernels": implementers(operator.name),
        "doc": operator.doc,
    }


def answer(options: argparse.Namespace) -> list[dict[str, Any]]:  # Any: JSON
    """One operator, or all."""
    operators = dispatch.dispatcher().registry.operators
    return [row(find(options.operator))] if options.operator else [row(operator) for operator in operators.values()]


def text(rows: list[dict[str, Any]]) -> str:  # Any: JSON
    """A line each; the whole contract of a single one."""
    if len(rows) == 1:
        return one(rows[0])
    lines = []
    for family in dict.fromkeys(row["family"] for row in rows):
        mine = [(row["name"], brief(row)) for row in rows if row["family"] == family]
        lines += [family, entries(mine), ""]
    return "\n".join([*lines, "isolith ops NAME prints an operator's whole contract."])


def brief(row: dict[str, Any]) -> str:  # Any: JSON
    """What it does, and who has a kernel."""
    summary: str = row["doc"].split("\n\n")[0].replace("\n", " ")
    kernels = f" [{', '.join(row['kernels'])}]" if row["kernels"] else ""
    return summary + kernels


def one(row: dict[str, Any]) -> str:  # Any: JSON
    """The whole contract."""
    facts = [("signature", row["signature"].replace("torch.Tensor", "Tensor")), ("shapes", row["shapes"])]
    facts += [(f"{name} is", ", ".join(dtypes)) for name, dtypes in row["dtypes"].items()]
    facts += [("writes", ", ".join(row["mutates"]))] if row["mutates"] else []
    facts += [("composed of", ", ".join(row["composed_of"]))] if row["composed_of"] else []
    facts.append(("kernels", ", ".join(row["kernels"]) or "none; the reference runs"))
    return f"{row['name']}\n\n{row['doc']}\n\n{entries(facts, indent=0)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`ops [NAME]`."""
    parser.add_argument("operator", nargs="?", metavar="NAME", help="print this operator's whole contract")


COMMAND = Command(
    name="ops",
    summary="the operators, their contracts, and who implements them",
    add_arguments=add_arguments,
    answer=answer,
    text=text,
)
