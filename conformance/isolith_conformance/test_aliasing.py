"""Results have memory of their own, and two arguments may be one tensor."""

from collections.abc import Iterator
from contextlib import suppress
from itertools import combinations, islice

from torch import Tensor

from isolith.errors import ArgumentError
from isolith_conformance.case import check
from isolith_conformance.trial import Inapplicable, Trial

MOST_PAIRS = 3


@check("aliasing", "one", empty=False, takes=lambda operator: bool(operator.parsed_shapes.outputs))
def test_results_do_not_change_with_the_arguments(trial: Trial) -> None:
    response = trial.run(overwrite=True)
    trial.agree(trial.outputs(response.results), response.late, "after the arguments were overwritten", exactly=True)


@check("same tensor", "few", empty=False, without="model", takes=lambda operator: not operator.mutates)
def test_two_arguments_may_be_one_tensor(trial: Trial) -> None:
    looked = False
    for one, other in islice(pairs(trial), MOST_PAIRS):
        arguments = trial.case.arguments | {other: trial.case.arguments[one]}
        response = trial.run_if_claimed(arguments, same=(one, other))
        if response is not None:
            trial.accept(response.results, arguments, f"{one} is {other}")
            looked = True
    if not looked:
        raise Inapplicable("no two arguments may be one tensor")


def pairs(trial: Trial) -> Iterator[tuple[str, str]]:
    """Arguments that may be one tensor: of one shape and dtype, in a call that is still legal."""
    operator, given = trial.case.operator, trial.case.arguments
    tensors = [name for name, value in given.items() if isinstance(value, Tensor)]
    for one, other in combinations(tensors, 2):
        if given[one].shape == given[other].shape and given[one].dtype == given[other].dtype:
            arguments = given | {other: given[one]}
            with suppress(ArgumentError):
                operator.validate(arguments, values=True)
                yield one, other
