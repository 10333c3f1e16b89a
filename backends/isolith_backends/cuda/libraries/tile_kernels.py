"""Routing, quantisation and hyper-connections by TileKernels, behind the kernels of this backend: to be pinned.

Facts (TileKernels 36d9e45; needs tilelang 0.1.9, CUDA 13.1, sm_90 or sm_100; each set of sizes and constants is
compiled in its first call):
- moe/top2_sum_gate_kernel.py, `top2_sum_gate(logits, bias, ...)`: contiguous float32, a bias always, one warp a token,
  so k <= 32; experts are a multiple of 4; 0 groups are none, else at most 32, of 2 to 32 experts, each counted by its
  two best whether or not there is a bias. Lowest index first among equals; weights over their sum + 1e-20, always; ids
  int64. softmax ranks by logits plus bias, not by scores. A logit that is not finite stops the process's whole context
  by an assertion, a bias of -inf leaves a chosen expert unset.
- quant/per_token_cast_kernel.py, `per_token_cast(x, "e4m3", num_per_channels, round_sf=...)`: bfloat16 or float32
  [tokens, hidden], groups of 16, 32, 64, 128 or the whole row, a short last one too; scales float32, powers of two with
  round_sf; the floor is 1e-4. Its tests have rows of multiples of 64.
- mhc/post_kernel.py, `mhc_post(x, residual, post_layer_mix, comb_res_mix)`: bfloat16 [a, b, hidden] and
  [a, b, n, hidden], contiguous, coefficients float32 [a, b, n, 1] and [a, b, n, n], first axis of comb the source. Its
  tests have 4 streams and rows of multiples of 256. No tokens are refused by the launch.
- mhc/sinkhorn_kernel.py, `sinkhorn_normalize(x, repeat, eps)`: float32, the contract's steps; its tests have 4 x 4. It
  compiles the backward kernel along, with 5 KiB of shared memory for each repetition.

Not here: `swiglu_forward_and_per_token_cast`, for no operator ends in the codes of an activation.
"""

from functools import partial

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.numerics.codes import SCALE_FORMATS
from isolith_backends.cuda.libraries import lacks, library

ARCH = ">=9.0,<11"
WARP = 32
VECTOR = 4
GROUP_SIZES = (16, 32, 64, 128)
ROW = 64
FLOOR = 1e-4
STREAMS = 4
WIDTH = 256
REPETITIONS = 40  # 200 KiB, of 227
BYTES = 16


def whole(tensor: Tensor) -> Tensor:
    """Contiguous, and starting where a vector load may: what compiled kernels assume and do not check."""
    if tensor.storage_offset() * tensor.itemsize % BYTES:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous()


def moe_gate_refused(
    logits: Tensor,
    k: int,
    bias: Tensor | None,
    score: str,
    groups: int,
    topk_groups: int,
    renormalize: bool,
    **_: object,
) -> WhyNot:
    experts = logits.shape[1]
    if score == "softmax":
        return "score=softmax; it chooses by logits there, not by scores; takes sqrtsoftplus, sigmoid"
    if not renormalize:
        return "renormalize=False; it divides by the sum of the k scores"
    if k > WARP or experts % VECTOR:
        return f"k={k} of {experts} experts; takes at most {WARP} of a multiple of {VECTOR}"
    return None if topk_groups == groups else groups_refused(experts, bias, groups, topk_groups)


def groups_refused(experts: int, bias: Tensor | None, groups: int, topk_groups: int) -> WhyNot:
    if bias is None:
        return f"groups={groups} without a bias; it counts a group by its two best, not by its best alone"
    if groups > WARP or not 2 <= experts // groups <= WARP:
        return f"groups={groups} of {experts // groups} experts; takes at most {WARP}, of 2 to {WARP}"
    held = -(-experts // WARP // VECTOR) * VECTOR
    if topk_groups > held and topk_groups % VECTOR:
        return f"topk_groups={topk_groups}; takes at most {held} for {experts} experts, or multiples of {VECTOR}"
    return None


GATE = "top2_sum_gate", "logits", "bias", "num_topk", "num_topk_groups", "num_groups", "scoring_func", "mask"


@implements(
    ops.moe.moe_gate,
    requires=Requires(
        dtypes={"logits": (torch.float32,), "bias": (torch.float32,)},
        arch=ARCH,
        missing=partial(lacks, "tile_kernels.moe", *GATE),
    ),
    why_not=moe_gate_refused,
    batch_invariant=True,
)
def moe_gate_tile_kernels(
    logits: Tensor,
    k: int,
    bias: Tensor | None = None,
    score: str = "sqrtsoftplus",
    groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = True,
    routed_scale: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    some = topk_groups < groups
    chosen, weights = library("tile_kernels.moe").top2_sum_gate(
        # The library stops at what is not finite; the contract wants some expert there, and the other tokens unharmed.
        logits=logits.nan_to_num().contiguous(),
        bias=logits.new_zeros(logits.shape[1]) if bias is None else bias.nan_to_num().contiguous(),
        num_topk=k,
        num_topk_groups=topk_groups if some else 0,
        num_groups=groups if some else 0,
        use_shared_as_routed=False,
        num_shared_experts=0,
        routed_scaling_factor=routed_scale,
        ep_rank=0,
        num_ep_ranks=1,
        tp_rank=0,
        num_tp_ranks=1,
        scoring_func=score,
        mask=None if mask is None else mask.contiguous(),
    )
    return chosen.int(), weights


def act_quant_fp8_refused(x: Tensor, group_size: int, amax_floor: float, **_: object) -> WhyNot:
    hidden = x.shape[-1]
    if amax_floor != FLOOR:
        return f"amax_floor={amax_floor}; takes {FLOOR}"
    if hidden % ROW or not hidden:
        return f"rows of {hidden}; takes multiples of {ROW}"
    if group_size < hidden and group_size not in GROUP_SIZES:
        return f"group_size={group_size}; takes 16, 32, 64, 128 or all of a row"
    return None


@implements(
    ops.quant.act_quant_fp8,
    requires=Requires(
        dtypes=(torch.bfloat16, torch.float32),
        arch=ARCH,
        missing=partial(lacks, "tile_kernels.quant", "per_token_cast", "x", "fmt", "num_per_channels", "round_sf"),
    ),
    why_not=act_quant_fp8_refused,
    batch_invariant=True,
)
def act_quant_fp8_tile_kernels(
    x: Tensor, group_size: int = 128, scale_format: str = "ue8m0", amax_floor: float = 1e-4
) -> tuple[Tensor, Tensor]:
    hidden = x.shape[-1]
    codes, scale = library("tile_kernels.quant").per_token_cast(
        whole(x).view(-1, hidden), "e4m3", min(group_size, hidden), round_sf=scale_format == "ue8m0"
    )
    # Powers of two convert without an error.
    return codes.view(x.shape), scale.to(SCALE_FORMATS[scale_format]).view(*x.shape[:-1], scale.shape[1])


def hc_post_refused(streams: Tensor, **_: object) -> WhyNot:
    tokens, n, hidden = streams.shape
    if n != STREAMS or hidden % WIDTH:
        return f"{n} streams of {hidden}; takes {STREAMS} of a multiple of {WIDTH}"
    return None if streams.numel() else f"{tokens} tokens; takes at least 1"


@implements(
    ops.residual.hc_post,
    requires=Requires(
        dtypes={
            "x": (torch.bfloat16,),
            "streams": (torch.bfloat16,),
            "post": (torch.float32,),
            "comb": (torch.float32,),
        },
        arch=ARCH,
        missing=partial(
            lacks, "tile_kernels.modeling.mhc.ops", "mhc_post", "x", "residual", "post_layer_mix", "comb_res_mix"
        ),
    ),
    why_not=hc_post_refused,
    batch_invariant=True,
)
def hc_post_tile_kernels(x: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    batch = (whole(tensor).unsqueeze(0) for tensor in (x, streams, post.unsqueeze(-1), comb))
    mixed: Tensor = library("tile_kernels.modeling.mhc.ops").mhc_post(*batch)
    return mixed[0]


def sinkhorn_refused(logits: Tensor, iters: int, **_: object) -> WhyNot:
    n = logits.shape[-1]
    if n != STREAMS:
        return f"matrices of {n} x {n}; takes {STREAMS} x {STREAMS}"
    if iters > REPETITIONS:
        return f"iters={iters}; takes at most {REPETITIONS}"
    return None if logits.numel() else f"logits is {tuple(logits.shape)}; takes no empty ones"


@implements(
    ops.residual.sinkhorn,
    requires=Requires(
        dtypes=(torch.float32,),
        arch=ARCH,
        missing=partial(lacks, "tile_kernels.modeling.mhc.ops", "sinkhorn_normalize", "x", "repeat", "eps"),
    ),
    why_not=sinkhorn_refused,
    batch_invariant=True,
)
def sinkhorn_tile_kernels(logits: Tensor, iters: int = 20, eps: float = 1e-6) -> Tensor:
    comb: Tensor = library("tile_kernels.modeling.mhc.ops").sinkhorn_normalize(whole(logits), repeat=iters, eps=eps)
    return comb
