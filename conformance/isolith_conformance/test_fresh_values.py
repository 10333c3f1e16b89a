"""New values in the same memory give new results: nothing is remembered by where the arguments lie."""

from isolith_conformance.case import arguments_of, check
from isolith_conformance.trial import Trial


@check("fresh values", "one", empty=False, without="model")
def test_values_that_change_in_place_change_the_results(trial: Trial) -> None:
    case = trial.case
    earlier = arguments_of(case.operator.name, case.sample, case.dtype, case.seed + 1)
    trial.accept(trial.run(earlier=earlier).results, when="other values were in the same memory before")
