"""`isolith why OP`: every candidate for a call, and why it is or is not taken."""

import argparse
import ast
import inspect
import re
from typing import Any

import torch

from isolith import dispatch
from isolith.commands.command import Command, entries
from isolith.commands.ops import find
from isolith.dtypes import dtype_name
from isolith.errors import ConfigError, nearest
from isolith.operator import AnyOperator
from isolith.sample import Make


def example(operator: AnyOperator) -> dict[str, Any]:  # Any: a call's own values
    """The arguments of the operator's first sample at a model's shapes, else of its first sample, on no device."""
    made = list(operator.samples(Make(operator.sample_dtypes[0])))
    chosen = next((sample for sample in made if "model" in sample.tags), made[0])
    arguments = operator.arguments(**chosen.arguments)
    return {name: on_no_device(value) for name, value in arguments.items()}


def on_no_device(value: Any) -> Any:  # Any: a call's own values
    """A tensor's metadata, as a tensor without memory; other values as they are."""
    return torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else value


def parse_argument(operator: AnyOperator, word: str) -> tuple[str, Any]:  # Any: a call's own values
    """`x=16x4096:bfloat16`, `x=16x4096` or `eps=1e-6`."""
    name, equals, value = word.partition("=")
    names = tuple(operator.signature.parameters)
    if name not in names:
        raise ConfigError(f"why: {operator.name} has no argument {name!r}; {nearest(name, names)}")
    if not equals or not value:
        raise ConfigError(f"why: an argument is written name=value; got {word!r}.")
    if name not in operator.tensor_arguments:
        return name, literal(value)
    match = re.fullmatch(r"(\d+(?:x\d+)*)(?::(\w+))?", value)
    if match is None:
        raise ConfigError(f"why: a tensor is written like 16x4096:bfloat16; got {value!r} for {name}.")
    legal = {dtype_name(dtype): dtype for dtype in operator.dtypes[name]}
    said = match[2] or next(iter(legal))
    if said not in legal:
        raise ConfigError(f"why: {name} of {operator.name} may be {', '.join(legal)}; got {said!r}.")
    return name, torch.empty([int(size) for size in match[1].split("x")], dtype=legal[said], device="meta")


def literal(value: str) -> Any:  # Any: a number, a switch or a word
    """A number or a switch as Python writes it, else the word itself."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def answer(options: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """The explanation of a call with the given shapes, or with an example's."""
    operator = find(options.operator)
    if options.shapes:
        given = dict(parse_argument(operator, word) for word in options.shapes)
        arguments = operator.arguments(**given)
    else:
        arguments = example(operator)
    active = dispatch.dispatcher()
    device = options.device or device_in_force(active)
    explanation = active.explain(operator, arguments, device_type=device)
    return {**explanation.as_dict(), "arguments": {name: shown(value) for name, value in arguments.items()}}


def device_in_force(active: dispatch.Dispatcher) -> str:
    """The device of the backend that the user named, else the host."""
    named = active.settings.backend
    return active.registry.backend(named).device_type if named else "cpu"


def shown(value: Any) -> str:  # Any: a call's own values
    """A value in the way that --shapes takes it."""
    if isinstance(value, torch.Tensor):
        return f"{'x'.join(map(str, value.shape))}:{dtype_name(value.dtype)}"
    return str(value)


def text(answer: dict[str, Any]) -> str:  # Any: JSON
    """For people."""
    defaults = {
        name: str(parameter.default)
        for name, parameter in find(answer["operator"]).signature.parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    call = " ".join(f"{name}={value}" for name, value in answer["arguments"].items() if value != defaults.get(name))
    rows = []
    for candidate in answer["candidates"]:
        chosen = candidate["name"] == answer["chosen"]
        verdict = candidate["why_not"] or ("chosen" if chosen else "would do")
        rows.append((f"{'->' if chosen else '  '} {candidate['name']}", verdict))
    return f"{entries([(answer['operator'], call)], indent=0)}\non {answer['device']!r}:\n{entries(rows, indent=0)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`why OP [--shapes NAME=VALUE …] [--device TYPE]`."""
    parser.add_argument("operator", metavar="OP", help="an operator, as `isolith ops` lists them")
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="NAME=VALUE",
        help="arguments, such as x=16x4096:bfloat16 eps=1e-6; an example's when left out",
    )
    parser.add_argument("--device", metavar="TYPE", help="a torch device type; cpu when left out")


COMMAND = Command(
    name="why",
    summary="every candidate for a call, and why it is or is not taken",
    add_arguments=add_arguments,
    answer=answer,
    text=text,
)
