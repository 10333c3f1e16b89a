"""Mixture-of-experts layers to sample: arguments of fused_moe."""

from typing import Any

import torch
from torch import Tensor

from isolith.materials.weights import quantised_weight
from isolith.sample import Make

EXPONENTS = {"e4m3": (-4, -2), "e4m3_float32": (-4, -2), "e4m3_32": (-4, -2), "e2m1": (-6, -3), "int8": (-10, -8)}
"""Kinds of quantised weights, and exponents of scales that keep activations in the range of float16."""


def moe_layer(
    make: Make, tokens: int, hidden: int = 64, inter: int = 48, experts: int = 8, k: int = 3
) -> dict[str, Any]:
    """A float layer whose activations keep the size of its input."""
    chosen = make.uniform(tokens, experts, dtype=torch.float64).argsort(dim=1)[:, :k]
    return {
        "x": make.normal(tokens, hidden),
        "topk_idx": chosen.int(),
        "topk_weights": make.uniform(tokens, k, low=0.1, high=0.6, dtype=torch.float32),
        "w13": make.normal(experts, 2 * inter, hidden, std=2 * hidden**-0.5),
        "w2": make.normal(experts, hidden, inter, std=2 * inter**-0.5),
    }


def shared_expert(make: Make, hidden: int = 64, inter: int = 32) -> dict[str, Any]:
    """A float shared expert."""
    up = make.normal(2 * inter, hidden, std=2 * hidden**-0.5)
    return {"shared_w13": up, "shared_w2": make.normal(hidden, inter, std=2 * inter**-0.5)}


def quantised_experts(
    make: Make, kind: str, hidden: int, inter: int, *experts: int, prefix: str = ""
) -> dict[str, Tensor]:
    """Weights and scales of routed experts, or with the prefix "shared_" of a shared one."""
    low, high = EXPONENTS[kind]
    up = quantised_weight(make, kind, 2 * inter, hidden, *experts, low=low, high=high)
    down = quantised_weight(make, kind, hidden, inter, *experts, low=low, high=high)
    names = {f"{prefix}w13": up["weight"], f"{prefix}w13_scale": up["weight_scale"]}
    return {**names, f"{prefix}w2": down["weight"], f"{prefix}w2_scale": down["weight_scale"]}


def mixed_experts(make: Make, hidden: int, inter: int, *experts: int, prefix: str = "", up: str, down: str) -> Any:
    """Weights and scales of two kinds: of w13, and of w2."""
    first = quantised_experts(make, up, hidden, inter, *experts, prefix=prefix)
    second = quantised_experts(make, down, hidden, inter, *experts, prefix=prefix)
    return {name: (first if "w13" in name else second)[name] for name in first}


def layer_of_uneven_groups(make: Make) -> dict[str, Any]:
    """Activations of two sizes, 2^16 apart, in turn for 32 columns; scales of weights make up for it.

    A scale for more than 32 columns flushes the small ones. e2m1 routed, e4m3 shared in blocks of 32.
    """
    given = {**moe_layer(make, 7, 160, 96), **quantised_experts(make, "e2m1", 160, 96, 8)}
    given |= quantised_experts(make, "e4m3_32", 160, 64, prefix="shared_")
    sizes = make.tensor([2.0**10, 2.0**-6, 2.0**10, 2.0**-6, 2.0**10], torch.float32)
    given["x"] = (given["x"].float() * sizes.repeat_interleave(32)).to(make.dtype)
    for prefix, inter in (("", 96), ("shared_", 64)):
        up, down = given[f"{prefix}w13_scale"].float() / sizes, given[f"{prefix}w2_scale"].float()
        groups = inter // 32
        # The rows of w3 alone: the sigmoid sees gates of one size.
        rows = up.shape[-2] // 2
        up[..., rows:, :] *= sizes[:groups].repeat_interleave(rows // groups)[:, None]
        given[f"{prefix}w13_scale"], given[f"{prefix}w2_scale"] = up, down / sizes[:groups]
    return {**given, "act_group": 32, "block_n": 32, "block_k": 32}


def in_oblong_blocks(given: dict[str, Any], *names: str) -> dict[str, Any]:
    """Scales of blocks of 32 made those of 64 rows and 32 columns: every other row of them."""
    return {**given, **{name: given[name][..., ::2, :].contiguous() for name in names}, "block_n": 64, "block_k": 32}


def layer_of_integers(make: Make, tokens: int = 6) -> dict[str, Any]:
    """A layer of three experts in which everything but the sum of slots is exact in every dtype.

    Every gate is 32, where silu is the identity. Expert 0 gives multiples of 32, expert 1 multiples of 1/32, expert 2
    the opposite of expert 0.
    """
    x, w13 = make.small_integers(tokens, 32), make.zeros(3, 32, 32)
    x[:, 0], w13[:, :16, 0] = 1, 32
    w13[:2, 16:] = make.small_integers(2, 16, 32)
    w2 = make.small_integers(3, 32, 16)
    w13[2], w2[2], w2[1] = w13[0], -w2[0], w2[1] * 2.0**-10
    idx = make.tensor([[0, 1, 2]] * tokens, torch.int32)
    weights = make.full(1.0, tokens, 3, dtype=torch.float32)
    return {"x": x, "topk_idx": idx, "topk_weights": weights, "w13": w13, "w2": w2}
