"""Golden values of hadamard, and its invariants."""

import pytest
import torch

from isolith import Make
from isolith.ops.rotary.hadamard import hadamard

DOUBLE = torch.float64


def test_golden_row():
    assert hadamard(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [5.0, -1.0, -2.0, 0.0]


@pytest.mark.parametrize("n", [1, 2, 16, 128])
def test_matrix_has_the_sign_of_the_common_bits(n):
    index = torch.arange(n)
    common = index[:, None] & index
    parity = sum((common >> bit) & 1 for bit in range(7)) % 2
    expected = (1.0 - 2.0 * parity.double()) / n**0.5
    torch.testing.assert_close(hadamard(torch.eye(n, dtype=DOUBLE)), expected, rtol=1e-14, atol=0)


def test_twice_gives_the_row_back():
    x = Make(DOUBLE, seed=1).normal(8, 128)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=0, atol=1e-13)


def test_dot_products_are_unchanged():
    make = Make(DOUBLE, seed=2)
    q, k = make.normal(8, 128), make.normal(8, 128)
    torch.testing.assert_close(hadamard(q) @ hadamard(k).mT, q @ k.mT, rtol=0, atol=1e-12)


def test_one_rounding_at_the_end():
    x = Make(torch.bfloat16, seed=3).normal(16, 128)
    assert torch.equal(hadamard(x), hadamard(x.double()).float().bfloat16())


def test_unscaled_sum_may_exceed_float16():
    assert hadamard(torch.full((64,), 8000.0, dtype=torch.float16))[0].item() == 64000.0


def test_nan_stays_in_its_own_row():
    x = Make(seed=4).normal(3, 16)
    alone = hadamard(x[[0, 2]])
    x[1, 5] = float("nan")
    assert torch.equal(hadamard(x)[[0, 2]], alone)
