"""The invariants of mappings and selections hold: bijections, counts, ranges, sentinels; also where gold is slow."""

from isolith_conformance.case import check
from isolith_conformance.trial import Trial


@check("mapping", "every", takes=lambda operator: operator.invariants is not None, invariants=True)
def test_invariants_hold(trial: Trial) -> None:
    operator = trial.case.operator
    assert operator.invariants is not None, "the check takes operators that have some"
    results = trial.run().results
    trial.shaped(results)
    problem = operator.invariants(results=results, **trial.case.arguments)
    if problem is not None:
        trial.fail(problem, "invariant")
