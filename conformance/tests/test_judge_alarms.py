"""No correct kernel fails: references and variants with their sums taken in orders that the judge does not try."""

import pytest
import torch
from orders import Order
from torch.utils._pytree import tree_flatten

from isolith import OPERATORS, Make
from isolith.dispatch import using
from isolith_conformance.family import copied, only_references
from isolith_conformance.judge import expect

ORDERS = ("split_k", "blocks_of_16", "blocks_of_64", "interleaved", "reversed")
SEEDS = (101, 102)
NAMES = [name for name, operator in OPERATORS.items() if not operator.bitwise]
OTHER_WORK = {"slow", "device", "invariants", "model"}


def run(operator, function, arguments, order):
    given = copied(arguments)
    with using(only_references()), Order(order):
        outputs = function(**given)
    leaves = [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, torch.Tensor)]
    return leaves + [given[name] for name in operator.mutates]


def problems(operator, dtype, seed):
    """What the judge says of every correct kernel, where it says anything."""
    for sample in operator.samples(Make(dtype, seed=f"{operator.name}{seed}")):
        if sample.tags & OTHER_WORK:
            continue
        arguments = operator.arguments(**sample.arguments)
        expectation = expect(operator, arguments, "exact" in sample.tags)
        for order in ORDERS:
            for function in (operator.reference, *operator.variants):
                results = run(operator, function, arguments, order)
                found = [expectation.judge(results)]
                found += [expectation.selection(results)] if operator.selects_by else []
                yield from (f"{sample.name} {order} {each.problem}" for each in found if each.problem)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", NAMES)
def test_no_order_of_sums_is_wrong(name, seed):
    operator = OPERATORS[name]
    assert [said for dtype in operator.sample_dtypes for said in problems(operator, dtype, seed)] == []
