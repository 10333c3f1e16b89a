"""A call, from the operator to its kernel, and the ladder when there is none.

call      look the call's metadata up; the answer is the function to run
resolve   on a miss: check, select, and build that function
step_down when a kernel raises Unsupported
"""

import functools
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from isolith import config, registry
from isolith.config import Settings
from isolith.errors import FallbackWarning, FrozenError, NoKernelError, Unsupported
from isolith.memory import check_room
from isolith.registry import Registry
from isolith.select import Candidate, Explanation, select
from isolith.shadow import shadow_for

if TYPE_CHECKING:
    from isolith.bisect import Flips
    from isolith.operator import AnyOperator

Function = Callable[..., Any]  # Any: the operator's own signature, checked where it is declared

MEMO_LIMIT = 8192  # calls remembered; a server with ever new lengths forgets all and starts again


@dataclass(frozen=True, kw_only=True)
class FallbackRecord:
    """Calls of one operator that ran on a lower step, for one reason."""

    operator: str
    device: str
    ran: str
    reason: str
    count: int


class Dispatcher:
    """A registry under settings, with what has been chosen so far; a bisection's also with what it flips."""

    def __init__(self, registry: Registry, settings: Settings, flips: "Flips | None" = None) -> None:
        self.registry = registry
        self.settings = settings
        self.flips = flips
        self.shadow = shadow_for(settings.shadow)
        self.memo: dict[Any, Function] = {}  # Any: metadata keys
        self.fallbacks: Counter[tuple[str, str, str, str]] = Counter()
        self.warned: set[tuple[str, str]] = set()
        registry.check_pins(settings)
        if settings.backend:
            registry.backend(settings.backend)

    def explain(
        self, operator: "AnyOperator", arguments: dict[str, Any], device_type: str | None = None
    ) -> Explanation:
        """Every candidate for a legal call."""
        operator.validate(arguments)
        explanation = select(self.registry, self.settings, operator, arguments, device_type)
        return self.flips.applied(explanation) if self.flips else explanation

    def resolve(self, operator: "AnyOperator", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
        """Check the call, select, and remember the function that runs it."""
        arguments = operator.arguments(*args, **kwargs)
        explanation = self.explain(operator, arguments)
        check_room(operator, arguments, explanation.device)
        function = self.function(operator, explanation)
        if len(self.memo) >= MEMO_LIMIT:
            self.memo.clear()
        self.memo[operator.metadata_key(*args, **kwargs)] = function
        return function

    def function(self, operator: "AnyOperator", explanation: Explanation) -> Function:
        """The function for the chosen candidate, as bare as the call allows."""
        if explanation.device == "meta":
            return lambda *args, **kwargs: operator.fake(**operator.by_name(*args, **kwargs))
        function = self.unchecked(operator, explanation)
        if operator.mutates:
            function = never_twice(operator, function)
        if operator.check_values and (explanation.device == "cpu" or self.settings.debug):
            function = checked(operator, operator.check_values, function)
        return function

    def unchecked(self, operator: "AnyOperator", explanation: Explanation) -> Function:
        """The function for the chosen candidate, as a bound handle has it."""
        chosen = explanation.chosen
        assert chosen is not None, "the ladder ends with steps that nothing rules out"
        if explanation.is_fallback:
            function = self.counted(operator, explanation, chosen)
        else:
            function = run_candidate(self, operator, chosen)
        return self.flips.noted(operator, chosen, function) if self.flips else function

    def under(self, settings: Settings, registry: Registry | None = None) -> "Dispatcher":
        """The dispatcher of other settings, with the same flips."""
        found = registry or self.registry
        return Dispatcher(found, settings, self.flips) if self.flips else dispatcher_for(found, settings)

    def counted(self, operator: "AnyOperator", explanation: Explanation, candidate: Candidate) -> Function:
        """Run a lower step: refuse, warn or allow as the settings say, and count every call."""
        if self.settings.fallback == "error":
            raise NoKernelError(
                f"{operator.name}: no kernel on {explanation.device!r} takes this call, and ISOLITH_FALLBACK=error.\n"
                f"{explanation.reasons}\nSet ISOLITH_FALLBACK=warn to run {candidate.name} instead."
            )
        function = run_candidate(self, operator, candidate)
        key = (operator.name, explanation.device, candidate.name, explanation.reasons.strip())

        def run_and_count(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)  # first, since it may refuse
            self.fallbacks[key] += 1
            if self.settings.fallback == "warn" and key[:2] not in self.warned:
                self.warned.add(key[:2])
                message = f"{key[0]} on {key[1]} runs on {key[2]}; no kernel takes the call:\n{explanation.reasons}"
                warnings.warn(message, FallbackWarning, stacklevel=4)
            return result

        return run_and_count

    def step_down(
        self, operator: "AnyOperator", args: tuple[Any, ...], kwargs: dict[str, Any], refusal: Unsupported
    ) -> Any:
        """Try the candidates below the one that has refused; nothing is remembered for the next call."""
        arguments = operator.arguments(*args, **kwargs)
        explanation = self.explain(operator, arguments)
        reason = str(refusal)
        while (refused := explanation.chosen) is not None:
            explanation = ruled_out(explanation, refused, reason)
            explanation = self.flips.applied(explanation) if self.flips else explanation
            if explanation.chosen is None:
                break
            try:
                return self.function(operator, explanation)(*args, **kwargs)
            except Unsupported as next_refusal:
                reason = str(next_refusal)
        raise NoKernelError(
            f"{operator.name}: nothing on {explanation.device!r} takes this call.\n{explanation.reasons}"
        )


class Recorder(Dispatcher):
    """A dispatcher that also counts what ran: `calls[operator, candidate]`."""

    def __init__(self, registry: Registry, settings: Settings, flips: "Flips | None" = None) -> None:
        super().__init__(registry, settings, flips)
        self.calls: Counter[tuple[str, str]] = Counter()

    def function(self, operator: "AnyOperator", explanation: Explanation) -> Function:
        """The function for the chosen candidate, counted when it has run."""
        function = super().function(operator, explanation)
        chosen = explanation.chosen
        assert chosen is not None, "the ladder ends with steps that nothing rules out"

        def run_and_record(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.calls[operator.name, chosen.name] += 1
            return result

        return run_and_record


def ruled_out(explanation: Explanation, refused: Candidate, reason: str) -> Explanation:
    """The explanation with one candidate ruled out."""
    rows = tuple(replace(row, why_not=reason) if row is refused else row for row in explanation.candidates)
    return replace(explanation, candidates=rows)


def run_candidate(dispatcher: Dispatcher, operator: "AnyOperator", candidate: Candidate) -> Function:
    """The function of a candidate."""
    if candidate.kernel is not None:
        shadow = dispatcher.shadow
        return shadow.beside(operator, candidate.name, candidate.kernel) if shadow else candidate.kernel.fn
    if candidate.step == "host":
        return functools.partial(run_on_host, dispatcher, operator)
    if candidate.step == "composition":
        return operator.reference
    if operator.composed_of:
        return functools.partial(run_reference, dispatcher, operator)
    return on_this_device(operator.reference)


def run_reference(dispatcher: Dispatcher, operator: "AnyOperator", *args: Any, **kwargs: Any) -> Any:
    """A composite's reference with the references of its parts."""
    with using(references(dispatcher)):
        return operator.reference(*args, **kwargs)


def references(dispatcher: Dispatcher) -> Dispatcher:
    """The dispatcher that runs nothing but references."""
    pins = tuple((name, "reference") for name in dispatcher.registry.operators)
    return dispatcher_for(dispatcher.registry, config.overridden(dispatcher.settings, kernels=pins))


def on_this_device(reference: Function) -> Function:
    """A reference whose device lacks one of torch's operators refuses, so that the next step is tried."""

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return reference(*args, **kwargs)
        except NotImplementedError as error:
            raise Unsupported(f"the device lacks a torch operator: {str(error).splitlines()[0]}") from error

    return run


def run_on_host(dispatcher: Dispatcher, operator: "AnyOperator", *args: Any, **kwargs: Any) -> Any:
    """Copy to the host, run there, copy results and mutated arguments back."""
    arguments = operator.arguments(*args, **kwargs)
    host = on_host(arguments)
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with using(dispatcher.under(config.overridden(dispatcher.settings, backend=""))):
        result = call(operator, (), host)
    for name in operator.mutates:
        arguments[name].copy_(host[name])
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), result)


def on_host(arguments: Mapping[str, Any]) -> dict[str, Any]:  # Any: a call's own values
    """The arguments with copies of the tensors on the host."""
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def checked(operator: "AnyOperator", check_values: Function, function: Function) -> Function:
    """Check values, then run."""

    def check_and_run(*args: Any, **kwargs: Any) -> Any:
        arguments = operator.by_name(*args, **kwargs)
        try:
            check_values(**arguments)
        except NotImplementedError:  # the device lacks a torch operator that looking at the values takes
            with torch._C.DisableTorchFunction():  # unseen by a mode that watches the kernel's own work
                check_values(**on_host(arguments))
        return function(*args, **kwargs)

    return check_and_run


def never_twice(operator: "AnyOperator", function: Function) -> Function:
    """A kernel that refuses after it has written raises, since the next step would write again."""

    def run(*args: Any, **kwargs: Any) -> Any:
        arguments = operator.arguments(*args, **kwargs)
        written = [arguments[name] for name in operator.mutates]
        versions = [tensor._version for tensor in written]
        try:
            return function(*args, **kwargs)
        except Unsupported as refusal:
            if versions != [tensor._version for tensor in written]:
                raise RuntimeError(f"{operator.name}: a kernel refused after it had written: {refusal}") from refusal
            raise

    return run


current: ContextVar[Dispatcher | None] = ContextVar("isolith_dispatcher", default=None)
"""The dispatcher of an `override`; None means the process's own."""


class Process:
    """What this process has decided once: its dispatchers, by settings, and whether it is frozen."""

    lock = threading.RLock()
    default: Dispatcher | None = None
    by_settings: dict[tuple[int, Settings], Dispatcher] = {}  # noqa: RUF012  # one per process is the meaning
    frozen = False


def dispatcher() -> Dispatcher:
    """The dispatcher in force; reads the environment and finds the plugins on the first call."""
    found = current.get() or Process.default
    return found if found is not None else first_dispatcher()


def first_dispatcher() -> Dispatcher:
    """Read the environment, find the plugins."""
    from isolith.ops import OPERATORS  # the operators are made of this module

    with Process.lock:
        if Process.default is None:
            settings = config.from_environment()
            Process.default = dispatcher_for(registry.build(OPERATORS, settings), settings)
    return Process.default


def dispatcher_for(registry: Registry, settings: Settings) -> Dispatcher:
    """The one dispatcher of a registry under these settings."""
    key = (id(registry), settings)
    with Process.lock:
        if key not in Process.by_settings:
            Process.by_settings[key] = Dispatcher(registry, settings)
        return Process.by_settings[key]


def call(operator: "AnyOperator", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator eagerly."""
    active = current.get() or Process.default or first_dispatcher()
    function = None
    try:  # noqa: SIM105  # contextlib.suppress costs as much as the rest of the call
        function = active.memo.get(operator.metadata_key(*args, **kwargs))
    except (TypeError, AttributeError):
        pass  # arguments of the wrong type or number: resolve says which
    if function is None:
        function = active.resolve(operator, args, kwargs)
    try:
        return function(*args, **kwargs)
    except Unsupported as refusal:
        return active.step_down(operator, args, kwargs, refusal)


@contextmanager
def using(active: Dispatcher) -> Iterator[Dispatcher]:
    """Run a block under a dispatcher."""
    token = current.set(active)
    try:
        yield active
    finally:
        current.reset(token)


@contextmanager
def override(**settings: Any) -> Iterator[Dispatcher]:  # Any: settings are of several types
    """Change settings within a block, for this thread or task alone.

        with isolith.override(backend="cpu", kernels={"rms_norm": "reference"}, fallback="error"): ...

    Raises:
        ConfigError: for an unknown setting, operator, kernel or value.
        PluginError: when the backend named is not available.
        FrozenError: after `isolith.freeze()`.
    """
    if Process.frozen:
        raise FrozenError("isolith is frozen: settings can no longer change in this process.")
    active = dispatcher()
    changed = config.overridden(active.settings, **settings)
    same = changed.backend == active.settings.backend and changed.plugins == active.settings.plugins
    found = active.registry if same else registry.build(active.registry.operators, changed)
    with using(active.under(changed, found)) as inner:
        yield inner


@contextmanager
def record() -> Iterator[Counter[tuple[str, str]]]:
    """Count what runs within a block, under the settings in force.

    with isolith.record() as calls: ...
    calls["sparse_attn", "cpu.sparse_attn"]
    """
    active = dispatcher()
    recorder = Recorder(active.registry, active.settings, active.flips)
    with using(recorder):
        yield recorder.calls


class Handle(functools.partial[Any]):
    """A bound call: the kernel's own function, with its name in `kernel`."""

    kernel: str
    """As `explain` spells it: "cpu.sparse_attn", "reference", …"""


def bind(operator: "AnyOperator", *args: Any, **kwargs: Any) -> Handle:
    """Resolve a call once, for a hot loop.

    The handle takes the arguments that the operator takes and runs the kernel chosen for the example: it checks
    nothing, so give it arguments of the example's kind (equal but for values and data pointers). Under
    ISOLITH_DEBUG=1 a handle is the operator itself, checks included. A kernel's Unsupported goes to the caller.
    """
    active = dispatcher()
    explanation = active.explain(operator, operator.arguments(*args, **kwargs))
    chosen = explanation.chosen
    assert chosen is not None, "the ladder ends with steps that nothing rules out"
    check_room(operator, operator.arguments(*args, **kwargs), explanation.device)
    handle = Handle(operator if active.settings.debug else active.unchecked(operator, explanation))
    handle.kernel = chosen.name
    return handle


def explain(operator: "AnyOperator", *args: Any, **kwargs: Any) -> Explanation:
    """Say which candidate takes a call and why the others do not; print it, or ask `as_dict()`."""
    return dispatcher().explain(operator, operator.arguments(*args, **kwargs))


def fallbacks() -> tuple[FallbackRecord, ...]:
    """Every step down taken so far under the settings in force."""
    return tuple(
        FallbackRecord(operator=operator, device=device, ran=ran, reason=reason, count=count)
        for (operator, device, ran, reason), count in sorted(dispatcher().fallbacks.items())
    )
