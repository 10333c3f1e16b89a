"""Facts of hc_head that no sample states."""

import torch

from isolith import Make
from isolith.ops.residual import hc_head, hc_pre
from isolith.ops.residual.hc_pre import weights

DOUBLE = torch.float64


def test_equals_the_collapse_of_hc_pre_with_the_same_weights():
    make = Make(DOUBLE, seed=1)
    streams = make.normal(5, 4, 32)
    call = {name: value.double() for name, value in weights(make, 4, 32).items()}
    collapsed, _, _ = hc_pre(streams, **call)
    head = {"fn": call["fn"][:4], "scale": call["scale"][:1], "base": call["base"][:4]}
    torch.testing.assert_close(hc_head(streams, **head), collapsed, rtol=1e-12, atol=1e-14)


def test_eps_is_added_to_every_coefficient():
    streams = torch.tensor([[[1.0], [10.0]]], dtype=DOUBLE)
    base = torch.tensor([-50.0, -50.0], dtype=DOUBLE)
    x = hc_head(streams, torch.zeros(2, 2, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE), base, hc_eps=0.125)
    torch.testing.assert_close(x, torch.tensor([[11 / 8]], dtype=DOUBLE))


def test_coefficients_do_not_sum_to_1():
    streams = torch.ones(1, 4, 8, dtype=DOUBLE)
    x = hc_head(streams, torch.zeros(4, 32, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE), torch.zeros(4, dtype=DOUBLE))
    torch.testing.assert_close(x, torch.full((1, 8), 4 * (0.5 + 1e-6), dtype=DOUBLE))
