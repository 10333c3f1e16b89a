"""Quantisation of activations: a group is a row of a tile."""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith_acme import chip

E4M3_MAX = 448.0


def group_is_a_row_of_a_tile(group_size: int, scale_format: str, **_: object) -> WhyNot:
    """Refuse groups that a tile does not hold, and scales that are no powers of two."""
    if group_size != chip.COLUMNS:
        return f"group_size={group_size}; a row of a tile has {chip.COLUMNS} columns"
    if scale_format != "ue8m0":
        return f"scale_format={scale_format}; writes ue8m0"
    return None


@chip.program
def quantise(x: Tensor, q: Tensor, scale: Tensor, amax_floor: float) -> None:
    """Codes and the scale of every group."""
    for rows in chip.tiles(0, x.shape[0], chip.ROWS):
        for group, columns in enumerate(chip.tiles(0, x.shape[1], chip.COLUMNS)):
            tile = chip.load(x, rows, columns)
            amax = chip.clamp(chip.largest_of_rows(chip.magnitude(tile)), low=amax_floor)
            scales = chip.power_of_two_above(chip.divide(amax, chip.fill(E4M3_MAX)))
            chip.store(chip.clamp(chip.divide(tile, scales), -E4M3_MAX, E4M3_MAX), q, rows, columns)
            chip.store(scales, scale, rows, slice(group, group + 1))


@implements(
    ops.quant.act_quant_fp8,
    requires=Requires(dtypes=(torch.bfloat16, torch.float16, torch.float32)),
    why_not=group_is_a_row_of_a_tile,
    batch_invariant=True,
)
def act_quant_fp8(
    x: Tensor, group_size: int = 128, scale_format: str = "ue8m0", amax_floor: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Take groups of 128 columns, and scales that are powers of two."""
    q = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    scale = x.new_empty((*x.shape[:-1], -(-x.shape[-1] // group_size)), dtype=torch.float8_e8m0fnu)
    quantise(chip.matrix(x), chip.matrix(q), chip.matrix(scale), amax_floor)
    return q, scale
