"""Nothing that the operator does not read has an effect: NaN, or integers out of range, in every unused row."""

from isolith_conformance.case import check
from isolith_conformance.trial import Inapplicable, Trial
from isolith_conformance.unused import with_garbage


@check("unused input", "one", empty=False, without="model", takes=lambda operator: not operator.mutates)
def test_garbage_in_unused_input_has_no_effect(trial: Trial) -> None:
    garbage, where = with_garbage(trial.case.operator, trial.case.arguments)
    if not where:
        raise Inapplicable("every row of the arguments is read")
    trial.agree(trial.run().results, trial.run(garbage).results, f"garbage in unused rows of {', '.join(where)}")
