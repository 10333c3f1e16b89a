"""Many tokens are done in slices: which tokens are in one shows in nothing."""

import torch

from isolith_backends.cuda import residual
from isolith_backends.cuda.kernels import stream_mix

TOKENS, N, HIDDEN = 150, 4, 48


def arguments(outputs, scales):
    generator = torch.Generator().manual_seed(7)
    return (
        torch.randn(TOKENS, N, HIDDEN, generator=generator).to(torch.bfloat16),
        torch.randn(outputs, N * HIDDEN, generator=generator) / 14,
        torch.randn(scales, generator=generator),
        torch.randn(outputs, generator=generator),
    )


def test_slices_of_hc_pre_give_the_bits_of_the_whole(monkeypatch):
    given = arguments((2 + N) * N, 3)
    whole = residual.hc_pre.fn(*given)
    monkeypatch.setattr(stream_mix, "SLICE", 1)
    assert all(map(torch.equal, residual.hc_pre.fn(*given), whole))


def test_slices_of_hc_head_give_the_bits_of_the_whole(monkeypatch):
    given = arguments(N, 1)
    whole = residual.hc_head.fn(*given)
    monkeypatch.setattr(stream_mix, "SLICE", 1)
    assert torch.equal(residual.hc_head.fn(*given), whole)


def test_a_token_alone_has_the_bits_that_it_has_among_others():
    streams, *weights = arguments((2 + N) * N, 3)
    among = [result[TOKENS - 1 :] for result in residual.hc_pre.fn(streams, *weights)]
    assert all(map(torch.equal, residual.hc_pre.fn(streams[TOKENS - 1 :], *weights), among))
