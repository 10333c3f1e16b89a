"""Every limit, with its source. No vendor can change one, and no other file has any.

R1, R2 and R3 are ratios of a kernel's error to the largest error among the operator's legal variants: root mean square
over the tensor, the worst row's root mean square, the worst element. Calibrated on 312 trials of correct MoE and
attention kernels, whose worst ratios were 1.00, 1.51 and 2.25; a truncating cast in bfloat16 has R1 of about 2.1.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """The largest legal error ratios for results of one dtype."""

    r1: float
    r2: float
    r3: float


STANDARD = {
    # float32 is looser: which order a sum is taken in is most of its error.
    torch.float32: Ratios(r1=2.0, r2=3.0, r3=4.0),
    torch.float16: Ratios(r1=1.5, r2=2.0, r3=3.0),
    torch.bfloat16: Ratios(r1=1.4, r2=2.0, r3=3.0),
}

ONE_ROUNDING = 0.2
"""Root mean square of the error of one rounding to nearest, in units of the dtype's eps times the value (0.41 times
half an eps, measured): the legal error is at least that, since a variant that happens to be exact must not make others
wrong."""
LARGEST_ROUNDING = 0.5
"""The largest error of one rounding to nearest, in the same units."""

ROW_FLOOR = 0.5
"""A row's legal error counts as at least this part of the median row's, so that exact rows divide by something."""

SELECTION_SLACK = 2.0
"""How far a selected value may lie below the one that gold selects, in units of the largest error that legal rounding
makes in the row's values: one such error may raise the wrong value, another lower the right one."""
