"""Collapse the residual streams behind the last layer.

    v = streams[t] flattened, element j*hidden + c;  z = (fn v) / sqrt(mean(v^2) + norm_eps)
    pre[j] = sigmoid(scale[0]*z[j] + base[j]) + hc_eps
    x[t, c] = sum_j pre[j]*streams[t, j, c]

All in float32, x rounded once to the dtype of streams. fn is float32: a kernel that declares "tf32" may multiply
bfloat16 and float16 streams with it in TF32, but not float32 streams. There is no Sinkhorn step and no norm weight: the
model's last norm comes after it. All-zero streams give zeros. No tokens give an empty result.

Source: DeepSeek-V4 inference/model.py, hc_head (and MTPBlock, which has weights of its own); transformers 5.23
DeepseekV4HyperHead.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isolith.dtypes import FLOAT, WIDE, widen
from isolith.errors import ArgumentError
from isolith.materials.relations import same, scaled, take
from isolith.numerics import stream_mix
from isolith.operator import Cost, Operator
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float = 1e-6, hc_eps: float = 1e-6
) -> Tensor:
    flat = streams.to(widen(streams.dtype)).flatten(1)
    z = flat @ fn.to(flat.dtype).T * (flat.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
    return collapsed(streams, z, scale, base, hc_eps)


def collapsed(streams: Tensor, z: Tensor, scale: Tensor, base: Tensor, hc_eps: float) -> Tensor:
    """The streams added up with the coefficients that the projection z [tokens, n] gives."""
    pre = torch.sigmoid(scale.to(z.dtype) * z + base.to(z.dtype)) + hc_eps
    x = (pre[:, :, None] * streams.to(z.dtype)).sum(dim=1)
    return x.to(streams.dtype).contiguous()


def normalised_first(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float = 1e-6, hc_eps: float = 1e-6
) -> Tensor:
    """Normalise the streams before projecting them."""
    return collapsed(streams, stream_mix.normalised_first(streams, fn, norm_eps), scale, base, hc_eps)


def sum_in_order(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float = 1e-6, hc_eps: float = 1e-6
) -> Tensor:
    """Sum products and squares one after the other."""
    return collapsed(streams, stream_mix.sum_in_order(streams, fn, norm_eps), scale, base, hc_eps)


def multiplied_in_tf32(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float = 1e-6, hc_eps: float = 1e-6
) -> Tensor:
    """Cut fn to TF32 where the streams are narrower than float32."""
    return collapsed(streams, stream_mix.multiplied_in_tf32(streams, fn, norm_eps), scale, base, hc_eps)


def fake(streams: Tensor, **_: object) -> Tensor:
    tokens, hidden = streams.shape[0], streams.shape[2]
    return streams.new_empty((tokens, hidden))


def check(norm_eps: float, hc_eps: float, **_: object) -> None:
    if not norm_eps > 0:
        raise ArgumentError(f"hc_head: norm_eps must be positive; got {norm_eps}.")
    if not hc_eps > 0:
        raise ArgumentError(f"hc_head: hc_eps must be positive; got {hc_eps}.")


def cost(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, **_: object) -> Cost:
    tokens, n, hidden = streams.shape
    return Cost(
        flops=2 * tokens * n * hidden * (n + 2),  # fn, the squares, the collapse
        bytes_read=streams.nbytes + fn.nbytes + scale.nbytes + base.nbytes,
        bytes_written=tokens * hidden * streams.element_size(),
    )


def weights(make: Make, n: int, hidden: int) -> dict[str, Tensor]:
    """fn, scale and base such that z is about 1."""
    wide = torch.float32
    return {
        "fn": make.normal(n, n * hidden, std=(n * hidden) ** -0.5, dtype=wide),
        "scale": make.tensor([1.3], wide),
        "base": make.normal(n, dtype=wide),
    }


def samples(make: Make) -> Iterator[Sample]:
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
    yield Sample("small_streams", streams=make.normal(6, 4, 64, std=1e-3), **weights(make, 4, 64))
    yield Sample("large_eps", streams=make.normal(6, 4, 64), norm_eps=0.5, hc_eps=0.05, **weights(make, 4, 64))
    # Saturated coefficients: exp(-z) overflows where it is not guarded.
    large = weights(make, 4, 64)
    large["scale"] = make.tensor([200.0], torch.float32)
    yield Sample("large_logits", streams=make.normal(6, 4, 64), **large)
    # The square of the large element overflows in float16.
    outlier = make.normal(3, 4, 64)
    outlier[:, 2, 5] = 300.0
    yield Sample("outlier", streams=outlier, **weights(make, 4, 64))
    same_sign = weights(make, 4, 512)
    same_sign["fn"] = same_sign["fn"].abs()
    yield Sample("same_sign", streams=make.uniform(3, 4, 512, low=0.5, high=1.5), **same_sign)


def errors(make: Make) -> Iterator[ErrorSample]:
    call = {"streams": make.normal(3, 4, 16), **weights(make, 4, 16)}

    def but(**changed: object) -> dict[str, object]:
        return {**call, **changed}

    yield ErrorSample("zero_norm_eps", says="hc_head: norm_eps must be positive; got 0.0.", **but(norm_eps=0.0))
    yield ErrorSample("zero_hc_eps", says="hc_head: hc_eps must be positive; got 0.0.", **but(hc_eps=0.0))
    says = "hc_head: n is 4 in streams but 3 in fn."
    yield ErrorSample("short_fn", says=says, **but(fn=call["fn"][:3]))
    says = "hc_head: axis 1 of fn [n n*hidden] must be n*hidden = 64; got 63."
    yield ErrorSample("narrow_fn", says=says, **but(fn=call["fn"][:, :63]))
    says = "hc_head: axis 0 of scale [1] must be 1; got 3."
    yield ErrorSample("three_scales", says=says, **but(scale=call["scale"].repeat(3)))
    yield ErrorSample("short_base", says="hc_head: n is 4 in streams but 2 in base.", **but(base=call["base"][:2]))
    says = "hc_head: base must be float32 or float64; got float16."
    yield ErrorSample("narrow_dtype", says=says, **but(base=call["base"].half()))


def relations(make: Make) -> Iterator[Relation]:
    n, hidden = 4, 40
    call: dict[str, Any] = {"streams": make.normal(7, n, hidden), **weights(make, n, hidden), "norm_eps": 1e-3}
    yield scaled("streams_times_8", call, {"streams": 3, "norm_eps": 6}, [3])
    order = make.permutation(n)
    fn = take(take(weights_of(call), order), order, 1).flatten(1)
    moved = {"fn": fn, "base": take(call["base"], order)}
    yield same("streams_reordered", call, {**moved, "streams": take(call["streams"], order, 1)})


def weights_of(call: dict[str, Any]) -> Tensor:  # Any: arguments
    """fn with an axis for the streams: [n, n, hidden]."""
    n = call["streams"].shape[1]
    fn: Tensor = call["fn"]
    return fn.view(n, n, -1)


hc_head = Operator(
    name="hc_head",
    shapes="streams[tokens n hidden] fn[n n*hidden] scale[1] base[n] -> x[tokens hidden]",
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
