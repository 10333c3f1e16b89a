"""What holds between calls of products with weights: of one weight, and of one for each expert."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isolith.dtypes import dtype_name
from isolith.materials.relations import inverse, reordered, same, scaled, take
from isolith.materials.weights import quantised_activations, quantised_weight
from isolith.sample import Make, Relation

Arguments = dict[str, Any]  # Any: an operator's arguments


def relations_of_grouped_gemm(make: Make) -> Iterator[Relation]:
    """Relations of grouped_gemm."""
    counts, out = make.tensor([5, 0, 6, 1], torch.int32), dtype_name(make.dtype)
    call: Arguments = {"x": make.normal(12, 96), "weight": make.normal(4, 40, 96, std=0.1), "expert_counts": counts}
    call["out_dtype"] = out
    yield scaled("x_times_8", call, {"x": 3}, [3])
    columns = make.permutation(96)
    yield reordered("inputs_reordered", call, columns, {"x": 1, "weight": 2}, {})
    yield reordered("outputs_reordered", call, make.permutation(40), {"weight": 1}, {0: 1})
    yield same("zeros_behind", call, {name: zeros_behind(call[name], 33) for name in ("x", "weight")})
    yield experts_reordered(call)
    yield halves_added(make, {"expert_counts": counts}, (12,), (4, 24))
    if make.dtype == torch.float16:
        return  # where scaling is not exact, and gold of this width takes long
    packed = quantised_weight(make, "e2m1", 64, 7168, 4, low=-4, high=0)
    flash = {"x": make.normal(12, 7168), "expert_counts": counts, "out_dtype": "float32", **packed}
    yield scaled("v3_width_e2m1_times_4", flash, {"weight_scale": 2}, [2])
    codes = quantised_weight(make, "e4m3", 128, 7168, 4, low=-4, high=0) | quantised_activations(make, "e4m3", 12, 7168)
    flash = {"expert_counts": counts, "out_dtype": "float32", **codes}
    yield scaled("v3_width_e4m3_times_4", flash, {"x_scale": 1, "weight_scale": 1}, [2])


def relations_of_linear(make: Make) -> Iterator[Relation]:
    """Relations of quant_linear."""
    call: Arguments = {
        "x": make.normal(7, 96),
        "weight": make.normal(40, 96, std=0.1),
        "out_dtype": dtype_name(make.dtype),
    }
    yield scaled("x_times_8", call, {"x": 3}, [3])
    yield reordered("inputs_reordered", call, make.permutation(96), {"x": 1, "weight": 1}, {})
    yield reordered("outputs_reordered", call, make.permutation(40), {"weight": 0}, {0: 1})
    yield reordered("tokens_reordered", call, make.permutation(7), {"x": 0}, {0: 0})
    yield same("zeros_behind", call, {name: zeros_behind(call[name], 33) for name in ("x", "weight")})
    yield halves_added(make, {}, (12,), (24,))
    if make.dtype == torch.float16:
        return  # where scaling is not exact, and gold of this width takes long
    # x is quantised in blocks of a power-of-two scale, which follows it.
    for kind in ("e4m3", "e2m1"):
        weight = quantised_weight(make, kind, 128, 7168, low=-4, high=0)
        wide = {"x": make.normal(3, 7168), "out_dtype": "float32", **weight}
        yield scaled(f"v3_width_{kind}_times_4", wide, {"x": 2}, [2])


def zeros_behind(values: Tensor, count: int) -> Tensor:
    """Zeros behind the last axis."""
    return torch.nn.functional.pad(values, (0, count))


def experts_reordered(call: Arguments) -> Relation:
    """The experts, and with them their rows, from the last to the first."""
    ends = [0, *call["expert_counts"].cumsum(0).tolist()]
    order = torch.arange(len(ends) - 2, -1, -1)
    rows = torch.cat([torch.arange(ends[expert], ends[expert + 1]) for expert in order.tolist()])
    part = {"x": take(call["x"], rows), "weight": take(call["weight"], order)}
    part["expert_counts"] = take(call["expert_counts"], order)

    def assemble(parts: list[list[Tensor]]) -> list[Tensor]:
        return [take(parts[0][0], inverse(rows))]

    return Relation(name="experts_reordered", whole=call, parts=({**call, **part},), assemble=assemble)


def halves_added(make: Make, call: Arguments, rows: tuple[int, ...], outputs: tuple[int, ...]) -> Relation:
    """The sum over K in two parts, at a real width; small integers, so that every order gives the same bits."""
    x, weight = make.small_integers(*rows, 7168), make.small_integers(*outputs, 7168)
    call = {**call, "x": x, "weight": weight, "out_dtype": "float32"}
    parts = tuple(
        {**call, "x": x[..., span].contiguous(), "weight": weight[..., span].contiguous()}
        for span in (slice(0, 4099), slice(4099, None))
    )

    def assemble(results: list[list[Tensor]]) -> list[Tensor]:
        return [results[0][0] + results[1][0]]

    return Relation(name="v3_width_in_two_parts", whole=call, parts=parts, assemble=assemble, exact=True)
