"""Three runs give the same bits: the second after other work, the third in a process of its own."""

from isolith_conformance.case import check
from isolith_conformance.trial import Trial


@check("determinism", "one")
def test_runs_agree_to_the_bit(trial: Trial) -> None:
    first = trial.run().results
    exactly = not trial.case.unit.nondeterministic
    for _ in range(2):
        trial.agree(first, trial.run(before=3).results, "a run after other work", exactly=exactly)
    trial.run(which="fresh")  # the first call of a process is a check of its own
    trial.agree(first, trial.run(which="fresh").results, "a run in another process", exactly=exactly)
    if not exactly:
        trial.accept(first, when="the first of several runs")
