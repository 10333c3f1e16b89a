"""A few tokens of a large call, as a call of their own: what the reference can do where the whole would take too long.

A token's results depend on its own rows and on its sequence's caches, which hold this step's tokens before the call;
so a token is a sequence of one token at its position. Where that does not hold, tokens do not lead all outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isolith.numerics.ragged import positions_of_tokens
from isolith.operator import AnyOperator

Arguments = Mapping[str, Any]  # Any: an operator's arguments

FEW = 4
"""Tokens of a part."""
LED = ("tokens", "*")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some tokens of a call."""

    arguments: dict[str, Any]  # Any: an operator's arguments
    places: Tensor
    tokens: int

    def of(self, results: list[Tensor]) -> list[Tensor]:
        """Their share of the whole call's results."""
        return [result[self.places.to(result.device)] for result in results]


def part_of(operator: AnyOperator, arguments: Arguments) -> Part | None:
    """A few tokens spread over a call; None where it has not more, or where they are not by themselves."""
    shapes = operator.parsed_shapes
    if operator.mutates or not all(shape.axes[:1] == ("tokens",) for shape in shapes.outputs):
        return None
    led = [shape.name for shape in shapes.inputs if shape.axes[:1] == ("tokens",)]
    sizes = [len(arguments[name]) for name in led if arguments.get(name) is not None]
    if not sizes or sizes[0] <= FEW:
        return None
    tokens = sizes[0]
    places = torch.linspace(0, tokens - 1, FEW).long()
    given = dict(arguments)
    for shape in shapes.inputs:
        value = arguments[shape.name]
        if isinstance(value, Tensor) and shape.axes[:1] and shape.axes[0] in LED and len(value) == tokens:
            given[shape.name] = value[places.to(value.device)]
    if arguments.get("cu_seqlens") is not None:
        given |= alone(operator, arguments, places)
    return Part(arguments=given, places=places, tokens=tokens)


def alone(operator: AnyOperator, arguments: Arguments, places: Tensor) -> dict[str, Tensor]:
    """The tokens' sequences: what a batch of one token each has for them."""
    bounds = arguments["cu_seqlens"]
    start = arguments.get("start_pos")
    begun = torch.zeros_like(bounds[:-1]) if start is None else start
    sequence, position = positions_of_tokens(bounds, begun, int(bounds[-1]))
    rows, at = sequence[places.to(sequence.device)], position[places.to(position.device)]
    made = {"cu_seqlens": torch.arange(len(places) + 1, dtype=bounds.dtype, device=bounds.device)}
    for shape in operator.parsed_shapes.inputs:
        value = arguments[shape.name]
        if isinstance(value, Tensor) and shape.axes[:1] == ("sequences",):
            made[shape.name] = value[rows]
    return made if start is None else made | {"start_pos": at.to(start.dtype)}
