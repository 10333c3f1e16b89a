"""Sinkhorn normalisation: logits to matrices whose columns sum to 1, and nearly their rows.

    comb = softmax_k(logits[..., j, k]) + eps
    comb[..., j, k] /= sum_j(comb[..., j, k]) + eps
    iters - 1 times:  comb[..., j, k] /= sum_k(comb[..., j, k]) + eps;  comb[..., j, k] /= sum_j(comb[..., j, k]) + eps

j, the source, is the last axis but one; k, the destination, the last. So `iters` counts columns: 20 is one softmax, 19
rows and 20 columns. The last step is a column's: columns sum to 1 to about eps, rows as far as the iteration has
converged. eps enters the matrix once, after the softmax, and every divisor. The softmax subtracts the row's largest
logit, so logits of any size are legal; one far below it becomes eps. A matrix knows nothing of its neighbours.

Source: DeepSeek-V4 inference/model.py, Block.hc_pre; arXiv:2606.19348 section 2.2, whose B is this matrix transposed;
TileKernels 36d9e45 tile_kernels/torch/mhc.py, sinkhorn_normalize.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from isolith.dtypes import WIDE
from isolith.errors import ArgumentError
from isolith.materials.relations import reordered, same
from isolith.operator import Cost, Operator
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(logits: Tensor, iters: int = 20, eps: float = 1e-6) -> Tensor:
    comb = torch.softmax(logits, dim=-1) + eps
    comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(dim=-1, keepdim=True) + eps)
        comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    return comb.contiguous()


def by_reciprocals(logits: Tensor, iters: int = 20, eps: float = 1e-6) -> Tensor:
    """Multiply by the reciprocal of every divisor, the softmax's too."""
    weight = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    comb = weight * weight.sum(dim=-1, keepdim=True).reciprocal() + eps
    comb = comb * (comb.sum(dim=-2, keepdim=True) + eps).reciprocal()
    for _ in range(iters - 1):
        comb = comb * (comb.sum(dim=-1, keepdim=True) + eps).reciprocal()
        comb = comb * (comb.sum(dim=-2, keepdim=True) + eps).reciprocal()
    return comb.contiguous()


def summed_backwards(logits: Tensor, iters: int = 20, eps: float = 1e-6) -> Tensor:
    """Powers of 2 instead of e, sums that start at eps and run from the last entry to the first."""
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    weight = (shifted * 1.4426950408889634).exp2()  # log2(e)
    comb = weight / backward_sum(weight, -1, 0.0) + eps
    comb = comb / backward_sum(comb, -2, eps)
    for _ in range(iters - 1):
        comb = comb / backward_sum(comb, -1, eps)
        comb = comb / backward_sum(comb, -2, eps)
    return comb.contiguous()


def as_two_scalings(logits: Tensor, iters: int = 20, eps: float = 1e-6) -> Tensor:
    """Leave the matrix as it is and iterate on a factor for each row and each column; multiply once, at the end."""
    comb = torch.softmax(logits, dim=-1) + eps
    row = torch.ones_like(comb[..., :1])
    column = 1 / (comb.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        row = row / ((comb * column).sum(dim=-1, keepdim=True) * row + eps)
        column = column / ((comb * row).sum(dim=-2, keepdim=True) * column + eps)
    return (comb * row * column).contiguous()


def backward_sum(values: Tensor, dim: int, start: float) -> Tensor:
    parts = reversed(values.split(1, dim))
    return functools.reduce(torch.add, parts, torch.full((), start, dtype=values.dtype, device=values.device))


def fake(logits: Tensor, iters: int = 20, eps: float = 1e-6) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def check(logits: Tensor, iters: int = 20, eps: float = 1e-6) -> None:
    if iters < 1:
        raise ArgumentError(f"sinkhorn: iters must be at least 1; got {iters}.")
    if not eps > 0:
        raise ArgumentError(f"sinkhorn: eps must be positive; got {eps}.")


def cost(logits: Tensor, iters: int = 20, eps: float = 1e-6) -> Cost:
    # Softmax and eps: subtract, exponential, add, divide, add. Then 2*iters - 1 normalisations: add, divide.
    return Cost(flops=(5 + 2 * (2 * iters - 1)) * logits.numel(), bytes_read=logits.nbytes, bytes_written=logits.nbytes)


def samples(make: Make) -> Iterator[Sample]:
    yield Sample("tokens_of_4_streams", "model", logits=make.normal(64, 4, 4))
    yield Sample("one_stream", logits=make.normal(3, 1, 1))
    yield Sample("two_streams", logits=make.normal(8, 2, 2))
    yield Sample("three_streams", logits=make.normal(8, 3, 3))
    yield Sample("eight_streams", logits=make.normal(5, 8, 8))
    yield Sample("no_leading_axis", logits=make.normal(4, 4))
    yield Sample("three_leading_axes", logits=make.normal(2, 3, 5, 4, 4))
    yield Sample("permuted_axes", logits=make.normal(4, 5, 4).permute(1, 2, 0))
    yield Sample("no_matrices", logits=make.normal(0, 4, 4))
    yield Sample("one_iteration", logits=make.normal(16, 4, 4), iters=1)
    yield Sample("two_iterations", logits=make.normal(16, 4, 4, std=3.0), iters=2)
    # Far from converged after 20 iterations: 19 and 21 differ by a tenth of a percent.
    slow = make.tensor([[[0.0, 20.0], [0.0, 0.0]]])
    yield Sample("slow_to_converge", logits=slow)
    yield Sample("slow_to_converge_19", logits=slow, iters=19)
    # Where eps is large its place shows: in the matrix once, in every divisor.
    yield Sample("large_eps", logits=make.normal(16, 4, 4), iters=3, eps=0.05)
    yield Sample("large_logits", logits=make.normal(16, 4, 4, std=100.0))
    # exp of these overflows unless the largest is subtracted, and a whole column is left with eps alone.
    yield Sample("overflowing_logits", logits=make.tensor([[[300.0, -300.0], [250.0, -250.0]]]), iters=5)
    yield Sample("equal_logits", logits=make.full(7.0, 4, 4, 4))
    # Strong rows, weak columns: softmax over the wrong axis, or rows normalised last, shows.
    skewed = make.normal(16, 4, 4)
    skewed[:, 0] += 6.0
    skewed[:, :, 1] -= 4.0
    yield Sample("asymmetric", logits=skewed, iters=4)


def errors(make: Make) -> Iterator[ErrorSample]:
    logits = make.normal(3, 4, 4)
    yield ErrorSample("no_iterations", logits=logits, iters=0, says="sinkhorn: iters must be at least 1; got 0.")
    yield ErrorSample("zero_eps", logits=logits, eps=0.0, says="sinkhorn: eps must be positive; got 0.0.")
    yield ErrorSample("not_square", logits=logits[:, :3], says="sinkhorn: n is both 3 and 4 in logits.")
    says = "sinkhorn: logits must be [... n n], at least 2 axes; got shape (4,)."
    yield ErrorSample("one_axis", logits=logits[0, 0], says=says)
    says = "sinkhorn: logits must be float32 or float64; got bfloat16."
    yield ErrorSample("narrow_logits", logits=logits.to(torch.bfloat16), says=says)
    yield ErrorSample("float_iters", logits=logits, iters=2.0, says="sinkhorn: iters must be int; got float.")


def relations(make: Make) -> Iterator[Relation]:
    call = {"logits": make.normal(9, 4, 4, std=2.0)}
    rows, columns = make.permutation(4), make.permutation(4)
    yield reordered("rows_reordered", call, rows, {"logits": 1}, {0: 1})
    yield reordered("columns_reordered", call, columns, {"logits": 2}, {0: 2})
    # Multiples of 1/16, so that adding is exact; a softmax does not see what all of a row have.
    coarse = make.place((make.normal(9, 4, 4, dtype=torch.float64) * 16).round() / 16, make.dtype)
    yield same("rows_shifted", {"logits": coarse}, {"logits": coarse + 2.0})


sinkhorn = Operator(
    name="sinkhorn",
    shapes="logits[... n n] -> comb[... n n]",
    dtypes={"logits": WIDE},
    reference=reference,
    variants=(by_reciprocals, summed_backwards, as_two_scalings),
    fake=fake,
    check=check,
    cost=cost,
    samples=samples,
    errors=errors,
    sample_dtypes=(torch.float32,),
    relations=relations,
)
