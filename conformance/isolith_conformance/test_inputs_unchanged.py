"""No argument changes that the operator does not declare to write."""

from isolith_conformance import bits
from isolith_conformance.buffers import place_all
from isolith_conformance.case import check
from isolith_conformance.trial import Trial


@check("inputs unchanged", "one")
def test_arguments_keep_their_bytes(trial: Trial) -> None:
    response = trial.run(buffers=True)
    for name, before in place_all(trial.case.arguments)[0].items():
        if name not in trial.case.operator.mutates and not bits.same_bytes(response.buffers.get(name), before):
            trial.fail(f"changes {name}", "inputs unchanged")
