"""Output projection of attention: a product for each group of heads, then one for all groups.

The groups of a token lie side by side in x and in what the first product gives, so both are read where they are: the
first product takes a column of programs for each group, of which each reads its group's weight alone.
"""

import dataclasses

import torch
from torch import Tensor

from isolith_backends.cuda.kernels.quant_linear import Rules, batched_product, quant_linear, quantised


def grouped_output_proj(
    x: Tensor,
    wo_a: Tensor,
    wo_b: Tensor,
    wo_a_scale: Tensor | None,
    wo_b_scale: Tensor | None,
    act_quant_a: str,
    rules: Rules,
) -> Tensor:
    """[tokens, hidden] in the dtype of x; what the first step gives is rounded to it too.

    Args:
        x: [tokens, heads, head_dim].
        wo_a: [groups, rank, heads/groups * head_dim] of any kind.
        wo_b: [hidden, groups * rank] of any kind.
        wo_a_scale: As the kind of wo_a wants it.
        wo_b_scale: As the kind of wo_b wants it.
        act_quant_a: How activations are quantised before the first step.
        rules: How they are before the second, and the blocks of both weights.
    """
    tokens, heads, head_dim = x.shape
    groups, rank = wo_a.shape[:2]
    first = dataclasses.replace(rules, act_quant=act_quant_a)
    o, o_scale = quantised(x.reshape(tokens, groups, heads // groups * head_dim), wo_a, first)
    u = torch.empty((tokens, groups, rank), dtype=x.dtype, device=x.device)
    batched_product(o, o_scale, wo_a, wo_a_scale, first, u)
    return quant_linear(u.view(tokens, groups * rank), wo_b, wo_b_scale, None, rules, x.dtype)
