import pytest
import torch
from torch.testing import assert_close

from isolith.ops.moe import swiglu


def test_worked_example_of_the_contract():
    gate, up = [-20.0, -1.0, 5.0, 12.0], [3.0, -15.0, 20.0, -2.0]
    y = swiglu(torch.tensor([gate + up], dtype=torch.float64), limit=10.0)
    want = torch.tensor([[-1.2366922e-7, 2.6894142, 49.6653575, -19.9990920]], dtype=torch.float64)
    assert_close(y, want, rtol=1e-7, atol=1e-14)


@pytest.mark.parametrize("value", [-40.0, -10.5])
def test_gate_is_not_clamped_below(value):
    y = swiglu(torch.tensor([value, 1.0], dtype=torch.float64), limit=10.0)
    exact = value / (1 + torch.exp(torch.tensor(-value, dtype=torch.float64)))
    assert_close(y, exact[None])


def test_row_weight_is_inside_the_one_rounding():
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.rand(64, generator=torch.Generator().manual_seed(1))
    exact = swiglu(x.double(), row_weight=weight.double())
    assert torch.equal(swiglu(x, row_weight=weight), exact.bfloat16())
