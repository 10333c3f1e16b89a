"""Legal variants of operators with many arguments: written over all of them by name, called like the reference."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

Given = dict[str, Any]  # Any: an operator's arguments, by name


def variant_of(reference: Callable[P, R]) -> Callable[[Callable[[Given], R]], Callable[P, R]]:
    """Turn a function of a dictionary of all arguments, which is its own, into one with the reference's signature."""
    signature = inspect.signature(reference)

    def mark(variant: Callable[[Given], R]) -> Callable[P, R]:
        @functools.wraps(variant)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return variant(bound.arguments)

        call.__signature__ = signature  # type: ignore[attr-defined]  # read by inspect alone
        return call

    return mark
