"""What holds between calls of a mixture-of-experts layer."""

from collections.abc import Iterator

import torch
from torch import Tensor

from isolith.materials.experts import moe_layer, quantised_experts, shared_expert
from isolith.materials.relations import Call, inverse, reordered, same, scaled, take
from isolith.sample import Make, Relation


def relations_of_experts(make: Make) -> Iterator[Relation]:
    """Relations of fused_moe."""
    call = {**moe_layer(make, 17), **shared_expert(make)}
    call["topk_idx"][::3, 1] = -1
    yield reordered(
        "tokens_reordered", call, make.permutation(17), dict.fromkeys(("x", "topk_idx", "topk_weights"), 0), {0: 0}
    )
    yield experts_renumbered("experts_renumbered", call, make.permutation(8))
    slots = make.permutation(3)
    other = {key: take(call[key], slots, 1) for key in ("topk_idx", "topk_weights")}
    yield same("slots_reordered", call, other)
    yield scaled("down_projection_times_8", call, {"w2": 3, "shared_w2": 3}, [3])
    yield from slots_apart(make)
    yield from model_relations(make)


def experts_renumbered(name: str, call: Call, order: Tensor) -> Relation:
    """The experts in another order, and their numbers with them."""
    idx = call["topk_idx"]
    number = torch.where(idx < 0, -1, inverse(order).to(idx.device)[idx.clamp(min=0).long()]).to(idx.dtype)
    held = [key for key in ("w13", "w2", "w13_scale", "w2_scale") if call.get(key) is not None]
    return same(name, call, {"topk_idx": number, **{key: take(call[key], order) for key in held}})


def slots_apart(make: Make) -> Iterator[Relation]:
    """Slots that weigh nothing, and slots in calls of their own."""
    call = moe_layer(make, 11, k=4)
    call["topk_weights"][:, 2] = 0.0
    kept = [0, 1, 3]
    fewer = {key: call[key][:, kept].contiguous() for key in ("topk_idx", "topk_weights")}
    yield same("slot_of_weight_0_left_out", call, fewer)
    gone = call["topk_idx"].clone()
    gone[:, 2] = -1
    yield same("slot_of_weight_0_dropped", call, {"topk_idx": gone})
    if make.dtype != torch.float32:
        return  # each call rounds once, which is one rounding too many
    call = moe_layer(make, 11, k=4)
    halves = tuple(
        {**call, **{key: call[key][:, low : low + 2].contiguous() for key in ("topk_idx", "topk_weights")}}
        for low in (0, 2)
    )
    yield Relation(
        name="slots_in_two_calls",
        whole=call,
        parts=halves,
        assemble=lambda parts: [parts[0][0] + parts[1][0]],
    )


def model_relations(make: Make) -> Iterator[Relation]:
    """Released widths, with few experts and narrow ones."""
    if make.dtype == torch.float16:
        return  # the relations are not exact, and gold of this width takes long
    given = moe_layer(make, 9, hidden=4096, inter=32, experts=8, k=6)
    yield scaled("flash_width_times_4", given, {"w2": 2}, [2])
    for kind in ("e2m1", "int8"):
        weights = quantised_experts(make, kind, 4096, 128, 8)
        yield scaled(f"flash_width_{kind}_times_4", given | weights, {"w2_scale": 2}, [2])
