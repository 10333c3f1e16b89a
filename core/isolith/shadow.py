"""Shadow runs: for a sample of the kernels' calls, the reference beside them, and whether the judge finds them right.

ISOLITH_SHADOW=0.01 samples one call in a hundred of every kernel. Of such a call the tensors are copied to the host
before the kernel runs, and its results after it; the reference runs on those copies, on a thread of its own, where none
of the caller's modes and settings are in force, and the judge of `isolith_conformance` compares. The caller waits for
a while at most, and gets what the kernel gave. Nothing here draws from a random generator that is not its own, and
nothing raises; only a filter that makes errors of warnings makes one of a ShadowWarning too.

References and compositions are not compared: the one is what the judge measures by, of the other each part is a call.
"""

import functools
import importlib
import random
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from isolith import config
from isolith.errors import ArgumentError, ShadowWarning
from isolith.simulated import SimulatedTensor, is_simulated

if TYPE_CHECKING:
    from isolith.operator import AnyOperator
    from isolith.plugins import AnyKernel

Function = Callable[..., Any]  # Any: the operator's own signature

JUDGE = "isolith_conformance.shadow"

MOST_FLOPS = 2**31
"""A reference on one core of a host does about 2**34 float32 operations a second: an eighth of a second."""
MOST_BYTES = 2**28
"""Of arguments and results together: a device's memory comes to the host at a few GB/s, so a tenth of a second."""
TIME = 2.0
"""A share of 0.01 may take 2 * 0.01 of the time that goes by. At 1 every call is asked for, whatever it takes."""
MOST_CREDIT_S = 1.0
"""Time that was not used is saved up to here, so that no rush of comparisons follows a pause."""
PATIENCE_S = 1.0
"""How long a call waits for the judge, who then goes on in the background: to find it wrong takes far longer than to
find it right, since every legal rounding is tried. At a share of 1 the call waits to the end."""
MOST_WRONG = 3
"""A kernel that was found wrong so often is not compared again."""
SEED = 0
"""With the names of operator and kernel: which of its calls are sampled is the same in every run and on every rank."""
PLAIN = (Tensor, torch.nn.Parameter, SimulatedTensor)
"""Tensors of other kinds stand for values that are elsewhere, or that there are none of."""
MOST_REASONS = 64

TRACED = "its tensors are traced, transformed or of a kind of their own"
CAPTURED = "a graph is being captured"
LARGE = f"it takes more than {MOST_FLOPS:,} operations"
LONG = f"its tensors have more than {MOST_BYTES:,} bytes"
NO_TIME = "the time that shadow runs may take was used up"
KNOWN = f"it was found wrong {MOST_WRONG} times"
RAISED = "the kernel raised or refused"

is_dynamo_compiling = torch.compiler.is_dynamo_compiling


class Skip(Exception):  # noqa: N818  # no mistake: a sampled call that is not compared
    """Why a call is not compared, in the same words for every such call: they are counted by it."""


@dataclass(frozen=True, kw_only=True)
class ShadowRecord:
    """What shadow runs have found of one kernel.

    Args:
        seen: Its calls, sampled or not.
        compared: Calls that the judge has looked at.
        wrong: Those of them with wrong results.
        skipped: Calls that were sampled and not compared, by reason.
        seconds: What shadow runs took, the kernel's own time apart.
        problem: The judge's sentence on the first wrong call.
        inputs: The folder that keeps that call, for `python -m isolith_conformance reproduce`; or why there is none.
    """

    operator: str
    kernel: str
    seen: int
    compared: int
    wrong: int
    skipped: Mapping[str, int]
    seconds: float
    problem: str | None
    inputs: str | None


@dataclass(kw_only=True)
class Tally:
    """What is known of one kernel; it changes under the lock of its Shadow."""

    operator: "AnyOperator"
    kernel: str
    declares: tuple[str, ...]
    draw: random.Random
    seen: int = 0
    compared: int = 0
    wrong: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    last_s: float = 0.0
    problem: str | None = None
    inputs: str | None = None


@dataclass(kw_only=True)
class Held:
    """A call that is being compared.

    Args:
        given: The caller's arguments by name.
        copies: The same on the host, as they were before the call.
        reserved_s: Time taken from the credit for it.
        spent_s: Time that it has taken.
        done: Whether the comparison is.
        left: Whether the caller waits no longer.
        told: The sentence to warn of.
    """

    given: dict[str, Any] = field(default_factory=dict)  # Any: a call's own values
    copies: dict[str, Any] = field(default_factory=dict)
    reserved_s: float = 0.0
    spent_s: float = 0.0
    done: bool = False
    left: bool = False
    told: str | None = None


class Shadow:
    """Compares a share of the kernels' calls.

    Args:
        share: Of every kernel's calls.
        clock: Gives seconds.
        folder: Where wrong calls are kept; None for the user's state folder.
    """

    def __init__(
        self, share: float, clock: Callable[[], float] = time.perf_counter, folder: Path | None = None
    ) -> None:
        self.share, self.clock, self.folder = share, clock, folder
        self.lock = threading.Lock()
        self.tallies: dict[tuple[str, str], Tally] = {}
        self.credit_s, self.counted_to = 0.0, clock()
        self.late = 0  # comparisons that go on after their call has returned

    @functools.cached_property
    def judge(self) -> Any:  # Any: a module, which core does not import by itself
        """What compares; None, with a warning, where it is not installed."""
        try:
            return importlib.import_module(JUDGE)
        except ImportError as error:
            package = JUDGE.partition(".")[0]
            warnings.warn(
                f"ISOLITH_SHADOW={self.share:g} compares nothing: {package} cannot be imported ({error});"
                " pip install 'isolith[conformance]'",
                ShadowWarning,
                stacklevel=2,
            )
            return None

    def beside(self, operator: "AnyOperator", name: str, kernel: "AnyKernel") -> Function:
        """The kernel's function, that has a share of its calls compared."""
        run_kernel, tally = kernel.fn, self.tally(operator, name, kernel.declares)
        if self.judge is None:
            return run_kernel

        def run(*args: Any, **kwargs: Any) -> Any:
            if is_dynamo_compiling() or not self.drawn(tally):
                return run_kernel(*args, **kwargs)
            held = self.before(tally, args, kwargs)
            if held is None:
                return run_kernel(*args, **kwargs)
            try:
                result = run_kernel(*args, **kwargs)
            except BaseException:
                self.settle(tally, held, skipped=RAISED)
                raise
            told = self.after(tally, held, result)
            if told is not None:
                warnings.warn(told, ShadowWarning, stacklevel=4)
            return result

        return run

    def tally(self, operator: "AnyOperator", kernel: str, declares: tuple[str, ...] = ()) -> Tally:
        """The one tally of a kernel."""
        with self.lock:
            if (operator.name, kernel) not in self.tallies:
                draw = random.Random(f"{SEED} {operator.name} {kernel}")
                made = Tally(operator=operator, kernel=kernel, declares=declares, draw=draw)
                self.tallies[operator.name, kernel] = made
            return self.tallies[operator.name, kernel]

    def drawn(self, tally: Tally) -> bool:
        """Count a call, and say whether it is sampled."""
        with self.lock:
            tally.seen += 1
            return tally.draw.random() < self.share

    def before(self, tally: Tally, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Held | None:
        """Copy a call's arguments; None, with the reason counted, where it is not to be compared."""
        held, started = Held(), self.clock()
        try:
            held.given = tally.operator.by_name(*args, **kwargs)
            refuse(tally.operator, held.given)
            held.reserved_s = self.reserve(tally)
            held.copies = {n: host_copy(v) if isinstance(v, Tensor) else v for n, v in held.given.items()}
        except Exception as error:  # whatever goes wrong here is none of the caller's
            held.spent_s = self.clock() - started
            self.settle(tally, held, skipped=reason_of(error))
            return None
        held.spent_s = self.clock() - started
        return held

    def after(self, tally: Tally, held: Held, result: Any) -> str | None:  # Any: whatever a kernel returns
        """Compare what the kernel gave; a sentence where this is its first wrong call and the caller is still there."""
        started = self.clock()
        try:
            leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            results = [host_copy(each) for each in (*leaves, *(held.given[name] for name in tally.operator.mutates))]
            # torch's modes, autocast and the default device are a thread's own. It is waited for when Python ends.
            thread = threading.Thread(target=self.compare, args=(tally, held, results, started), name="isolith shadow")
            thread.start()
        except Exception as error:  # nor here
            held.spent_s += self.clock() - started
            self.settle(tally, held, skipped=reason_of(error))
            return None
        thread.join(PATIENCE_S if self.share < 1 else None)
        with self.lock:
            held.left = True
            self.late += not held.done
            return held.told

    def compare(self, tally: Tally, held: Held, results: list[Tensor], started: float) -> None:
        """Judge on a thread of its own; it warns by itself where the caller has gone on."""
        skipped, told = None, None
        try:
            told = self.compared(tally, held, results)
        except Exception as error:  # nor here
            skipped = reason_of(error)
        held.spent_s += self.clock() - started
        self.settle(tally, held, skipped)
        with self.lock:
            held.done, held.told = True, told
            self.late -= held.left
        if held.left and told is not None:
            warnings.warn(told, ShadowWarning, stacklevel=1)

    def compared(self, tally: Tally, held: Held, results: list[Tensor]) -> str | None:
        """Judge, count, and keep the kernel's first wrong call: the sentence on that."""
        problem: str | None = self.judge.problem(tally.operator, held.copies, results, tally.declares)
        with self.lock:
            tally.compared += 1
            tally.wrong += problem is not None
            first = problem is not None and tally.problem is None
            tally.problem = tally.problem or problem
        if not first:
            return None
        simulated = any(is_simulated(v.device) for v in held.given.values() if isinstance(v, Tensor))
        tally.inputs, way_out = self.kept(tally, held, results, "twin" if simulated else "hardware")
        return f"{tally.kernel} gives wrong results for {tally.operator.name}: {problem}; {way_out}"

    def kept(self, tally: Tally, held: Held, results: list[Tensor], how: str) -> tuple[str, str]:
        """Keep a wrong call: (where, or why not; the end of a sentence)."""
        folder = self.folder or config.state_folder() / "shadow"
        try:
            place = self.judge.keep(folder, tally.operator, tally.kernel, how, tally.problem, held.copies, results)
        except Exception as error:  # a full disk, a tensor that no file holds
            reason = f"{type(error).__name__}: {error}"
            return reason, f"its inputs are not kept: {reason}"
        return str(place), f"the call again: python -m isolith_conformance reproduce {place}"

    def reserve(self, tally: Tally) -> float:
        """Take from the credit what the kernel's last comparison took; Skip where there is not so much."""
        with self.lock:
            now = self.clock()
            earned = (now - self.counted_to) * TIME * self.share
            self.credit_s, self.counted_to = min(MOST_CREDIT_S, self.credit_s + earned), now
            needed = min(tally.last_s, MOST_CREDIT_S)
            if tally.wrong >= MOST_WRONG:
                raise Skip(KNOWN)
            if self.share < 1 and (self.late or self.credit_s < needed):
                raise Skip(NO_TIME)
            self.credit_s -= needed
            return needed

    def settle(self, tally: Tally, held: Held, skipped: str | None = None) -> None:
        """Count what a sampled call has come to, and pay for it."""
        with self.lock:
            self.credit_s += held.reserved_s - held.spent_s
            tally.seconds += held.spent_s
            if skipped is None:
                tally.last_s = held.spent_s
            else:
                known = skipped in tally.skipped or len(tally.skipped) < MOST_REASONS
                tally.skipped[skipped if known else "other reasons"] += 1

    def records(self) -> list[ShadowRecord]:
        """What has been found so far."""
        names = [name for name in ShadowRecord.__dataclass_fields__ if name not in ("operator", "skipped")]
        with self.lock:
            return [
                ShadowRecord(
                    operator=tally.operator.name,
                    skipped=dict(tally.skipped),
                    **{name: getattr(tally, name) for name in names},
                )
                for tally in self.tallies.values()
            ]


def refuse(operator: "AnyOperator", arguments: Mapping[str, Any]) -> None:  # Any: a call's own values
    """Raise Skip for a call that cannot be compared, or not at a bearable cost; reads metadata."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        raise Skip(TRACED)
    if any(type(t) not in PLAIN or t.layout != torch.strided or t.device.type == "meta" for t in tensors):
        raise Skip(TRACED)
    if any(capturing(device) for device in {tensor.device for tensor in tensors}):
        raise Skip(CAPTURED)
    cost = operator.cost(**arguments)
    if cost.flops > MOST_FLOPS:
        raise Skip(LARGE)
    # What is copied: a pool of a cache is copied whole, however little of it the call reads.
    if sum(tensor.nbytes for tensor in tensors) + cost.bytes_written > MOST_BYTES:
        raise Skip(LONG)


def capturing(device: torch.device) -> bool:
    """Whether the device's current stream records a graph, where a copy to the host would be an error."""
    if device.type == "cpu":
        return False
    answer: bool = getattr(torch.get_device_module(device), "is_current_stream_capturing", bool)()
    return answer


def host_copy(tensor: Tensor) -> Tensor:
    """A copy on the host that no mode of the caller sees made, and that no gradient flows through."""
    with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
        return tensor.detach().to("cpu", copy=True)


def reason_of(error: Exception) -> str:
    """What a call that is not compared is counted under: no value of the call stands in it."""
    if isinstance(error, Skip):
        return str(error)
    if isinstance(error, ArgumentError):
        return "its values are illegal, which is not checked on a device unless ISOLITH_DEBUG=1"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"the comparison raised {type(error).__name__} ({Path(frame.filename).name}:{frame.lineno})"


SHADOWS: dict[float, Shadow] = {}
"""By share: the time that they may take is a process's, whatever its settings."""
LOCK = threading.Lock()


def shadow_for(share: float) -> Shadow | None:
    """The one Shadow of a share; None for 0."""
    if not share:
        return None
    with LOCK:
        return SHADOWS.setdefault(share, Shadow(share))


def shadows() -> tuple[ShadowRecord, ...]:
    """What shadow runs have found of every kernel that was called under ISOLITH_SHADOW, in this process."""
    with LOCK:
        found = [record for shadow in SHADOWS.values() for record in shadow.records()]
    return tuple(sorted(found, key=lambda record: (record.operator, record.kernel)))
