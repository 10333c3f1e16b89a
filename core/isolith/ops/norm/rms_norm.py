"""Root-mean-square normalisation of the last axis.

    y[..., i] = weight[i] * x[..., i] / sqrt(mean_j(x[..., j]^2) + eps)

Computed in float32 and rounded once, whatever the dtype of `weight`. With `round_before_weight` the normalised value is
rounded to x's dtype before the weight multiplies it, and the product again (DeepSeek-V3's order); the two orders are
equal in float32. An all-zero row gives zeros.

Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4; DeepSeek-V4 inference/model.py, RMSNorm (one rounding);
transformers 5.23 DeepseekV3RMSNorm (two roundings).
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isolith.dtypes import FLOAT, widen
from isolith.errors import ArgumentError
from isolith.materials.relations import joined, reordered, scaled
from isolith.operator import Cost, Operator
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(x: Tensor, weight: Tensor, eps: float = 1e-6, round_before_weight: bool = False) -> Tensor:
    wide = x.to(widen(x.dtype))
    normed = wide * (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return weighted(normed, weight, x.dtype, round_before_weight)


def weighted(normed: Tensor, weight: Tensor, dtype: torch.dtype, round_before_weight: bool) -> Tensor:
    """The product with the weight, rounded to `dtype`."""
    if round_before_weight:
        normed = normed.to(dtype).to(normed.dtype)
    return (normed * weight.to(normed.dtype)).to(dtype).contiguous()


def blocked_sum(x: Tensor, weight: Tensor, eps: float = 1e-6, round_before_weight: bool = False) -> Tensor:
    """Sum the squares in blocks of 64, and divide by the root instead of multiplying by its inverse."""
    wide = x.to(widen(x.dtype))
    total = torch.stack([part.square().sum(-1) for part in wide.split(64, dim=-1)]).sum(0)
    normed = wide / (total / x.shape[-1] + eps).sqrt()[..., None]
    return weighted(normed, weight, x.dtype, round_before_weight)


def sum_in_order(x: Tensor, weight: Tensor, eps: float = 1e-6, round_before_weight: bool = False) -> Tensor:
    """Sum the squares one after the other."""
    wide = x.to(widen(x.dtype))
    total = functools.reduce(torch.add, wide.square().unbind(-1))
    normed = wide * (total / x.shape[-1] + eps).rsqrt()[..., None]
    return weighted(normed, weight, x.dtype, round_before_weight)


def fake(x: Tensor, weight: Tensor, eps: float = 1e-6, round_before_weight: bool = False) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def check(x: Tensor, weight: Tensor, eps: float = 1e-6, round_before_weight: bool = False) -> None:
    if not eps > 0:
        raise ArgumentError(f"rms_norm: eps must be positive; got {eps}.")


def cost(x: Tensor, weight: Tensor, eps: float = 1e-6, round_before_weight: bool = False) -> Cost:
    return Cost(
        flops=4 * x.numel(),  # square, add, two multiplications
        bytes_read=x.nbytes + weight.nbytes,
        bytes_written=x.nbytes,
    )


def weight_beyond(make: Make) -> Tensor:
    """A float32 weight that make.dtype cannot hold, though 4/5 of it can be: rounding the weight first shows."""
    product = 1 - torch.arange(1, 33, dtype=torch.float64) * torch.finfo(make.dtype).eps / 2
    rounded = (product / 0.8).to(make.dtype).double() * 0.8
    lost = (rounded - product).abs() > torch.finfo(make.dtype).eps / 4
    return make.place(product[lost] / 0.8, torch.float32)


def beside_halfway(make: Make) -> dict[str, Tensor]:
    """Results 1/64 of a unit from where rounding turns: a mean, a square or a factor that is rounded first shows."""
    eps = torch.finfo(make.dtype).eps
    # Its square is halfway between two numbers of make.dtype, or nearly.
    value = 1 + round((0.5 / eps) ** 0.5) * eps
    halfway = 1 + (torch.arange(64, dtype=torch.float64).repeat_interleave(2) + 0.5) * eps
    product = halfway * (1 + torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(64) * eps / 64)
    x = torch.where(make.uniform(4, 128, dtype=torch.float64).cpu() < 0.5, -value, value)
    weight = product * (value**2 + 1e-6) ** 0.5 / value
    return {"x": make.place(x, make.dtype), "weight": make.place(weight, torch.float32)}


def rounded_twice(make: Make) -> dict[str, Any]:  # Any: tensors and a number
    """Weights that make of 4/5, rounded to make.dtype, another product than of 4/5."""
    weight = 1 + torch.arange(128, dtype=torch.float64) / 128
    narrow = torch.tensor(0.8, dtype=torch.float64).to(make.dtype).double()
    weight = weight[(weight * narrow).to(make.dtype) != (weight * 0.8).to(make.dtype)]
    return {"x": make.full(1.0, 4, weight.shape[0]), "weight": make.place(weight, make.dtype), "eps": 9 / 16}


def samples(make: Make) -> Iterator[Sample]:
    wide = torch.float32
    # A float32 result depends on the last bits of the root, a narrower one does not.
    exact = ("exact",) if make.dtype != wide else ()
    yield Sample("hidden_7168", "model", x=make.normal(2, 7168), weight=make.normal(7168))
    yield Sample("hidden_4096", "model", x=make.normal(16, 4096), weight=make.normal(4096, dtype=wide), eps=1e-6)
    yield Sample("one_row", x=make.normal(1, 512), weight=make.normal(512))
    yield Sample("odd_width", x=make.normal(3, 129), weight=make.normal(129))
    yield Sample("no_rows", x=make.normal(0, 128), weight=make.normal(128))
    yield Sample("three_axes", x=make.normal(2, 3, 64), weight=make.normal(64, dtype=wide))
    yield Sample("permuted_axes", x=make.normal(3, 5, 64).transpose(0, 1), weight=make.normal(64))
    yield Sample("all_zero", x=make.zeros(4, 128), weight=make.normal(128))
    # eps decides where the mean square is near it, and hides where it is far above.
    yield Sample("eps_dominates", x=make.normal(4, 128, std=1e-3), weight=make.normal(128), eps=1e-4)
    yield Sample("tiny_eps", x=make.normal(4, 128), weight=make.normal(128), eps=1e-20)
    yield Sample("round_before_weight", x=make.normal(8, 256), weight=make.normal(256), round_before_weight=True)
    yield Sample("rounded_twice", *exact, **rounded_twice(make), round_before_weight=True)
    yield Sample("rounded_once", *exact, **rounded_twice(make))
    yield Sample("beside_halfway", *exact, **beside_halfway(make))
    # Every element is normalised to 4/5.
    weight = weight_beyond(make)
    yield Sample("weight_of_more_bits", x=make.full(1.0, 4, weight.shape[0]), weight=weight, eps=9 / 16)
    # One large element: a sum in low precision loses the small ones, and its square overflows in float16.
    outlier = make.normal(4, 1024, std=0.5)
    outlier[:, 7] = 300.0
    yield Sample("outlier", x=outlier, weight=make.normal(1024))


def errors(make: Make) -> Iterator[ErrorSample]:
    x, weight = make.normal(4, 128), make.normal(128)
    yield ErrorSample("zero_eps", x=x, weight=weight, eps=0.0, says="rms_norm: eps must be positive; got 0.0.")
    says = "rms_norm: hidden is 128 in x but 127 in weight."
    yield ErrorSample("weight_width", x=x, weight=weight[:127], says=says)
    says = "rms_norm: weight must be [hidden], 1 axis; got shape (1, 128)."
    yield ErrorSample("weight_rank", x=x, weight=weight[None], says=says)
    says = "rms_norm: x must be bfloat16, float16, float32 or float64; got int64."
    yield ErrorSample("integer_x", x=x.long(), weight=weight, says=says)
    yield ErrorSample("list_x", x=[1.0], weight=weight, says="rms_norm: x must be Tensor; got list.")


def relations(make: Make) -> Iterator[Relation]:
    call = {"x": make.normal(11, 200), "weight": make.normal(200, mean=1.0), "eps": 1e-3}
    # eps counts among the squares.
    yield scaled("x_times_8", call, {"x": 3, "eps": 6}, [0])
    yield scaled("weight_times_8", call, {"weight": 3}, [3])
    yield reordered("columns_reordered", call, make.permutation(200), {"x": 1, "weight": 0}, {0: 1})
    yield joined("rows_apart", call, [1, 4], ["x"])
    flash = {"x": make.normal(5, 7168), "weight": make.normal(7168, mean=1.0), "eps": 1e-6}
    yield scaled("v3_width_times_8", flash, {"x": 3, "eps": 6}, [0])


rms_norm = Operator(
    name="rms_norm",
    shapes="x[... hidden] weight[hidden] -> y[... hidden]",
    dtypes={"x": FLOAT, "weight": FLOAT},
    reference=reference,
    variants=(blocked_sum, sum_in_order),
    fake=fake,
    check=check,
    cost=cost,
    samples=samples,
    errors=errors,
    relations=relations,
)
