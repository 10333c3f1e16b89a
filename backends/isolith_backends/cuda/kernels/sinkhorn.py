"""Sinkhorn normalisation: the matrices of a program stay in its registers through all iterations.

Reading and writing them is nothing; the time is the chain of 2*iters sums and divisions, each waiting for the last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.launch import ceil_div, launch, power_of_two

SIDE = 128  # a matrix of 16,384 elements fills the registers of 16 warps


@triton.jit
def normalised(logits, n, iters, eps, N: tl.constexpr):
    """[matrices N N] with n real rows and columns; the others come out as 0."""
    real = tl.arange(0, N) < n
    inside = (real[:, None] & real[None, :])[None, :, :]
    logits = tl.where(real[None, None, :], logits, float("-inf"))
    weight = tl.exp(logits - tl.max(logits, axis=2, keep_dims=True))
    comb = tl.where(inside, weight / tl.sum(weight, axis=2, keep_dims=True) + eps, 0.0)
    comb = comb / (tl.sum(comb, axis=1, keep_dims=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (tl.sum(comb, axis=2, keep_dims=True) + eps)
        comb = comb / (tl.sum(comb, axis=1, keep_dims=True) + eps)
    return comb


@triton.jit
def sinkhorn_matrices(X, Y, matrices, n, iters, eps, MATRICES: tl.constexpr, N: tl.constexpr):
    matrix = tl.program_id(0).to(tl.int64) * MATRICES + tl.arange(0, MATRICES)
    side = tl.arange(0, N)
    place = (matrix[:, None, None] * n + side[None, :, None]) * n + side[None, None, :]
    inside = (matrix < matrices)[:, None, None] & ((side < n)[:, None] & (side < n)[None, :])[None, :, :]
    logits = tl.load(X + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + place, normalised(logits, n, iters, eps, N), mask=inside)


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """The matrices of the last two axes, normalised."""
    y = torch.empty_like(logits, memory_format=torch.contiguous_format)
    n = logits.shape[-1]
    if y.numel() == 0:
        return y
    padded = power_of_two(n)
    matrices = y.numel() // (n * n)
    # By n alone: sums are in the order of a tile's layout, which a matrix's neighbours must not change.
    together = max(1, 512 // padded**2)
    launch(
        sinkhorn_matrices,
        (ceil_div(matrices, together),),
        logits.contiguous(),
        y,
        matrices,
        n,
        iters,
        eps,
        warps=min(max(padded**2 * together // 512, 1), 16),
        stages=1,
        MATRICES=together,
        N=padded,
    )
    return y
