"""Rotary embedding and the Hadamard rotation."""

from torch import Tensor

from isolith import Requires, implements, ops
from isolith.dtypes import DEVICE_FLOAT
from isolith_backends.cuda.kernels import hadamard as rotation
from isolith_backends.cuda.kernels import rope as turning
from isolith_backends.cuda.kernels.tensors import row_too_long

FLOATS = Requires(dtypes=DEVICE_FLOAT)


@implements(ops.rotary.rope, requires=FLOATS, why_not=row_too_long, batch_invariant=True)
def rope(
    x: Tensor,
    positions: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    inverse: bool = False,
    interleaved: bool = True,
    rope_first: bool = False,
) -> Tensor:
    return turning.rope(x, positions, cos_table, sin_table, inverse, interleaved, rope_first)


@implements(ops.rotary.hadamard, requires=FLOATS, why_not=row_too_long, batch_invariant=True)
def hadamard(x: Tensor) -> Tensor:
    return rotation.hadamard(x)
