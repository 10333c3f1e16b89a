"""The gated activation of an expert, with clamps: SiLU of the gate times the up projection.

    x[..., :] = [gate | up], halves of the last axis
    gate <- min(gate, limit)             an upper bound alone
    up   <- clamp(up, -limit, limit)
    y[..., i] = gate[..., i] * sigmoid(gate[..., i]) * up[..., i] * row_weight[...]

limit = 0 means no clamp. Computed in float32 and rounded once, row weight included, so a routing weight that multiplies
here is inside the quantisation that follows. Far negative gates give 0, not NaN. A row weight of 0 gives zeros.

Source: DeepSeek-V4 inference/model.py, Expert.forward (swiglu_limit); TileKernels 36d9e45 tile_kernels/torch/swiglu.py
(halves, clamps before the activation, weight before the rounding).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isolith.dtypes import FLOAT, WIDE, widen
from isolith.errors import ArgumentError
from isolith.materials.relations import inverse, joined, same, scaled, take
from isolith.operator import Cost, Operator
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(x: Tensor, limit: float = 0.0, row_weight: Tensor | None = None) -> Tensor:
    gate, up = clamped_halves(x, limit)
    y = gate * torch.sigmoid(gate) * up
    if row_weight is not None:
        y = y * row_weight.to(y.dtype)[..., None]
    return y.to(x.dtype)


def clamped_halves(x: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """(gate, up), clamped, in the dtype that the reference computes in."""
    gate, up = x.to(widen(x.dtype)).chunk(2, dim=-1)
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate, up


def quotient(x: Tensor, limit: float = 0.0, row_weight: Tensor | None = None) -> Tensor:
    """Divide by 1 + exp(-gate), and let the row weight multiply first."""
    gate, up = clamped_halves(x, limit)
    if row_weight is not None:
        up = up * row_weight.to(up.dtype)[..., None]
    return (gate / (1 + torch.exp(-gate)) * up).to(x.dtype)


def product_first(x: Tensor, limit: float = 0.0, row_weight: Tensor | None = None) -> Tensor:
    """Multiply gate and up before the sigmoid."""
    gate, up = clamped_halves(x, limit)
    y = gate * up * torch.sigmoid(gate)
    if row_weight is not None:
        y = y * row_weight.to(y.dtype)[..., None]
    return y.to(x.dtype)


def fake(x: Tensor, limit: float = 0.0, row_weight: Tensor | None = None) -> Tensor:
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)


def check(x: Tensor, limit: float = 0.0, row_weight: Tensor | None = None) -> None:
    if x.shape[-1] % 2:
        raise ArgumentError(f"swiglu: the last axis of x holds gate and up, so it must be even; got {x.shape[-1]}.")
    if not limit >= 0:
        raise ArgumentError(f"swiglu: limit must not be negative (0 means no clamp); got {limit}.")


def cost(x: Tensor, limit: float = 0.0, row_weight: Tensor | None = None) -> Cost:
    return Cost(
        flops=6 * (x.numel() // 2),  # exponential, sum, quotient and up to three products
        bytes_read=x.nbytes + (0 if row_weight is None else row_weight.nbytes),
        bytes_written=x.nbytes // 2,
    )


def samples(make: Make) -> Iterator[Sample]:
    wide = torch.float32
    weight = make.uniform(16, high=0.5, dtype=wide)
    yield Sample("inter_2048", "model", x=make.normal(16, 4096, std=4.0), limit=10.0, row_weight=weight)
    yield Sample("no_limit", x=make.normal(5, 256, std=20.0))
    # The clamps are seen only where values lie beyond them: most of them here, on both sides.
    yield Sample("beyond_limit", x=make.normal(7, 256, std=40.0), limit=10.0)
    sides = make.tensor([[-40.0, -10.5, 10.5, 40.0] * 4 + [-40.0] * 4 + [-10.5] * 4 + [10.5] * 4 + [40.0] * 4])
    yield Sample("each_side_beyond", x=sides, limit=10.0)
    yield Sample("low_limit", x=make.normal(4, 64), limit=0.5)
    grid = torch.cat([torch.linspace(-20, 20, 401), torch.ones(401)])
    yield Sample("gate_grid", x=make.tensor([grid.tolist()]))
    far = torch.cat([torch.tensor([-100.0, -88.0, -89.5, -1000.0, 100.0, 0.0]), torch.full((6,), 3.0)])
    yield Sample("far_gates", x=make.tensor([far.tolist()]))
    yield Sample("odd_inter", x=make.normal(3, 66), limit=1.0, row_weight=make.normal(3, dtype=wide))
    yield Sample("row_weight_zero", x=make.normal(3, 64), row_weight=make.tensor([0.0, 2.0, -1.0], wide))
    # The product is rounded once: a weight that multiplies a rounded product shows in the last place.
    yield Sample("row_weight", x=make.normal(64, 128), row_weight=make.uniform(64, dtype=wide))
    # Products just above a power of two, results just below one: an early rounding errs twice as much as the last one.
    early = torch.cat((make.uniform(64, 64, low=1.28, high=1.34), make.uniform(64, 64, low=1.0, high=1.03)), dim=1)
    yield Sample("one_rounding", x=early, row_weight=make.uniform(64, low=1.7, high=1.76, dtype=wide))
    # Gates whose sigmoid is tiny, but not 0.
    low = torch.cat((make.uniform(8, 32, low=-24.0, high=-17.0), make.normal(8, 32, std=1000.0)), dim=1)
    yield Sample("tiny_sigmoids", x=low)
    yield Sample("product_beyond_float16", x=make.full(300.0, 2, 8))
    poisoned = make.normal(4, 64)
    poisoned[2] = float("nan")
    yield Sample("nan_row", x=poisoned, limit=10.0)
    yield Sample("three_axes", x=make.normal(2, 3, 32), row_weight=make.uniform(2, 3, dtype=wide))
    yield Sample("one_axis", x=make.normal(32), limit=1.0)
    yield Sample("no_rows", x=make.normal(0, 64), limit=10.0, row_weight=make.normal(0, dtype=wide))


def errors(make: Make) -> Iterator[ErrorSample]:
    x = make.normal(4, 64)
    says = "swiglu: limit must not be negative (0 means no clamp); got -1.0."
    yield ErrorSample("negative_limit", x=x, limit=-1.0, says=says)
    says = "swiglu: limit must not be negative (0 means no clamp); got nan."
    yield ErrorSample("nan_limit", x=x, limit=float("nan"), says=says)
    says = "swiglu: the last axis of x holds gate and up, so it must be even; got 63."
    yield ErrorSample("odd_width", x=x[:, :63], says=says)
    says = "swiglu: leading axes are (4,) in x but (3,) in row_weight."
    yield ErrorSample("row_weight_rows", x=x, row_weight=make.normal(3), says=says)
    says = "swiglu: row_weight must be float32 or float64; got bfloat16."
    yield ErrorSample("row_weight_dtype", x=x, row_weight=make.normal(4, dtype=torch.bfloat16), says=says)
    says = "swiglu: x must be bfloat16, float16, float32 or float64; got int64."
    yield ErrorSample("integer_x", x=x.long(), says=says)


def relations(make: Make) -> Iterator[Relation]:
    call: dict[str, Any] = {
        "x": make.normal(9, 80, std=3.0),
        "limit": 4.0,
        "row_weight": make.uniform(9, dtype=torch.float32),
    }
    yield scaled("weight_times_8", call, {"row_weight": 3}, [3])
    yield joined("rows_apart", call, [1, 4], ["x", "row_weight"])
    yield same("weight_of_1", {**call, "row_weight": torch.ones_like(call["row_weight"])}, {"row_weight": None})
    columns = make.permutation(40)
    halves = torch.cat((columns, 40 + columns))

    def back(parts: list[list[Tensor]]) -> list[Tensor]:
        return [take(parts[0][0], inverse(columns), 1)]

    part = {**call, "x": take(call["x"], halves, 1)}
    yield Relation(name="columns_reordered", whole=call, parts=(part,), assemble=back)


swiglu = Operator(
    name="swiglu",
    shapes="x[... gate_up] row_weight?[...] -> y[... gate_up//2]",
    dtypes={"x": FLOAT, "row_weight": WIDE},
    reference=reference,
    variants=(quotient, product_first),
    fake=fake,
    check=check,
    cost=cost,
    samples=samples,
    errors=errors,
    relations=relations,
)
