"""Facts of hc_post that no sample states."""

import pytest
import torch

from isolith import Make
from isolith.ops.residual.hc_post import hc_post, random_call
from isolith.ops.residual.hc_pre import hc_pre, weights

DOUBLE = torch.float64
THIRD, NARROW_THIRD = 1 / 3, torch.tensor(1 / 3, dtype=torch.bfloat16).item()


def test_comb_is_used_transposed():
    streams = torch.tensor([[[1.0], [10.0]]])
    comb = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])  # [source, destination]
    y = hc_post(torch.zeros(1, 1), streams, torch.zeros(1, 2), comb)
    assert y.tolist() == [[[1.0 + 30.0], [2.0 + 40.0]]]


def test_sublayer_output_reaches_every_stream_with_its_own_weight():
    y = hc_post(torch.tensor([[5.0, 7.0]]), torch.zeros(1, 2, 2), torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, 2))
    assert y.tolist() == [[[5.0, 7.0], [15.0, 21.0]]]


def test_columns_summing_to_1_keep_equal_streams_as_they_are():
    make = Make(DOUBLE, seed=1)
    stream = make.normal(6, 1, 32)
    streams = stream.expand(6, 4, 32).contiguous()
    call = {name: value.double() for name, value in weights(make, 4, 32).items()}
    _, post, comb = hc_pre(streams, **call)
    y = hc_post(torch.zeros(6, 32, dtype=DOUBLE), streams, post, comb)
    torch.testing.assert_close(y, streams, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("post", "comb"), [(-NARROW_THIRD, THIRD), (THIRD, -NARROW_THIRD)], ids=["comb_wide", "post_wide"]
)
def test_coefficients_are_not_rounded_to_the_dtype_of_the_streams(post, comb):
    x = torch.full((1, 1), 256.0, dtype=torch.bfloat16)
    y = hc_post(x, x[:, None], torch.full((1, 1), post), torch.full((1, 1, 1), comb))
    assert y.item() == pytest.approx(256 * (THIRD - NARROW_THIRD), rel=2**-8)


def test_result_has_the_dtype_of_the_streams():
    call = random_call(Make(torch.bfloat16, seed=2), 3, 4, 16)
    call["x"] = call["x"].float()
    assert hc_post(**call).dtype == torch.bfloat16


def test_wide_sublayer_output_is_not_rounded_before_the_sum():
    one = torch.ones(1, 1, 1)
    y = hc_post(torch.full((1, 1), 1 + 2.0**-10), -one.bfloat16(), one[0], one)
    assert y.item() == 2.0**-10


def test_nan_stays_in_its_own_token():
    call = random_call(Make(seed=3), 3, 4, 16)
    alone = hc_post(**{name: value[[0, 2]] for name, value in call.items()})
    call["streams"][1, 2] = float("nan")
    assert torch.equal(hc_post(**call)[[0, 2]], alone)
