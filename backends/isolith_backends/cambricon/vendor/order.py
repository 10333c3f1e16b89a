"""Selections of the largest, with the tie rule of the profile."""

from torch import Tensor

from isolith_backends.cambricon.vendor.profile import current


def largest(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest of the last axis, largest first; no source says which of equals wins."""
    if current().ties == "lowest":
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    mirrored = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return scores.shape[-1] - 1 - mirrored
