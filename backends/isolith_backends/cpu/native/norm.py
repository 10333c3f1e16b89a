"""Norms in C++: norm.cpp."""

import torch
from torch import Tensor

from isolith import Requires, implements, ops
from isolith.dtypes import DEVICE_FLOAT
from isolith_backends.cpu.native.library import Library, in_large_pages

library = Library("norm")


@implements(
    ops.norm.rms_norm,
    requires=Requires(dtypes={"x": DEVICE_FLOAT, "weight": DEVICE_FLOAT}, missing=library.missing),
    batch_invariant=True,
)
def rms_norm_native(x: Tensor, weight: Tensor, eps: float = 1e-6, round_before_weight: bool = False) -> Tensor:
    x, weight, dim = x.contiguous(), weight.contiguous(), x.shape[-1]
    y = in_large_pages(torch.empty_like(x))
    library.call(
        "rms_norm", x, x.dtype, weight, weight.dtype, y, x.numel() // max(dim, 1), dim, eps, round_before_weight
    )
    return y


@implements(
    ops.norm.head_rms_norm,
    requires=Requires(dtypes=DEVICE_FLOAT, missing=library.missing),
    batch_invariant=True,
)
def head_rms_norm_native(x: Tensor, eps: float = 1e-6) -> Tensor:
    x, dim = x.contiguous(), x.shape[-1]
    y = in_large_pages(torch.empty_like(x))
    library.call("rms_norm", x, x.dtype, None, x.dtype, y, x.numel() // max(dim, 1), dim, eps, False)
    return y
