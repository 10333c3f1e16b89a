"""Groups of columns, as the quantising kernels divide rows among programs.

A program takes neighbouring groups, whatever row they are in. What it computes of a group depends on nothing else, so
how many it takes is a matter of speed: enough programs for a few tokens, enough bytes in flight for many.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.kernels.tensors import rows_of, start_of_rows
from isolith_backends.cuda.launch import ceil_div, power_of_two


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups of a tensor."""

    flat: Tensor
    """[outer inner columns], as `rows_of` gives it."""
    size: int
    """Columns of a group; the last of a row may have fewer."""
    a_row: int
    total: int
    padded: int
    together: int
    """Groups of a program."""

    @property
    def grid(self) -> tuple[int]:
        """One program for the groups together."""
        return (ceil_div(self.total, self.together),)

    @property
    def warps(self) -> int:
        """16 elements of each thread, up to 16 warps."""
        return min(max(self.padded * self.together // 512, 1), 16)

    @property
    def runtime(self) -> tuple[int, ...]:
        """What `places` takes first."""
        columns, inner = self.flat.shape[2], self.flat.shape[1]
        return self.total, self.a_row, columns, self.size, self.flat.stride(0), inner, self.flat.stride(1)

    @property
    def index(self) -> tl.dtype:
        """The type that numbers the groups; division by a runtime value is slow in the wide one."""
        return tl.int32 if self.total + self.together < 1 << 31 else tl.int64


def groups_of(x: Tensor, group_size: int) -> Groups:
    """Divide the last axis of a tensor that has elements."""
    columns = x.shape[-1]
    flat = rows_of(x)
    size = min(group_size, columns)
    a_row = ceil_div(columns, size)
    total = x.numel() // columns * a_row
    padded = power_of_two(size)
    most = 512 if total * padded <= 1 << 18 else 2048
    together = min(power_of_two(total), max(1, most // padded))
    return Groups(flat=flat, size=size, a_row=a_row, total=total, padded=padded, together=together)


@triton.jit
def places(
    total,
    a_row,
    columns,
    size,
    stride,
    inner,
    inner_stride,
    TOGETHER: tl.constexpr,
    PADDED: tl.constexpr,
    INDEX: tl.constexpr,
):
    """(group, row, where the row starts), vectors, and (column, whether there is such an element), tiles."""
    group = tl.program_id(0).to(INDEX) * TOGETHER + tl.arange(0, TOGETHER)
    row = group // a_row
    within = tl.arange(0, PADDED)[None, :]
    column = ((group - row * a_row) * size).to(tl.int32)[:, None] + within
    inside = (group < total)[:, None] & (within < size) & (column < columns)
    start = start_of_rows(row, stride, inner, inner_stride)
    return group, row.to(tl.int64), start, column, inside
