"""Root-mean-square normalisation of every query head, without a weight.

    y[t, h, i] = x[t, h, i] / sqrt(mean_j(x[t, h, j]^2) + eps)

Computed in float32 over all of head_dim, the dimensions to be rotated included, and rounded once. It comes before the
rotary embedding. A head knows nothing of its neighbours. An all-zero head gives zeros. No tokens give no tokens.

Source: arXiv:2606.19348 section 2.3.3; DeepSeek-V4 inference/model.py (which squares in bfloat16);
transformers 5.23 DeepseekV4UnweightedRMSNorm (which rounds the factor to x's dtype).
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isolith.dtypes import FLOAT, widen
from isolith.errors import ArgumentError
from isolith.materials.relations import reordered, scaled
from isolith.operator import Cost, Operator
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(x: Tensor, eps: float = 1e-6) -> Tensor:
    wide = x.to(widen(x.dtype))
    normed = wide * (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return normed.to(x.dtype).contiguous()


def blocked_sum(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Sum the squares in blocks of 64, and divide by the root instead of multiplying by its inverse."""
    wide = x.to(widen(x.dtype))
    total = torch.stack([part.square().sum(-1) for part in wide.split(64, dim=-1)]).sum(0)
    return (wide / (total / x.shape[-1] + eps).sqrt()[..., None]).to(x.dtype).contiguous()


def sum_in_order(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Sum the squares one after the other."""
    wide = x.to(widen(x.dtype))
    total = functools.reduce(torch.add, wide.square().unbind(-1))
    return (wide * (total / x.shape[-1] + eps).rsqrt()[..., None]).to(x.dtype).contiguous()


def fake(x: Tensor, eps: float = 1e-6) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def check(x: Tensor, eps: float = 1e-6) -> None:
    if not eps > 0:
        raise ArgumentError(f"head_rms_norm: eps must be positive; got {eps}.")


def cost(x: Tensor, eps: float = 1e-6) -> Cost:
    return Cost(flops=3 * x.numel(), bytes_read=x.nbytes, bytes_written=x.nbytes)  # square, add, multiply


def beside_halfway(make: Make, side: float) -> dict[str, Any]:  # Any: a tensor and a number
    """Results 1/64 of a unit below 1 and a half (side -1), or above: a mean or a factor that is rounded first shows."""
    unit = torch.finfo(make.dtype).eps
    # Its square is halfway between two numbers of make.dtype, or nearly.
    value = 1 + round((0.5 / unit) ** 0.5) * unit
    result = (1 - unit / 4) * (1 + side * unit / 64)
    x = torch.where(make.uniform(4, 3, 64, dtype=torch.float64).cpu() < 0.5, -value, value)
    return {"x": make.place(x, make.dtype), "eps": (value / result) ** 2 - value**2}


def samples(make: Make) -> Iterator[Sample]:
    yield Sample("flash_queries", "model", x=make.normal(4, 64, 512))
    yield Sample("pro_queries", "model", x=make.normal(2, 128, 512))
    yield Sample("one_head", x=make.normal(1, 1, 512))
    yield Sample("odd_sizes", x=make.normal(3, 5, 129))
    yield Sample("one_dim", x=make.normal(3, 2, 1))
    yield Sample("no_tokens", x=make.normal(0, 8, 64))
    yield Sample("permuted_axes", x=make.normal(3, 5, 64).transpose(0, 1))
    # Heads of very different size: a mean over the whole token shows.
    spread = torch.logspace(-6, 6, 13, base=2.0, dtype=torch.float64)[None, :, None]
    yield Sample(
        "head_norms_spread", x=make.place(make.normal(4, 13, 64, dtype=torch.float64).cpu() * spread, make.dtype)
    )
    # The trailing dimensions, which the rotary embedding turns, hold most of the mean.
    tail = make.normal(4, 2, 512)
    tail[..., 448:] *= 8
    yield Sample("large_rotary_dims", x=tail)
    zero_head = make.normal(4, 3, 128)
    zero_head[:, 1] = 0
    yield Sample("zero_head", x=zero_head)
    yield Sample("eps_dominates", x=make.normal(4, 2, 128, std=1e-3), eps=1e-4)
    yield Sample("tiny_eps", x=make.normal(4, 2, 128), eps=1e-20)
    outlier = make.normal(4, 2, 512, std=0.5)
    outlier[..., 7] = 300.0  # its square overflows in float16
    yield Sample("outlier", x=outlier)
    # A float32 result depends on the last bits of the root, a narrower one does not.
    exact = ("exact",) if make.dtype != torch.float32 else ()
    yield Sample("above_halfway", *exact, **beside_halfway(make, 1.0))
    yield Sample("below_halfway", *exact, **beside_halfway(make, -1.0))


def errors(make: Make) -> Iterator[ErrorSample]:
    x = make.normal(4, 2, 64)
    yield ErrorSample("zero_eps", x=x, eps=0.0, says="head_rms_norm: eps must be positive; got 0.0.")
    says = "head_rms_norm: x must be [tokens heads head_dim], 3 axes; got shape (4, 128)."
    yield ErrorSample("two_axes", x=x.flatten(1), says=says)
    says = "head_rms_norm: x must be bfloat16, float16, float32 or float64; got int32."
    yield ErrorSample("integer_x", x=x.int(), says=says)
    yield ErrorSample("text_eps", x=x, eps="1e-6", says="head_rms_norm: eps must be float; got str.")


def relations(make: Make) -> Iterator[Relation]:
    call = {"x": make.normal(7, 3, 96), "eps": 1e-3}
    yield scaled("x_times_8", call, {"x": 3, "eps": 6}, [0])
    yield reordered("heads_reordered", call, make.permutation(3), {"x": 1}, {0: 1})
    yield scaled("flash_times_8", {"x": make.normal(3, 64, 512), "eps": 1e-6}, {"x": 3, "eps": 6}, [0])


head_rms_norm = Operator(
    name="head_rms_norm",
    shapes="x[tokens heads head_dim] -> y[tokens heads head_dim]",
    dtypes={"x": FLOAT},
    reference=reference,
    variants=(blocked_sum, sum_in_order),
    fake=fake,
    check=check,
    cost=cost,
    samples=samples,
    errors=errors,
    relations=relations,
)
