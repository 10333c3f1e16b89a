"""Codes and scales in integer arithmetic, the same on every architecture and in the interpreter.

Bytes are uint8 of any shape, values float32.
Formats: e4m3 (float8_e4m3fn), e2m1 (fp4, code 0..15), e8m0 (2^(byte-127)).
"""

import triton
import triton.language as tl


@triton.jit
def value_of_e4m3(byte):
    """Byte -> value: the fields moved into a float32, whose exponent is 120 less than meant."""
    bits = byte.to(tl.uint32)
    magnitude = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    value = tl.where(bits >= 0x80, -magnitude, magnitude)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def decoded_e4m3(byte, TYPE: tl.constexpr, NATIVE: tl.constexpr):
    """Byte -> value in a float type that holds it; where the architecture has e4m3, by its own conversion."""
    if NATIVE:
        return byte.to(tl.float8e4nv, bitcast=True).to(TYPE)
    return value_of_e4m3(byte).to(TYPE)


@triton.jit
def e4m3_of(value):
    """Value -> byte, to nearest, ties to even; beyond 448 saturates, NaN stays NaN."""
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = tl.minimum(tl.abs(value), 448.0)
    fields = magnitude.to(tl.uint32, bitcast=True)
    normal = ((fields + 0x7FFFF + ((fields >> 20) & 1)) >> 20) - 960  # 120 << 3
    # Below 2^-6 codes are multiples of 2^-9, the last place of numbers from 2^14 on: the addition rounds.
    small = (magnitude + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0.015625, small, normal)
    code = tl.where(value == value, code, 0x7F)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def value_of_e2m1(code):
    """Code 0..15 -> value: the fields moved into a float32, whose exponent is 126 less than meant."""
    bits = code.to(tl.uint32)
    magnitude = ((bits & 7) << 22).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
    return tl.where((bits & 8) != 0, -magnitude, magnitude)


@triton.jit
def e2m1_of(value):
    """Value -> code 0..15, to nearest, ties to the even code, the sign of zero kept; beyond 6 saturates."""
    magnitude = tl.abs(value)
    code = (magnitude > 0.25).to(tl.uint8) + (magnitude >= 0.75).to(tl.uint8) + (magnitude > 1.25).to(tl.uint8)
    code += (magnitude >= 1.75).to(tl.uint8) + (magnitude > 2.5).to(tl.uint8) + (magnitude >= 3.5).to(tl.uint8)
    code += (magnitude > 5.0).to(tl.uint8)
    return code | ((value.to(tl.uint32, bitcast=True) >> 28) & 8).to(tl.uint8)


@triton.jit
def value_of_e8m0(byte):
    """Byte -> 2^(byte-127), 255 -> NaN; 2^-127 is a subnormal float32."""
    bits = byte.to(tl.uint32)
    bits = tl.where(bits == 0, 0x400000, tl.where(bits == 0xFF, 0x7FC00000, bits << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def e8m0_at_least(value):
    """Byte of the smallest power of two that is at least a value: positive, finite and normal."""
    return ((value.to(tl.uint32, bitcast=True) + 0x7FFFFF) >> 23).to(tl.uint8)
