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
