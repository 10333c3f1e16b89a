"""Triton kernels of the cuda backend where tmo has no call, for Cambricon's build of Triton. Never run on an MLU.

Only kernels without an instruction of one vendor are here: no inline assembly, no fp8, no sorting by histogram. They go
last, and where that build of Triton is absent they are not here at all. A program is one warp, as more multiply the
grid; no axis of a grid exceeds 65,535, and a tile and its addresses fit the 512 KiB of a core.

Source: FlagGems ed2508bc (grids, one warp, 512 KiB of NRAM; versions of the build have +mlu).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT
from isolith_backends.cambricon.calls import why_not

MOST_PROGRAMS = 65535
MOST_LISTED = 1 << 23
"""Indices of a call whose tiles stay within 8,192."""
MOST_STREAMS, LEAST_HIDDEN = 8, 256
FLOAT32 = (torch.float32,)


def missing_triton() -> WhyNot:
    """Whether Cambricon's build of Triton is not here; nothing is imported for it."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "triton is not installed; its build for MLUs comes with Cambricon's SDK"
    return None if "+mlu" in found else f"triton={found} is no build for MLUs; the version of one has +mlu"


@contextmanager
def one_warp() -> Iterator[None]:
    """Launch programs of one warp, with no option that a GPU's compiler alone knows."""
    # Not imported before: with another Triton, or without, this backend has no use for it.
    from isolith_backends.cuda.launch import elsewhere

    token = elsewhere.set({"num_warps": 1, "num_stages": 1})
    try:
        yield
    finally:
        elsewhere.reset(token)


def too_many(tokens: int, columns: int) -> WhyNot:
    """What a list of indices exceeds."""
    if tokens > MOST_PROGRAMS:
        return f"tokens={tokens}; an axis of a grid has at most {MOST_PROGRAMS} programs"
    if tokens * columns > MOST_LISTED:
        return f"{tokens} lists of {columns}; a tile is within 512 KiB up to {MOST_LISTED} indices"
    return None


def why_not_window(positions: Tensor, window: int, **_: object) -> WhyNot:
    return too_many(positions.shape[0], window)


@implements(
    ops.attention.window_indices,
    requires=Requires(missing=missing_triton),
    why_not=why_not(why_not_window),
)
def window_indices(positions: Tensor, window: int) -> Tensor:
    from isolith_backends.cuda.kernels import index_lists

    with one_warp():
        return index_lists.window_indices(positions, window)


def why_not_compress(positions: Tensor, max_entries: int, **_: object) -> WhyNot:
    return too_many(positions.shape[0], max_entries)


@implements(
    ops.attention.compress_indices,
    requires=Requires(missing=missing_triton),
    why_not=why_not(why_not_compress),
)
def compress_indices(positions: Tensor, ratio: int, max_entries: int) -> Tensor:
    from isolith_backends.cuda.kernels import index_lists

    with one_warp():
        return index_lists.compress_indices(positions, ratio, max_entries)


def why_not_head(streams: Tensor, **_: object) -> WhyNot:
    n, hidden = streams.shape[1:]
    if n > MOST_STREAMS:
        return f"n={n}; a program holds the projection of at most {MOST_STREAMS} streams"
    # Of fewer columns a program takes more tokens, and the pieces of their projections.
    return f"hidden={hidden}; a tile is within 512 KiB from {LEAST_HIDDEN} on" if hidden < LEAST_HIDDEN else None


@implements(
    ops.residual.hc_head,
    requires=Requires(
        dtypes={"streams": DEVICE_FLOAT, **dict.fromkeys(("fn", "scale", "base"), FLOAT32)}, missing=missing_triton
    ),
    why_not=why_not(why_not_head),
)
def hc_head(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float = 1e-6, hc_eps: float = 1e-6
) -> Tensor:
    from isolith_backends.cuda.kernels import hc_head

    with one_warp():
        return hc_head.hc_head(streams, fn, scale, base, norm_eps, hc_eps)
