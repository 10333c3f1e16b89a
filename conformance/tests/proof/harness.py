"""Runs wrong and right kernels through the judge, and through every check of the suite."""

import importlib
import inspect
from functools import lru_cache
from pathlib import Path

import torch
from faults import Fault
from local import Local

from isolith import OPERATORS, Make
from isolith_conformance import suite
from isolith_conformance.buffers import place_all
from isolith_conformance.case import Unit, arguments_of, cases, dtype_name, labels
from isolith_conformance.judge import Expectation, expect
from isolith_conformance.trial import Finding, Inapplicable, Trial

HERE = Path(__file__).parent
SEED = 1
CHECKS = {
    function.isolith_check.name: function
    for function in vars(suite).values()
    if inspect.isfunction(function) and hasattr(function, "isolith_check")
}
"""The suite's test functions by the names of their checks."""


def listed(folder: str, name: str) -> list:
    """All mutants, or all right variants, of the files in a folder."""
    modules = [importlib.import_module(f"{folder}.{path.stem}") for path in sorted((HERE / folder).glob("*.py"))]
    return [entry for module in modules for entry in getattr(module, name)]


def sample(entries: list, count: int) -> list:
    """So many entries of each operator, spread over its list."""
    by_operator: dict[str, list] = {}
    for entry in entries:
        by_operator.setdefault(entry.operator, []).append(entry)
    return [entry for of_one in by_operator.values() for entry in of_one[:: -(-len(of_one) // count)]]


@lru_cache(maxsize=4)
def made(operator: str, dtype: torch.dtype, seed: int) -> list:
    """(sample, arguments) of every sample that a host can afford."""
    samples = OPERATORS[operator].samples(Make(dtype, seed=f"{operator}:{seed}"))
    fitting = [sample for sample in samples if not sample.tags & {"slow", "device", "invariants"}]
    return [(sample, OPERATORS[operator].arguments(**sample.arguments)) for sample in fitting]


@lru_cache(maxsize=300)
def expectation(operator: str, dtype: torch.dtype, seed: int, place: int) -> Expectation:
    """What is due for one of them; kept, since many functions are judged by it."""
    sample, arguments = made(operator, dtype, seed)[place]
    return expect(OPERATORS[operator], arguments, "exact" in sample.tags)


def trials(operator: str) -> int:
    """How many calls a function is judged by, for each seed."""
    return sum(len(made(operator, dtype, 0)) for dtype in OPERATORS[operator].sample_dtypes)


def first_problem(function, operator: str, seed: int, quick: bool = False) -> str | None:
    """What the judge says of a function, of the first sample where it says anything, in up to three dtypes.

    A quick answer is for one dtype, and without the samples of models.
    """
    for dtype in OPERATORS[operator].sample_dtypes[: 1 if quick else 3]:
        for place, (sample, arguments) in enumerate(made(operator, dtype, seed)):
            if quick and "model" in sample.tags:
                continue
            given = place_all(arguments)[1]  # copies with the sample's strides
            try:
                results = function(**given)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:  # a wrong reference may also raise
                return f"{sample.name} {dtype}: {type(error).__name__}: {error}"
            verdict = expectation(operator, dtype, seed, place).verdict_on(results)
            if not verdict.passed:
                return f"{sample.name} {dtype}: {verdict.problem}"
    return None


def runner_of(entry) -> Local:
    """A wrong kernel, ready to be checked; it has run once, as a backend's process has."""
    if isinstance(entry, Fault):
        name = next(name for name, tags, work in labels(entry.operator, SEED) if work and not tags & {"device", "slow"})
        dtype = dtype_name(OPERATORS[entry.operator].sample_dtypes[0])
        warm = (entry.operator, arguments_of(entry.operator, name, dtype, SEED))
        return Local(entry.make, entry.validates, entry.refuses, warm)
    loaded, written = entry.load(), len(OPERATORS[entry.operator].mutates)

    def kernel(**given):
        results = loaded(**given)
        outputs = results[: len(results) - written]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return Local(lambda: kernel)


def unit_of(entry) -> Unit:
    """The candidate that a wrong kernel plays."""
    invariant = getattr(entry, "batch_invariant", False)
    native = not (isinstance(entry, Fault) and entry.check == "executed")
    return Unit(backend="proof", operator=entry.operator, kernel="kernel", native=native, batch_invariant=invariant)


def killers(entry) -> list[str]:
    """The names of the checks that a wrong kernel fails, in the full run of one seed."""
    return [name for name, function in CHECKS.items() if fails(function, unit_of(entry), entry)]


def fails(function, unit: Unit, entry) -> bool:
    """Whether a check fails on one of its cases; those of models are left to the checks that take every sample."""
    runner, check = runner_of(entry), function.isolith_check
    left_out = {"slow"} if check.samples == "every" else {"slow", "model"}
    for case in cases(check, unit, "full", SEED):
        if case.tags & left_out:
            continue
        try:
            function(Trial(case=case, runner=runner))
        except Inapplicable:
            continue
        except Finding as finding:
            if finding.verdict != "NOT-CLAIMED":
                return True
    return False
