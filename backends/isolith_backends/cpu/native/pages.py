"""What pages.h has to know of a pool."""

import ctypes

import torch
from torch import Tensor

from isolith.numerics.pages import entry_dim
from isolith_backends.cpu.native.library import CODES


class Pool(ctypes.Structure):
    """The struct of pages.h; `kind` is a dtype's code, or the bytes of a quantised entry."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("kind", "dim", "blocks", "block_size")),
        *((name, ctypes.c_int64) for name in ("block_bytes", "row_bytes", "element_bytes", "shift")),
    )


def pool_of(cache: Tensor) -> Pool:
    """The pool, wherever its blocks, rows and elements lie; its address is what a C++ function is given."""
    kind = cache.shape[2] if cache.dtype == torch.uint8 else CODES[cache.dtype]
    strides = (stride * cache.itemsize for stride in cache.stride())
    blocks, block_size = cache.shape[:2]
    shift = block_size.bit_length() - 1 if block_size.bit_count() == 1 else -1
    return Pool(cache.data_ptr(), kind, entry_dim(cache), blocks, block_size, *strides, shift)
