"""Experts: products on the matrix unit, a tile of the results at a time, and their activation."""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith_acme import chip

FLOAT = (torch.bfloat16, torch.float16, torch.float32)
OUTPUTS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@chip.program
def activate(gate: Tensor, up: Tensor, row_weight: Tensor | None, y: Tensor, limit: float) -> None:
    """y = gate * sigmoid(gate) * up * row_weight, clamped first where there is a limit."""
    for rows in chip.tiles(0, y.shape[0], chip.ROWS):
        for columns in chip.tiles(0, y.shape[1], chip.COLUMNS):
            gates, ups = chip.load(gate, rows, columns), chip.load(up, rows, columns)
            if limit > 0:
                gates, ups = chip.clamp(gates, high=limit), chip.clamp(ups, -limit, limit)
            fallen = chip.exponential(chip.multiply(gates, chip.fill(-1.0)))
            tile = chip.multiply(chip.divide(gates, chip.add(fallen, chip.fill(1.0))), ups)
            if row_weight is not None:
                tile = chip.multiply(tile, chip.load(row_weight[:, None].expand(y.shape), rows, columns))
            chip.store(tile, y, rows, columns)


@implements(ops.moe.swiglu, requires=Requires(dtypes={"x": FLOAT}), batch_invariant=True)
def swiglu(x: Tensor, limit: float = 0.0, row_weight: Tensor | None = None) -> Tensor:
    """Take rows of any width."""
    gate, up = x.chunk(2, dim=-1)
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    weight = None if row_weight is None else row_weight.flatten()
    activate(chip.matrix(gate), chip.matrix(up), weight, chip.matrix(y), limit)
    return y


def results_can_be_stored(out_dtype: str, **_: object) -> WhyNot:
    """Refuse float64."""
    return None if out_dtype in OUTPUTS else f"out_dtype={out_dtype}; writes {', '.join(OUTPUTS)}"


@chip.program
def multiply_segments(x: Tensor, weight: Tensor, counts: Tensor, y: Tensor, alignment: int, capacity: int) -> None:
    """Rows of each expert's segment times its weight; rows outside every segment are neither read nor written."""
    start = 0
    for expert, count in enumerate(chip.read(counts)):
        first = expert * capacity if capacity else start
        for rows in chip.tiles(first, first + count, chip.ROWS):
            for outputs in chip.tiles(0, y.shape[1], chip.ROWS):
                sums = chip.fill(0.0, chip.ROWS)
                for columns in chip.tiles(0, x.shape[1], chip.COLUMNS):
                    a, b = chip.load(x, rows, columns), chip.load(weight[expert], outputs, columns)
                    sums = chip.multiply_add(sums, a, b)
                chip.store(sums, y, rows, outputs)
        start += -(-count // alignment) * alignment


@implements(
    ops.moe.grouped_gemm,
    requires=Requires(dtypes={"x": (torch.bfloat16,), "weight": (torch.bfloat16,)}),
    why_not=results_can_be_stored,
    batch_invariant=True,
)
def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    expert_counts: Tensor,
    alignment: int = 1,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    act_group: int = 128,
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: str = "bfloat16",
) -> Tensor:
    """Take bfloat16 by bfloat16, whose products the matrix unit does not round."""
    y = x.new_empty((*x.shape[:-1], weight.shape[1]), dtype=OUTPUTS[out_dtype])
    capacity = x.shape[1] if x.dim() == 3 else 0
    multiply_segments(chip.matrix(x), weight, expert_counts, chip.matrix(y), alignment, capacity)
    return y
