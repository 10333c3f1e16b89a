"""The legal family of a composition: all its parts in their i-th legal rounding."""

import functools
from collections.abc import Callable
from typing import Any

from isolith.config import Settings
from isolith.dispatch import Dispatcher, dispatcher, using
from isolith.operator import AnyOperator
from isolith.registry import Registry
from isolith.select import Explanation

Function = Callable[..., Any]  # Any: an operator's own signature


class Variants(Dispatcher):
    """A dispatcher that runs the variant at one place of every operator, counted around where there are fewer."""

    def __init__(self, registry: Registry, settings: Settings, place: int) -> None:
        super().__init__(registry, settings)
        self.place = place

    def function(self, operator: AnyOperator, explanation: Explanation) -> Function:  # noqa: ARG002  # as a Dispatcher
        """The variant; the reference of an operator that has none."""
        if not operator.variants:
            return operator.reference
        return operator.variants[self.place % len(operator.variants)]


def in_variants(composition: Function, count: int) -> tuple[Function, ...]:
    """A composition's variants, as functions with its signature."""
    return tuple(in_variant(composition, place) for place in range(count))


def in_variant(composition: Function, place: int) -> Function:
    """The composition with its parts in the variant at one place."""

    @functools.wraps(composition)
    def variant(*args: Any, **kwargs: Any) -> Any:  # Any: the composition's own signature
        active = dispatcher()
        with using(Variants(active.registry, active.settings, place)):
            return composition(*args, **kwargs)

    return variant
