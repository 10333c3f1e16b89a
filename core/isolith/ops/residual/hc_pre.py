"""Collapse the residual streams into a sublayer's input, and make the coefficients with which `hc_post` puts it back.

    v = streams[t] flattened, element j*hidden + c;  z = (fn v) / sqrt(mean(v^2) + norm_eps)
    pre[j]      = sigmoid(scale[0]*z[j] + base[j]) + hc_eps
    post[t, j]  = 2*sigmoid(scale[1]*z[n+j] + base[n+j])
    comb[t]     = sinkhorn(scale[2]*z[2n + j*n + k] + base[2n + j*n + k], iters=sinkhorn_iters, eps=hc_eps)
    x[t, c]     = sum_j pre[j]*streams[t, j, c]

All in float32; x is rounded once to the dtype of streams, post and comb stay float32 (float64 for float64 streams). fn
is float32: a kernel that declares "tf32" may multiply bfloat16 and float16 streams with it in TF32, but not float32
streams. There is no norm weight. All-zero streams give z = 0. No tokens give empty results.

Source: DeepSeek-V4 inference/model.py, Block.hc_pre; arXiv:2606.19348 section 2.2; TileKernels 36d9e45
tile_kernels/torch/mhc.py; DeepGEMM 54e2261 tests/test_hyperconnection.py (TF32); transformers 5.23
DeepseekV4HyperConnection.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isolith.dtypes import FLOAT, WIDE, widen
from isolith.errors import ArgumentError
from isolith.materials.relations import inverse, reordered, scaled, take
from isolith.numerics import stream_mix
from isolith.operator import Cost, Operator
from isolith.ops.residual.sinkhorn import reference as sinkhorn
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(
    streams: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    sinkhorn_iters: int = 20,
    norm_eps: float = 1e-6,
    hc_eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    flat = streams.to(widen(streams.dtype)).flatten(1)
    z = flat @ fn.to(flat.dtype).T * (flat.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
    return mixed(streams, z, scale, base, sinkhorn_iters, hc_eps)


def mixed(
    streams: Tensor, z: Tensor, scale: Tensor, base: Tensor, sinkhorn_iters: int, hc_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, post, comb) from the projection z [tokens, (2+n)*n]."""
    n = streams.shape[1]
    scale, base = scale.to(z.dtype), base.to(z.dtype)
    pre = torch.sigmoid(scale[0] * z[:, :n] + base[:n]) + hc_eps
    post = 2 * torch.sigmoid(scale[1] * z[:, n : 2 * n] + base[n : 2 * n])
    logits = scale[2] * z[:, 2 * n :] + base[2 * n :]
    comb = sinkhorn(logits.unflatten(1, (n, n)), sinkhorn_iters, hc_eps)
    x = (pre[:, :, None] * streams.to(z.dtype)).sum(dim=1)
    return x.to(streams.dtype).contiguous(), post, comb


def normalised_first(
    streams: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    sinkhorn_iters: int = 20,
    norm_eps: float = 1e-6,
    hc_eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise the streams before projecting them."""
    z = stream_mix.normalised_first(streams, fn, norm_eps)
    return mixed(streams, z, scale, base, sinkhorn_iters, hc_eps)


def sum_in_order(
    streams: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    sinkhorn_iters: int = 20,
    norm_eps: float = 1e-6,
    hc_eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum products and squares one after the other."""
    z = stream_mix.sum_in_order(streams, fn, norm_eps)
    return mixed(streams, z, scale, base, sinkhorn_iters, hc_eps)


def multiplied_in_tf32(
    streams: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    sinkhorn_iters: int = 20,
    norm_eps: float = 1e-6,
    hc_eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut fn to TF32 where the streams are narrower than float32."""
    z = stream_mix.multiplied_in_tf32(streams, fn, norm_eps)
    return mixed(streams, z, scale, base, sinkhorn_iters, hc_eps)


def fake(streams: Tensor, **_: object) -> tuple[Tensor, Tensor, Tensor]:
    tokens, n, hidden = streams.shape
    wide = widen(streams.dtype)
    return (
        streams.new_empty((tokens, hidden)),
        streams.new_empty((tokens, n), dtype=wide),
        streams.new_empty((tokens, n, n), dtype=wide),
    )


def check(sinkhorn_iters: int, norm_eps: float, hc_eps: float, **_: object) -> None:
    if sinkhorn_iters < 1:
        raise ArgumentError(f"hc_pre: sinkhorn_iters must be at least 1; got {sinkhorn_iters}.")
    if not norm_eps > 0:
        raise ArgumentError(f"hc_pre: norm_eps must be positive; got {norm_eps}.")
    if not hc_eps > 0:
        raise ArgumentError(f"hc_pre: hc_eps must be positive; got {hc_eps}.")


def cost(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, sinkhorn_iters: int, **_: object) -> Cost:
    tokens, n, hidden = streams.shape
    wide = widen(streams.dtype).itemsize
    coefficients = n + n * n
    return Cost(
        # fn, the squares, the collapse; then Sinkhorn as its own operator counts it.
        flops=2 * tokens * n * hidden * ((2 + n) * n + 2) + (3 + 4 * sinkhorn_iters) * tokens * n * n,
        bytes_read=streams.nbytes + fn.nbytes + scale.nbytes + base.nbytes,
        bytes_written=tokens * (hidden * streams.element_size() + coefficients * wide),
    )


def weights(make: Make, n: int, hidden: int) -> dict[str, Tensor]:
    """fn, scale and base such that z is about 1, and that tells the three scales and every slice of base apart."""
    wide = torch.float32
    return {
        "fn": make.normal((2 + n) * n, n * hidden, std=(n * hidden) ** -0.5, dtype=wide),
        "scale": make.tensor([1.0, 0.6, 1.7], wide),
        "base": make.normal((2 + n) * n, dtype=wide),
    }


def samples(make: Make) -> Iterator[Sample]:
    wide = torch.float32
    yield Sample("flash", "model", streams=make.normal(4, 4, 4096), **weights(make, 4, 4096))
    yield Sample("pro", "model", streams=make.normal(2, 4, 7168), **weights(make, 4, 7168))
    for n in (1, 2, 3):
        yield Sample(f"{n}_streams", streams=make.normal(5, n, 96), **weights(make, n, 96))
    yield Sample("one_token", streams=make.normal(1, 4, 64), **weights(make, 4, 64))
    yield Sample("odd_hidden", streams=make.normal(7, 4, 37), **weights(make, 4, 37))
    yield Sample("permuted_axes", streams=make.normal(4, 5, 64).transpose(0, 1), **weights(make, 4, 64))
    yield Sample("no_tokens", streams=make.normal(0, 4, 64), **weights(make, 4, 64))
    yield Sample("all_zero", streams=make.zeros(3, 4, 64), **weights(make, 4, 64))
    # Streams of different sizes: a mean over one stream, or a wrong order of flattening, shows.
    spread = make.normal(6, 4, 64)
    spread *= make.tensor([0.25, 1.0, 4.0, 16.0])[:, None]
    yield Sample("stream_sizes_spread", streams=spread, **weights(make, 4, 64))
    # The mean square is near norm_eps.
    yield Sample("small_streams", streams=make.normal(6, 4, 64, std=1e-3), **weights(make, 4, 64))
    # hc_eps is added to pre and to comb, not to post; norm_eps stands inside the root.
    yield Sample("large_eps", streams=make.normal(6, 4, 64), norm_eps=0.5, hc_eps=0.05, **weights(make, 4, 64))
    yield Sample("one_iteration", streams=make.normal(6, 4, 64), sinkhorn_iters=1, **weights(make, 4, 64))
    yield Sample("two_iterations", streams=make.normal(6, 4, 64), sinkhorn_iters=2, **weights(make, 4, 64))
    # 20 iterations that have not converged: 19 and 21 show.
    slow = {"fn": make.zeros(8, 128, dtype=wide), "scale": make.full(1.0, 3, dtype=wide)}
    slow["base"] = make.tensor([0.5, -1.0, 2.0, 0.0, 0.0, 20.0, 0.0, 0.0], wide)
    yield Sample("slow_to_converge", streams=make.normal(3, 2, 64), **slow)
    large = weights(make, 4, 64)
    large["scale"] = make.tensor([20.0, 30.0, 50.0], wide)
    # Saturated coefficients: exp overflows where it is not guarded.
    large["base"][:8] = make.tensor([200.0, -200.0, 0.0, 1.0, -200.0, 200.0, 0.0, 1.0], wide)
    yield Sample("large_logits", streams=make.normal(6, 4, 64), **large)
    # The square of the large element overflows in float16.
    outlier = make.normal(3, 4, 64)
    outlier[:, 2, 5] = 300.0
    yield Sample("outlier", streams=outlier, **weights(make, 4, 64))
    # Every product has one sign: an accumulator that is too narrow shows.
    same_sign = weights(make, 4, 512)
    same_sign["fn"] = same_sign["fn"].abs()
    yield Sample("same_sign", streams=make.uniform(3, 4, 512, low=0.5, high=1.5), **same_sign)


def errors(make: Make) -> Iterator[ErrorSample]:
    call = {"streams": make.normal(3, 4, 16), **weights(make, 4, 16)}

    def but(**changed: object) -> dict[str, object]:
        return {**call, **changed}

    says = "hc_pre: sinkhorn_iters must be at least 1; got 0."
    yield ErrorSample("no_iterations", says=says, **but(sinkhorn_iters=0))
    yield ErrorSample("zero_norm_eps", says="hc_pre: norm_eps must be positive; got 0.0.", **but(norm_eps=0.0))
    yield ErrorSample("negative_hc_eps", says="hc_pre: hc_eps must be positive; got -1e-06.", **but(hc_eps=-1e-6))
    says = "hc_pre: axis 0 of fn [(2+n)*n n*hidden] must be (2+n)*n = 24; got 23."
    yield ErrorSample("short_fn", says=says, **but(fn=call["fn"][:23]))
    says = "hc_pre: axis 1 of fn [(2+n)*n n*hidden] must be n*hidden = 64; got 63."
    yield ErrorSample("narrow_fn", says=says, **but(fn=call["fn"][:, :63]))
    says = "hc_pre: axis 0 of scale [3] must be 3; got 2."
    yield ErrorSample("two_scales", says=says, **but(scale=call["scale"][:2]))
    says = "hc_pre: axis 0 of base [(2+n)*n] must be (2+n)*n = 24; got 8."
    yield ErrorSample("short_base", says=says, **but(base=call["base"][:8]))
    says = "hc_pre: streams must be [tokens n hidden], 3 axes; got shape (3, 64)."
    yield ErrorSample("flat_streams", says=says, **but(streams=call["streams"].flatten(1)))
    says = "hc_pre: fn must be float32 or float64; got bfloat16."
    yield ErrorSample("narrow_dtype", says=says, **but(fn=call["fn"].to(torch.bfloat16)))


def relations(make: Make) -> Iterator[Relation]:
    tokens, n, hidden = 7, 4, 48
    wide = torch.float32
    call: dict[str, Any] = {  # Any: arguments
        "streams": make.normal(tokens, n, hidden),
        "fn": make.normal((2 + n) * n, n * hidden, std=(n * hidden) ** -0.5, dtype=wide),
        "scale": make.uniform(3, low=0.5, high=1.5, dtype=wide),
        "base": make.normal((2 + n) * n, dtype=wide),
        "norm_eps": 1e-3,
    }
    yield scaled("streams_times_8", call, {"streams": 3, "norm_eps": 6}, [3, 0, 0])
    yield reordered("tokens_reordered", call, make.permutation(tokens), {"streams": 0}, {0: 0, 1: 0, 2: 0})
    order = make.permutation(n)
    mixes = torch.cat((order, n + order, 2 * n + (order[:, None] * n + order).flatten()))
    fn = take(call["fn"], mixes).view(-1, n, hidden)
    moved = {"fn": take(fn, order, 1).flatten(1), "base": take(call["base"], mixes)}

    def streams_back(parts: list[list[Tensor]]) -> list[Tensor]:
        x, post, comb = parts[0]
        back = inverse(order)
        return [x, take(post, back, 1), take(take(comb, back, 1), back, 2)]

    part = {**call, **moved, "streams": take(call["streams"], order, 1)}
    yield Relation(name="streams_reordered", whole=call, parts=(part,), assemble=streams_back)


hc_pre = Operator(
    name="hc_pre",
    shapes=(
        "streams[tokens n hidden] fn[(2+n)*n n*hidden] scale[3] base[(2+n)*n]"
        " -> x[tokens hidden] post[tokens n] comb[tokens n n]"
    ),
    dtypes={"streams": FLOAT, "fn": WIDE, "scale": WIDE, "base": WIDE},
    reference=reference,
    variants=(normalised_first, sum_in_order),
    declared={"tf32": (multiplied_in_tf32,)},
    fake=fake,
    check=check,
    cost=cost,
    samples=samples,
    errors=errors,
    relations=relations,
)
