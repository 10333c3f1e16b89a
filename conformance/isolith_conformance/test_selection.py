"""A selection takes the largest values, each once, as many as are due; among equals the lowest index."""

from isolith_conformance.case import check
from isolith_conformance.trial import Trial


@check("selection", "every", takes=lambda operator: operator.selects_by is not None)
def test_the_largest_values_are_selected(trial: Trial) -> None:
    trial.conclude(trial.case.expectation.selection(trial.run().results))
