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
REQUANTISED = Ratios(r1=1.4, r2=2.5, r3=4.0)
"""At the least, where legal roundings change codes of activations that are quantised on the way: few and large errors.
R1 alone is not widened."""
PROFILES = {
    "strict": dict.fromkeys(STANDARD, Ratios(r1=1.25, r2=1.75, r3=2.5)),
    "standard": STANDARD,
    "basic": {
        dtype: Ratios(r1=max(2.0, each.r1), r2=max(3.0, each.r2), r3=max(5.0, each.r3))
        for dtype, each in STANDARD.items()
    },
}
"""By profile, then by dtype of the result. A report names its profile."""


def ratios_of(profile: str, dtype: torch.dtype, requantised: bool) -> Ratios:
    """The limits of a profile for results of a dtype."""
    limits = PROFILES[profile][dtype]
    if not requantised:
        return limits
    return Ratios(r1=limits.r1, r2=max(limits.r2, REQUANTISED.r2), r3=max(limits.r3, REQUANTISED.r3))


ONE_ROUNDING = 0.2
"""Root mean square of the error of one rounding to nearest, in units of the dtype's eps times the value (0.41 times
half an eps, measured): the legal error is at least that, since a variant that happens to be exact must not make others
wrong."""
LARGEST_ROUNDING = 0.5
"""The largest error of one rounding to nearest, in the same units."""

ROW_FLOOR = 0.5
"""A row's legal error, in proportion to its size, counts as at least this part of the median row's, so that exact rows
divide by something."""
FEW_ELEMENTS = 1.5
"""A row of n elements has the tensor's error in proportion times 1 + FEW_ELEMENTS/n as its legal error at the least: of
normal errors, the root mean square of 1, 2, 4 and 8 exceeds 4.9, 3.7, 2.9 and 2.3 deviations once in a million rows."""
ELEMENT_SPREAD = 2.0
"""An element's legal error is at least so many legal root mean squares of its row, since the largest error of a variant
may by chance be small in a row of few elements."""

D_CAP = {torch.float32: 1e-12, torch.float16: 1e-6, torch.bfloat16: 3e-5}
"""The backstop: |c-g|^2/(|c|^2+|g|^2) of a row, whatever the operator's variants err; that of a chain of roundings. It
grows with the condition of the row, the square of how much a relative change of the inputs is enlarged."""
D_TRUSTED = 16.0
"""and is at least so many times that of the reference, in any order and with inputs off by a float32 rounding: a long
sum in order, and values that underflow, have a larger one."""
D_REACH = 1024.0
"""A variant of the operator in float32 may take the cap to so many times that, an error 32 times as large: parts merged
by a logsumexp of 200 lose 4 bits. TF32 is 30,000 times beyond the cap."""
D_CAP_REQUANTISED = 4 * 1.5e-3
"""Where legal roundings change codes on the way. An e8m0 scale that steps up doubles the steps of its group, which has
four times the error of changed codes alone."""
CONDITION_SHARE = 6.0
"""Of a row that is not ill-conditioned, d after a change of the inputs by up to u is at most u^2 over this: a uniform
change has the square u^2/3, and d counts it by halves."""

BIAS = 6.0
"""z of the signs of |c|-|g|, away from the median of the legal variants."""
BIAS_SPREAD = 1.0
"""Bias is judged where the variants agree on z to so much; on structured values correct kernels reach 22."""
BIAS_ELEMENTS = 1000
"""and where there are so many elements,"""
BIAS_FLOPS = 16
"""and at most so many operations an element: casts, quantisation and elementwise work."""

CODE_WINDOW = 2.0**-20
"""A code may be the neighbouring one where its exact value lies so near to the middle of the two, relatively: room for
8 roundings in float32. With 2^-3 between neighbours it leaves well below 0.1 % of codes free."""
SCALE_ULPS = 1
"""How far a float32 scale may be from the nearest to amax/largest; an e8m0 scale has one right value."""
CODE_LEAN = 2.0**-19
"""By how much of the format's largest value an activation may have moved before it is quantised within an operator:
four deviations of a float32 sum over 7168 columns. Both neighbours of such a boundary are legal."""

INPUT_ROUNDING = 2.0**-23
"""A legal variant sees every float input off by up to this part: what two float32 roundings do, of a product and of the
sum that it joins."""

SELECTION_SLACK = 2.0
"""How far a selected value may lie below the one that gold selects, in units of the largest error that legal rounding
makes in the row's values: one such error may raise the wrong value, another lower the right one."""

BESIDE = 4.0
"""Two results that are each within a cap of gold, in d, are within four times that of each other."""
BESIDE_D = {
    torch.float32: BESIDE * D_REACH * D_CAP[torch.float32],
    torch.float16: BESIDE * D_CAP[torch.float16],
    torch.bfloat16: BESIDE * D_CAP[torch.bfloat16],
}
"""A row's largest d between a large call's results and the reference's own, without gold; by dtype of the result. A row
that is off by 2 % as a whole is beyond all of them."""
BESIDE_D_REQUANTISED = BESIDE * D_CAP_REQUANTISED
"""Where the reference quantises on the way."""
BESIDE_SLACK = 2.0**-16
"""How far a selected value may lie below the one that the reference selects, in parts of the row's largest: 128 float32
roundings."""
