"""Facts of hc_pre that no sample states."""

import math

import pytest
import torch

from isolith import Make
from isolith.ops.residual.hc_pre import hc_pre, weights
from isolith.ops.residual.sinkhorn import sinkhorn

DOUBLE = torch.float64


def random_call(n=4, hidden=32, dtype=DOUBLE, seed=0):
    make = Make(dtype, seed=seed)
    call = {"streams": make.normal(5, n, hidden), **weights(make, n, hidden)}
    return {name: value.double() for name, value in call.items()} if dtype == DOUBLE else call


def worked(streams, base, scale=(1.0, 1.0, 1.0), fn=None, **scalars):
    """hc_pre in float64 with fn = 0 unless given."""
    streams = torch.tensor(streams, dtype=DOUBLE)
    n, hidden = streams.shape[1:]
    fn = torch.zeros((2 + n) * n, n * hidden, dtype=DOUBLE) if fn is None else fn
    return hc_pre(streams, fn, torch.tensor(scale, dtype=DOUBLE), torch.tensor(base, dtype=DOUBLE), **scalars)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_pre_is_a_sigmoid_of_the_first_slice_of_base_plus_eps():
    x, _, _ = worked([[[1.0], [10.0]]], [0.0, -50.0, 3, 3, 3, 3, 3, 3], hc_eps=0.125)
    torch.testing.assert_close(x, torch.tensor([[0.625 + 1.25]], dtype=DOUBLE))


def test_post_is_twice_a_sigmoid_of_the_second_slice_without_eps():
    _, post, _ = worked([[[1.0], [10.0]]], [3.0, 3.0, 0.0, -50.0, 3, 3, 3, 3], hc_eps=0.125)
    torch.testing.assert_close(post, torch.tensor([[1.0, 0.0]], dtype=DOUBLE), rtol=0, atol=1e-15)


def test_comb_is_sinkhorn_of_the_rest_row_by_row():
    _, _, comb = worked([[[1.0], [10.0]]], [3.0, 3, 3, 3, 0.0, 1.0, 2.0, -1.0])
    expected = torch.tensor([[[0.1192063, 0.8807974], [0.8807927, 0.1192016]]], dtype=DOUBLE)
    torch.testing.assert_close(comb, expected, rtol=1e-6, atol=0)


def test_iterations_and_eps_reach_sinkhorn():
    _, _, comb = worked([[[1.0], [2.0]]], [0.0, 0, 0, 0, 0, 20, 0, 0], sinkhorn_iters=3, hc_eps=0.01)
    logits = torch.tensor([[[0.0, 20.0], [0.0, 0.0]]], dtype=DOUBLE)
    assert torch.equal(comb, sinkhorn(logits, iters=3, eps=0.01))


def test_fn_reads_stream_after_stream():
    # Only element 1*hidden + 0, the first of stream 1, feeds pre[0]; mean(v^2) = 2 * 9 / 4.
    fn = torch.zeros(8, 4, dtype=DOUBLE)
    fn[0, 2] = 1.0
    x, _, _ = worked([[[1.0, 2.0], [3.0, 2.0]]], [0.0, -50, 0, 0, 0, 0, 0, 0], fn=fn, hc_eps=1e-30)
    pre = torch.sigmoid(torch.tensor(3.0 / (18 / 4) ** 0.5, dtype=DOUBLE))
    torch.testing.assert_close(x, pre * torch.tensor([[1.0, 2.0]], dtype=DOUBLE), rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_columns_of_comb_sum_to_1(n):
    columns = hc_pre(**random_call(n=n))[2].sum(dim=1)
    torch.testing.assert_close(columns, torch.ones_like(columns), rtol=0, atol=1e-5)


def test_size_of_the_streams_does_not_change_the_coefficients():
    call = random_call()
    _, post, comb = hc_pre(**call, norm_eps=1e-30)
    call["streams"] = call["streams"] * 4
    _, scaled_post, scaled_comb = hc_pre(**call, norm_eps=1e-30)
    torch.testing.assert_close((scaled_post, scaled_comb), (post, comb), rtol=1e-12, atol=0)


def test_norm_eps_stands_inside_the_root():
    call = random_call()
    halved = {**call, "fn": call["fn"] / 2**0.5}
    mean = call["streams"].square().mean((1, 2), keepdim=True)
    unit = {"streams": call["streams"] / mean.sqrt()}
    expected = hc_pre(**{**halved, **unit}, norm_eps=1e-30)[1]
    torch.testing.assert_close(hc_pre(**{**call, **unit}, norm_eps=1.0)[1], expected, rtol=1e-12, atol=0)


def test_post_and_comb_stay_float32_for_bfloat16_streams():
    _, post, comb = hc_pre(**random_call(dtype=torch.bfloat16))
    assert (post.dtype, comb.dtype) == (torch.float32, torch.float32)
    assert not torch.equal(post, post.bfloat16().float())


def test_token_does_not_depend_on_others():
    call = random_call(dtype=torch.float32)
    alone = hc_pre(**{**call, "streams": call["streams"][:1]})
    call["streams"][1:] = float("nan")
    together = [result[:1] for result in hc_pre(**call)]
    torch.testing.assert_close(together, list(alone), rtol=1e-6, atol=1e-7)


def test_every_coefficient_is_of_its_own_slice_scale_and_base():
    call = random_call(n=3)
    streams, fn, scale, base = (call[name] for name in ("streams", "fn", "scale", "base"))
    x, post, comb = hc_pre(**call)
    for t in range(5):
        v = torch.cat(list(streams[t]))
        z = [float(row @ v) / (float(v @ v) / 96 + 1e-6) ** 0.5 for row in fn]
        pre = [1 / (1 + math.exp(-(scale[0] * z[j] + base[j]))) + 1e-6 for j in range(3)]
        wanted = [2 / (1 + math.exp(-(scale[1] * z[3 + j] + base[3 + j]))) for j in range(3)]
        logits = [[scale[2] * z[6 + 3 * j + k] + base[6 + 3 * j + k] for k in range(3)] for j in range(3)]
        close(x[t], sum(weight * stream for weight, stream in zip(pre, streams[t], strict=True)))
        close(post[t], torch.tensor(wanted, dtype=DOUBLE))
        close(comb[t], sinkhorn(torch.tensor(logits, dtype=DOUBLE)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_streams_are_mixed_as_their_values_and_rounded_once(dtype):
    call = random_call(dtype=dtype)
    wide = {name: value.double() for name, value in call.items()}
    (x, *coefficients), (wide_x, *wide_coefficients) = hc_pre(**call), hc_pre(**wide)
    torch.testing.assert_close([c.double() for c in coefficients], wide_coefficients, rtol=1e-5, atol=1e-6)
    assert bool(((x.double() - wide_x).abs() <= 0.501 * torch.finfo(dtype).eps * wide_x.abs() + 1e-6).all())
