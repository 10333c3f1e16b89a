"""The suite as a pytest plugin: `pytest -p isolith_conformance.plugin`.

Opt-in: it is no installed pytest plugin, since its options would collide with those of other projects.
"""

import datetime
import secrets
import shlex
import sys
import time
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from isolith import certificates
from isolith_conformance import plan as plans
from isolith_conformance import report as reports
from isolith_conformance.case import MARK, Case, Scope, cases
from isolith_conformance.certify import certificates_of
from isolith_conformance.page import page
from isolith_conformance.plan import Found, Plan, PlanError
from isolith_conformance.report_text import inert, reproduce_command, summary_text
from isolith_conformance.trial import Finding, Inapplicable, Trial

LETTERS = {"NOT-CLAIMED": "n", "WAIVED": "w", "FAIL": "F", "ERROR": "E", "CRASH": "C", "TIMEOUT": "T", "INFRA": "I"}
"""What a case prints on the line of progress."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, spelled as on the command line of the package."""
    group = parser.getgroup("isolith", "conformance of Isolith's backends")
    group.addoption(
        "--backend", action="append", default=[], metavar="NAME", help="check this backend (default: all available)"
    )
    group.addoption("--op", action="append", default=[], metavar="OPERATOR", help="check this operator alone")
    group.addoption("--dtype", action="append", default=[], metavar="DTYPE", help="check samples of this dtype alone")
    group.addoption("--quick", action="store_true", help="a part of the cases; not sufficient for conformance")
    group.addoption("--full", action="store_true", help="all cases (the default)")
    group.addoption("--seed", type=int, default=None, help="of the inputs; a fresh one by default")
    group.addoption("--profile", choices=("strict", "standard", "basic"), default="standard", help="the limits")
    group.addoption(
        "--how", choices=("hardware", "interpreter", "twin"), default="hardware", help="what runs the kernels"
    )
    group.addoption("--case", default="", metavar="ID", help="check this case alone")
    group.addoption("--timeout", type=float, metavar="SECONDS", help="of one call (120; in an interpreter 600)")
    group.addoption("--waivers", default="", metavar="FILE", help="instead of the waivers that the backend brings")
    group.addoption("--pass-env", action="append", default=[], metavar="PATTERN", help="more variables for the backend")
    group.addoption("--no-certificates", action="store_true", help="write no certificates of what passed")
    group.addoption("--report", default="", metavar="FILE", help="write the report as JSON")
    group.addoption("--page", default="", metavar="FILE", help="write the report as one HTML page")


def plan_of(config: pytest.Config) -> Plan:
    """The plan that the options say."""
    option = config.option
    if option.quick and option.full:
        raise PlanError("--quick and --full exclude each other")
    given: dict[str, Any] = getattr(config, "workerinput", {})  # of xdist
    seed = given.get("isolith_seed", option.seed)
    return Plan(
        backends=tuple(option.backend),
        operators=tuple(option.op),
        dtypes=tuple(option.dtype),
        case=option.case,
        scope="quick" if option.quick else "full",
        profile=option.profile,
        how=option.how,
        seed=secrets.randbelow(1 << 31) if seed is None else seed,
        timeout_s=option.timeout or (600.0 if option.how == "interpreter" else 120.0),
        waivers=option.waivers,
        environment=tuple(option.pass_env),
    )


def pytest_configure(config: pytest.Config) -> None:
    """Find the backends; an impossible plan ends the run before it starts."""
    try:
        plan = plan_of(config)
        conductor = Conductor(plan, plans.find(plan))
    except PlanError as error:
        raise pytest.UsageError(str(error)) from None
    config.pluginmanager.register(conductor, "isolith_conductor")


class Conductor:
    """One run: makes the cases, runs them, gathers the records, writes the report.

    Args:
        plan: What is asked for.
        found: The backends.
    """

    def __init__(self, plan: Plan, found: list[Found]) -> None:
        self.plan, self.found = plan, found
        self.started, self.clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
        self.records: list[reports.Case] = []
        self.deselected = False
        self.report: reports.Report | None = None
        self.certified: list[Path] = []

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:  # Any: xdist's node
        """Give the seed to a worker of xdist."""
        node.workerinput["isolith_seed"] = self.plan.seed

    def pytest_report_header(self) -> list[str]:
        """Seed, scope and backends."""
        lines = [f"isolith: {self.plan.scope} run, profile {self.plan.profile}, {self.plan.how}, seed {self.plan.seed}"]
        if self.plan.scope == "quick":
            lines.append("isolith: a quick run is NOT SUFFICIENT FOR CONFORMANCE")
        return lines + [f"isolith: backend {f.name}: {inert(f.reason or f.device)}" for f in self.found]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Every case of a check."""
        kind = getattr(metafunc.function, MARK, None)
        if kind is None:
            return
        scope: Scope = "quick" if self.plan.scope == "quick" else "full"
        made = [
            case
            for one in self.found
            for unit in one.units(self.plan)
            for case in cases(kind, unit, scope, self.plan.seed, self.plan.dtypes, self.plan.case)
        ]
        metafunc.parametrize("trial", made, ids=[case.id for case in made], indirect=True)

    @pytest.fixture
    def trial(self, request: pytest.FixtureRequest) -> Trial:
        """The case of a test, on the runner of its backend."""
        case: Case = request.param
        return Trial(case=case, runner=self.backend_of(case).runner, profile=self.plan.profile)

    def backend_of(self, case: Case) -> Found:
        """The backend that a case is about."""
        return next(one for one in self.found if one.name == case.unit.backend)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Cases of one sample one after another, so that its gold is computed once, by one worker of xdist."""
        items[:] = [item for item in items if case_of(item) or not hasattr(getattr(item, "function", None), MARK)]
        items.sort(key=order)
        for item in items:
            item.add_marker(pytest.mark.xdist_group(" ".join(order(item)[:3])))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """A case asked for by its id must be there."""
        if self.plan.case and not any(case_of(item) for item in session.items):
            raise pytest.UsageError(f"there is no case {self.plan.case!r}")

    def pytest_deselected(self) -> None:
        """-k, -m and --lf leave cases out."""
        self.deselected = True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Turn what a test did into a verdict, and attach the record to pytest's report."""
        report: Any = yield  # Any: it gets an attribute
        case = case_of(item)
        if case is None or not (call.when == "call" or call.excinfo is not None):
            return report  # type: ignore[no-any-return]  # it is what came in
        if call.excinfo is not None and isinstance(call.excinfo.value, Inapplicable):
            report.outcome, report.longrepr = "skipped", (str(item.path), 0, str(call.excinfo.value))
            return report  # type: ignore[no-any-return]  # it is what came in
        trial = getattr(item, "funcargs", {}).get("trial")
        record = self.record(case, trial, call.excinfo.value if call.excinfo else None)
        report.isolith_record = asdict(record)
        if record.verdict in ("NOT-CLAIMED", "WAIVED"):
            report.outcome = "skipped"
            report.longrepr = (str(item.path), 0, f"{record.verdict}: {inert(record.problem or '')}")
        elif record.verdict == "PASS":
            report.outcome = "passed"
        else:
            report.outcome = "failed"
            report.longrepr = f"{record.verdict}: {inert(record.problem or '')}\n{reproduce_command(record)}"
        return report  # type: ignore[no-any-return]  # it is what came in

    def record(self, case: Case, trial: Trial | None, error: BaseException | None) -> reports.Case:
        """The record of a case."""
        finding = error if isinstance(error, Finding) else None
        if error is not None and finding is None:
            finding = Finding("INFRA", f"the suite itself failed: {type(error).__name__}: {error}", "suite")
        verdict, problem = (finding.verdict, finding.problem) if finding else ("PASS", None)
        verdict, problem = self.excused(case, verdict, problem)
        sampled = case.sample != "-" and verdict in ("PASS", "FAIL", "WAIVED")
        return reports.Case(
            id=case.id,
            check=case.check,
            backend=case.unit.backend,
            operator=case.unit.operator,
            family=case.operator.family,
            kernel=case.unit.kernel,
            sample=case.sample,
            dtype=case.dtype,
            verdict=verdict,  # type: ignore[arg-type]  # Findings hold nothing but verdicts
            problem=None if problem is None else problem[:4000],
            rule=finding.rule if finding else "",
            seed=case.seed,
            input_hash=case.input_hash if sampled else None,
            result_hash=trial.result_hash if trial else None,
            statistics=trial.statistics if trial else {},
            limits=trial.limits if trial else {},
            seconds=trial.seconds if trial else 0.0,
            executed=tuple(sorted(trial.executed)) if trial else (),
            how=self.plan.how,
        )

    def excused(self, case: Case, verdict: str, problem: str | None) -> tuple[str, str | None]:
        """The verdict under the waivers: an excused failure is WAIVED, an excused pass a failure."""
        found = self.backend_of(case)
        for waiver in found.waivers:
            if verdict in ("NOT-CLAIMED", "INFRA") or not waiver.excuses(case.id, found.device):
                continue
            if verdict == "PASS":
                return "FAIL", f"waiver {waiver.id} excuses this case, but it passes; remove the waiver"
            if waiver.expires < datetime.date.today():
                return verdict, f"{problem} (waiver {waiver.id} expired on {waiver.expires})"
            return "WAIVED", f"{waiver.id}: {problem}"
        return verdict, problem

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """The verdict's own letter."""
        verdict = getattr(report, "isolith_record", {}).get("verdict")
        if verdict in LETTERS:
            return report.outcome, LETTERS[verdict], verdict
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Gather the records, those of xdist's workers too."""
        record = getattr(report, "isolith_record", None)
        if record is not None:
            self.records.append(reports.Case(**record | {"executed": tuple(record["executed"])}))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """End the processes; judge the waivers; write the report."""
        for one in self.found:
            one.runner.close()
        if hasattr(session.config, "workerinput"):
            return
        complete = exitstatus in (0, 1) and not session.shouldstop and not session.shouldfail
        self.records += self.useless_waivers()
        if any(record.verdict not in ("PASS", "NOT-CLAIMED", "WAIVED") for record in self.records) and exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        self.report = self.report_of(complete)
        if session.config.option.report:
            self.report.write(Path(session.config.option.report))
        if session.config.option.page:
            Path(session.config.option.page).write_text(page(self.report), encoding="utf-8")
        plan, left_out = self.plan, self.deselected or self.plan.case or self.plan.dtypes
        if complete and plan.scope == "full" and not left_out and not session.config.option.no_certificates:
            self.certified = [certificates.write(one) for one in certificates_of(self.report, self.found)]

    def useless_waivers(self) -> list[reports.Case]:
        """A failure for every waiver that has expired, or that no case of a full run needed."""
        today, whole = datetime.date.today(), not (self.plan.selected or self.deselected or self.plan.scope != "full")
        rows = []
        for one in self.found:
            for waiver in one.waivers:
                waived = any(r.verdict == "WAIVED" and waiver.excuses(r.id, one.device) for r in self.records)
                if waiver.expires < today:
                    problem = f"waiver {waiver.id} expired on {waiver.expires}"
                elif whole and not waived:
                    problem = f"waiver {waiver.id} excuses nothing: no failing case matches {waiver.cases!r}"
                else:
                    continue
                rows.append(waiver_record(one.name, waiver.id, problem, self.plan))
        return rows

    def report_of(self, complete: bool) -> reports.Report:
        """The report of what ran."""
        selected = self.plan.selected or self.deselected
        return reports.Report(
            suite=plans.suite(),
            run=reports.Run(
                profile=self.plan.profile,
                how=self.plan.how,
                seed=self.plan.seed,
                scope="selected" if selected and self.plan.scope == "full" else self.plan.scope,
                started=self.started.isoformat(timespec="seconds"),
                seconds=round(time.perf_counter() - self.clock, 3),
                command=shlex.join(["python", "-m", "isolith_conformance", *sys.argv[1:]]),
                complete=complete,
                peak_memory_bytes=plans.peak_memory(),
            ),
            environment=plans.environment(self.found),
            backends=tuple(one.record() for one in self.found),
            cases=tuple(self.records),
            waivers=tuple(waiver.record() for one in self.found for waiver in one.waivers),
        )

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:  # Any: pytest's own reporter
        """The summary that a person reads."""
        if self.records and self.report is not None:
            terminalreporter.section("conformance")
            terminalreporter.write_line(summary_text(self.report))
        if self.certified:
            terminalreporter.write_line(f"Certificates of {len(self.certified)} kernels: {certificates.folder()}")


def case_of(item: pytest.Item) -> Case | None:
    """The case of a test; None for a test of somebody else's."""
    callspec = getattr(item, "callspec", None)
    case = callspec.params.get("trial") if callspec is not None else None
    return case if isinstance(case, Case) else None


def order(item: pytest.Item) -> tuple[str, ...]:
    """Sorts by backend, operator, dtype, sample and kernel; tests of others come first, as they stand."""
    case = case_of(item)
    if case is None:
        return ()
    return (case.unit.backend, case.unit.operator, case.dtype, case.sample, case.unit.kernel)


def waiver_record(backend: str, waiver: str, problem: str, plan: Plan) -> reports.Case:
    """The record of a waiver that is itself a failure."""
    return reports.Case(
        id=f"{backend}/waivers/{waiver}",
        check="waivers",
        backend=backend,
        operator="waivers",
        family="waivers",
        kernel="",
        sample="-",
        dtype="-",
        verdict="FAIL",
        problem=problem,
        rule="waiver",
        seed=plan.seed,
        how=plan.how,
    )
