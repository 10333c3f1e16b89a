"""One run of a function on placed arguments, and what it did beside returning: runs in a backend's process.

Nothing is judged here. Bytes go back as they are; the suite compares them.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

import isolith.ops
from isolith import ArgumentError, NoKernelError
from isolith.operator import AnyOperator
from isolith_conformance.buffers import GUARD, NAN_BYTES, Layout, place_all, reserve

Function = Callable[..., Any]  # Any: an operator's own signature
Values = dict[str, Any]  # Any: a call's own values

EMPTY = {torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty, Tensor.new_empty_strided}
MOST_ZONES = 64
OPERATORS_FOLDER = str(Path(isolith.ops.__file__).parent)


class Declined(NoKernelError):  # noqa: N818  # no mistake: what a kernel says of a call
    """The candidate itself does not claim the call, for the reason given."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a call is run.

    Args:
        layout: How the arguments lie in memory.
        fill: The byte that guard zones, gaps and, with `poison`, newly allocated memory are filled with.
        poison: Fill and guard the memory that the kernel allocates through torch.
        buffers: Give the arguments' whole buffers back.
        overwrite: After the call, call again and overwrite what that returned, and every argument; then look at the
            first call's outputs once more.
        settle: Wait so many seconds after the call and look at all results once more.
        together: Run the call on so many threads at once and give back every thread's results.
        threads: How many threads torch may use; 0 leaves that as it is.
        before: How many other calls of torch come first, so that memory and state are not fresh.
        same: Names of arguments that are to be one and the same tensor.
        side_stream: Run on a stream of its own, where slow work and a copy have yet to bring the arguments.
        watch: Note which references run.
        rows: Arguments whose rows (slices of the first axis) are repeated, `repeats` times.
        repeats: How often.
        copies: Which of the results' copies to give back.
    """

    layout: Layout = "as_is"
    fill: int = NAN_BYTES
    poison: bool = False
    buffers: bool = False
    overwrite: bool = False
    settle: float = 0.0
    together: int = 1
    threads: int = 0
    before: int = 0
    same: tuple[str, ...] = ()
    side_stream: bool = False
    watch: bool = False
    rows: tuple[str, ...] = ()
    repeats: int = 1
    copies: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Response:
    """What came of a run; everything in it may cross the wire.

    Args:
        status: "ran", "refused" (no kernel takes the call), "illegal" (ArgumentError) or "raised".
        message: The whole message of what was raised.
        declined: Of "refused": whether the candidate said so before it was run.
        results: Outputs, then mutated arguments.
        late: Results looked at once more, after `overwrite` or `settle`; of `together`, every other thread's.
        buffers: The arguments' whole buffers, by name, after the call.
        zones: Guard zones of memory that the kernel allocated, as bytes.
        executed: What ran, "operator kernel" each.
        references: References that ran, by operator.
        on_host: Floating-point elements that were computed on the host though the device is another.
        left_running: By how many threads the process grew.
        seconds: Time of the call alone.
    """

    status: str
    message: str = ""
    declined: bool = False
    results: list[Tensor] = field(default_factory=list)
    late: list[Tensor] = field(default_factory=list)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    zones: list[Tensor] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    on_host: int = 0
    left_running: int = 0
    seconds: float = 0.0

    def as_message(self) -> Values:
        """For the wire; tensors are not copied."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


def run(
    operator: AnyOperator,
    function: Function,
    arguments: Values,
    options: Options,
    device: torch.device,
    earlier: Values | None = None,
) -> Response:
    """Place the arguments, call the function, gather what it made of them.

    Args:
        operator: Whose call it is.
        function: What runs it: a kernel, or a dispatcher's call.
        arguments: On the host, with the strides that they shall have.
        options: How to run.
        device: Where to run.
        earlier: Values of a call that comes first, in the same memory.
    """
    buffers, given = placed(arguments, options, device)
    if earlier is not None:
        with suppress(Exception):  # whatever it does, it is not what is looked at
            with_other_values(function, given, earlier)
    stir(options.before, device)
    threads, watch, references = threading.active_count(), Watch(options, device), set[str]()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch_threads(options.threads))
            if options.poison or device.type != "cpu":
                stack.enter_context(watch)
            if options.watch:
                stack.enter_context(references_seen(references))
            start = time.perf_counter()
            outputs = called(function, given, options, device)
            synchronise(device)
            seconds = time.perf_counter() - start
    except (ArgumentError, NoKernelError) as error:
        return refusal(error, kept(buffers, options))
    except (Exception, SystemExit) as error:  # a kernel may raise anything
        return Response(status="raised", message=f"{type(error).__name__}: {error}"[:4000])
    written = [given[name] for name in operator.mutates]
    results = snapshot([*outputs[0], *written], options)
    late = [snapshot([*other, *written], options) for other in outputs[1:]]
    whole = kept(buffers, options)
    if options.overwrite:
        for tensor in (*called(function, given, options, device)[0], *buffers.values()):
            tensor.zero_()
        late.append(snapshot(outputs[0], options))
    if options.settle:
        late.append(snapshot_later([*outputs[0], *written], options))
    return Response(
        status="ran",
        results=results,
        late=[tensor for results in late for tensor in results],
        buffers=whole,
        zones=[torch.cat((zone[:GUARD], zone[-GUARD:])).cpu() for zone in watch.zones],
        references=sorted(references),
        on_host=watch.on_host,
        left_running=max(0, threading.active_count() - threads),
        seconds=seconds,
    )


def placed(arguments: Values, options: Options, device: torch.device) -> tuple[dict[str, Tensor], Values]:
    """The arguments on the device: (the buffers that they lie in, the arguments)."""
    if options.repeats > 1:
        large = {
            name: value.to(device, copy=True) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        for name in options.rows:
            large[name] = large[name].repeat(options.repeats, *(1,) * (large[name].dim() - 1))
        return {}, large
    buffers, given = place_all(arguments, options.fill, options.layout, device)
    for name in options.same[1:]:
        given[name] = given[options.same[0]]
    return buffers, given


def with_other_values(function: Function, given: Values, earlier: Values) -> None:
    """Run a call with other values in the same memory, and put the values back."""
    kept = {name: value.clone() for name, value in given.items() if isinstance(value, Tensor)}
    for name, value in kept.items():
        if earlier[name].shape == value.shape and 0 not in value.stride():
            given[name].copy_(earlier[name])
    try:
        function(**given)
    finally:
        for name, value in kept.items():
            if 0 not in value.stride():
                given[name].copy_(value)


def called(function: Function, given: Values, options: Options, device: torch.device) -> list[list[Tensor]]:
    """The outputs of the call, of every thread."""
    if options.side_stream:
        return [on_side_stream(function, given, device)]
    if options.together > 1:
        with ThreadPoolExecutor(options.together) as pool:
            running = [pool.submit(copy_context().run, lambda: function(**given)) for _ in range(options.together)]
            return [leaves(future.result()) for future in running]
    return [leaves(function(**given))]


def on_side_stream(function: Function, given: Values, device: torch.device) -> list[Tensor]:
    """Run on a stream that has yet to do slow work and to bring the arguments when the call is made."""
    stream = torch.Stream(device)
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    waiting = {name: value.clone() for name, value in tensors.items()}
    for value in tensors.values():
        value.zero_()
    synchronise(device)
    with stream:
        slow = torch.ones(2048, 2048, device=device)
        for _ in range(20):
            slow = slow @ slow * 2.0**-11
        for name, value in waiting.items():
            tensors[name].copy_(value, non_blocking=True)
        outputs = leaves(function(**given))
        event = stream.record_event()
    event.synchronize()
    return outputs


def leaves(outputs: Any) -> list[Tensor]:  # Any: whatever a kernel returns
    """The tensors that a call returned, in order."""
    return [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor)]


def snapshot(tensors: list[Tensor], options: Options) -> list[Tensor]:
    """Host copies of results, or of some of their copies when rows were repeated."""
    if options.repeats > 1:
        rows = [tensor.unflatten(0, (options.repeats, -1)) for tensor in tensors]
        return [tensor[list(options.copies)].cpu() for tensor in rows]
    return [tensor.detach().to("cpu", copy=True) for tensor in tensors]


def refusal(error: ArgumentError | NoKernelError, buffers: dict[str, Tensor]) -> Response:
    """The answer where nothing ran."""
    status = "illegal" if isinstance(error, ArgumentError) else "refused"
    declined = isinstance(error, Declined)
    return Response(status=status, message=str(error), declined=declined, buffers=buffers)


def snapshot_later(tensors: list[Tensor], options: Options) -> list[Tensor]:
    """Host copies of results, after a while."""
    time.sleep(options.settle)
    return snapshot(tensors, options)


def kept(buffers: dict[str, Tensor], options: Options) -> dict[str, Tensor]:
    """Host copies of the buffers, where they are asked for."""
    return {name: buffer.to("cpu", copy=True) for name, buffer in buffers.items()} if options.buffers else {}


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def stir(calls: int, device: torch.device) -> None:
    """Use memory and threads in other ways, with sizes that differ from call to call."""
    for number in range(calls):
        side = 64 + 17 * number
        work = torch.full((side, side), float(number), device=device)
        torch.softmax(work @ work.T, dim=-1).sum()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads; 0 leaves that as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def references_seen(found: set[str]) -> Iterator[None]:
    """Note every operator whose reference is entered, on any thread."""

    def look(frame: FrameType, event: str, _: Any) -> None:  # Any: as the interpreter gives it
        code = frame.f_code
        if event == "call" and code.co_name == "reference" and code.co_filename.startswith(OPERATORS_FOLDER):
            found.add(Path(code.co_filename).stem)

    threading.setprofile(look)
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


class Watch(TorchFunctionMode):
    """Sees every call of torch: poisons and guards what is allocated, counts what is computed on the host."""

    def __init__(self, options: Options, device: torch.device) -> None:
        super().__init__()
        self.options, self.device = options, device
        self.zones: list[Tensor] = []
        self.on_host = 0

    def __torch_function__(
        self, func: Function, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run torch's function, then look at what it made."""
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or result.layout != torch.strided:
            return result
        if self.options.poison and func in EMPTY and result.device.type != "meta" and len(self.zones) < MOST_ZONES:
            buffer, result = reserve(result.shape, result.stride(), result.dtype, self.options.fill, result.device)
            self.zones.append(buffer)
        elif result.device.type == "cpu" != self.device.type and result.is_floating_point():
            self.on_host += result.numel()
        return result
