"""What both releases of the compressor share: the three modes, the pooling of a window, and the row that it becomes.

A window's row is a softmax over its tokens, channel by channel, of score plus ape, applied to kv. With overlap the
tokens of the window before stand in the first half of the lanes and those of the window in the second; the first window
has none before it (domesticated_torch_mlu_ops@9fbf7df6 _ops.py; lanes from xllm@3906f5a9 and its tests).
"""

import torch
from torch import Tensor

from isolith_backends.cambricon.vendor.rotary import rotate
from isolith_backends.cambricon.vendor.rules import need, need_dtype, need_shape, need_within, undefined

MODES = {(True, 4, 128), (True, 4, 512), (False, 128, 512)}
"""(overlap, ratio, head_dim)."""


def head_dim_of(call: str, kv: Tensor, score: Tensor, ape: Tensor, overlap: bool) -> int:
    """head_dim, of a legal mode."""
    width = kv.shape[-1]
    dim = width // 2 if overlap else width
    need_dtype(call, (torch.float32,), ape=ape)
    need_shape(call, score=(score, tuple(kv.shape)), ape=(ape, (-1, width)))
    mode = (overlap, ape.shape[0], dim)
    need(mode in MODES, f"{call}: (overlap, ratio, head_dim) must be one of {sorted(MODES)}, but is {mode}.")
    return dim


def pooled(rows: Tensor, overlap: bool) -> Tensor:
    """The row of float32 tokens [n, 2 * width], kv before score: those of a window, or of two with the one before."""
    kv, score = rows.chunk(2, dim=-1)
    if overlap:
        dim = kv.shape[-1] // 2
        if kv.shape[0] > 4:
            kv, score = (torch.cat((part[:4, :dim], part[4:, dim:])) for part in (kv, score))
        else:
            kv, score = kv[:, dim:], score[:, dim:]
    return (score.softmax(0) * kv).sum(0)


def need_row(
    call: str,
    dim: int,
    gamma: Tensor,
    sin: Tensor,
    cos: Tensor,
    hadamard_matrix: Tensor | None,
    kv_cache: Tensor,
    kv_cache_scale: Tensor | None,
) -> None:
    """Refuse what `stored` cannot take."""
    either = (torch.float32, torch.bfloat16)
    need_dtype(call, either, gamma=gamma, sin=sin, cos=cos, kv_cache=kv_cache)
    need_dtype(call, (kv_cache.dtype,), hadamard_matrix=hadamard_matrix)
    need(kv_cache_scale is None, f"{call}: kv_cache_scale is for int8, which kv_cache cannot be.")
    need_shape(
        call, gamma=(gamma, (dim,)), hadamard_matrix=(hadamard_matrix, (dim, dim)), kv_cache=(kv_cache, (-1, -1, dim))
    )
    need_shape(call, cos=(cos, tuple(sin.shape)))


def stored(
    call: str, row: Tensor, first: int, gamma: Tensor, sin: Tensor, cos: Tensor, hadamard: Tensor | None, eps: float
) -> Tensor:
    """A pooled row behind norm, rotary embedding of its last lanes at the window's first position, and rotation."""
    need_within(call, sin.shape[0], position=torch.tensor(first))
    row = row * torch.rsqrt(row.square().mean() + eps) * gamma.float()
    width = sin.shape[-1]
    tail = rotate(row[-width:], sin[first].float(), cos[first].float(), interleaved=True)
    row = torch.cat((row[:-width], tail))
    return row if hadamard is None else row @ hadamard.float().T


def unfinished(kv_cache: Tensor) -> Tensor:
    """What a slot holds until its window ends."""
    return undefined((kv_cache.shape[-1],), kv_cache.dtype)
