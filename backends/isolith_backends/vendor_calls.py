"""Calls of a vendor's functions, bound by what this installation really has: torch schemas or Python signatures.

A vendor's operators move between namespaces and gain arguments from one release to the next. So a call names the
functions that would do, in order, and the arguments that it passes; the first that is here and has them all is taken.
Everything is passed by keyword, and what equals the function's default is left out, so that an older function without
the argument serves as well. What is missing is a sentence, never a guess. A Python function whose names are not public,
but whose calls are, is called as they do: its first arguments by place, the others by keyword.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from isolith import WhyNot
from isolith.errors import Unsupported

NO_DEFAULT = inspect.Parameter.empty
"""Stands in a table of defaults for an argument that must be given."""

KERNEL_KEYS = ("PrivateUse1", "AutogradPrivateUse1", "CompositeExplicitAutograd", "CompositeImplicitAutograd")
"""Where a kernel of an operator may be registered for a device that is not torch's own."""


@dataclass(frozen=True)
class Function:
    """A vendor's function as it is here.

    Args:
        name: As it was asked for.
        call: What is called.
        defaults: Every argument with its default, or NO_DEFAULT; None where the function takes any.
        places: Arguments that may be given by place, in their order.
        only_by_place: How many of these have no other way.
        placed: How many are given by place.
    """

    name: str
    call: Callable[..., Any]  # Any: the vendor's own signature
    defaults: Mapping[str, Any] | None
    places: tuple[str, ...] = ()
    only_by_place: int = 0
    placed: int = 0


@dataclass(frozen=True)
class VendorCall:
    """A call that an adapter makes.

    Args:
        names: Functions that would do, in order: "namespace::operator" or "namespace::operator.overload" for a torch
            operator, "package.module:function" for a Python function. They mean the same by the arguments named.
        passes: The arguments that the adapter gives, or may give; all must exist.
        by_place: Those that are given by place, in this order, where `by_place_here` allows it and the function does
            not take them by keyword. The adapter gives them all.
        by_place_here: Whether this installation is one whose calls by place are known.
    """

    names: tuple[str, ...]
    passes: tuple[str, ...]
    by_place: tuple[str, ...] = ()
    by_place_here: Callable[[], bool] | None = None

    def missing(self) -> WhyNot:
        """Say what this installation lacks for the call, or None."""
        forms = self.forms()
        return None if self.found() else "; ".join(str(form) for form in forms[-len(self.names) :])

    def found(self) -> Function | None:
        """The first function that is here and has the arguments, or None."""
        return next((form for form in self.forms() if isinstance(form, Function)), None)

    def forms(self) -> list[Function | str]:
        """Every name's function by keyword, then by place where that is known here; or what it lacks."""
        ways: list[tuple[str, ...]] = [()]
        if self.by_place and self.by_place_here and self.by_place_here():
            ways.append(self.by_place)
        return [look_up(name, self.passes, by_place) for by_place in ways for name in self.names]

    def __call__(self, **arguments: Any) -> Any:  # Any: the vendor's own signature
        """Call it by keyword, without what equals a default; or by place, as described above.

        Raises:
            Unsupported: where no function here has the arguments.
        """
        function = self.found()
        if function is None:
            raise Unsupported(str(self.missing()))
        defaults = function.defaults or {}
        placed = [arguments.pop(name) for name in self.by_place[: function.placed]]
        needed = {name: v for name, v in arguments.items() if not same(v, defaults.get(name, NO_DEFAULT))}
        return function.call(*placed, **needed)


def first_missing(*calls: VendorCall) -> WhyNot:
    """What this installation lacks for the first of several calls that it cannot make, or None."""
    return next((reason for call in calls if (reason := call.missing())), None)


def same(value: Any, default: Any) -> bool:  # Any: whatever a schema allows
    """Whether a value is a default; a tensor is none."""
    if isinstance(value, torch.Tensor) or default is NO_DEFAULT:
        return False
    if isinstance(value, list | tuple) and isinstance(default, list | tuple):
        return len(value) == len(default) and all(map(same, value, default))
    return value is default or (type(value) in (bool, int, float, str) and bool(value == default))


def look_up(name: str, passes: tuple[str, ...], by_place: tuple[str, ...] = ()) -> Function | str:
    """The function of a name, or the sentence that says what it lacks."""
    function = found_operator(name) if "::" in name else found_function(name)
    if isinstance(function, str) or function.defaults is None:
        return function
    if len(by_place) < function.only_by_place:
        return f"{name} takes {', '.join(function.places[: function.only_by_place])} by position alone"
    if len(by_place) > len(function.places):
        return f"{name} takes {len(function.places)} arguments by position, not {len(by_place)}"
    by_keyword = list(function.defaults)[len(by_place) :]
    lacks = [argument for argument in passes if argument not in by_place and argument not in by_keyword]
    return f"{name} has no argument {', '.join(lacks)}" if lacks else replace(function, placed=len(by_place))


def found_operator(name: str) -> Function | str:
    """A torch operator that is registered and has a kernel for the vendor's device."""
    if not torch._C._dispatch_has_kernel(full_name(name)):
        return f"{name} is not registered"
    return bound_operator(name)


def full_name(name: str) -> str:
    """The name as the dispatcher has it, with an empty overload left out."""
    return name.removesuffix(".default")


@functools.cache
def operator_function(name: str) -> Function:
    """The operator with its defaults; its schema does not change while it is registered."""
    namespace, _, packet = full_name(name).partition("::")
    packet, _, overload = packet.partition(".")
    operator = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    defaults = {a.name: a.default_value if a.has_default_value() else NO_DEFAULT for a in operator._schema.arguments}
    return Function(name, operator, defaults)


def bound_operator(name: str) -> Function | str:
    """The operator, or that it has a schema without a kernel, as an extension built for another chip leaves it."""
    if any(torch._C._dispatch_has_kernel_for_dispatch_key(full_name(name), key) for key in KERNEL_KEYS):
        return operator_function(name)
    return f"{name} has no kernel for this device"


def found_function(name: str) -> Function | str:
    """A Python function of a module that can be imported."""
    module_name, _, attribute = name.partition(":")
    try:
        module = sys.modules.get(module_name) or importlib.import_module(module_name)
    except ImportError as error:
        return f"{module_name} does not import: {error}"
    function = getattr(module, attribute, None)
    if function is None:
        return f"{module_name} has no {attribute}"
    return described(name, function)


@functools.cache
def described(name: str, function: Callable[..., Any]) -> Function | str:  # Any: the vendor's own signature
    """A Python function with its defaults, or that it does not tell them."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return f"{name} has no signature that Python can read"
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return Function(name, function, None)
    places = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    only_by_place = sum(p.kind is p.POSITIONAL_ONLY for p in parameters)
    return Function(name, function, {p.name: p.default for p in parameters}, places, only_by_place)
