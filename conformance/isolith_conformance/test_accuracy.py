"""Results err no more than legal roundings do: R1, R2, R3 and the caps of `limits`."""

from isolith_conformance.case import check
from isolith_conformance.trial import Trial


@check("accuracy", "every", without="exact")
def test_results_err_no_more_than_legal_roundings(trial: Trial) -> None:
    trial.accept_values(trial.run().results)
