"""e^x and log(1+x) to about an ulp, by operations that are the same on every architecture.

The hardware's 2^x and log2(x) are short of that: e^x loses the rounding of x*log2(e), which is as large as x is, and
log2 near 1 has an absolute error, where 1+x has lost x before.
"""

import triton
import triton.language as tl


@triton.jit
def exp_of(x):
    """e^x for float32; infinities and NaN as usual."""
    within = (x > -87.0) & (x < 88.0)
    near = tl.where(within, x, 0.0)
    nearest = tl.floor(near * 1.4426950408889634 + 0.5)
    # ln(2) in two parts, of which the first has so few bits that its product with a whole number is exact.
    rest = (near - nearest * 0.693359375) + nearest * 2.12194440e-4
    power = ((nearest.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(within, power * tl.exp(rest), tl.exp(x))


@triton.jit
def log1p_of(x):
    """log(1+x) for x in 0..1, however small: 2*atanh(x/(2+x)) by its series."""
    z = x / (2.0 + x)
    s = z * z
    series = 1.0 / 15.0 + s * (1.0 / 17.0 + s * (1.0 / 19.0))
    series = 1.0 / 9.0 + s * (1.0 / 11.0 + s * (1.0 / 13.0 + s * series))
    series = s * (1.0 / 3.0 + s * (1.0 / 5.0 + s * (1.0 / 7.0 + s * series)))
    return 2.0 * (z + z * series)
