"""What a run of the suite found: the record that every table, page and badge is made of.

A report is JSON, one record per case and line, with a SHA-256 over all of it. The hash finds accidents, not forgery:
whoever can change a report can also hash it anew.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from isolith_conformance import report_json
from isolith_conformance.report_json import Hex, JsonError, Statistic, as_text, canonical, decode, encode, parse, shown

Outcome = Literal["PASS", "FAIL", "ERROR", "CRASH", "TIMEOUT", "NOT-CLAIMED", "WAIVED", "INFRA"]
"""Only PASS is a pass. INFRA: the suite itself could not do its work."""
How = Literal["hardware", "interpreter", "twin", "reference"]
Profile = Literal["strict", "standard", "basic"]
Scope = Literal["full", "quick", "selected"]

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
LARGEST_FILE = 256 * 2**20
LARGEST_REST = 16 * 2**20
VERSION = 1


class ReportError(ValueError):
    """A report that cannot be read or written; the message is a sentence that names the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One check of one kernel with one sample, and what came of it.

    Args:
        id: Unique in a report, and what `reproduce` takes.
        check: Which property was looked at, as the suite's modules name them.
        kernel: What was to run; `executed` is what did.
        problem: The first thing wrong, a sentence; None for a pass.
        rule: Which of the check's rules found it; "" for a pass.
        input_hash: Over all argument bytes.
        statistics: r1, r2, r3, d, … where the check has them, also of a pass.
        limits: What each statistic may be at most.
        result_hash: Over all result bytes, so that two runs can be compared to the bit.
    """

    id: str
    check: str
    backend: str
    operator: str
    family: str
    kernel: str
    sample: str
    dtype: str
    verdict: Outcome
    problem: str | None = None
    rule: str = ""
    seed: int = 0
    input_hash: Hex | None = None
    result_hash: Hex | None = None
    statistics: Mapping[str, Statistic] = field(default_factory=dict)
    limits: Mapping[str, Statistic] = field(default_factory=dict)
    seconds: float = 0.0
    executed: tuple[str, ...] = ()
    how: How = "hardware"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Which suite ran; commit and clean are None where it isn't a checkout."""

    version: str
    commit: str | None = None
    clean: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """What was asked for, and whether it came to its end."""

    profile: Profile
    how: How
    seed: int
    scope: Scope
    started: str
    seconds: float
    command: str
    complete: bool
    peak_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class BackendRecord:
    """A backend as the run found it; of its kernels, those that can run here, and the others with what they lack."""

    name: str
    distribution: str
    version: str
    device: str
    arch: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    why_unavailable: str | None = None
    kernels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unavailable_kernels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where it ran."""

    python: str
    platform: str
    processor: str
    cores: int
    torch: str
    modules: Mapping[str, str] = field(default_factory=dict)
    more: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Whether something is conformant, and every reason why not."""

    conformant: bool
    why_not: tuple[str, ...]
    counts: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What follows from the cases: of the run, of each backend, and counts by operator (as "backend.operator")."""

    conformant: bool
    why_not: tuple[str, ...]
    counts: Mapping[str, int]
    by_backend: Mapping[str, Standing]
    by_operator: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A report's file, field by field."""

    schema: Literal[1]
    suite: Suite
    run: Run
    environment: Environment
    backends: tuple[BackendRecord, ...]
    cases: tuple[Case, ...]
    waivers: tuple[Mapping[str, str], ...]
    summary: Summary
    sha256: Hex


@dataclass(frozen=True, kw_only=True)
class Report:
    """One run: its cases, and all that is needed to judge what they are worth."""

    suite: Suite
    run: Run
    environment: Environment
    backends: tuple[BackendRecord, ...]
    cases: tuple[Case, ...]
    waivers: tuple[Mapping[str, str], ...] = ()

    def __post_init__(self) -> None:
        # Cases end in any order where several processes run them; the file has one order.
        object.__setattr__(self, "cases", tuple(sorted(self.cases, key=lambda case: case.id)))

    @cached_property
    def summary(self) -> Summary:
        """What follows from the cases."""
        from isolith_conformance.report_standing import summarise  # the rules are made of these records

        return summarise(self)

    @cached_property
    def sha256(self) -> str:
        """The hash over the canonical JSON of everything in the file but itself, cases in the order of their ids."""
        hashed = hashlib.sha256()
        for part in canonical_parts(self):
            hashed.update(part.encode())
        return hashed.hexdigest()

    def case(self, case_id: str) -> Case:
        """The case of this id; ReportError when there is none."""
        for case in self.cases:
            if case.id == case_id:
                return case
        raise ReportError(f"The report has no case {shown(case_id)}.")

    def write(self, path: Path) -> None:
        """Write the file, at once or not at all; ReportError when it could not be read again."""
        check_report(self, str(path))
        part = path.with_name(f"{path.name}.part")
        with part.open("w", encoding="ascii", newline="\n") as file:
            for line in lines(self):
                file.write(f"{line}\n")
        os.replace(part, path)


CASE_KEYS = frozenset(one.name for one in fields(Case))


def read(path: Path) -> Report:
    """The report in a file; ReportError unless it is whole, of this version, and says what its cases say."""
    try:
        return report_of(*parts_of(path))
    except JsonError as error:
        raise ReportError(f"{path}: {error}.") from error


def parts_of(path: Path) -> tuple[str, list[Case]]:
    """The file's text with a 0 for each case that has a line of its own, and those cases.

    So a file as we write it is never in memory as a whole; one with other lines is, and must be smaller.
    """
    shrinking, rest, cases, inside = Shrinking(), bytearray(), [], False
    for line in report_json.read_lines(path, LARGEST_FILE):
        if inside and line.startswith(b"{"):
            words = line.rstrip()
            case = shrinking(parse(as_text(words.removesuffix(b","))))
            if not isinstance(case, Case):
                raise JsonError(f"a line of the cases is none: {shown(case)}")
            cases.append(case)
            line = b"0,\n" if words.endswith(b",") else b"0\n"
        else:
            inside = line.rstrip() == b'"cases":['
        rest += line
        if len(rest) > LARGEST_REST:
            raise JsonError(f"beside cases of a line each it has more than {LARGEST_REST} bytes")
    return as_text(rest), cases


def report_of(rest: str, cases: list[Case]) -> Report:
    """The report that the parts of a file spell; JsonError otherwise."""
    made = parse(rest)
    if cases:
        if not isinstance(made, dict) or made.get("cases") != [0] * len(cases):
            raise JsonError("its cases do not stand where cases are due")
        made["cases"] = cases
    document: Document = decode(Document, made)
    report = Report(**{one.name: getattr(document, one.name) for one in fields(Report)})
    check_unique(report)
    if encode(report.summary) != encode(document.summary):
        raise JsonError("its summary is not what its cases say")
    if report.sha256 != document.sha256:
        raise JsonError(f"its content has the hash {report.sha256}, its sha256 is {document.sha256}")
    return report


class Shrinking:
    """Turns parsed cases into their records, equal parts of them into one: those of a large file stay small."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.limits: dict[str, Mapping[str, float]] = {}

    def __call__(self, made: Any) -> Any:  # Any: JSON values
        """The case, where the value has a case's keys."""
        if not isinstance(made, dict) or made.keys() != CASE_KEYS:
            return made
        for name, value in made.items():
            if type(value) is str and name not in ("id", "input_hash", "result_hash"):
                made[name] = self.texts.setdefault(value, value)
        case: Case = decode(Case, made, f"case {shown(made['id'])}")
        limits = self.limits.setdefault(canonical(encode(case.limits)), case.limits)
        executed = tuple(self.texts.setdefault(name, name) for name in case.executed)
        return replace(case, limits=limits, executed=executed)


def check_report(report: Report, where: str) -> None:
    """Raise ReportError where the report's own records are not what a reader accepts."""
    try:
        check_unique(report)
        for name, value in document_of(report).items():
            decode(Document.__annotations__[name], value, name)
        for case in report.cases:
            decode(Case, encode(case), f"case {shown(case.id)}")
    except JsonError as error:
        raise ReportError(f"{where}: {error}.") from error


def check_unique(report: Report) -> None:
    """Refuse two cases of one id, and two backends of one name."""
    for kind, names in (("case", [c.id for c in report.cases]), ("backend", [b.name for b in report.backends])):
        for name, count in Counter(names).items():
            if count > 1:
                raise JsonError(f"the {kind} {shown(name)} stands {count} times")


def document_of(report: Report) -> dict[str, Any]:  # Any: JSON values
    """The file's fields, in its order, without cases and hash."""
    return {
        "schema": VERSION,
        "suite": encode(report.suite),
        "run": encode(report.run),
        "environment": encode(report.environment),
        "backends": encode(report.backends),
        "waivers": encode(report.waivers),
        "summary": encode(report.summary),
    }


def canonical_parts(report: Report) -> Iterator[str]:
    """The canonical JSON of the document without its hash, case by case."""
    document = document_of(report)
    opening = "{"
    for name in sorted([*document, "cases"]):
        yield f'{opening}"{name}":'
        opening = ","
        if name != "cases":
            yield canonical(document[name])
            continue
        yield "["
        for place, case in enumerate(report.cases):
            yield ("," if place else "") + canonical(encode(case))
        yield "]"
    yield "}"


def lines(report: Report) -> Iterator[str]:
    """The file: a field a line, a case a line, so that two files can be told apart line by line."""
    document = document_of(report)
    yield "{"
    for name, value in document.items():
        yield f'"{name}":{canonical(value)},'
    yield '"cases":['
    for place, case in enumerate(report.cases, 1):
        yield canonical(encode(case)) + ("," if place < len(report.cases) else "")
    yield "],"
    yield f'"sha256":"{report.sha256}"'
    yield "}"


def timeless(report: Report) -> Report:
    """The report without what differs between two equal runs: when, how long, how much memory."""
    cases = tuple(replace(case, seconds=0.0) for case in report.cases)
    run = replace(report.run, started="", seconds=0.0, peak_memory_bytes=0)
    return replace(report, run=run, cases=cases)
