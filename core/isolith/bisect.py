"""Bisection: which kernels make the difference between a wrong result and a right one.

A user's callable is run again and again, each time with some of the kernels flipped to the reference. First as it is
and with every kernel flipped, each twice: where the one is not wrong or the other not right, no kernel is to blame, and
where two equal runs differ, the check tells nothing. In between, of the kernels in a row, the shortest beginning whose
flip makes it right ends with one to blame; with that one flipped the search goes on until those found are enough. They
are verified in both directions: with them alone flipped it is right, with them alone as they were it is wrong. Where
it is not, others have a part in it, and the sentence says so.
"""

import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal

import torch

from isolith import dispatch
from isolith.dispatch import Dispatcher, Function, Process
from isolith.errors import FrozenError, Unsupported
from isolith.select import Candidate, Explanation

if TYPE_CHECKING:
    from isolith.operator import AnyOperator

Run = Callable[[], Any]  # Any: whatever the user's callable returns
Check = Callable[[Any], Any]
Tell = Callable[[str], object]
Pair = tuple[str, str]
"""An operator, and a kernel as `explain` spells it."""
Outcome = Literal["found", "right", "not a kernel", "no kernel ran", "flaky"]

LONGEST_PROBLEM = 160
FLIPPED = "flipped to the reference by a bisection"


class Flips:
    """What one run flips, and which kernels it runs; on every thread, and under whatever settings the run chooses.

    Args:
        pairs: The kernels in whose place the reference runs; None for every kernel.
    """

    def __init__(self, pairs: Collection[Pair] | None = ()) -> None:
        self.pairs = pairs
        self.lock = threading.Lock()
        self.ran: Counter[Pair] = Counter()

    def applied(self, explanation: Explanation) -> Explanation:
        """The explanation with the reference chosen where a kernel is that is flipped."""
        chosen = explanation.chosen
        if chosen is None or chosen.kernel is None:
            return explanation
        if self.pairs is not None and (explanation.operator, chosen.name) not in self.pairs:
            return explanation
        rows = tuple(
            replace(row, why_not=row.why_not or FLIPPED) if row.step in ("kernel", "composition") else row
            for row in explanation.candidates
        )
        # As though it were native: the step down is not one that settings forbid or a warning is due for.
        return replace(explanation, candidates=rows, native=True, pin=None)

    def noted(self, operator: "AnyOperator", chosen: Candidate, function: Function) -> Function:
        """The function of a candidate, counted where it is a kernel's, whether it returns or raises."""
        if chosen.kernel is None:
            return function

        def run_and_note(*args: Any, **kwargs: Any) -> Any:
            try:
                result = function(*args, **kwargs)
            except Unsupported:
                raise  # another candidate runs
            except BaseException:
                self.note(operator.name, chosen.name)
                raise
            self.note(operator.name, chosen.name)
            return result

        return run_and_note

    def note(self, operator: str, kernel: str) -> None:
        """Count a call."""
        with self.lock:
            self.ran[operator, kernel] += 1


@dataclass(frozen=True, kw_only=True)
class Culprit:
    """A kernel that makes the difference.

    Args:
        calls: How often it ran in the first run.
        alone: Whether it makes the result wrong with every other kernel flipped.
    """

    operator: str
    kernel: str
    calls: int
    alone: bool


@dataclass(frozen=True, kw_only=True)
class Bisection:
    """What a bisection has found.

    Args:
        outcome: "found", or why there is nothing to find.
        sentence: The outcome in words.
        culprits: The smallest set of kernels whose flip makes the result right.
        kernels: Every kernel that ran, with the number of its calls.
        runs: How often the callable was run.
        problem: What was wrong in the first run.
    """

    outcome: Outcome
    sentence: str
    culprits: tuple[Culprit, ...]
    kernels: Mapping[Pair, int]
    runs: int
    problem: str | None

    def as_dict(self) -> dict[str, Any]:  # Any: JSON
        """For JSON."""
        kernels = [{"operator": operator, "kernel": name, "calls": n} for (operator, name), n in self.kernels.items()]
        return {**asdict(replace(self, kernels={})), "kernels": kernels}

    def __str__(self) -> str:
        lines = [f"{self.sentence} {self.runs} runs, {len(self.kernels)} kernels."]
        for each in self.culprits:
            how = "wrong by itself" if each.alone else "wrong only together with others"
            lines.append(f"  {each.operator}: {each.kernel}, {each.calls} calls, {how}")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run: what was wrong, or None, and which kernels ran."""

    problem: str | None
    ran: Mapping[Pair, int]


class Stop(Exception):  # noqa: N818  # no mistake: there is nothing to search for
    """Why a bisection ends without a culprit."""

    def __init__(self, outcome: Outcome, sentence: str) -> None:
        super().__init__(sentence)
        self.outcome, self.sentence = outcome, sentence


class Search:
    """The runs of one bisection.

    Args:
        run: The user's callable.
        check: What its result goes to, or None.
        tell: Gets a line for each run.
    """

    def __init__(self, run: Run, check: Check | None, tell: Tell) -> None:
        self.run, self.check, self.tell = run, check, tell
        self.runs = 0
        self.state = random_state()
        self.kernels: dict[Pair, int] = {}
        self.problem: str | None = None
        self.both_ways = True

    def trial(self, flipped: Collection[Pair] | None, what: str) -> Trial:
        """Run with these kernels flipped, None for all of them, from the same random state every time."""
        restore(self.state)
        flips, self.runs = Flips(None if flipped is None else frozenset(flipped)), self.runs + 1
        with flipping(flips):
            problem = problem_of(self.run, self.check)
        if Process.frozen:
            Process.frozen = False
            raise FrozenError(
                "bisect: the callable freezes isolith, which fixes the kernels that are to be flipped; leave"
                " isolith.freeze() out of it."
            )
        self.tell(f"run {self.runs}, {what}: {'right' if problem is None else f'wrong: {problem}'}")
        return Trial(problem=problem, ran=dict(flips.ran))

    def twice(self, flipped: Collection[Pair] | None, what: str) -> Trial:
        """Run two times; Stop where only one of them is right."""
        first, second = self.trial(flipped, what), self.trial(flipped, what)
        if (first.problem is None) != (second.problem is None):
            raise Stop(
                "flaky", f"Two equal runs differ, {what}: one is right, the other is not ({told(first, second)})."
            )
        return first

    def culprits(self) -> tuple[Culprit, ...]:
        """Search; Stop where there is nothing to find."""
        first = self.twice((), "as it is")
        self.kernels, self.problem = dict(first.ran), first.problem
        if first.problem is None:
            raise Stop("right", "It is right as it is: there is nothing to find.")
        if not first.ran:
            raise Stop(
                "no kernel ran",
                "It is wrong, and runs no kernel through isolith; handles that were bound before are not seen.",
            )
        references = self.twice(None, "all on references")
        if references.problem is not None:
            raise Stop(
                "not a kernel",
                "It is wrong with every kernel flipped to the reference too, so that no kernel makes the difference, or"
                f" one that was bound before ({references.problem}).",
            )
        suspects = sorted(self.kernels, key=lambda pair: depth(pair[0]))  # parts before what is composed of them
        return self.verified(self.found_in(suspects), suspects)

    def found_in(self, suspects: list[Pair]) -> list[Pair]:
        """Kernels whose flip makes it right, each the last of a shortest beginning that does, beside those before."""
        found: list[Pair] = []
        low, high = 0, len(suspects)
        while high:
            while high - low > 1:
                middle = (low + high) // 2
                what = f"{len(found) + middle} of {len(suspects)} kernels on references"
                if self.trial([*found, *suspects[:middle]], what).problem is None:
                    high = middle
                else:
                    low = middle
            found.append(suspects[high - 1])
            low, high = 0, high - 1
            if self.trial(found, f"{names(found)} alone on references").problem is None:
                return found
        raise Stop("flaky", "The runs contradict each other: with all kernels found on references it is wrong again.")

    def verified(self, found: list[Pair], suspects: list[Pair]) -> tuple[Culprit, ...]:
        """Leave out what is not needed, and let the rest be wrong where all others are on references."""
        for pair in tuple(found) if len(found) > 1 else ():
            others = [other for other in found if other != pair]
            if others and self.trial(others, f"{names(others)} alone on references").problem is None:
                found = others
        alone = {pair: self.wrong_with([pair], suspects) for pair in found}
        self.both_ways = any(alone.values()) or (len(found) > 1 and self.wrong_with(found, suspects))
        if not self.both_ways and (
            self.trial((), "as it is").problem is None
            or self.trial(found, f"{names(found)} alone on references").problem is not None
        ):
            raise Stop("flaky", "The runs contradict each other: equal ones are right and wrong.")
        return tuple(
            Culprit(
                operator=operator, kernel=kernel, calls=self.kernels[operator, kernel], alone=alone[operator, kernel]
            )
            for operator, kernel in found
        )

    def wrong_with(self, kept: list[Pair], suspects: list[Pair]) -> bool:
        """Whether it is wrong with these kernels, those of composites that run them, and references for the rest."""
        operators = {operator for operator, _ in kept}
        flipped = [pair for pair in suspects if pair not in kept and not contains(pair[0], operators)]
        return self.trial(flipped, f"all but {names(kept)} on references").problem is not None


def bisect(run: Run, check: Check | None = None, *, tell: Tell | None = None) -> Bisection:
    """Find the kernels that make the difference between a wrong result and a right one.

        print(isolith.bisect(lambda: model(tokens), lambda logits: torch.allclose(logits, expected, atol=1e-2)))

    Every run starts from the same state of torch's, Python's and numpy's random generators. What the callable keeps
    between runs, such as a cache that kernels fill, it has to make anew. Kernels of handles that it binds are flipped
    as those of calls are, those of handles bound before are not seen.

    Args:
        run: Runs what is wrong. Without a check it returns False or raises where it is wrong.
        check: Gets what `run` returns; returns False or raises where that is wrong.
        tell: Gets a line for each run.

    Raises:
        FrozenError: after `isolith.freeze()`, or where the callable freezes.
    """
    if Process.frozen:
        raise FrozenError("isolith is frozen: kernels can no longer be flipped in this process.")
    search = Search(run, check, tell or (lambda _: None))
    culprits: tuple[Culprit, ...] = ()
    outcome: Outcome = "found"
    try:
        culprits = search.culprits()
        number = "One kernel makes" if len(culprits) == 1 else f"{len(culprits)} kernels make"
        ways = (
            "verified in both directions"
            if search.both_ways
            else "though with all others on references it is right too"
        )
        sentence = f"{number} the difference, {ways}: {search.problem}."
    except Stop as stop:
        outcome, sentence = stop.outcome, stop.sentence
    return Bisection(
        outcome=outcome,
        sentence=sentence,
        culprits=culprits,
        kernels=search.kernels,
        runs=search.runs,
        problem=search.problem,
    )


@contextmanager
def flipping(flips: Flips) -> Iterator[None]:
    """Flip in this thread, under the settings in force here, and in threads that start meanwhile."""
    here, default = dispatch.dispatcher(), Process.default or dispatch.first_dispatcher()
    Process.default = Dispatcher(default.registry, default.settings, flips)
    try:
        with dispatch.using(Dispatcher(here.registry, here.settings, flips)):
            yield
    finally:
        Process.default = default


def problem_of(run: Run, check: Check | None) -> str | None:
    """What is wrong, or None."""
    try:
        answer = run()
        if check is not None:
            answer = check(answer)
    except (Exception, SystemExit) as error:  # that it raises is the user's way to say that it is wrong
        return shorten(f"{type(error).__name__}: {error}", LONGEST_PROBLEM, placeholder=" …")
    if says_no(answer):
        return "the check returned False" if check else "the callable returned False"
    return None


def says_no(answer: Any) -> bool:  # Any: whatever a callable returns
    """Whether it is False: Python's, a tensor's or numpy's."""
    if hasattr(answer, "item") and not isinstance(answer, bool):
        sizes = getattr(answer, "shape", (0,))
        return all(size == 1 for size in sizes) and answer.item() is False
    return answer is False


def told(*trials: Trial) -> str | None:
    """What was wrong in the first trial that was."""
    return next(trial.problem for trial in trials if trial.problem is not None)


def names(pairs: list[Pair]) -> str:
    """Kernels in words."""
    return " and ".join(kernel for _, kernel in pairs)


def operators() -> "Mapping[str, AnyOperator]":
    """Every operator by name."""
    return dispatch.dispatcher().registry.operators


def depth(operator: str) -> int:
    """0 for an operator that is composed of no other, else one more than its deepest part."""
    return 1 + max(map(depth, operators()[operator].composed_of), default=-1)


def contains(operator: str, parts: Collection[str]) -> bool:
    """Whether an operator is composed of one of these, on whatever level."""
    return any(part in parts or contains(part, parts) for part in operators()[operator].composed_of)


def random_state() -> dict[str, Any]:  # Any: each generator's own
    """The state of the random generators that a callable may draw from."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if "numpy" in sys.modules:
        state["numpy"] = sys.modules["numpy"].random.get_state()
    if torch.accelerator.is_available() and hasattr(torch.get_device_module(), "get_rng_state_all"):
        state["device"] = torch.get_device_module().get_rng_state_all()
    return state


def restore(state: Mapping[str, Any]) -> None:  # Any: each generator's own
    """Put the generators back."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "numpy" in state:
        sys.modules["numpy"].random.set_state(state["numpy"])
    if "device" in state:
        torch.get_device_module().set_rng_state_all(state["device"])
