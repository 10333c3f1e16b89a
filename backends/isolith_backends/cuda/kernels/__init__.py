"""Triton kernels, one to a file: a jitted function and the function that launches it.

Every kernel computes in float32: it widens what it loads, since arithmetic on bfloat16 rounds at each step, and rounds
once where it stores. Addresses are 64-bit products. Codes of e4m3 and e2m1 and exponents of e8m0 travel as bytes, which
every architecture can load.
"""

import triton

from isolith_backends.cuda.kernels import interpreter

if triton.knobs.runtime.interpret:
    interpreter.repair()
