"""Put a sublayer's output back into the residual streams, and mix the streams.

    y[t, k, c] = post[t, k]*x[t, c] + sum_j comb[t, j, k]*streams[t, j, c]

The sum runs over the first index of comb, the source: comb is used transposed. All in float32, post and comb too, and
rounded once to the dtype of streams; x, the sublayer's output, may be of another float dtype. No tokens give an empty
result.

Source: DeepSeek-V4 inference/model.py, Block.hc_post; arXiv:2606.19348 section 2.2; TileKernels 36d9e45
tile_kernels/torch/mhc.py, mhc_post. transformers 5.23 DeepseekV4DecoderLayer rounds post and comb to bfloat16 first,
which is not legal here.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from isolith.dtypes import FLOAT, WIDE, widen
from isolith.materials.relations import joined, reordered, scaled, take
from isolith.operator import Cost, Operator
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(x: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    wide = wide_of(x, streams)
    expanded = post.to(wide)[:, :, None] * x.to(wide)[:, None, :]
    y = expanded + comb.to(wide).mT @ streams.to(wide)
    return y.to(streams.dtype).contiguous()


def wide_of(x: Tensor, streams: Tensor) -> torch.dtype:
    """What to compute in: float64 when either tensor is."""
    return torch.promote_types(widen(x.dtype), widen(streams.dtype))


def one_stream_after_another(x: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Start with the sublayer's output, then add the streams in their order."""
    wide = wide_of(x, streams)
    y = post.to(wide)[:, :, None] * x.to(wide)[:, None, :]
    for j, stream in enumerate(streams.to(wide).unbind(1)):
        y = y + comb[:, j, :, None].to(wide) * stream[:, None, :]
    return y.to(streams.dtype).contiguous()


def sublayer_last(x: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Add the streams from the last to the first, then the sublayer's output."""
    wide = wide_of(x, streams)
    y = torch.zeros(streams.shape, dtype=wide, device=streams.device)
    for j in reversed(range(streams.shape[1])):
        y = y + comb[:, j, :, None].to(wide) * streams[:, j, None, :].to(wide)
    y = y + post.to(wide)[:, :, None] * x.to(wide)[:, None, :]
    return y.to(streams.dtype).contiguous()


def fake(x: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return torch.empty_like(streams, memory_format=torch.contiguous_format)


def check(x: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> None:
    """Shapes and dtypes say everything."""


def cost(x: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Cost:
    n = streams.shape[1]
    return Cost(
        flops=2 * (n + 1) * streams.numel(),
        bytes_read=x.nbytes + streams.nbytes + post.nbytes + comb.nbytes,
        bytes_written=streams.nbytes,
    )


def random_call(make: Make, tokens: int, n: int, hidden: int) -> dict[str, Tensor]:
    """Coefficients as hc_pre gives them, but far from symmetric: post in 0..2, the columns of comb summing to 1."""
    weight = make.normal(tokens, n, n, std=2.0, dtype=torch.float64).exp()
    return {
        "x": make.normal(tokens, hidden),
        "streams": make.normal(tokens, n, hidden),
        "post": make.uniform(tokens, n, high=2.0, dtype=torch.float32),
        "comb": (weight / weight.sum(1, keepdim=True)).to(torch.float32),
    }


def samples(make: Make) -> Iterator[Sample]:
    wide = torch.float32
    yield Sample("flash", "model", **random_call(make, 4, 4, 4096))
    yield Sample("pro", "model", **random_call(make, 2, 4, 7168))
    for n in (1, 2, 3):
        yield Sample(f"{n}_streams", **random_call(make, 5, n, 96))
    yield Sample("one_token", **random_call(make, 1, 4, 64))
    yield Sample("odd_hidden", **random_call(make, 7, 4, 37))
    yield Sample("no_tokens", **random_call(make, 0, 4, 64))
    call = random_call(make, 5, 4, 64)
    call["streams"] = make.normal(4, 5, 64).transpose(0, 1)
    call["comb"] = call["comb"].mT.contiguous().mT
    yield Sample("permuted_axes", **call)
    # A cycle is not its own transpose: y[k] = streams[k-1 mod n], to the bit.
    cycle = make.tensor([[0.0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]], wide).expand(5, 4, 4).contiguous()
    call = {**random_call(make, 5, 4, 64), "comb": cycle, "post": make.zeros(5, 4, dtype=wide)}
    yield Sample("cycle_of_streams", "exact", **call)
    integers = {
        "x": make.small_integers(6, 65),
        "streams": make.small_integers(6, 4, 65),
        "post": make.small_integers(6, 4, dtype=wide),
        "comb": make.small_integers(6, 4, 4, dtype=wide),
    }
    yield Sample("small_integers", "exact", **integers)
    yield Sample("sublayer_only", **{**random_call(make, 4, 4, 64), "comb": make.zeros(4, 4, 4, dtype=wide)})
    # The terms cancel but for 2^-10 of them: coefficients rounded to bfloat16 leave nothing right.
    call = random_call(make, 6, 4, 64)
    call["streams"] = call["x"][:, None].repeat(1, 4, 1)
    call["comb"] *= 0.7
    call["post"] = 2.0**-10 - call["comb"].sum(1)
    yield Sample("cancelling", **call)
    # Sizes far apart: a stream weighed by another's coefficient shows.
    call = random_call(make, 6, 4, 64)
    call["streams"] *= make.tensor([0.01, 1.0, 30.0, 1000.0])[:, None]
    yield Sample("stream_sizes_spread", **call)
    yield Sample("wide_sublayer", **{**random_call(make, 4, 4, 64), "x": make.normal(4, 64, dtype=wide)})
    # What is left is what rounding x to the dtype of the streams would take away.
    call = {**random_call(make, 6, 4, 64), "x": make.normal(6, 64, dtype=wide)}
    call["streams"] = -make.place(call["x"], make.dtype)[:, None].repeat(1, 4, 1)
    call["post"] = call["comb"].sum(1)
    yield Sample("cancelling_wide_sublayer", **call)
    yield Sample("wide_streams", **{**random_call(make, 4, 4, 64), "streams": make.normal(4, 4, 64, dtype=wide)})


def errors(make: Make) -> Iterator[ErrorSample]:
    call = random_call(make, 3, 4, 16)

    def but(**changed: object) -> dict[str, object]:
        return {**call, **changed}

    says = "hc_post: tokens is 2 in x but 3 in streams."
    yield ErrorSample("fewer_tokens", says=says, **but(x=call["x"][:2]))
    says = "hc_post: hidden is 15 in x but 16 in streams."
    yield ErrorSample("narrow_x", says=says, **but(x=call["x"][:, :15]))
    yield ErrorSample("short_post", says="hc_post: n is 4 in streams but 3 in post.", **but(post=call["post"][:, :3]))
    says = "hc_post: n is 4 in streams but 2 in comb."
    yield ErrorSample("comb_not_square", says=says, **but(comb=call["comb"][:, :, :2]))
    says = "hc_post: comb must be [tokens n n], 3 axes; got shape (3, 16)."
    yield ErrorSample("flat_comb", says=says, **but(comb=call["comb"].flatten(1)))
    says = "hc_post: post must be float32 or float64; got bfloat16."
    yield ErrorSample("narrow_dtype", says=says, **but(post=call["post"].to(torch.bfloat16)))


def relations(make: Make) -> Iterator[Relation]:
    call = random_call(make, 9, 4, 40)
    yield scaled("everything_times_8", call, {"x": 3, "streams": 3}, [3])
    order = make.permutation(4)
    comb = take(take(call["comb"], order, 1), order, 2)
    axes = {"streams": 1, "post": 1}
    yield reordered("streams_reordered", call, order, axes, {0: 1}, changes={"comb": comb})
    yield joined("tokens_apart", call, [1, 5], ["x", "streams", "post", "comb"])
    yield scaled("flash_times_8", random_call(make, 3, 4, 4096), {"x": 3, "streams": 3}, [3])


hc_post = Operator(
    name="hc_post",
    shapes="x[tokens hidden] streams[tokens n hidden] post[tokens n] comb[tokens n n] -> y[tokens n hidden]",
    dtypes={"x": FLOAT, "streams": FLOAT, "post": WIDE, "comb": WIDE},
    reference=reference,
    variants=(one_stream_after_another, sublayer_last),
    fake=fake,
    check=check,
    cost=cost,
    samples=samples,
    errors=errors,
    relations=relations,
)
