"""Metamorphic relations hold: results of one call made of the results of others."""

from itertools import islice

from torch import Tensor

from isolith.sample import Relation
from isolith_conformance.case import MOST_RELATIONS, check
from isolith_conformance.trial import Finding, Trial


@check("relations", "none", takes=lambda operator: operator.relations is not None)
def test_relations_hold(trial: Trial) -> None:
    relations = trial.case.operator.relations
    assert relations is not None, "the check takes operators that have some"
    refused = []
    for relation in islice(relations(trial.case.make), MOST_RELATIONS[trial.case.scope]):
        try:
            hold(trial, relation)
        except Finding as finding:
            if finding.verdict != "NOT-CLAIMED":
                raise
            refused.append(finding)
    if refused:
        raise refused[0]


def hold(trial: Trial, relation: Relation) -> None:
    """Fail where a relation does not hold."""
    operator = trial.case.operator
    whole, written = operator.arguments(**relation.whole), operator.mutates
    made: list[list[Tensor]] = []
    carried: dict[str, Tensor] = {}
    for part in relation.parts:
        made.append(trial.run(operator.arguments(**part) | carried).results)
        after = dict(zip(written, made[-1][len(made[-1]) - len(written) :], strict=True))
        carried = {name: after[name] for name in relation.carry}
    assembled = relation.assemble(made)
    if relation.exact and not trial.case.unit.nondeterministic:
        trial.equal(whole, trial.run(whole).results, assembled, relation.name)
    else:
        trial.accept(assembled, whole, relation.name)
