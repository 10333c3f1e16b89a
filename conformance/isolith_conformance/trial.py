"""A check's view of one case: it runs calls, and what it finds is a verdict."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from isolith.errors import ArgumentError
from isolith_conformance import bits, wire
from isolith_conformance.buffers import Layout, place_all
from isolith_conformance.case import Case
from isolith_conformance.execute import Options, Response, Values, leaves
from isolith_conformance.judge import Expectation, Verdict, expect
from isolith_conformance.runner import Trouble


class Finding(Exception):  # noqa: N818  # a verdict, not a mistake of ours
    """The verdict on a case that did not pass.

    Args:
        verdict: FAIL, ERROR, CRASH, TIMEOUT, NOT-CLAIMED or INFRA.
        problem: A sentence.
        rule: Which rule of the judge, or of the check, was broken.
        statistics: The judge's figures.
    """

    def __init__(
        self, verdict: str, problem: str, rule: str = "", statistics: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(problem)
        self.verdict, self.problem, self.rule, self.statistics = verdict, problem, rule, dict(statistics or {})


class Inapplicable(Exception):  # noqa: N818  # no mistake: nothing in the case to check, so that there is no verdict
    """The check has nothing to say of this case; it is not recorded, least of all as a pass."""


class Runs(Protocol):
    """Whatever runs calls: a backend's processes, or a function in this process."""

    def run(
        self,
        operator: str,
        kernel: str,
        arguments: Values,
        options: Options,
        which: str = "first",
        earlier: Values | None = None,
    ) -> Response:
        """Run one call."""
        ...

    def end(self, which: str) -> None:
        """Forget the process of that name."""
        ...


@dataclass(kw_only=True)
class Trial:
    """One case on a runner. What it ran and measured stays in it for the report.

    Args:
        case: What is checked.
        runner: What runs the calls.
        profile: The limits' profile.
    """

    case: Case
    runner: Runs
    profile: str = "standard"

    def __post_init__(self) -> None:
        self.statistics: dict[str, float] = {}
        self.limits: dict[str, float] = {}
        self.executed: set[str] = set()
        self.seconds = 0.0
        self.result_hash: str | None = None

    def run(
        self,
        arguments: Values | None = None,
        which: str = "first",
        earlier: Values | None = None,
        **options: Any,  # Any: of Options
    ) -> Response:
        """Run a call, the sample's own unless told otherwise; a Finding where it does not come back with results."""
        response = self.ask(arguments, which, earlier, **options)
        if response.status == "refused":
            raise Finding("NOT-CLAIMED", response.message)
        if response.status == "illegal":
            raise Finding("ERROR", f"refuses a legal call: {response.message}", "legal")
        if response.status == "raised":
            raise Finding("ERROR", response.message, "raised")
        return response

    def ask(
        self,
        arguments: Values | None = None,
        which: str = "first",
        earlier: Values | None = None,
        **options: Any,  # Any: of Options
    ) -> Response:
        """Run a call and return whatever came of it; a Finding only where the process died."""
        unit = self.case.unit
        given = self.case.arguments if arguments is None else arguments
        try:
            response = self.runner.run(unit.operator, unit.kernel, given, Options(**options), which, earlier)
        except Trouble as trouble:
            raise Finding(trouble.verdict, str(trouble), trouble.verdict.lower()) from None
        self.executed |= set(response.executed)
        self.seconds += response.seconds
        return response

    def run_if_claimed(self, arguments: Values | None = None, **options: Any) -> Response | None:  # Any: of `run`
        """The same, but None where the candidate does not claim this way of calling it."""
        try:
            return self.run(arguments, **options)
        except Finding as finding:
            if finding.verdict != "NOT-CLAIMED":
                raise
            return None

    def accept(self, results: list[Tensor], arguments: Values | None = None, when: str = "") -> None:
        """Let the judge look at results; a Finding where they are wrong.

        Args:
            results: Outputs, then mutated arguments.
            arguments: The call's; None for the sample's own.
            when: How the call was run, for the sentence.
        """
        due = self.case.expectation if arguments is None else self.expectation_of(arguments)
        self.conclude(due.verdict_on(results, self.profile), when)

    def expectation_of(self, arguments: Values) -> Expectation:
        """What is due for a call of the kernel under check."""
        return expect(self.case.operator, arguments, declared=self.case.unit.declares)

    def accept_values(self, results: list[Tensor]) -> None:
        """The same for the sample's own call, without the rule for selections, which is a check of its own."""
        self.result_hash = hashlib.sha256(wire.encode({"results": results})).hexdigest()
        figures, limits = self.case.expectation.house_figures(results)
        self.statistics.update(figures)
        self.limits.update(limits)
        self.conclude(self.case.expectation.judge(results, self.profile))

    def outputs(self, results: list[Tensor]) -> list[Tensor]:
        """Results without the mutated arguments behind them."""
        return results[: len(results) - len(self.case.operator.mutates)]

    def equal(self, arguments: Values, results: list[Tensor], others: list[Tensor], when: str) -> None:
        """Let two results of a call be the same to the bit."""
        difference = bits.differing(self.case.operator, arguments, results, others)
        if difference is not None:
            raise Finding("FAIL", f"{when}: {difference}", "same bits")

    def conclude(self, verdict: Verdict, when: str = "") -> None:
        """Keep the figures of a verdict; a Finding where it did not pass."""
        self.statistics.update(verdict.statistics)
        self.limits.update(verdict.limits)
        if not verdict.passed:
            raise Finding(
                "FAIL",
                f"{when}: {verdict.problem}" if when else f"{verdict.problem}",
                verdict.check,
                verdict.statistics,
            )

    def agree(self, results: list[Tensor], others: list[Tensor], when: str, *, exactly: bool = False) -> None:
        """Let results be those of another run to the bit, or, unless `exactly`, be right by themselves."""
        if exactly:
            self.equal(self.case.arguments, results, others, when)
        elif bits.differing(self.case.operator, self.case.arguments, results, others) is not None:
            self.accept(others, when=when)

    def takes(self, layout: Layout) -> bool:
        """Whether the sample's call is legal in a layout of memory."""
        try:
            self.case.operator.validate(place_all(self.case.arguments, layout=layout)[1])
        except ArgumentError:
            return False
        return True

    def shaped(self, results: list[Tensor]) -> None:
        """Let results have the shapes and dtypes that the operator's fake gives them, where there is no gold."""
        given = self.case.arguments
        meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in given.items()}
        due = leaves(self.case.operator.fake(**meta))
        due += [given[name] for name in self.case.operator.mutates]
        said, wanted = ([(tensor.dtype, tuple(tensor.shape)) for tensor in part] for part in (results, due))
        if said != wanted:
            self.fail(f"gives {said}; due is {wanted}", "shape")

    def fail(self, problem: str, rule: str) -> None:
        """End the case with FAIL."""
        raise Finding("FAIL", problem, rule)
