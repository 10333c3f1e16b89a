"""Where every legal rounding gives the same bits, results have those bits."""

from isolith_conformance.case import check
from isolith_conformance.trial import Trial


@check("exact", "every", only="exact")
def test_exact_results_have_the_bits_of_the_reference(trial: Trial) -> None:
    trial.accept_values(trial.run().results)
