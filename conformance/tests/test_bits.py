import pytest
import torch

from isolith import OPERATORS, Make
from isolith_conformance.bits import differing, unequal_rows


@pytest.fixture
def call():
    """Arguments and results where rows behind the last expert's are undefined."""
    operator = OPERATORS["moe_permute"]
    sample = next(s for s in operator.samples(Make(torch.float32)) if s.name == "random_alignment_16")
    arguments = operator.arguments(**sample.arguments)
    return operator, arguments, list(operator.reference(**arguments))


def test_undefined_rows_may_differ():
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
    assert unequal_rows(one, other).tolist() == [False, True]
    assert unequal_rows(one, other, torch.tensor([True, False])).tolist() == [False, False]


def test_results_of_another_shape_than_is_due_are_compared_whole(call):
    operator, arguments, results = call
    longer = [torch.cat((result, result[:1])) for result in results]
    assert differing(operator, arguments, longer, longer) is None
    changed = [longer[0].clone(), *longer[1:]]
    changed[0][-1] += 1
    assert differing(operator, arguments, longer, changed).startswith("result 0 differs in 1 of")
