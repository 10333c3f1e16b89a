"""Golden values of sinkhorn, and its invariants."""

import pytest
import torch

from isolith import Make
from isolith.ops.residual.sinkhorn import sinkhorn

DOUBLE = torch.float64
PLAIN = [[0.0, 1.0], [2.0, -1.0]]
SLOW = [[0.0, 20.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("logits", "iters", "expected", "rtol"),
    [
        pytest.param(PLAIN, 1, [[0.2201706, 0.9390769], [0.7798286, 0.0609218]], 1e-6, id="one_iteration"),
        pytest.param(PLAIN, 20, [[0.1192063, 0.8807974], [0.8807927, 0.1192016]], 1e-6, id="twenty_iterations"),
        pytest.param(SLOW, 19, [[3.80584e-5, 0.9743459], [0.9999609, 0.0256531]], 3e-6, id="slow_19"),
        pytest.param(SLOW, 20, [[4.00593e-5, 0.9755960], [0.9999589, 0.0244030]], 3e-6, id="slow_20"),
    ],
)
def test_golden_matrix(logits, iters, expected, rtol):
    comb = sinkhorn(torch.tensor(logits, dtype=DOUBLE), iters=iters, eps=1e-6)
    torch.testing.assert_close(comb, torch.tensor(expected, dtype=DOUBLE), rtol=rtol, atol=0)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("std", [1.0, 100.0], ids=["ordinary", "large"])
def test_columns_sum_to_1(n, std):
    columns = sinkhorn(Make(seed=n).normal(64, n, n, std=std)).sum(dim=-2)
    torch.testing.assert_close(columns, torch.ones_like(columns), rtol=0, atol=1e-5)


def test_rows_sum_to_1_where_the_iteration_has_converged():
    rows = sinkhorn(Make(torch.float64, seed=1).normal(64, 4, 4)).sum(dim=-1)
    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=1e-3)


def test_rows_do_not_sum_to_1_where_it_has_not():
    rows = sinkhorn(torch.tensor(SLOW, dtype=DOUBLE)).sum(dim=-1)
    assert (rows - 1).abs().max() > 0.02


def test_result_is_not_symmetric():
    comb = sinkhorn(Make(seed=2).normal(4, 4))
    assert (comb - comb.mT).abs().max() > 0.05


def test_constant_added_to_a_row_does_not_matter():
    logits = Make(torch.float64, seed=3).normal(8, 4, 4)
    shifted = logits + Make(torch.float64, seed=4).normal(8, 4, 1)
    torch.testing.assert_close(sinkhorn(shifted), sinkhorn(logits), rtol=1e-12, atol=0)


def test_constant_added_to_a_column_matters_before_convergence():
    logits = Make(torch.float64, seed=5).normal(8, 4, 4)
    shifted = logits + Make(torch.float64, seed=6).normal(8, 1, 4)
    assert (sinkhorn(shifted, iters=1) - sinkhorn(logits, iters=1)).abs().max() > 0.01


def test_logit_far_below_the_largest_becomes_eps_over_its_column():
    comb = sinkhorn(torch.tensor([[0.0, -1e4], [0.0, 0.0]], dtype=DOUBLE), iters=1, eps=0.25)
    torch.testing.assert_close(comb[0, 1], torch.tensor(0.25 / (0.25 + 0.75 + 0.25), dtype=DOUBLE))


def test_nan_stays_in_its_own_matrix():
    logits = Make(seed=7).normal(3, 4, 4)
    alone = sinkhorn(logits[[0, 2]])
    logits[1, 2, 3] = float("nan")
    assert torch.equal(sinkhorn(logits)[[0, 2]], alone)


def test_eps_is_in_every_divisor():
    comb = torch.tensor([[0.5 + 0.25, 0.5 + 0.25], [0.5 + 0.25, 0.5 + 0.25]], dtype=DOUBLE)
    column = comb / (1.5 + 0.25)
    row = column / (column.sum(-1, keepdim=True) + 0.25)
    expected = row / (row.sum(-2, keepdim=True) + 0.25)
    torch.testing.assert_close(sinkhorn(torch.zeros(2, 2, dtype=DOUBLE), iters=2, eps=0.25), expected)
