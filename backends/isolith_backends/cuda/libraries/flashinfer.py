"""The indexer's selection by flashinfer, behind the kernel of this backend: to be pinned.

Facts (flashinfer fb28d72, flashinfer/topk.py, csrc/topk.cu, include/flashinfer/topk.cuh):
`top_k_ragged_transform(input, offsets, lengths, k, deterministic, tie_break)` selects among the first lengths[i] of a
row and adds offsets[i]; input is contiguous float32, float16 or bfloat16, offsets and lengths int32; a row shorter than
k ends in -1. Lengths are not compared with the row. `tie_break=1` lets the lowest index win and takes one kernel for
every shape, a block for each row, of k <= 2048 and 128 KiB of shared memory; that kernel keeps no state between calls,
unlike the one without ties, whose buffer all streams share. `deterministic=True` returns indices in ascending order.
Values are ranked by their bits: 0.0 stands before -0.0, so one pass makes them alike, which also aligns the rows; a NaN
is ranked as some number. The faster paths of `top_k` on sm_100 know no ties. No rows are refused by the launch.

Not here: `fused_moe.hash_topk` for moe_hash_gate. It divides by the bare sum of the scores: where all of them underflow
a token gets NaN and not zeros, and no argument adds the floor.
"""

from functools import partial

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith_backends.cuda.libraries import lacks, library

MOST = 2048
LOWEST_INDEX = 1


def indexer_topk_refused(scores: Tensor, k: int, candidates: Tensor | None, **_: object) -> WhyNot:
    if candidates is not None:
        return f"candidates has {candidates.shape[1]} columns; takes none, every visible entry competes"
    if k > MOST:
        return f"k={k}; takes at most {MOST}"
    return None if scores.numel() else f"scores is {tuple(scores.shape)}; takes no empty ones"


RAGGED = "top_k_ragged_transform", "offsets", "lengths", "deterministic", "tie_break"


@implements(
    ops.attention.indexer_topk,
    requires=Requires(
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
        arch=">=8.0,!=8.6,!=8.9,<12",  # those with 128 KiB of shared memory
        missing=partial(lacks, "flashinfer", *RAGGED),
    ),
    why_not=indexer_topk_refused,
    batch_invariant=True,
)
def indexer_topk_flashinfer(
    scores: Tensor, lengths: Tensor, k: int, candidates: Tensor | None = None, candidate_block: int = 1
) -> tuple[Tensor, Tensor]:
    visible = lengths.clamp(0, scores.shape[1]).int().contiguous()
    ranked = (scores + 0.0).contiguous()  # -0.0 + 0.0 is 0.0
    indices: Tensor = library("flashinfer").top_k_ragged_transform(
        ranked, torch.zeros_like(visible), visible, k, deterministic=True, tie_break=LOWEST_INDEX
    )
    return indices, visible.clamp(max=k)
