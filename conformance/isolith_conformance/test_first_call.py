"""The very first call of a process is right, before anything else could have left its results in memory."""

from isolith_conformance.case import check
from isolith_conformance.trial import Trial


@check("first call", "first", empty=False, quick=False, without="model")
def test_the_first_call_of_a_process_is_right(trial: Trial) -> None:
    trial.runner.end("fresh")
    trial.accept(trial.run(which="fresh").results, when="the first call of a process")
