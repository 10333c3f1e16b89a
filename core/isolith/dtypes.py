"""The groups of dtypes that operators accept, by one name each, and their spelling in messages."""

import torch

FLOAT = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Activations and unquantised weights; float64 is what gold is computed in."""
DEVICE_FLOAT = (torch.bfloat16, torch.float16, torch.float32)
"""Floats that backends compute with; float64 is left to the reference."""
WIDE = (torch.float32, torch.float64)
"""Values that are held in float32 on a device (float64 for gold)."""
INTEGER = (torch.int32, torch.int64)
INT32 = (torch.int32,)
INT8 = (torch.int8,)
BOOL = (torch.bool,)
E4M3 = (torch.float8_e4m3fn,)
PACKED = (torch.uint8,)
"""Bytes: two e2m1 codes each, or the byte image of a cache page."""
SCALE = (torch.float8_e8m0fnu, torch.float32)

FLOAT_NAMES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
"""What an `out_dtype` argument may say."""


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def widen(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a reference computes in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def listed(words: tuple[str, ...]) -> str:
    """Words as prose: "a", "a or b", "a, b or c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
