"""Every operator, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from isolith import graph
from isolith.operator import AnyOperator, Operator
from isolith.ops import attention, moe, norm, quant, residual, rotary

FAMILIES = (norm, residual, rotary, moe, attention, quant)

OPERATORS: Mapping[str, AnyOperator] = MappingProxyType(
    {
        value.name: value
        for family in FAMILIES
        for _, value in sorted(vars(family).items())
        if isinstance(value, Operator) and value.family == family.__name__.rpartition(".")[2]
    }
)

graph.define(OPERATORS.values())
