"""What a benchmark found: the record that its table, pictures, page and comparisons are made of.

A record is JSON, checked against these types when it is read, with a SHA-256 over all of it.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from isolith_conformance import report_json
from isolith_conformance.report import BackendRecord, Environment, Suite
from isolith_conformance.report_json import Hex, JsonError, as_text, canonical, decode, encode, parse

VERSION = 2
LARGEST_FILE = 32 * 2**20

State = Literal["RIGHT", "WRONG", "ERROR"]
"""ERROR: the kernel, or what makes its call, has raised."""


class BenchError(ValueError):
    """A benchmark that cannot run, or a record that cannot be read; the message is a sentence."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of a call: the median, the quartiles, and how many repeats they are of."""

    median: float
    lower: float
    upper: float
    repeats: int

    @property
    def spread(self) -> float:
        """The interquartile range."""
        return self.upper - self.lower


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the device did in the same run.

    Args:
        read_gbs: Reading a long stream, GB/s.
        copy_gbs: Copying one, GB/s read and written.
        gflops: Of a square product, by format.
        assumed: Formats without a rate of their own, and why; they count with bfloat16's.
        launch_us: Of a kernel that does nothing, back to back; None where calls run on the host.
        how: What was measured, in words.
    """

    read_gbs: float
    copy_gbs: float
    gflops: Mapping[str, float]
    assumed: Mapping[str, str]
    launch_us: float | None
    how: str


@dataclass(frozen=True, kw_only=True)
class PeerTime:
    """Another way to compute it: what that computes, its time, and how much longer it takes than the kernel."""

    name: str
    computes: str
    time: Timing | None
    ratio: float | None
    why_not: str | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One call.

    Args:
        operator: What was called.
        label: Which of the model's calls of it.
        note: In which way the call is not the model's own; "" where it is.
        phase, context, tokens, experts: Of the step.
        kernel: What took the call, as `explain` spells it.
        ran: What ran it, parts of a composition too.
        fallback: Whether that is a step down for this device.
        time: None where the call has raised.
        flops, bytes_read, bytes_written, math: By the operator's `cost`.
        roofline_s: The least time under the measured limits.
        bound: What the roofline time is made of.
        percent: Roofline time over median, in percent.
        extra_bytes: Memory beyond the arguments at the peak of a call; None where the machine cannot say.
        reference: The reference's time on the same arguments.
        reference_note: Why there is none; else "".
        ratio: The reference's median over the kernel's.
        state: Whether the results that were timed are right.
        checked: What they were compared with.
        problem: The first thing that is wrong.
        statistics: Of the comparison.
    """

    operator: str
    label: str
    note: str
    phase: Literal["decode", "prefill"]
    context: int
    tokens: int
    experts: int
    kernel: str
    ran: tuple[str, ...]
    fallback: bool
    time: Timing | None
    flops: int
    bytes_read: int
    bytes_written: int
    math: str
    roofline_s: float
    bound: Literal["memory", "compute"]
    percent: float | None
    extra_bytes: int | None
    reference: Timing | None
    reference_note: str
    ratio: float | None
    state: State
    checked: str
    problem: str | None = None
    statistics: Mapping[str, report_json.Statistic] = field(default_factory=dict)
    peers: tuple[PeerTime, ...] = ()

    @property
    def key(self) -> tuple[str, str, str, int, int, int, str]:
        """What two rows of one call have in common."""
        return self.operator, self.label, self.phase, self.context, self.tokens, self.experts, self.note

    @property
    def gbs(self) -> float | None:
        """Bytes of the cost over the median, GB/s."""
        return None if self.time is None else (self.bytes_read + self.bytes_written) / self.time.median / 1e9

    @property
    def gflops(self) -> float | None:
        """FLOPs of the cost over the median, GFLOP/s."""
        return None if self.time is None else self.flops / self.time.median / 1e9


@dataclass(frozen=True, kw_only=True)
class BenchRun:
    """What was asked for; `caches` says whether they were filled with something else before every repeat."""

    command: str
    started: str
    seconds: float
    model: str
    phase: Literal["decode", "prefill"]
    contexts: tuple[int, ...]
    tokens: tuple[int, ...]
    experts: tuple[int, ...]
    caches: Literal["cold", "warm"]
    threads: int
    complete: bool


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A benchmark's file, field by field."""

    schema: Literal[2]
    kind: Literal["bench"]
    suite: Suite
    run: BenchRun
    environment: Environment
    backend: BackendRecord
    limits: Limits
    rows: tuple[Row, ...]
    sha256: Hex

    @property
    def all_right(self) -> bool:
        """Whether every row was timed and is right, and none is missing."""
        return self.run.complete and all(row.state == "RIGHT" for row in self.rows)


def bench_of(**parts: Any) -> Bench:  # Any: the fields of Bench
    """A record of its parts, with its version and hash."""
    made = {"schema": VERSION, "kind": "bench", **parts}
    return Bench(**made, sha256=hash_of(made))


def hash_of(made: Mapping[str, Any]) -> str:  # Any: the fields of Bench
    """The hash over everything but itself."""
    text = canonical({name: encode(value) for name, value in made.items()})
    return hashlib.sha256(text.encode()).hexdigest()


def write(bench: Bench, path: Path) -> None:
    """Write the file, a field a line and a row a line, at once or not at all."""
    made = encode(bench)
    try:
        check(decode(Bench, made))
    except JsonError as error:
        raise BenchError(f"{path}: {error}.") from error
    heads = [f'"{name}":{canonical(value)}' for name, value in made.items() if name != "rows"]
    rows = [",\n".join(canonical(row) for row in made["rows"])]
    lines = ["{", *(f"{head}," for head in heads), '"rows":[', *rows, "]", "}"]
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text("\n".join(lines) + "\n", encoding="ascii")
        os.replace(part, path)
    except OSError as error:
        raise BenchError(f"{path}: {str(error)[:200]}.") from error


def read(path: Path) -> Bench:
    """The record in a file; BenchError unless it is whole and of this version."""
    try:
        return check(decode(Bench, parse(as_text(report_json.read_bytes(path, LARGEST_FILE)))))
    except JsonError as error:
        raise BenchError(f"{path}: {error}.") from error


def check(bench: Bench) -> Bench:
    """The record, where its parts agree with each other; JsonError otherwise."""
    for row in bench.rows:
        if (row.time is None) != (row.state == "ERROR"):
            raise JsonError(f"row {report_json.shown(row.operator)} has the state {row.state}, and a time or none")
        if min(row.flops, row.bytes_read, row.bytes_written, row.roofline_s) < 0:
            raise JsonError(f"row {report_json.shown(row.operator)} has a cost below 0")
        times = [row.time, row.reference, *(peer.time for peer in row.peers)]
        if any(each is not None and not 0 < each.lower <= each.median <= each.upper for each in times):
            raise JsonError(f"row {report_json.shown(row.operator)} has a time that is none")
    keys = [row.key for row in bench.rows]
    if len(set(keys)) != len(keys):
        raise JsonError("two rows are of one call")
    found = hash_of({one.name: getattr(bench, one.name) for one in fields(bench) if one.name != "sha256"})
    if found != bench.sha256:
        raise JsonError(f"its content has the hash {found}, its sha256 is {bench.sha256}")
    return bench


def is_bench(path: Path) -> bool:
    """Whether a file says that it is a benchmark's, be it a valid one or not."""
    try:
        with path.open("rb") as file:
            head = file.read(200)
    except OSError:
        return False
    return b'"kind":"bench"' in head.replace(b" ", b"")
