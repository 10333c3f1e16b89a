"""A report as text for a terminal: what passed, what did not, and what to repair first."""

import shlex
import unicodedata
from collections.abc import Iterator, Mapping

from isolith_conformance.house_rules import RULES, kept
from isolith_conformance.report import BackendRecord, Case, Report, Standing
from isolith_conformance.report_standing import FORBIDDEN, first_to_fix

WORDS = {"PASS": "passed", "NOT-CLAIMED": "not claimed", "WAIVED": "waived"}
LONGEST_PROBLEM = 400


def inert(text: str) -> str:
    """Text that cannot move a cursor, set a colour, break a line or turn the reading direction.

    What a plugin says goes to people's terminals; anything but letters, marks, digits, signs and the blank is spelled.
    """
    return "".join(character if harmless(character) else spelled(character) for character in text)


def harmless(character: str) -> bool:
    """Whether a terminal shows the character and does nothing else."""
    # C: controls, format marks such as those of direction, surrogates, private use. Zl, Zp: breaks of line.
    return character == " " or unicodedata.category(character)[0] not in "CZ"


def spelled(character: str) -> str:
    """A character by its number."""
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def first_line(problem: str | None) -> str:
    """What stands first of a problem, which may go on with a traceback."""
    lines = (problem or "").strip().splitlines() or ["no reason given"]
    return inert(lines[0])[:LONGEST_PROBLEM]


def in_words(counts: Mapping[str, int]) -> str:
    """Counts as prose: "12 passed, 3 FAIL, 4 not claimed"."""
    return ", ".join(f"{count} {WORDS.get(outcome, outcome)}" for outcome, count in counts.items() if count) or "none"


def reproduce_command(case: Case) -> str:
    """The command line that runs exactly this case again."""
    parts = [
        *("python", "-m", "isolith_conformance", "reproduce", case.id),
        *("--seed", str(case.seed), "--backend", case.backend),
    ]
    if case.how != "hardware":
        parts += ["--how", case.how]
    return inert(shlex.join(parts))


def mark(report: Report) -> str:
    """The one line that a result is quoted by: what ran, on what, under which rules."""
    suite, run = report.suite, report.run
    state = suite.commit[:12] if suite.commit else "no commit"
    state += " with changes" if suite.clean is False else ""
    devices = "; ".join(f"{one.name} {one.version} on {one.device}{arch(one)}" for one in available(report))
    return inert(f"suite {suite.version} ({state}), profile {run.profile}, {run.how}, {run.scope} run: {devices}")


def arch(backend: BackendRecord) -> str:
    """The architecture and the versions that belong to a backend's device."""
    known = [backend.arch or "", *(f"{name} {version}" for name, version in sorted(backend.versions.items()))]
    told = ", ".join(part for part in known if part)
    return f" ({told})" if told else ""


def available(report: Report) -> list[BackendRecord]:
    """The backends that could run."""
    return [backend for backend in report.backends if backend.why_unavailable is None]


def summary_text(report: Report) -> str:
    """What passed, failed and was not claimed, by backend and operator, with the first thing to fix."""
    return "\n".join(summary_lines(report))


def summary_lines(report: Report) -> Iterator[str]:
    """The lines of `summary_text`."""
    summary = report.summary
    yield f"Isolith conformance: {mark(report)}"
    for backend in report.backends:
        yield ""
        if backend.why_unavailable is not None:
            yield f"Backend {inert(backend.name)}: not run: {first_line(backend.why_unavailable)}"
        else:
            yield from lines_of_backend(report, backend.name)
    known = {backend.name for backend in report.backends}
    for name in sorted(summary.by_backend.keys() - known):
        yield ""
        yield from lines_of_backend(report, name)
    yield ""
    yield from lines_of_standing(report)


def lines_of_backend(report: Report, backend: str) -> Iterator[str]:
    """One backend: a line per operator, and its first failure."""
    cases = [case for case in report.cases if case.backend == backend]
    operators = {case.operator for case in cases}
    width = max((len(inert(name)) for name in operators), default=0)
    yield f"Backend {inert(backend)}: {in_words(standing_of(report, backend).counts)}"
    for name in sorted(operators):
        counts = report.summary.by_operator[f"{backend}.{name}"]
        sign = "!" if any(counts[outcome] for outcome in FORBIDDEN) else " "
        yield f" {sign} {inert(name):<{width}}  {in_words(counts)}"
    absent = [record.unavailable_kernels for record in report.backends if record.name == backend]
    for reason in dict.fromkeys(reason for kernels in absent for reason in kernels.values()):
        names = [name for kernels in absent for name, said in kernels.items() if said == reason]
        yield f"   not here: {inert(', '.join(names))}: {first_line(reason)}"
    yield from lines_of_house_rules(cases)
    first = first_to_fix(cases)
    if first is not None:
        yield f"   Fix first: {inert(first.id)}"
        yield f"     {first.verdict}: {first_line(first.problem)}"
        yield f"     {reproduce_command(first)}"


def lines_of_house_rules(cases: list[Case]) -> Iterator[str]:
    """How many cases would keep the vendors' own rules, which decide nothing here."""
    told = [(rule, *kept(rule, cases)) for rule in RULES]
    if any(total for _, _, total in told):
        yield "   Vendors' own rules, kept by: " + "; ".join(f"{rule.name} {n} of {total}" for rule, n, total in told)


def standing_of(report: Report, backend: str) -> Standing:
    """A backend's standing; of one without cases, that nothing passed."""
    none = Standing(conformant=False, why_not=("no case passed",), counts={})
    return report.summary.by_backend.get(backend, none)


def lines_of_standing(report: Report) -> Iterator[str]:
    """The verdict over the whole run."""
    summary = report.summary
    if summary.conformant:
        yield f"CONFORMANT ({report.run.profile})"
        return
    yield "NOT CONFORMANT"
    for reason in summary.why_not:
        yield f"  - {inert(reason)}"
    for name, standing in summary.by_backend.items():
        if standing.conformant and len(summary.by_backend) > 1:
            yield f"  {inert(name)} by itself is conformant ({report.run.profile})."
