"""Faster libraries, taken where they are installed and have what an adapter calls; none is imported before."""

import importlib
import inspect
import re
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from isolith import WhyNot


@cache
def attempt(name: str) -> ModuleType | str:
    """Import a library; the sentence that says why it cannot be used where that fails."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name.partition(".")[0]:
            return f"{error.name} is not installed"
        return f"importing {name} failed: {error}"
    except (ImportError, OSError, AssertionError, RuntimeError) as error:  # what they raise without nvcc or a driver
        return f"importing {name} failed: {type(error).__name__}: {error}"


def library(name: str) -> Any:  # Any: libraries without types
    """The library, for a kernel that requires it."""
    return attempt(name)


def lacks(name: str, function: str, *parameters: str) -> WhyNot:
    """Why a library does not serve: it is not there, or its function has not these parameters.

    Versions say little: these libraries change calls without renaming them, and some forks count otherwise.
    """
    module = attempt(name)
    if isinstance(module, str):
        return module
    found = getattr(module, function, None)
    if found is None:
        return f"{name} has no {function}"
    known = parameters_of(found)
    if known is None:
        return f"{name}.{function} does not tell its parameters"
    missing = [parameter for parameter in parameters if parameter not in known]
    return f"{name}.{function} does not take {', '.join(missing)}" if missing else None


def parameters_of(function: Callable[..., Any]) -> tuple[str, ...] | None:  # Any: libraries without types
    """The names of a function's parameters; None where it does not tell them.

    What pybind11 makes has no signature to inspect. It writes one into the first line of the docstring.
    """
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        line = (function.__doc__ or "").partition("\n")[0]
        return tuple(re.findall(r"(?<=[(\s])(\w+): ", line)) if "(" in line else None
