"""Triton's interpreter, made to round as a GPU does.

As released (3.6, 3.9) it cuts bfloat16 off where a GPU rounds to nearest even, loses carries in e4m3, and adds,
compares and multiplies the bit patterns of both as if they were integers. Here casts are torch's, products widen
their operands, and arithmetic in a narrow type, which no kernel of this backend does, is an error.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Array = np.ndarray[Any, Any]  # Any: shapes and dtypes are values here
Handle = Any  # Any: the interpreter's own class, which has no types
Method = Callable[..., Any]  # Any: methods of the interpreter have no types

TYPES = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
BITS = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
"""Types that the interpreter keeps as bit patterns."""
LARGEST = 448.0  # of e4m3; a GPU's conversion saturates there


def repair() -> None:
    """Replace what is wrong, for this process; RuntimeError where Triton's version has no such parts."""
    builder = interpreter.InterpreterBuilder
    parts = ("binary_op", "unary_op", "create_dot")
    missing = [name for name in parts if not hasattr(builder, name)]
    missing += [name for name in ("_convert_float", "_patch_lang") if not hasattr(interpreter, name)]
    if missing:
        raise RuntimeError(f"this Triton's interpreter has no {', '.join(missing)} to repair")
    interpreter._convert_float = convert
    builder.binary_op = guarded(builder.binary_op)
    builder.unary_op = guarded(builder.unary_op)
    builder.create_dot = widened(builder.create_dot)
    interpreter._patch_lang = once_a_launch(interpreter._patch_lang)


def convert(data: Array, source: tl.dtype, target: tl.dtype, _: object) -> Array:
    """Cast with rounding to nearest even; the result has the bits of the target type."""
    values = torch.from_numpy(np.array(data, copy=True, order="C", ndmin=1)).view(TYPES[source]).float()
    if target == tl.float8e4nv:
        values = values.clamp(-LARGEST, LARGEST)
    numbers = interpreter._get_np_dtype(target)
    made: Array = values.to(TYPES[target]).view(torch.uint8).numpy().view(numbers)
    return made.reshape(np.shape(data))


def guarded(operation: Method) -> Method:
    """Refuse operands that are bit patterns."""

    def run(self: object, first: Handle, *rest: Any) -> Any:  # Any: the interpreter's own values
        if first.dtype.scalar in BITS:
            raise TypeError(f"arithmetic in {first.dtype.scalar}: widen to float32 first")
        return operation(self, first, *rest)

    return run


def widened(dot: Method) -> Method:
    """Give a product float32 operands, which hold every value of the narrow types."""

    def wide(operand: Handle) -> Handle:
        kind = operand.dtype.scalar
        if kind not in BITS:
            return operand
        return interpreter.TensorHandle(convert(operand.data, kind, tl.float32, None), tl.float32)

    def run(self: object, a: Handle, b: Handle, *rest: Any) -> Any:  # Any: the interpreter's own values
        return dot(self, wide(a), wide(b), *rest)

    return run


def once_a_launch(patch: Method) -> Method:
    """Put the interpreter's functions into a module once, not at every call of a device function: that takes 0.6 ms."""
    done: set[int] = set()

    def run(fn: Any) -> Any:  # Any: the interpreter's own values
        module = id(fn.__globals__)
        if module in done:
            return None
        outermost, scope = not done, patch(fn)
        done.add(module)
        if outermost:
            restore = scope.restore

            def end() -> None:
                done.clear()
                restore()

            scope.restore = end
        return scope

    return run
