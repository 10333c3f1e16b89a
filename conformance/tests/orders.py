"""Correct kernels: references whose float32 products and sums are taken in other orders than the judge's own."""

import torch
from torch.overrides import TorchFunctionMode

SPLITS = 8


def pieces(size, how):
    """The columns of each partial sum, in the order in which the partial sums are added."""
    columns = torch.arange(size)
    if how == "reversed":
        return [c[None] for c in columns.flip(0)]
    if how == "split_k":
        return [part for part in columns.tensor_split(SPLITS) if len(part)]
    if how == "interleaved":
        return [columns[start::SPLITS] for start in range(min(SPLITS, size))]
    return list(columns.split(int(how.removeprefix("blocks_of_"))))


class Order(TorchFunctionMode):
    """Take every float32 product and sum piece by piece."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul) and wide(args[:2]):
            return self.product(*args)
        if func is torch.einsum and wide(args[1:]) and len(args) == 3:
            return self.einsum(*args)
        if func in (torch.Tensor.sum, torch.sum, torch.Tensor.mean, torch.mean) and wide(args[:1]):
            found = self.sum(*args, **kwargs)
            if found is not None:
                mean = func in (torch.Tensor.mean, torch.mean)
                return found / args[0].shape[kwargs.get("dim", args[1] if len(args) > 1 else None)] if mean else found
        return func(*args, **kwargs)

    def product(self, a, b):
        if a.dim() < 2 or b.dim() < 2:
            return a @ b
        total = torch.zeros_like(a[..., :1] @ b[..., :1, :])
        for part in pieces(a.shape[-1], self.how):
            total = total + a[..., part] @ b[..., part, :]
        return total

    def einsum(self, equation, a, b):
        (left, right), result = equation.split("->")[0].split(","), equation.split("->")[1]
        (letter,) = set(left + right) - set(result)
        axes = left.index(letter), right.index(letter)
        total = torch.zeros_like(torch.einsum(equation, a.narrow(axes[0], 0, 0), b.narrow(axes[1], 0, 0)))
        for part in pieces(a.shape[axes[0]], self.how):
            total = total + torch.einsum(equation, a.index_select(axes[0], part), b.index_select(axes[1], part))
        return total

    def sum(self, x, dim=None, keepdim=False, **_):
        if not isinstance(dim, int):
            return None
        total = torch.zeros_like(x.select(dim, 0)) if x.shape[dim] else x.sum(dim)
        for part in pieces(x.shape[dim], self.how):
            total = total + x.index_select(dim, part).sum(dim)
        return total.unsqueeze(dim) if keepdim else total


def wide(tensors):
    return all(isinstance(each, torch.Tensor) and each.dtype == torch.float32 for each in tensors)
