"""Norms of rows and of heads: the squares of a row are added up tile by tile, in order."""

import torch
from torch import Tensor

from isolith import Requires, implements, ops
from isolith_acme import chip

HALF = (torch.bfloat16, torch.float16)


@chip.program
def normalise(x: Tensor, weight: Tensor | None, y: Tensor, eps: float, round_before_weight: bool) -> None:
    """y = x / sqrt(mean of its squares + eps), times the weight."""
    hidden = x.shape[1]
    for rows in chip.tiles(0, x.shape[0], chip.ROWS):
        squares = chip.fill(0.0)
        for columns in chip.tiles(0, hidden, chip.COLUMNS):
            tile = chip.load(x, rows, columns)
            squares = chip.add(squares, chip.multiply(tile, tile))
        mean = chip.divide(chip.sum_of_rows(squares), chip.fill(hidden))
        factor = chip.inverse_root(chip.add(mean, chip.fill(eps)))
        for columns in chip.tiles(0, hidden, chip.COLUMNS):
            tile = chip.multiply(chip.load(x, rows, columns), factor)
            if round_before_weight:
                tile = chip.rounded(tile, x.dtype)
            if weight is not None:
                tile = chip.multiply(tile, chip.load(weight.expand(x.shape), rows, columns))
            chip.store(tile, y, rows, columns)


@implements(ops.norm.rms_norm, requires=Requires(dtypes={"x": HALF}), batch_invariant=True)
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, round_before_weight: bool = False) -> Tensor:
    """Take rows of any width, and a weight of any dtype."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    normalise(chip.matrix(x), weight, chip.matrix(y), eps, round_before_weight)
    return y


@implements(ops.norm.head_rms_norm, requires=Requires(dtypes=HALF), batch_invariant=True)
def head_rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Take each head as a row."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    normalise(chip.matrix(x), None, chip.matrix(y), eps, False)
    return y
