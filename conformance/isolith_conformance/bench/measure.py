"""One row: make the call, time it, time the reference and the peers on the same arguments, judge what was timed."""

import gc
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from isolith.dispatch import Dispatcher, Recorder, bind, references, using
from isolith.errors import FallbackWarning, Unsupported
from isolith.memory import bytes_free
from isolith.operator import AnyOperator, Cost
from isolith_conformance.bench.clock import Clock
from isolith_conformance.bench.fill import Fill
from isolith_conformance.bench.machine import roofline
from isolith_conformance.bench.memory import MARGIN, peak_extra
from isolith_conformance.bench.part import FEW, Part, part_of
from isolith_conformance.bench.peer import Peer
from isolith_conformance.bench.peers import PEERS
from isolith_conformance.bench.record import Limits, PeerTime, Row, Timing
from isolith_conformance.bench.workloads import Setting, Workload
from isolith_conformance.execute import leaves
from isolith_conformance.judge import Verdict, judge_beside

Arguments = dict[str, Any]  # Any: an operator's arguments


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all rows have in common.

    Args:
        dispatcher: Chooses the kernels.
        clock: Times the calls.
        limits: Of the machine.
        seconds: The budget of a kernel's repeats, and of each peer's.
        reference_seconds: What a run of the reference may take; 0 leaves its time out.
        peers: Ways to time beside it.
    """

    dispatcher: Dispatcher
    clock: Clock
    limits: Limits
    seconds: float = 1.0
    reference_seconds: float = 20.0
    peers: tuple[Peer, ...] = PEERS

    @property
    def device(self) -> str:
        """The torch device that calls are made on."""
        return str(self.clock.device)


@dataclass(kw_only=True)
class Made:
    """A call's arguments, and its writable ones as they were before."""

    operator: AnyOperator
    arguments: Arguments
    before: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.before = {name: self.arguments[name].clone() for name in self.operator.mutates}

    def reset(self) -> None:
        """Undo what a call has written."""
        for name, value in self.before.items():
            self.arguments[name].copy_(value)

    def results(self, outputs: Any) -> list[Tensor]:  # Any: what the operator returned
        """Outputs, then written arguments, on the host, in memory of their own."""
        mutated = [self.arguments[name].clone() for name in self.operator.mutates]
        return [leaf.cpu() for leaf in (*leaves(outputs), *mutated)]


def measure(bench: Bench, setting: Setting, workload: Workload) -> Row:
    """The row of a call; one that raises has the error for a problem."""
    operator = workload.operator
    shape = operator.arguments(**workload.make(Fill("meta")))
    cost = operator.cost(**shape)
    least, bound = roofline(cost, bench.limits)
    row = Row(
        operator=operator.name,
        label=workload.label,
        note=workload.note,
        phase=setting.phase,
        context=setting.context,
        tokens=setting.tokens,
        experts=setting.experts,
        kernel="",
        ran=(),
        fallback=False,
        time=None,
        **of_cost(cost),
        roofline_s=least,
        bound=bound,
        percent=None,
        extra_bytes=None,
        reference=None,
        reference_note="",
        ratio=None,
        state="ERROR",
        checked="nothing",
    )
    try:
        with torch.no_grad():
            made = Made(operator=operator, arguments=operator.arguments(**workload.make(Fill(bench.device))))
            return timed(bench, row, made)
    except Exception as error:  # a plugin's kernel may raise anything; the whole reason stands in the row
        return replace(row, problem=f"{type(error).__name__}: {error}"[:4000])
    finally:
        made = None  # type: ignore[assignment]  # its memory is the next call's
        gc.collect()


def of_cost(cost: Cost) -> dict[str, Any]:  # Any: fields of Row
    """A cost as a row has it."""
    return {
        "flops": cost.flops,
        "bytes_read": cost.bytes_read,
        "bytes_written": cost.bytes_written,
        "math": cost.math,
    }


def timed(bench: Bench, row: Row, made: Made) -> Row:
    """The row with its times and its verdict."""
    call, chosen = resolved(bench.dispatcher, made)
    row = replace(row, **chosen)
    with using(bench.dispatcher):
        made.reset()
        extra = peak_extra(bench.clock, call)
        took, outputs = bench.clock.measure(call, bench.seconds, before=made.reset)
    results = made.results(outputs)
    del outputs
    made.reset()
    row = replace(row, time=took, extra_bytes=extra, percent=100 * row.roofline_s / took.median)
    row, found, checked = beside_reference(bench, row, made, results)
    if row.kernel == "reference":
        checked = f"itself: {checked} is what ran"
    made.reset()
    return replace(
        row,
        state="RIGHT" if found.passed else "WRONG",
        checked=checked,
        problem=found.problem,
        statistics=dict(found.statistics),
        peers=tuple(peer_times(bench, made, took)),
    )


def resolved(dispatcher: Dispatcher, made: Made) -> tuple[Callable[[], Any], dict[str, Any]]:  # Any: of Row
    """(the call to time, what a row says of it), from one checked call."""
    operator, given = made.operator, made.arguments
    recorder = Recorder(dispatcher.registry, dispatcher.settings)
    with using(recorder), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)  # the row says it
        operator(**given)
    ran = tuple(name for (called, name) in recorder.calls if called == operator.name)
    parts = tuple(f"{called}: {name}" for (called, name) in recorder.calls if called != operator.name)
    with using(dispatcher):
        handle = bind(operator, **given)
        explained = dispatcher.explain(operator, given)
    # A kernel that refuses when it runs steps down in a call, not in a handle.
    stepped = handle.kernel not in ran
    timed_function: Callable[..., Any] = operator if stepped else handle
    known = {"kernel": ran[0] if ran else handle.kernel, "ran": (*ran, *parts)}
    return lambda: timed_function(**given), known | {"fallback": explained.is_fallback or stepped}


def beside_reference(bench: Bench, row: Row, made: Made, results: list[Tensor]) -> tuple[Row, Verdict, str]:
    """(the row with the reference's time, the verdict, what was compared)."""
    operator, part = made.operator, part_of(made.operator, made.arguments)
    note = "left out by --no-reference" if not bench.reference_seconds else ""
    if part is None:
        # No part of it stands by itself: the whole is what it is compared with.
        took, outputs = run_reference(bench, operator, made.arguments, made.reset, again=not note)
        expected = made.results(outputs)
        made.reset()
        return with_reference(row, None if note else took, note), verdict(made, expected, results), "the reference"
    seconds, expected, peak = of_part(bench, operator, part)
    scale = part.tokens / FEW
    if not note and seconds * scale > bench.reference_seconds:
        note = f"would take about {seconds * scale:.0f} s; --reference-seconds allows it"
    if not note and peak is not None and peak * scale > MARGIN * bytes_free(bench.device):
        note = f"would need about {int(peak * scale):,} bytes"
    if note:
        found = judge_beside(operator, part.arguments, expected, part.of(results))
        return with_reference(row, None, note), found, f"the reference on {FEW} of {part.tokens} tokens"
    took, outputs = run_reference(bench, operator, made.arguments, made.reset, again=True)
    return with_reference(row, took, ""), verdict(made, made.results(outputs), results), "the reference"


def verdict(made: Made, expected: list[Tensor], results: list[Tensor]) -> Verdict:
    """Judge the whole call."""
    return judge_beside(made.operator, made.arguments, expected, results)


def with_reference(row: Row, took: Timing | None, note: str) -> Row:
    """The row with the reference's time, or why there is none."""
    assert row.time is not None, "the kernel has been timed"
    ratio = None if took is None else took.median / row.time.median
    return replace(row, reference=took, reference_note=note, ratio=ratio)


def of_part(bench: Bench, operator: AnyOperator, part: Part) -> tuple[float, list[Tensor], int | None]:
    """(seconds, results on the host, bytes at the peak) of the reference on some tokens."""
    kept: list[Any] = []  # Any: what the reference returns
    with using(references(bench.dispatcher)):
        started = time.perf_counter()
        peak = peak_extra(bench.clock, lambda: kept.append(operator(**part.arguments)))
        seconds = time.perf_counter() - started
    return seconds, [leaf.cpu() for leaf in leaves(kept[0])], peak


def run_reference(
    bench: Bench, operator: AnyOperator, arguments: Arguments, reset: Callable[[], None], again: bool
) -> tuple[Timing, Any]:  # Any: what the operator returns
    """(times, result) of the reference, parts of a composite too; `again` repeats it within the budget."""
    reset()
    with using(references(bench.dispatcher)):
        call: Callable[..., Any] = bind(operator, **arguments)
        try:
            one, result = bench.clock.measure(lambda: call(**arguments), 0.0, least=1, before=reset, warm_up=False)
        except Unsupported:  # torch lacks a part of it on this device: a call goes on to the host, a handle does not
            reset()
            call = operator
            one, result = bench.clock.measure(lambda: call(**arguments), 0.0, least=1, before=reset, warm_up=False)
        if not again or one.median > bench.seconds:
            return one, result
        result = None  # two results at once may be too many
        return bench.clock.measure(lambda: call(**arguments), bench.seconds, least=1, before=reset, warm_up=False)


def peer_times(bench: Bench, made: Made, took: Timing) -> Iterable[PeerTime]:
    """The times of all peers that take the call."""
    for peer in bench.peers:
        if peer.operator != made.operator.name or not peer.installed:
            continue
        try:
            run = peer.prepare(made.arguments)
            if run is None:
                continue
            theirs, _ = bench.clock.measure(run, bench.seconds, before=made.reset)
        except Exception as error:  # somebody else's code, of any version; the reason stands in the row
            reason = f"{type(error).__name__}: {error}"[:400]
            yield PeerTime(name=peer.name, computes=peer.computes, time=None, ratio=None, why_not=reason)
            continue
        ratio = theirs.median / took.median
        yield PeerTime(name=peer.name, computes=peer.computes, time=theirs, ratio=ratio)
