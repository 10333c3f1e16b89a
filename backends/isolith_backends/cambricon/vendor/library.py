"""The functions of torch_mlu_ops as one release on one card has them, over tensors of the host.

Release 1.12.1 has every function of ../signatures.json that is marked a Python definition. The day-0 release has those
that the day-0 stack calls (vllm-mlu@b9925203), as it calls them: what it passes by position goes by position alone,
since the names are not public, and the rest by keyword alone. What no public source states the mathematics of is there
with its signature and raises NotImplementedError.
"""

import functools
import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from isolith_backends.cambricon.vendor import compressor_day0
from isolith_backends.cambricon.vendor.profile import Profile, standing_for
from isolith_backends.cambricon.vendor.rules import refuse_by_card

Function = Callable[..., Any]  # Any: every vendor function has its own signature

SIGNATURES = Path(__file__).parent.parent / "signatures.json"
FAMILIES = (
    "norms",
    "rotary",
    "hyper",
    "gating",
    "permute",
    "gemm",
    "active",
    "quantize",
    "compressor",
    "tables",
    "indexer",
    "attention",
    "flash",
    "cache",
    "latent",
)
RENAMED = {"max_contxt_len": "max_context_len", "learnable_sink": "sink"}
"""Day-0 arguments by the names that they have in 1.12.1."""

OPTIONAL = {"smooth_quant_group_gemm": ("d", "quant_flag"), "group_gemm": ("d",), "scaled_quantize": ()}
"""Keywords that the day-0 stack does not pass in every call."""

DAY0 = (compressor_day0.fused_compress_multi_kv, compressor_day0.fused_compress_single_kv)
"""Functions of another form in the day-0 release."""


def functions(profile: Profile) -> Mapping[str, Function]:
    """Every function of the release by name, refusing what the card lacks."""
    made = released() if not profile.day0 else released_day0()
    return {name: guarded(name, function, profile) for name, function in made.items()}


@functools.cache
def entries() -> tuple[Mapping[str, Any], ...]:  # Any: JSON
    """The rows of ../signatures.json that describe Python functions."""
    rows = json.loads(SIGNATURES.read_text())["functions"]
    return tuple({**row, "name": row["name"].rpartition(".")[2]} for row in rows if row["level"] == "python")


@functools.cache
def simulated() -> Mapping[str, Function]:
    """What the twin has the mathematics of, in the form of 1.12.1."""
    defined = {row["name"] for row in entries() if row["form"] == "definition"}
    modules = [importlib.import_module(f"{__package__}.{family}") for family in FAMILIES]
    return {
        name: function
        for module in modules
        for name, function in vars(module).items()
        if name in defined and getattr(function, "__module__", "") == module.__name__
    }


@functools.cache
def released() -> Mapping[str, Function]:
    """The functions of 1.12.1."""
    rows = [row for row in entries() if row["form"] == "definition"]
    made = {row["name"]: simulated().get(row["name"]) or stub(row) for row in rows}
    return {**made, "get_cnnl_version": library_version, "get_cnnl_extra_version": library_version}


@functools.cache
def released_day0() -> Mapping[str, Function]:
    """The functions that the day-0 stack calls."""
    own = {function.__name__: function for function in DAY0}
    made = {}
    for row in entries():
        if row.get("profile") == "day0":
            name = row["name"]
            made[name] = as_called(row, own.get(name) or simulated().get(name) or stub(row))
    return made


def library_version() -> str:
    """The releases that the twin stands for state no version of these libraries."""
    return "unknown"


def stub(row: Mapping[str, Any]) -> Function:  # Any: JSON
    """A function with its signature and nothing else."""
    name = row["name"]

    def call(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"torch_mlu_ops.{name}: no public source states what it computes.")

    call.__name__ = name
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    with_signature(call, [parameter(entry, kind) for entry in row["parameters"]])
    return call


def as_called(row: Mapping[str, Any], function: Function) -> Function:  # Any: JSON
    """A function in the form of the day-0 stack's call of it."""
    name, by_place = row["name"], row["positional"]
    parameters = [
        parameter(entry, inspect.Parameter.POSITIONAL_ONLY if at < by_place else inspect.Parameter.KEYWORD_ONLY)
        for at, entry in enumerate(row["parameters"])
    ]
    optional = OPTIONAL.get(name, ())
    parameters = [p.replace(default=None) if p.name in optional else p for p in parameters]
    signature = inspect.Signature(parameters)

    def call(*args: object, **kwargs: object) -> object:
        given = signature.bind(*args, **kwargs).arguments
        return function(**{RENAMED.get(key, key): value for key, value in given.items()})

    call.__name__ = name
    return with_signature(call, parameters)


def parameter(entry: Mapping[str, str], kind: Any) -> inspect.Parameter:  # Any: inspect keeps the type to itself
    """A parameter of ../signatures.json."""
    default = value_of(entry["default"]) if "default" in entry else inspect.Parameter.empty
    return inspect.Parameter(entry["name"], kind, default=default)


def value_of(text: str) -> object:
    """A default as it is written there: a Python literal or a dtype."""
    if text.startswith("torch."):
        return getattr(torch, text.removeprefix("torch."))
    return (
        {"None": None, "True": True, "False": False}.get(text, text.strip("'\""))
        if not number(text)
        else number(text)[0]
    )


def number(text: str) -> tuple[float, ...]:
    """The number that a text is, alone, or nothing."""
    for kind in (int, float):
        try:
            return (kind(text),)
        except ValueError:
            continue
    return ()


def with_signature(call: Function, parameters: list[inspect.Parameter]) -> Function:
    """The function, telling these parameters."""
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # inspect reads it
    return call


def guarded(name: str, function: Function, profile: Profile) -> Function:
    """The function of one card: dtypes that it lacks and rows that are not dense are refused."""
    signature = inspect.signature(function)

    def call(*args: object, **kwargs: object) -> object:
        refuse_by_card(name, signature.bind(*args, **kwargs).arguments, profile)
        with standing_for(profile):
            return function(*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = function.__doc__
    return with_signature(call, list(signature.parameters.values()))
