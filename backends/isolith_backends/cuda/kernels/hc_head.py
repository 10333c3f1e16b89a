"""Collapse of the residual streams behind the last layer: as hc_pre, without what a sublayer's output needs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.kernels.stream_mix import Projection, collapse_streams
from isolith_backends.cuda.launch import launch


@triton.jit
def finish_hc_head(
    X,
    Partial,
    Scale,
    Base,
    Y,
    tokens,
    x_stride,
    hidden,
    n,
    splits,
    norm_eps,
    hc_eps,
    OUTPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    STREAMS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    collapse_streams(
        X,
        Partial,
        Scale,
        Base,
        Y,
        tl.program_id(0),
        tokens,
        x_stride,
        hidden,
        n,
        n,
        splits,
        norm_eps,
        hc_eps,
        OUTPUTS,
        SPLITS,
        STREAMS,
        TOKENS,
        COLUMNS,
    )


def hc_head(streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, hc_eps: float) -> Tensor:
    """[tokens hidden]."""
    tokens, n, hidden = streams.shape
    x = torch.empty((tokens, hidden), dtype=streams.dtype, device=streams.device)
    base = base.contiguous()
    made = Projection(streams, fn)
    for part in made.slices():
        rows = made.flat[part]
        made.project(rows)
        launch(
            finish_hc_head,
            (made.programs(rows.shape[0]),),
            rows,
            made.partial,
            scale,
            base,
            x[part],
            rows.shape[0],
            rows.stride(0),
            hidden,
            n,
            made.splits,
            norm_eps,
            hc_eps,
            warps=8,
            stages=1,
            **made.sums,
        )
    return x
