"""Results have memory of their own, and two arguments may be one tensor."""

from collections.abc import Iterator
from contextlib import suppress
from itertools import combinations, islice

from torch import Tensor

from isolith.errors import ArgumentError
from isolith_conformance.case import check
from isolith_conformance.trial import Finding, Inapplicable, Trial

MOST_PAIRS = 3


@check("aliasing", "one", empty=False)
def test_results_do_not_change_with_the_arguments(trial: Trial) -> None:
    response = trial.run(overwrite=True)
    outputs = response.results[: len(response.late)]
    trial.agree(outputs, response.late, "after the arguments were overwritten", exactly=True)


@check("same tensor", "few", empty=False, without="model", takes=lambda operator: not operator.mutates)
def test_two_arguments_may_be_one_tensor(trial: Trial) -> None:
    found = list(islice(pairs(trial), MOST_PAIRS))
    if not found:
        raise Inapplicable("no two arguments may be one tensor")
    for one, other in found:
        arguments = trial.case.arguments | {other: trial.case.arguments[one]}
        try:
            trial.accept(trial.run(arguments, same=(one, other)).results, arguments, f"{one} is {other}")
        except Finding as finding:
            if finding.verdict != "NOT-CLAIMED":
                raise


def pairs(trial: Trial) -> Iterator[tuple[str, str]]:
    """Arguments that may be one tensor: of one shape and dtype, in a call that is still legal."""
    operator, given = trial.case.operator, trial.case.arguments
    tensors = [name for name, value in given.items() if isinstance(value, Tensor)]
    for one, other in combinations(tensors, 2):
        if given[one].shape == given[other].shape and given[one].dtype == given[other].dtype:
            arguments = given | {other: given[one]}
            with suppress(ArgumentError):
                operator.validate(arguments)
                if operator.check_values:
                    operator.check_values(**arguments)
                yield one, other
