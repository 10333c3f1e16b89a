"""Certificates of a run: one for each kernel of which everything ran, and nothing was wrong."""

from collections.abc import Iterator, Sequence

import isolith
from isolith.certificates import Certificate
from isolith_conformance.plan import Found
from isolith_conformance.report import Case, Report

VALUES = ("accuracy", "exact", "selection")
"""The checks whose samples say in which dtypes results were right."""


def certificates_of(report: Report, found: Sequence[Found]) -> Iterator[Certificate]:
    """The certificates that a run's report is good for; it left out nothing but whole operators or backends."""
    for one in found:
        if one.description["why_unavailable"]:
            continue
        for operator, rows in one.description["kernels"].items():
            for row in rows:
                cases = [case for case in report.cases if (case.backend, case.kernel) == (one.name, row["name"])]
                passed = [case for case in cases if case.verdict == "PASS"]
                if passed and all(case.verdict in ("PASS", "NOT-CLAIMED") for case in cases):
                    yield certificate(report, one, operator, row, passed)


def certificate(report: Report, found: Found, operator: str, row: dict[str, str], passed: list[Case]) -> Certificate:
    """The certificate of one kernel."""
    facts = found.description["facts"]
    return Certificate(
        kernel=row["name"],
        operator=operator,
        dtypes=tuple(sorted({case.dtype for case in passed if case.check in VALUES})),
        passed=len(passed),
        profile=report.run.profile,
        how=report.run.how,
        isolith=isolith.__version__,
        device=facts["device"],
        arch=facts["arch"],
        versions=facts["versions"],
        source=row["source"],
        contract=row["contract"],
        report=report.sha256,
        written=report.run.started,
    )
