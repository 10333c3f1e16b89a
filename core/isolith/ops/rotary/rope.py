"""Rotary position embedding of a part of each head, forward and inverse.

    (a, b) -> (a*cos - b*sin, a*sin + b*cos),  cos = cos_table[positions[t], i], sin = sin_table[positions[t], i]

Column i of the tables turns pair i. The rotated dimensions, 2*pairs of them, are the last ones of x, or the first with
`rope_first`. Pair i is dimensions (2i, 2i+1) of these, or (i, i+pairs) with `interleaved=False`. `inverse` negates sin.
x is [tokens, head_dim] or [tokens, heads, head_dim]; all heads of a token turn alike.

Computed in float32 and rounded once; the other dimensions are returned bit by bit, whatever they hold. The tables are
arguments so that every kernel sees the same angles (`isolith.rope_tables` makes them): near position 1e6 a kernel's own
angles would be off by hundredths. They are not rounded to the dtype of x. A position below 0 or not below length is an
error. No tokens give an empty result.

Source: Su et al. 2021, arXiv:2104.09864, eq. 34; DeepSeek-V4 inference/model.py, apply_rotary_emb (interleaved, last
dimensions, inverse on the attention's output); vLLM PR 28968 (first dimensions and half-split: V3.2's indexer).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from isolith.dtypes import FLOAT, INTEGER, WIDE, widen
from isolith.errors import ArgumentError
from isolith.materials.relations import inverse, reordered, same, scaled, take
from isolith.numerics.rope_tables import rope_frequencies, rope_tables
from isolith.operator import Cost, Operator
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(
    x: Tensor,
    positions: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    inverse: bool = False,
    interleaved: bool = True,
    rope_first: bool = False,
) -> Tensor:
    a, b, cos, sin = pairs_and_angles(x, positions, cos_table, sin_table, inverse, interleaved, rope_first)
    return with_pairs(x, a * cos - b * sin, a * sin + b * cos, interleaved, rope_first)


def pairs_and_angles(
    x: Tensor,
    positions: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    inverse: bool,
    interleaved: bool,
    rope_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a, b, cos, sin), widened: the pairs of x, and the angles of its tokens."""
    wide = widen(x.dtype)
    rotated = x[..., rotated_dims(x, cos_table.shape[1], rope_first)].to(wide)
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
    else:
        a, b = rotated[..., : cos_table.shape[1]], rotated[..., cos_table.shape[1] :]
    cos, sin = cos_table[positions.long()].to(wide), sin_table[positions.long()].to(wide)
    if x.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    return a, b, cos, -sin if inverse else sin


def with_pairs(x: Tensor, a: Tensor, b: Tensor, interleaved: bool, rope_first: bool) -> Tensor:
    """A copy of x with its pairs replaced, rounded to x's dtype."""
    rotated = torch.stack((a, b), dim=-1).flatten(-2) if interleaved else torch.cat((a, b), dim=-1)
    y = x.clone(memory_format=torch.contiguous_format)
    y[..., rotated_dims(x, a.shape[-1], rope_first)] = rotated.to(x.dtype)
    return y


def rotated_dims(x: Tensor, pairs: int, rope_first: bool) -> slice:
    start = 0 if rope_first else x.shape[-1] - 2 * pairs
    return slice(start, start + 2 * pairs)


def fused_products(
    x: Tensor,
    positions: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    inverse: bool = False,
    interleaved: bool = True,
    rope_first: bool = False,
) -> Tensor:
    """Round the product with sin, and add the other unrounded, as a fused multiply-add does."""
    parts = pairs_and_angles(x, positions, cos_table, sin_table, inverse, interleaved, rope_first)
    a, b, cos, _ = (part.double() for part in parts)
    b_sin, a_sin = (parts[1] * parts[3]).double(), (parts[0] * parts[3]).double()
    wide = parts[0].dtype
    return with_pairs(x, (a * cos - b_sin).to(wide), (b * cos + a_sin).to(wide), interleaved, rope_first)


def fake(x: Tensor, **_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def check(x: Tensor, positions: Tensor, cos_table: Tensor, **_: object) -> None:
    if x.dim() not in (2, 3):
        raise ArgumentError(
            f"rope: x must be [tokens head_dim] or [tokens heads head_dim]; got shape {tuple(x.shape)}."
        )
    if x.shape[0] != positions.shape[0]:
        raise ArgumentError(f"rope: tokens is {x.shape[0]} in x but {positions.shape[0]} in positions.")
    if 2 * cos_table.shape[1] > x.shape[-1]:
        raise ArgumentError(
            f"rope: 2*pairs of cos_table must be at most head_dim = {x.shape[-1]}; got {2 * cos_table.shape[1]}."
        )


def check_values(positions: Tensor, cos_table: Tensor, **_: object) -> None:
    if not positions.numel():
        return
    length, lowest, highest = cos_table.shape[0], int(positions.min()), int(positions.max())
    if lowest < 0 or highest >= length:
        raise ArgumentError(
            f"rope: positions must be at least 0 and below length = {length}; got {lowest if lowest < 0 else highest}."
        )


def cost(x: Tensor, positions: Tensor, cos_table: Tensor, **_: object) -> Cost:
    tokens, pairs = x.shape[0], cos_table.shape[1]
    heads = x.shape[1] if x.dim() == 3 else 1
    rows = min(tokens, cos_table.shape[0])
    return Cost(
        flops=6 * tokens * heads * pairs,
        bytes_read=x.nbytes + positions.nbytes + 2 * rows * pairs * cos_table.element_size(),
        bytes_written=x.nbytes,
    )


def tables(make: Make, length: int, dims: int, theta: float = 10000.0, factor: float = 1.0) -> dict[str, Tensor]:
    """cos_table and sin_table; a factor other than 1 is V4's compress table."""
    frequencies = rope_frequencies(dims, theta, factor=factor, original_length=65536)
    cos_table, sin_table = rope_tables(frequencies, length, make.device)
    return {"cos_table": cos_table, "sin_table": sin_table}


def narrow_products(make: Make) -> dict[str, Tensor]:
    """Tables that x's dtype cannot hold, products that it can: rounding the tables first gives other numbers.

    Even pairs are scaled by cos, odd ones turned by sin: 7/4 of a wide factor is 1 less a few units in the last place.
    """
    eps = torch.finfo(make.dtype).eps
    product = 1 - torch.arange(1, 33, dtype=torch.float64) * eps / 2
    lost = ((product / 1.75).to(make.dtype).double() * 1.75 - product).abs() > eps / 4
    factor = make.place((product[lost] / 1.75).repeat(32)[: 8 * 32].view(8, 32), torch.float64)
    even = make.place(torch.arange(32) % 2 == 0, torch.bool)
    cos_table, sin_table = torch.where(even, factor, 0), torch.where(even, 0, factor)
    return {
        "x": make.full(1.75, 8, 2, 64),
        "positions": make.integers(0, 8, 8),
        "cos_table": cos_table.to(torch.float32),
        "sin_table": sin_table.to(torch.float32),
    }


def wide_products(make: Make) -> dict[str, Tensor]:
    """Pairs whose products, if x's dtype held them, had other sums; no sum is near to where rounding turns."""
    a, b = make.normal(2, 1024).cpu().double()
    angle = make.uniform(1024, high=6.28, dtype=torch.float64).cpu()
    cos, sin = angle.cos().float().double(), angle.sin().float().double()
    products = torch.stack((a * cos, -b * sin, a * sin, b * cos))
    sums = products.unflatten(0, (2, 2)).sum(1)
    narrow_sums = products.to(make.dtype).double().unflatten(0, (2, 2)).sum(1)
    error = 2.0**-20 * products.abs().amax(0)
    clear = ((sums + error).to(make.dtype) == (sums - error).to(make.dtype)).all(0)
    kept = (clear & (narrow_sums.to(make.dtype) != sums.to(make.dtype)).any(0)).nonzero()[:32, 0]
    return {
        "x": make.place(torch.stack((a, b), dim=-1)[kept].view(1, -1), make.dtype),
        "positions": make.integers(0, 1, 1),
        "cos_table": make.place(cos[None, kept], torch.float32),
        "sin_table": make.place(sin[None, kept], torch.float32),
    }


def samples(make: Make) -> Iterator[Sample]:
    main, compress = tables(make, 4096, 64), tables(make, 4096, 64, theta=160000.0, factor=16.0)
    far = make.integers(1, 4096, 6)
    query, kv = make.normal(6, 64, 512), make.normal(6, 512)
    yield Sample("query_main_table", "model", x=query, positions=far, **main)
    yield Sample("query_compress_table", "model", x=query, positions=far, **compress)
    yield Sample("output_inverse", "model", x=query, positions=far, inverse=True, **compress)
    yield Sample("window_kv", "model", x=kv, positions=far, **main)
    # Compressed entries stand at multiples of the ratio.
    every_4th = make.place(torch.arange(0, 24, 4), torch.int64)
    yield Sample("compressed_kv", x=kv, positions=every_4th, **compress)
    indexer = make.normal(5, 64, 128)
    half_split = {"interleaved": False, "rope_first": True}
    yield Sample("v32_indexer_query", "model", x=indexer, positions=far[:5], **half_split, **main)
    yield Sample("v32_indexer_inverse", x=indexer, positions=far[:5], inverse=True, **half_split, **main)
    yield Sample("half_split_last", x=make.normal(5, 3, 96), positions=far[:5], interleaved=False, **main)
    yield Sample("interleaved_first", x=make.normal(5, 3, 96), positions=far[:5], rope_first=True, **main)
    yield Sample("every_dim_rotated", x=make.normal(6, 2, 64), positions=far, **main)
    yield Sample("64_pairs", x=make.normal(3, 2, 160), positions=far[:3], **tables(make, 4096, 128))
    yield Sample("one_pair_of_odd_head", x=make.normal(6, 2, 7), positions=far, **tables(make, 4096, 2))
    yield Sample("position_0", x=make.normal(6, 2, 96), positions=make.integers(0, 1, 6), **main)
    repeated = make.tensor([7, 3, 7, 0, 4095, 3], torch.int64)
    yield Sample("positions_in_no_order", x=make.normal(6, 2, 96), positions=repeated, **main)
    heads_first = make.normal(2, 6, 96).transpose(0, 1)
    yield Sample("permuted_axes", x=heads_first, positions=far, **main)
    yield Sample("no_tokens", x=make.normal(0, 2, 96), positions=make.integers(0, 1, 0), **main)
    # Few pairs, so that a table of a million rows stays small: an index of 16 bits wraps.
    near = make.place(torch.arange(1_000_000, 1_000_005), torch.int32)
    yield Sample("positions_near_1e6", x=make.normal(5, 3, 16), positions=near, **tables(make, 1_000_005, 4))
    # Quarter turns only move and negate.
    turn = torch.tensor([[1.0, 0.0, -1.0, 0.0]]).T.repeat(1, 8)
    quarter = {"cos_table": make.place(turn, torch.float32), "sin_table": make.place(turn.roll(1, 0), torch.float32)}
    quarters = make.integers(0, 4, 12)
    yield Sample("quarter_turns", "exact", x=make.normal(12, 2, 24), positions=quarters, **quarter)
    yield Sample(
        "quarter_turns_half_split", "exact", x=make.normal(12, 24), positions=quarters, **half_split, **quarter
    )
    yield Sample("narrow_products", **narrow_products(make))
    if make.dtype != torch.float32:  # where products are rounded to it anyway
        yield Sample("wide_products", "exact", **wide_products(make))
    # What is not rotated is not read as a number.
    poisoned = make.normal(6, 2, 96)
    poisoned[:, 0, :32], poisoned[:, 1, 5] = float("nan"), float("inf")
    yield Sample("nan_outside", x=poisoned, positions=far, **compress)


def errors(make: Make) -> Iterator[ErrorSample]:
    call = {"x": make.normal(3, 2, 8), "positions": make.integers(0, 16, 3), **tables(make, 16, 4)}

    def but(**changed: object) -> dict[str, object]:
        return {**call, **changed}

    says = "rope: x must be [tokens head_dim] or [tokens heads head_dim]; got shape (3, 1, 2, 8)."
    yield ErrorSample("four_axes", says=says, **but(x=call["x"][:, None]))
    says = "rope: tokens is 3 in x but 2 in positions."
    yield ErrorSample("fewer_positions", says=says, **but(positions=call["positions"][:2]))
    says = "rope: 2*pairs of cos_table must be at most head_dim = 8; got 10."
    yield ErrorSample("more_pairs_than_dims", says=says, **but(**tables(make, 16, 10)))
    says = "rope: pairs is 2 in cos_table but 1 in sin_table."
    yield ErrorSample("tables_differ", says=says, **but(sin_table=call["sin_table"][:, :1]))
    says = "rope: positions must be at least 0 and below length = 16; got 16."
    yield ErrorSample("position_behind_table", says=says, **but(positions=make.tensor([0, 16, 3], torch.int32)))
    says = "rope: positions must be at least 0 and below length = 16; got -1."
    yield ErrorSample("negative_position", says=says, **but(positions=make.tensor([0, -1, 99], torch.int64)))
    says = "rope: positions must be int32 or int64; got float32."
    yield ErrorSample("float_positions", says=says, **but(positions=call["positions"].float()))
    says = "rope: cos_table must be float32 or float64; got bfloat16."
    yield ErrorSample("narrow_table", says=says, **but(cos_table=call["cos_table"].to(torch.bfloat16)))
    yield ErrorSample("integer_flag", says="rope: inverse must be bool; got int.", **but(inverse=1))


def relations(make: Make) -> Iterator[Relation]:
    cos_table, sin_table = rope_tables(rope_frequencies(16, 10000.0), 40, make.device)
    call = {
        "x": make.normal(9, 3, 24),
        "positions": make.integers(0, 40, 9),
        "cos_table": cos_table,
        "sin_table": sin_table,
    }
    yield scaled("x_times_8", call, {"x": 3}, [3])
    yield reordered("heads_reordered", call, make.permutation(3), {"x": 1}, {0: 1})
    order = make.permutation(40)
    number = inverse(order).to(make.device)[call["positions"].long()].int()
    tables = {"cos_table": take(cos_table, order), "sin_table": take(sin_table, order)}
    yield same("tables_reordered", call, {**tables, "positions": number})
    yield same("inverse_of_the_mirrored", {**call, "inverse": True}, {"inverse": False, "sin_table": -sin_table})
    # A pair of halves is a pair of neighbours in another order of the columns.
    halves = {**call, "x": make.normal(9, 3, 16), "interleaved": False}
    order = torch.arange(16).view(2, 8).T.flatten()
    yield reordered("halves_are_neighbours", halves, order, {"x": 2}, {0: 2}, changes={"interleaved": True})


rope = Operator(
    name="rope",
    shapes="x[... head_dim] positions[tokens] cos_table[length pairs] sin_table[length pairs] -> y[... head_dim]",
    dtypes={"x": FLOAT, "positions": INTEGER, "cos_table": WIDE, "sin_table": WIDE},
    reference=reference,
    variants=(fused_products,),
    fake=fake,
    check=check,
    check_values=check_values,
    cost=cost,
    samples=samples,
    errors=errors,
    relations=relations,
)
