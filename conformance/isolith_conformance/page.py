"""A report as one page of HTML that needs nothing else: no server, no network, and no script for what matters.

Everything in a report may come from a plugin. The template escapes all of it, characters that turn or hide text are
spelled out, and the page forbids every script but its own.
"""

import base64
import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from isolith_conformance.house_rules import RULES, kept
from isolith_conformance.page_picture import Picture, pictures_of, share_of_limit
from isolith_conformance.report import OUTCOMES, BackendRecord, Case, Report, ReportError, Standing, read
from isolith_conformance.report_standing import FORBIDDEN, counts, urgency
from isolith_conformance.report_text import in_words, inert, mark, reproduce_command, standing_of

MOST_FAILURES = 50
"""Of one operator on the page; the JSON has all."""
MOST_NEAREST = 3

DTYPE_ORDER = ("float64", "float32", "bfloat16", "float16")
CHECK_ORDER = ("accuracy", "exact", "selection")
ADVICE = {
    "quick": "A quick run is not sufficient for conformance.",
    "selected": "A run of selected cases is not sufficient for conformance.",
    "interpreter": "Results of an interpreter say nothing about a device: not sufficient for conformance.",
    "twin": "Results of a twin say nothing about a device: not sufficient for conformance.",
    "reference": "Results of the reference say nothing about a device: not sufficient for conformance.",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What the cases under one heading came to.

    Args:
        kind: bad, waived, pass, unclaimed or none: a class of the style sheet.
        sign: What stands in the cell.
        told: The counts as prose.
        how: Where the results come from, unless from hardware.
        target: The place on the page that tells more.
    """

    kind: str
    sign: str
    told: str
    how: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A case with what it takes to see it again; also of a pass that came near a limit."""

    case: Case
    anchor: str
    lines: tuple[str, ...]
    figures: tuple[tuple[str, float, float | None], ...]
    command: str


@dataclass(frozen=True, kw_only=True)
class OperatorView:
    """One operator on one backend."""

    name: str
    anchor: str
    told: str
    cells: tuple[Cell, ...]
    failures: tuple[Failure, ...]
    omitted: int
    nearest: tuple[Failure, ...]
    pictures: tuple[Picture, ...]
    kernels: tuple[str, ...]
    refusals: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class BackendView:
    """One backend: its matrix, by family."""

    record: BackendRecord
    standing: Standing
    told: str
    hows: tuple[str, ...]
    dtypes: tuple[str, ...]
    checks: tuple[str, ...]
    families: tuple[tuple[str, tuple[OperatorView, ...]], ...]
    house_rules: tuple[tuple[str, tuple[str, ...]], ...]
    """(operator, cases that keep each of the vendors' own rules), of operators with float results."""

    @property
    def urgent_first(self) -> list[OperatorView]:
        """All operators, those that failed before the others."""
        views = [view for _, operators in self.families for view in operators]
        return sorted(views, key=lambda view: not view.failures)


def page(report: Report) -> str:
    """The page of a report."""
    folder = files("isolith_conformance")
    style, script = (folder.joinpath(f"page.{kind}").read_text() for kind in ("css", "js"))
    template = environment().from_string(folder.joinpath("page.html.j2").read_text())
    return template.render(
        report=report,
        mark=mark(report),
        advice=[ADVICE[word] for word in (report.run.scope, report.run.how) if word in ADVICE],
        total=in_words(report.summary.counts),
        backends=[backend_view(report, record, place) for place, record in enumerate(known_backends(report))],
        outcomes=OUTCOMES,
        rules=[rule.name for rule in RULES],
        style=Markup(style),  # the package's own files
        script=Markup(script),
        policy=f"default-src 'none'; style-src '{source(style)}'; script-src '{source(script)}'; base-uri 'none'",
    )


def environment() -> Environment:
    """Templates that escape whatever they are given."""

    def spell(value: Any) -> Any:  # Any: whatever a template prints
        return inert(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    return Environment(autoescape=True, undefined=StrictUndefined, finalize=spell, trim_blocks=True, lstrip_blocks=True)


def source(text: str) -> str:
    """How a content security policy names an inline text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def known_backends(report: Report) -> list[BackendRecord]:
    """The backends of the report, and those that only cases name."""
    named = {backend.name for backend in report.backends}
    others = sorted({case.backend for case in report.cases} - named)
    return [
        *report.backends,
        *(BackendRecord(name=name, distribution="", version="", device="") for name in others),
    ]


def backend_view(report: Report, record: BackendRecord, place: int) -> BackendView:
    """All that the page shows of one backend."""
    cases = [case for case in report.cases if case.backend == record.name]
    dtypes = ordered({case.dtype for case in cases}, DTYPE_ORDER)
    checks = ordered({case.check for case in cases}, CHECK_ORDER)
    families: list[tuple[str, tuple[OperatorView, ...]]] = []
    for family in sorted({case.family for case in cases}):
        names = sorted({case.operator for case in cases if case.family == family})
        views = [
            operator_view(
                name,
                [case for case in cases if case.operator == name and case.family == family],
                (dtypes, checks),
                f"b{place}-{len(families)}-{number}",
                record,
            )
            for number, name in enumerate(names)
        ]
        families.append((family, tuple(views)))
    return BackendView(
        record=record,
        standing=standing_of(report, record.name),
        told=in_words(counts(cases)),
        hows=tuple(sorted({case.how for case in cases})),
        dtypes=dtypes,
        checks=checks,
        families=tuple(families),
        house_rules=house_rules_of(cases),
    )


def house_rules_of(cases: list[Case]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """A row for each operator that has the figures of a vendor's own rule."""
    rows = []
    for name in sorted({case.operator for case in cases}):
        told = [kept(rule, (case for case in cases if case.operator == name)) for rule in RULES]
        if any(total for _, total in told):
            rows.append((name, tuple(f"{number} of {total}" if total else "" for number, total in told)))
    return tuple(rows)


def ordered(found: set[str], first: tuple[str, ...]) -> tuple[str, ...]:
    """Names, the best known first."""
    return tuple(sorted(found, key=lambda name: (first.index(name) if name in first else len(first), name)))


def operator_view(
    name: str, cases: list[Case], columns: tuple[tuple[str, ...], tuple[str, ...]], anchor: str, record: BackendRecord
) -> OperatorView:
    """One row of the matrix, and what is told below it."""
    dtypes, checks = columns
    bad = sorted((case for case in cases if case.verdict in FORBIDDEN), key=urgency)
    places = {case.id: f"{anchor}-{number}" for number, case in enumerate(bad[:MOST_FAILURES])}
    groups = [[case for case in cases if case.dtype == dtype] for dtype in dtypes]
    groups += [[case for case in cases if case.check == check] for check in checks]
    passed = sorted((c for c in cases if c.verdict == "PASS" and share_of_limit(c)), key=share_of_limit, reverse=True)
    refusals = sorted({case.problem or "" for case in cases if case.verdict == "NOT-CLAIMED"} - {""})
    return OperatorView(
        name=name,
        anchor=anchor,
        told=in_words(counts(cases)),
        cells=tuple(cell(group, anchor, places) for group in groups),
        failures=tuple(failure(case, places[case.id]) for case in bad[:MOST_FAILURES]),
        omitted=max(0, len(bad) - MOST_FAILURES),
        nearest=tuple(failure(case, f"{anchor}-n{number}") for number, case in enumerate(passed[:MOST_NEAREST])),
        pictures=pictures_of(cases),
        kernels=tuple(record.kernels.get(name, ())),
        refusals=tuple(refusals[:MOST_FAILURES]),
    )


def cell(cases: list[Case], anchor: str, places: dict[str, str]) -> Cell:
    """A cell of the matrix: the worst that happened, and how often."""
    found = counts(cases)
    bad = sorted((case for case in cases if case.verdict in FORBIDDEN), key=urgency)
    if bad:
        kind, sign = "bad", f"✗ {len(bad)}"
    elif found["WAIVED"]:
        kind, sign = "waived", f"w {found['WAIVED']}"
    elif found["PASS"]:
        kind, sign = "pass", f"✓ {found['PASS']}"
    else:
        kind, sign = ("unclaimed", "–") if cases else ("none", "")
    hows = sorted({case.how for case in cases if case.how != "hardware"})
    target = places.get(bad[0].id, anchor) if bad else anchor
    return Cell(kind=kind, sign=sign, told=in_words(found), how=", ".join(hows), target=target)


def failure(case: Case, anchor: str) -> Failure:
    """A case as the page tells it."""
    figures = tuple((name, value, case.limits.get(name)) for name, value in case.statistics.items())
    lines = tuple(line for line in (case.problem or "").splitlines() if line.strip())
    return Failure(case=case, anchor=anchor, lines=lines, figures=figures, command=reproduce_command(case))


def page_command(report: Path, out: Path) -> int:
    """Write the page of a report's file.

    Returns:
        0, or 2 where the report cannot be read.
    """
    try:
        text = page(read(report))
    except ReportError as error:
        print(error)
        return 2
    out.write_text(text, encoding="utf-8")
    print(f"{out}: {len(text.encode()) // 1024} KiB")
    return 0
