"""The number of threads does not matter beyond legal rounding."""

from isolith_conformance.case import check
from isolith_conformance.trial import Trial


@check("schedule", "one", empty=False)
def test_the_number_of_threads_does_not_matter(trial: Trial) -> None:
    plain = trial.run().results
    for threads in (1, 3):
        trial.agree(plain, trial.run(threads=threads).results, f"{threads} threads")
