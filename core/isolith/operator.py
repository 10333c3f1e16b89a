"""An operator: a reference function and what is true of it on every chip."""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor

from isolith import dispatch
from isolith.dtypes import FLOAT, dtype_name, listed
from isolith.errors import ArgumentError
from isolith.sample import ErrorSample, Make, Relation, Sample
from isolith.shapes import Shapes, parse

P = ParamSpec("P")
R = TypeVar("R")

is_dynamo_compiling = torch.compiler.is_dynamo_compiling

# The bare C function: one look at whether any TorchDispatchMode (a tracer, a FakeTensorMode) is on.
dispatch_modes_on = torch._C._len_torch_dispatch_stack


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a call needs at the least, whatever runs it.

    Args:
        flops: Additions and multiplications, a fused multiply-add counting two. Elementwise work beside products may be
            left out: it is small, and runs on other units.
        bytes_read: Every input byte that must be read, once.
        bytes_written: Every output byte, once.
        math: The format that most of the flops are done in: "float32", "bfloat16", "float8", "float4" or "int8".
    """

    flops: int
    bytes_read: int
    bytes_written: int
    math: str = "float32"


@dataclass(frozen=True, kw_only=True, eq=False)
class Operator(Generic[P, R]):
    """A device-neutral operator. Calling it checks the arguments, selects a kernel and runs it.

    The reference and its variants have the operator's signature. The parts that look at a call (`fake`, `check`,
    `check_values`, `cost`, `selects_by`, `competes`, `unrounded`, `defined`) get every argument by name, name the ones
    they use and take the others as `**_`.

    Args:
        name: The operator's name, equal to the name of its file.
        shapes: Axes of its tensors, as `isolith.shapes` describes.
        dtypes: Legal dtypes of every tensor argument, by name.
        reference: The definition: exact to rounding, in float64 when given float64, on any torch device.
        variants: Legal roundings other than the reference's, written as code.
        fake: Empty outputs of the right shape and dtype, from metadata alone.
        check: Raises ArgumentError for what shapes and dtypes do not say; reads metadata only.
        check_values: Raises ArgumentError for illegal values; run where the tensors are on the host, and under debug.
        cost: The least work, from metadata alone.
        samples: Legal calls that every kernel is checked with.
        errors: Illegal calls with the messages they get.
        mutates: Arguments written in place.
        bitwise: Copies, counts and permutations: one right answer, to the bit.
        selects_by: For selections: the values by which they choose, from the operator's arguments.
        competes: For selections: which of these values may be chosen at all, a boolean each; None = all.
        ordered: For selections: whether the chosen stand in the order of their values, the largest first.
        unrounded: For quantisation: each output before it is rounded to its codes, or to its scale's dtype, in float64;
            NaN where it is unspecified.
        declared: Roundings that are legal only for a kernel that declares them, by name: "tf32".
        defined: Which elements of the outputs, then of the mutated arguments, are specified: a boolean mask each that
            broadcasts over leading axes' elements (or None for all), from the operator's arguments before the call.
        composed_of: Names of the operators that the reference calls, for a composite.
        sample_dtypes: Dtypes to make samples in.
        relations: Metamorphic relations that hold for every right kernel, from a Make.
        invariants: For mappings and selections: the first sentence that does not hold of the results (outputs, then
            mutated arguments), or None; gets `results` and every argument, and reads indices and counts alone.
    """

    name: str
    shapes: str
    dtypes: Mapping[str, tuple[torch.dtype, ...]]
    reference: Callable[P, R]
    variants: tuple[Callable[P, R], ...]
    fake: Callable[..., R]
    check: Callable[..., None]
    check_values: Callable[..., None] | None = None
    cost: Callable[..., Cost]
    samples: Callable[[Make], Iterator[Sample]]
    errors: Callable[[Make], Iterator[ErrorSample]]
    mutates: tuple[str, ...] = ()
    bitwise: bool = False
    selects_by: Callable[..., Tensor] | None = None
    competes: Callable[..., Tensor] | None = None
    ordered: bool = False
    unrounded: Callable[..., tuple[Tensor, ...]] | None = None
    declared: Mapping[str, tuple[Callable[P, R], ...]] = field(default_factory=dict)
    defined: Callable[..., tuple[Tensor | None, ...]] | None = None
    composed_of: tuple[str, ...] = ()
    sample_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    relations: Callable[[Make], Iterator[Relation]] | None = None
    invariants: Callable[..., str | None] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the operator on the device that its tensors are on."""
        # While Dynamo traces, the first test is the constant True and the rest is never seen; every other tracer, such
        # as torch.export's or make_fx, is a dispatch mode.
        if is_dynamo_compiling() or dispatch_modes_on():
            result: R = self.torch_op(*args, **kwargs)
            return result
        answer: R = dispatch.call(self, args, kwargs)
        return answer

    def __repr__(self) -> str:
        return f"isolith.{self.name}"

    @property
    def torch_op(self) -> Any:  # Any: torch types its operator overloads as Any
        """The operator as one node of a torch graph: `torch.ops.isolith.<name>`."""
        return getattr(torch.ops.isolith, self.name).default

    @cached_property
    def signature(self) -> inspect.Signature:
        """The reference's signature: everybody's."""
        return inspect.signature(self.reference)

    @cached_property
    def parsed_shapes(self) -> Shapes:
        """The `shapes` line, parsed."""
        return parse(self.shapes)

    @cached_property
    def doc(self) -> str:
        """The formula, the rule at every edge and the source: the docstring of the operator's file."""
        return inspect.cleandoc(sys.modules[self.reference.__module__].__doc__ or "")

    @property
    def family(self) -> str:
        """The folder that the operator's file is in."""
        return self.reference.__module__.split(".")[-2]

    @cached_property
    def tensor_arguments(self) -> tuple[str, ...]:
        """Names of the tensor arguments, in order."""
        return tuple(
            name
            for name, parameter in self.signature.parameters.items()
            if parameter.annotation is Tensor or Tensor in get_args(parameter.annotation)
        )

    @cached_property
    def metadata_key(self) -> Callable[P, tuple[Any, ...]]:  # Any: metadata of many kinds
        """A function of a call's arguments that gives all that a check or a selection may look at, hashable."""
        parts = [repr(self.name)]
        for name, parameter in self.signature.parameters.items():
            if name not in self.tensor_arguments:
                parts.append(name)
                continue
            seen = f"{name}.shape, {name}.dtype, {name}.device, {name}.is_contiguous() or {name}.stride()"
            optional = parameter.default is None
            parts.append(f"None if {name} is None else ({seen})" if optional else seen)
        return self.compiled(f"({', '.join(parts)})")

    @cached_property
    def by_name(self) -> Callable[P, dict[str, Any]]:  # Any: a call's own values
        """A function of a call's arguments that gives them by name, defaults filled in."""
        return self.compiled(f"{{{', '.join(f'{name!r}: {name}' for name in self.signature.parameters)}}}")

    def compiled(self, expression: str) -> Callable[P, Any]:  # Any: the expression's value
        """A function with the operator's signature, compiled once since it runs in every call."""
        given = [
            p.name if p.default is p.empty else f"{p.name}=default_{p.name}" for p in self.signature.parameters.values()
        ]
        defaults = {f"default_{p.name}": p.default for p in self.signature.parameters.values()}
        function: Callable[P, Any] = eval(f"lambda {', '.join(given)}: {expression}", defaults)
        return function

    def arguments(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # Any: whatever a caller passed
        """The call's arguments by name, defaults filled in; ArgumentError when they do not fit the signature."""
        try:
            return self.by_name(*args, **kwargs)
        except TypeError:
            pass
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ArgumentError(f"{self.name}: {error}; its arguments are {self.signature}.") from None
        raise AssertionError("what by_name refuses does not fit the signature")

    def validate(self, arguments: Mapping[str, Any], *, values: bool = False) -> None:  # Any: whatever a caller passed
        """Raise ArgumentError unless types, devices, dtypes, shapes and `check` agree with the call; reads metadata.

        With `values`, `check_values` too, which reads values.
        """
        for name, parameter in self.signature.parameters.items():
            check_type(self.name, name, parameter.annotation, arguments[name])
        tensors = {name: arguments[name] for name in self.tensor_arguments if arguments[name] is not None}
        check_devices(self.name, tensors)
        for name, tensor in tensors.items():
            if tensor.dtype not in self.dtypes[name]:
                takes = listed(tuple(map(dtype_name, self.dtypes[name])))
                raise ArgumentError(f"{self.name}: {name} must be {takes}; got {dtype_name(tensor.dtype)}.")
        self.parsed_shapes.bind(self.name, arguments)
        self.check(**arguments)
        if values and self.check_values:
            self.check_values(**arguments)


def in_float64(operator: "AnyOperator", arguments: Mapping[str, Any]) -> dict[str, Any]:  # Any: a call's own values
    """The same call for gold: floats widened to float64, `out_dtype` too; quantised codes and scales as they are."""
    wide = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.dtype in FLOAT and torch.float64 in operator.dtypes[name]:
            wide[name] = value.double()
        if name == "out_dtype":
            wide[name] = "float64"
    return wide


AnyOperator = Operator[..., Any]  # Any: operators of every signature


def check_type(operator: str, name: str, annotation: Any, value: Any) -> None:  # Any: whatever a caller passed
    """Raise ArgumentError unless the value is of the annotated type; an int does for a float."""
    allowed = tuple(get_args(annotation) or (annotation,))
    if type(value) in allowed or (float in allowed and type(value) is int):
        return
    if Tensor in allowed and isinstance(value, Tensor):
        return
    # SymInt and SymFloat stand for int and float while a graph is traced.
    if (int in allowed and isinstance(value, torch.SymInt)) or (float in allowed and isinstance(value, torch.SymFloat)):
        return
    words = tuple("None" if kind is type(None) else kind.__name__ for kind in allowed)
    raise ArgumentError(f"{operator}: {name} must be {listed(words)}; got {type(value).__name__}.")


def check_devices(operator: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ArgumentError unless all tensors are on one device."""
    first = None
    for name, tensor in tensors.items():
        first = first or (name, tensor.device)
        if tensor.device != first[1]:
            raise ArgumentError(
                f"{operator}: every tensor must be on one device; "
                f"{first[0]} is on {first[1]} and {name} on {tensor.device}."
            )
