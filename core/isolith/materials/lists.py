"""What must hold of lists of distinct items, whatever they were chosen by."""

import torch
from torch import Tensor


def wrong_list(indices: Tensor, due: Tensor, end: Tensor) -> str | None:
    """The first thing wrong with lists of distinct items below `end`, in any order, and -1 behind them; or None.

    Args:
        indices: [tokens, columns].
        due: [tokens], how many items each list has.
        end: [tokens], the items are 0..end-1.
    """
    listed = torch.arange(indices.shape[1], device=indices.device) < due[:, None]
    if bool((indices.masked_fill(listed, -1) != -1).any()):
        return "another number than -1 stands behind a list"
    if bool((listed & ((indices < 0) | (indices >= end[:, None]))).any()):
        return "a list names what there is not, or not yet"
    return "a list names an item twice" if bool(repeated(indices).any()) else None


def repeated(indices: Tensor) -> Tensor:
    """[tokens] bool: whether a row of indices has one twice, -1 apart."""
    ordered = indices.sort(dim=1).values
    return ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)
