"""No result holds what memory held before: every element is written, and nothing is read before it is."""

from isolith_conformance.buffers import LARGE_BYTES, NAN_BYTES
from isolith_conformance.case import check
from isolith_conformance.trial import Trial


@check("poison", "one")
def test_results_do_not_depend_on_what_memory_held(trial: Trial) -> None:
    with_nan = trial.run(poison=True, fill=NAN_BYTES).results
    with_large = trial.run(poison=True, fill=LARGE_BYTES).results
    trial.agree(with_nan, with_large, "memory filled with large numbers instead of NaN")
    trial.accept(with_nan, when="memory filled with NaN")
