"""When a run counts as conformant: the only place with these rules."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from isolith_conformance.report import OUTCOMES, Case, Report, Run, Standing, Suite, Summary

FORBIDDEN = ("FAIL", "ERROR", "CRASH", "TIMEOUT", "INFRA")
"""Outcomes that a conformant run has none of."""
LARGEST_WAIVED_SHARE = 0.01
CORE_CHECKS = frozenset({"accuracy", "exact", "selection", "codes"})
"""The core set: right values. No waiver excuses a case of these."""

# From the most basic: until the first of these is repaired, the later ones mean little.
FIRST_OUTCOMES = ("INFRA", "CRASH", "TIMEOUT", "ERROR", "FAIL")
FIRST_RULES = ("shape", "exact", "bits", "nonfinite", "codes", "scales", "selection", "ties", "R1", "R2", "R3", "D")


def summarise(report: Report) -> Summary:
    """What follows from the cases of a report."""
    of_backend: dict[str, list[Case]] = defaultdict(list)
    of_operator: dict[str, list[Case]] = defaultdict(list)
    for case in report.cases:
        of_backend[case.backend].append(case)
        of_operator[f"{case.backend}.{case.operator}"].append(case)
    whole = standing(report.suite, report.run, report.cases)
    by_backend = {name: standing(report.suite, report.run, cases) for name, cases in sorted(of_backend.items())}
    idle = [f"no case of the backend {name} passed" for name, one in by_backend.items() if not one.counts["PASS"]]
    why_not = (*whole.why_not, *(idle if len(by_backend) > 1 else ()))
    return Summary(
        conformant=not why_not,
        why_not=why_not,
        counts=whole.counts,
        by_backend=by_backend,
        by_operator={name: counts(cases) for name, cases in sorted(of_operator.items())},
    )


def standing(suite: Suite, run: Run, cases: Sequence[Case]) -> Standing:
    """Whether these cases of this run are conformant."""
    why_not = (*reasons_of_run(suite, run), *reasons_of_cases(cases))
    return Standing(conformant=not why_not, why_not=why_not, counts=counts(cases))


def counts(cases: Sequence[Case]) -> Mapping[str, int]:
    """How many cases came to each outcome, zeros too."""
    found = Counter(case.verdict for case in cases)
    return {outcome: found[outcome] for outcome in OUTCOMES}


def reasons_of_run(suite: Suite, run: Run) -> Iterator[str]:
    """Why a run cannot be conformant, whatever its cases say."""
    if run.scope != "full":
        yield f"the run was {run.scope}, not full: not sufficient for conformance"
    if not run.complete:
        yield "the run did not come to its end"
    if run.how != "hardware":
        yield f"results come from {run.how}, not from hardware"
    if suite.clean is False:
        yield "the suite has changes that its commit does not have"


def reasons_of_cases(cases: Sequence[Case]) -> Iterator[str]:
    """Why these cases are not conformant."""
    found = counts(cases)
    if not found["PASS"]:
        yield "no case passed"
    for outcome in FORBIDDEN:
        if found[outcome]:
            yield f"{found[outcome]} {'case' if found[outcome] == 1 else 'cases'} ended as {outcome}"
    elsewhere = sorted({case.how for case in cases if case.how != "hardware"})
    if elsewhere:
        yield f"some cases ran on {', '.join(elsewhere)}, not on hardware"
    waived = [case for case in cases if case.verdict == "WAIVED"]
    claimed = len(cases) - found["NOT-CLAIMED"]
    if len(waived) > LARGEST_WAIVED_SHARE * claimed:
        yield f"{len(waived)} of {claimed} claimed cases are waived, at most {LARGEST_WAIVED_SHARE:.0%} may be"
    core = [case.id for case in waived if case.check in CORE_CHECKS]
    if core:
        yield f"{len(core)} waived {'case is' if len(core) == 1 else 'cases are'} of the core set, first {core[0]}"


def first_to_fix(cases: Sequence[Case]) -> Case | None:
    """The failure that the most depends on; None where nothing failed."""
    failed = [case for case in cases if case.verdict in FORBIDDEN]
    return min(failed, key=urgency, default=None)


def urgency(case: Case) -> tuple[int, int, str]:
    """Sorts failures from the most basic."""
    rule = FIRST_RULES.index(case.rule) if case.rule in FIRST_RULES else len(FIRST_RULES)
    return FIRST_OUTCOMES.index(case.verdict), rule, case.id
