"""Rows of a tensor, as kernels address them."""

from torch import Tensor


def dense(tensor: Tensor) -> Tensor:
    """The tensor with a last axis of stride 1, copied where it has another."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def rows_of(x: Tensor) -> Tensor:
    """[outer inner columns] of stride 1 in columns; a view up to three axes, so that a slice of heads is not copied."""
    if x.is_contiguous() and x.numel():
        return x.reshape(-1, 1, x.shape[-1])  # where inner is 1, kernels divide nothing
    x = dense(x) if x.dim() <= 3 else x.contiguous().flatten(0, -3)
    return x.reshape((1,) * (2 - x.dim()) + tuple(x.shape)).unsqueeze(1) if x.dim() < 3 else x
