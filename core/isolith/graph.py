"""The operators as nodes of torch graphs: torch.library definitions for torch.compile and torch.export.

Only tracing enters here; an eager call goes from the operator to its kernel.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from isolith import dispatch
from isolith.operator import AnyOperator

library = torch.library.Library("isolith", "DEF")


def define(operators: Iterable[AnyOperator]) -> None:
    """Define every operator as `torch.ops.isolith.<name>`."""
    for operator in operators:
        schema = torch.library.infer_schema(operator.reference, mutates_args=operator.mutates)
        library.define(operator.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(operator.name, run(operator), "CompositeExplicitAutograd")
        library.impl(operator.name, trace(operator), "Meta")


def run(operator: AnyOperator) -> Callable[..., Any]:
    """What the node does when the graph runs."""
    return lambda *args, **kwargs: dispatch.call(operator, args, kwargs)


def trace(operator: AnyOperator) -> Callable[..., Any]:
    """What the node does while the graph is traced: the same check as an eager call, then empty outputs."""

    def traced(*args: Any, **kwargs: Any) -> Any:
        arguments = operator.arguments(*args, **kwargs)
        operator.validate(arguments)
        return operator.fake(**arguments)

    return traced
