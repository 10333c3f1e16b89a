"""A simulated accelerator on the host, for trying a backend's kernels where its device is not.

Its tensors say that they are on a device of the type asked for, keep their memory apart from the host's and refuse to
be mixed with tensors of the host, as on a real device; copies are explicit. It computes with PyTorch's CPU kernels, at
once and in order, so nothing here tells a device's speed, its rounding or its races.

Source: PyTorch's backend written in Python (torch.utils.backend_registration, the key PrivateUse1).
"""

import functools
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.utils import backend_registration

from isolith.errors import PluginError

P = ParamSpec("P")
R = TypeVar("R")

Function = Callable[..., Any]  # Any: any operator's signature


class State:
    """What this process has set up once: torch has room for one such device."""

    device_type = ""
    lacks: frozenset[str] = frozenset()
    libraries: dict[tuple[str, str], torch.library.Library] = {}  # noqa: RUF012  # one per process is the meaning
    offered: dict[str, Function] = {}  # noqa: RUF012


class SimulatedTensor(Tensor):
    """A tensor on the simulated device: metadata outside, a tensor of the host as its memory."""

    memory: Tensor

    @staticmethod
    def __new__(cls: "type[SimulatedTensor]", memory: Tensor) -> "SimulatedTensor":
        """Wrap a tensor of the host, sharing its bytes."""
        made = Tensor._make_wrapper_subclass(
            cls,
            memory.size(),
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            device=torch.device(State.device_type, 0),
        )
        made.memory = memory
        return made

    # Results are wrapped below, where torch dispatches; its wrapping of subclasses by default would come on top.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch documents it

    def tolist(self) -> Any:  # Any: as torch declares it
        """The values, copied to the host."""
        return self.memory.tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # Any: as torch has it
        """The values, and the device."""
        return f"{self.memory!r} on {self.device}"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it loosely
        cls, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # Any: every operator of torch comes here
        """Run an operator of torch on the device."""
        return run_operator(function, args, dict(kwargs or {}))


def run_operator(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:  # Any: every operator of torch
    """Run an operator of torch or an offered one, or copy between the host and the device."""
    name = function.name()
    if name.partition(".")[0] in State.lacks:
        raise NotImplementedError(f"Could not run {name!r} with arguments from the {State.device_type!r} backend.")
    if name in ("aten::copy_", "aten::_copy_from"):
        source, target = (args[1], args[0]) if name == "aten::copy_" else (args[0], args[1])
        memory_of(target).copy_(memory_of(source))
        return target
    if name == "aten::_to_copy" and kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == State.device_type
        copied = function(memory_of(args[0]), **{**kwargs, "device": "cpu"})
        return SimulatedTensor(copied) if there else copied
    if name in State.offered:
        return run(State.offered[name], args, kwargs, refuse)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == State.device_type
        kwargs["device"] = torch.device("cpu")
        if not there:  # torch.empty_like(tensor, device="cpu") and the like
            return function(*mapped(memory_of, args), **mapped(memory_of, kwargs))
    return run(function, args, kwargs, refuse_unless_scalar)


def run(function: Function, args: Any, kwargs: Any, refuse: Callable[[str, Tensor], None]) -> Any:
    """Run a function on the memory behind simulated tensors; a tensor that was passed in comes back as itself."""
    known: dict[int, tuple[SimulatedTensor, torch.Size]] = {}
    name = name_of(function)

    def inside(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, SimulatedTensor):
            refuse(name, tensor)
            return tensor
        known[id(tensor.memory)] = (tensor, tensor.memory.shape)
        return tensor.memory

    def outside(tensor: Tensor) -> Tensor:
        if isinstance(tensor, SimulatedTensor):
            return tensor
        if id(tensor) in known:
            wrapper, shape = known[id(tensor)]
            if tensor.shape != shape:
                raise RuntimeError(f"{name}: the output has shape {tuple(shape)} and needs {tuple(tensor.shape)}.")
            return wrapper
        return SimulatedTensor(tensor)

    args, kwargs = mapped(inside, args), mapped(inside, kwargs)
    # A mode that watches the kernel's calls of torch must not see those that stand for the device's own work.
    with torch._C.DisableTorchFunction():
        return mapped(outside, function(*args, **kwargs))


def mapped(change: Callable[[Tensor], Any], value: Any) -> Any:  # Any: what torch's operators take and return
    """The value with every tensor in it changed; torch's own tree functions cost more than a small operator."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: mapped(change, part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)([mapped(change, part) for part in value])
    if isinstance(value, tuple):  # with names
        parts = [mapped(change, part) for part in value]
        return value._make(parts) if hasattr(value, "_make") else type(value)(parts)
    return value


def name_of(function: Any) -> str:  # Any: a function, an operator of torch, or an offered one
    """What an error calls a function."""
    if isinstance(function, functools.partial):
        return str(function.args[0])
    return str(function.name() if isinstance(function, torch._ops.OpOverload) else function.__name__)


def memory_of(tensor: Tensor) -> Tensor:
    """The host tensor that holds the bytes."""
    return tensor.memory if isinstance(tensor, SimulatedTensor) else tensor


def refuse(name: str, tensor: Tensor) -> None:
    """Raise, since the tensor is the host's."""
    raise RuntimeError(
        f"{name}: every tensor must be on {State.device_type!r}; got one of shape {tuple(tensor.shape)} on "
        f"{tensor.device.type!r}."
    )


def refuse_unless_scalar(name: str, tensor: Tensor) -> None:
    """Raise for a tensor of the host, unless torch would take it as a number."""
    if tensor.dim():
        refuse(name, tensor)


def simulate(device_type: str, lacks: Collection[str] = ()) -> None:
    """Set the simulated device up in this process; a second call with the same name changes nothing.

    Args:
        device_type: What its tensors say that they are on.
        lacks: Operators of torch that it has no kernel for: "aten::sort".

    Raises:
        PluginError: where another device has the name or torch's one place for such a device.
    """
    if State.device_type == device_type:
        return
    if State.device_type:
        raise PluginError(f"this process simulates {State.device_type!r} already; got {device_type!r}.")
    if torch._C._get_privateuse1_backend_name() != "privateuseone" or hasattr(torch, device_type):
        raise PluginError(f"torch has a device {device_type!r} or another beside its own ones; it has room for one.")
    backend_registration._setup_privateuseone_for_python_backend(device_type, backend_module=Runtime(device_type))
    State.device_type, State.lacks = device_type, frozenset(lacks)
    library = torch.library.Library("aten", "IMPL")
    State.libraries["aten", "IMPL"] = library
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    for name in SIZED_BY_RESIZING:
        library.impl(name, functools.partial(created, operator_of("aten", name)), "PrivateUse1")


SIZED_BY_RESIZING = ("arange", "arange.start", "arange.start_step", "eye", "eye.m")
"""Functions that torch runs by resizing an empty tensor, which a wrapper cannot follow."""


def created(function: Function, *args: Any, **options: Any) -> Tensor:  # Any: torch's factory options
    """What a function of torch makes on the host, on the device."""
    return SimulatedTensor(function(*args, **{**options, "device": torch.device("cpu"), "pin_memory": False}))


def is_simulated(device: torch.device) -> bool:
    """Whether a device is the simulated one of this process."""
    return device.type == State.device_type


def empty(size: Sequence[int], **options: Any) -> Tensor:  # Any: torch's factory options
    """New memory on the device."""
    return SimulatedTensor(
        torch.empty(
            size, dtype=options.get("dtype"), memory_format=options.get("memory_format") or torch.contiguous_format
        )
    )


def empty_strided(size: Sequence[int], stride: Sequence[int], **options: Any) -> Tensor:  # Any: as above
    """New memory on the device, with strides."""
    return SimulatedTensor(torch.empty_strided(tuple(size), tuple(stride), dtype=options.get("dtype")))


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between the host and the device, or within the device."""
    memory_of(target).copy_(memory_of(source))
    return target


def on_device(function: Callable[P, R]) -> Callable[P, R]:
    """The same function over simulated tensors, as a vendor's Python interface offers one.

    It runs on the tensors of the host behind them. What it returns is wrapped; a tensor that was passed in comes back
    as itself. A tensor of the host is a RuntimeError.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return cast("R", run(function, args, kwargs, refuse))

    return call


def offer(namespace: str, name: str, function: Function) -> None:
    """Put a function over tensors of the host behind an operator that torch.library has defined, on the device alone.

    Args:
        namespace: The operator's namespace.
        name: Its name, with ".overload" where it has one.
        function: Gets every argument of the schema by name, defaults filled in, and returns what the schema says; an
            argument that it has written it returns as it came.
    """
    schema = operator_of(namespace, name)._schema
    key = namespace, "FRAGMENT"
    if key not in State.libraries:
        State.libraries[key] = torch.library.Library(*key)
    full = f"{namespace}::{name}"
    State.offered[full] = functools.partial(called_by_name, full, schema, function)
    call = functools.partial(without_tensors, full)
    State.libraries[key].impl(name, call, "PrivateUse1")
    if not any(str(argument.type) in ("Tensor", "List[Tensor]") for argument in schema.arguments):
        State.libraries[key].impl(name, call, "BackendSelect")  # no argument need lead a call to the device


def operator_of(namespace: str, name: str) -> Any:  # Any: torch types its operators as Any
    """torch's operator of a name with ".overload" behind or without."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")


def called_by_name(name: str, schema: Any, function: Function, *args: Any, **kwargs: Any) -> Any:  # Any: as schemas are
    """Call the function with every argument of the schema by name: torch leaves out those that equal the default."""
    given = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    given.update(zip((argument.name for argument in schema.arguments), args, strict=False))
    return function(**given | kwargs)


def without_tensors(name: str, *args: Any, **kwargs: Any) -> Any:  # Any: any operator's arguments
    """Run an offered operator in whose call no argument is a tensor of the device."""
    tensors: list[Tensor] = []
    mapped(tensors.append, (args, kwargs))
    if tensors:
        raise NotImplementedError(
            f"Could not run {name!r} with arguments from the 'CPU' backend; it is only available for these backends: "
            f"[{State.device_type}]."
        )
    return run(State.offered[name], args, kwargs, refuse)


class Runtime(types.ModuleType):
    """What torch and users ask of `torch.<device type>`."""

    def is_initialized(self) -> bool:
        """Nothing has to be started."""
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def is_available(self) -> bool:
        """There is a device."""
        return True

    def device_count(self) -> int:
        """One."""
        return 1

    def current_device(self) -> int:
        """The one."""
        return 0

    def set_device(self, device: Any) -> None:  # Any: an index, a name or a torch.device
        """There is no other."""
        if torch.device(device if not isinstance(device, int) else f"{self.__name__}:{device}").index not in (None, 0):
            raise RuntimeError(f"{self.__name__}: there is one device; got {device!r}.")

    def synchronize(self, _: Any = None) -> None:  # Any: as above
        """Everything has been done already."""

    def get_device_name(self, _: Any = None) -> str:  # Any: as above
        """Says that it is none."""
        return f"simulated {self.__name__}"

    def empty_cache(self) -> None:
        """There is no cache."""

    def manual_seed_all(self, seed: int) -> None:
        """Random numbers come from the host's generator."""

    def manual_seed(self, seed: int) -> None:
        """Random numbers come from the host's generator."""
