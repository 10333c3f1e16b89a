"""A row's result does not depend on the others: alone, in another order, twice in the batch, in a part of it."""

from isolith_conformance.case import check
from isolith_conformance.rows import rows_of
from isolith_conformance.trial import Inapplicable, Trial


@check("batch invariance", "one", empty=False, without="model")
def test_rows_do_not_depend_on_their_batch(trial: Trial) -> None:
    rows = rows_of(trial.case.operator, trial.case.arguments)
    if rows is None:
        raise Inapplicable("the call has no rows")
    results, last = trial.run().results, rows.count - 1
    batches = {
        "a row alone": [last],
        "rows in reverse": list(range(last, -1, -1)),
        "rows twice": [*range(rows.count), *range(rows.count)],
        "half of the rows": list(range(rows.count // 2, rows.count)),
    }
    looked = False
    for words, chosen in batches.items():
        arguments = rows.take(chosen)
        response = trial.run_if_claimed(arguments)
        if response is None:
            continue
        looked, others = True, response.results
        if trial.case.unit.batch_invariant:
            trial.equal(arguments, rows.pick(results, chosen), others, words)
        trial.accept(others, arguments, words)
    if not looked:
        raise Inapplicable("no other batch of the rows is claimed")
