"""Calls of a vendor's functions, bound by what this installation really has: torch schemas or Python signatures.

A vendor's operators move between namespaces and gain arguments from one release to the next. So a call names the
functions that would do, in order, and the arguments that it passes; the first that is here and has them all is taken.
Everything is passed by keyword, and what equals the function's default is left out, so that an older function without
the argument serves as well. What is missing is a sentence, never a guess.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    """

    name: str
    call: Callable[..., Any]  # Any: the vendor's own signature
    defaults: Mapping[str, Any] | None


@dataclass(frozen=True)
class VendorCall:
    """A call that an adapter makes.

    Args:
        names: Functions that would do, in order: "namespace::operator" or "namespace::operator.overload" for a torch
            operator, "package.module:function" for a Python function. They mean the same by the arguments named.
        passes: The arguments that the adapter gives, or may give; all must exist.
    """

    names: tuple[str, ...]
    passes: tuple[str, ...]

    def missing(self) -> WhyNot:
        """Say what this installation lacks for the call, or None."""
        return None if self.found() else "; ".join(str(look_up(name, self.passes)) for name in self.names)

    def found(self) -> Function | None:
        """The first function that is here and has the arguments, or None."""
        looked_up = (look_up(name, self.passes) for name in self.names)
        return next((function for function in looked_up if isinstance(function, Function)), None)

    def __call__(self, **arguments: Any) -> Any:  # Any: the vendor's own signature
        """Call it by keyword, without what equals a default.

        Raises:
            Unsupported: where no function here has the arguments.
        """
        function = self.found()
        if function is None:
            raise Unsupported(str(self.missing()))
        defaults = function.defaults or {}
        needed = {name: v for name, v in arguments.items() if not same(v, defaults.get(name, NO_DEFAULT))}
        return function.call(**needed)


def same(value: Any, default: Any) -> bool:  # Any: whatever a schema allows
    """Whether a value is a default; a tensor is none."""
    if isinstance(value, torch.Tensor) or default is NO_DEFAULT:
        return False
    if isinstance(value, list | tuple) and isinstance(default, list | tuple):
        return len(value) == len(default) and all(map(same, value, default))
    return value is default or (type(value) in (bool, int, float, str) and bool(value == default))


def look_up(name: str, passes: tuple[str, ...]) -> Function | str:
    """The function of a name, or the sentence that says what it lacks."""
    function = found_operator(name) if "::" in name else found_function(name)
    if isinstance(function, str) or function.defaults is None:
        return function
    lacks = [argument for argument in passes if argument not in function.defaults]
    return f"{name} has no argument {', '.join(lacks)}" if lacks else function


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
    only_by_place = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if only_by_place:
        return f"{name} takes {', '.join(only_by_place)} by position alone"
    return Function(name, function, {parameter.name: parameter.default for parameter in parameters})
