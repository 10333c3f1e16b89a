"""Illegal calls get the operator's own sentence, write nothing, and leave the process able to run the next call."""

from isolith_conformance import bits
from isolith_conformance.buffers import place_all
from isolith_conformance.case import check, make_for
from isolith_conformance.trial import Trial


@check("errors", "none")
def test_an_illegal_call_is_refused_and_the_next_is_right(trial: Trial) -> None:
    operator = trial.case.operator
    for sample in operator.errors(make_for(operator.name, "float32", trial.case.seed)):
        response = trial.ask(dict(sample.arguments), buffers=True)
        if response.status == "refused":
            continue  # this kernel would not have run, so that another's call gets the sentence
        if response.status != "illegal" or response.message != sample.says:
            trial.fail(f"{sample.name}: {response.status}: {response.message!r} instead of {sample.says!r}", "errors")
        for name, before in place_all(sample.arguments)[0].items():
            if not bits.same_bytes(response.buffers.get(name), before):
                trial.fail(f"{sample.name}: {name} was written", "errors")


@check("after an error", "few", empty=False)
def test_the_call_after_an_illegal_one_is_right(trial: Trial) -> None:
    operator = trial.case.operator
    for sample in operator.errors(make_for(operator.name, "float32", trial.case.seed)):
        trial.ask(dict(sample.arguments))
    trial.accept(trial.run().results, when="after illegal calls")
