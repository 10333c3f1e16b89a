"""Norms of rows and of heads."""

from torch import Tensor

from isolith import Requires, implements, ops
from isolith.dtypes import DEVICE_FLOAT
from isolith_backends.cuda.kernels import rms_norm as kernel
from isolith_backends.cuda.kernels.tensors import row_too_long


@implements(ops.norm.rms_norm, requires=Requires(dtypes=DEVICE_FLOAT), why_not=row_too_long, batch_invariant=True)
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, round_before_weight: bool = False) -> Tensor:
    return kernel.rms_norm(x, weight, eps, round_before_weight)


@implements(ops.norm.head_rms_norm, requires=Requires(dtypes=DEVICE_FLOAT), why_not=row_too_long, batch_invariant=True)
def head_rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    return kernel.rms_norm(x, None, eps, round_first=False)
