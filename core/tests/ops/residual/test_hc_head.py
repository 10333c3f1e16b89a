"""Facts of hc_head that no sample states."""

import pytest
import torch

from isolith import Make
from isolith.ops.residual import hc_head, hc_pre
from isolith.ops.residual.hc_head import weights as head_weights
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


def test_scale_multiplies_and_base_is_added():
    # Both streams are 1, so that z is fn's row, [2, 0] and [0, 2], times [1, 1].
    fn = torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=DOUBLE)
    streams, base = torch.ones(1, 2, 1, dtype=DOUBLE), torch.tensor([-6.0, -50.0], dtype=DOUBLE)
    x = hc_head(streams, fn, torch.full((1,), 3.0, dtype=DOUBLE), base, norm_eps=1e-30, hc_eps=1e-30)
    torch.testing.assert_close(x, torch.tensor([[0.5]], dtype=DOUBLE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_streams_are_mixed_as_their_values_and_rounded_once(dtype):
    make = Make(dtype, seed=2)
    call = {"streams": make.normal(5, 4, 32), **head_weights(make, 4, 32)}
    x, wide = hc_head(**call), hc_head(**{name: value.double() for name, value in call.items()})
    assert bool(((x.double() - wide).abs() <= 0.501 * torch.finfo(dtype).eps * wide.abs() + 1e-6).all())
