"""What holds between calls of attention over lists of entries, and over a window and compressed entries."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from isolith.materials.relations import (
    Call,
    Ragged,
    in_steps,
    pages_renumbered,
    reordered,
    same,
    scaled,
    sequences_apart,
    sequences_reordered,
    take,
)
from isolith.sample import Make, Relation

HYBRID = Ragged(
    tokens=("q", "topk_indices", "topk_length"),
    sequences=("window_block_table", "compressed_block_table"),
)


def relations_of_lists(make: Make, ragged: Callable[..., dict[str, Any]]) -> Iterator[Relation]:  # Any: arguments
    """Relations of sparse_attn; `ragged` makes a call over two paged pools."""
    call = ragged([3, 0, 5, 1], [40, 30, 7, 16], [150, 0, 200, 61], 8, 48, (90, 133))
    yield scaled("entries_times_8", call, {"kv_cache": 3, "extra_kv_cache": 3, "softmax_scale": -3}, [3, 0])
    columns = {key: take(call[key], make.permutation(call[key].shape[1]), 1) for key in ("indices", "extra_indices")}
    yield same("columns_reordered", call, columns)
    yield same(
        "columns_of_nothing", call, {"indices": spread(call["indices"]), "extra_indices": spread(call["extra_indices"])}
    )
    yield same("pools_exchanged", call, exchanged(call))
    heads = make.permutation(8)
    yield reordered("heads_reordered", call, heads, {"q": 1, "sink": 0}, {0: 1, 1: 1})
    for pool, table in (("kv_cache", "block_table"), ("extra_kv_cache", "extra_block_table")):
        yield pages_renumbered(f"{pool}_renumbered", call, make.permutation(call[pool].shape[0]), pool, table)
    yield narrowed("values_narrowed", call, 31)
    flash = ragged([1, 1], [128, 144], [700, 650], 64, 512, (128, 512))
    yield scaled("flash_entries_times_8", flash, {"kv_cache": 3, "extra_kv_cache": 3, "softmax_scale": -3}, [3, 0])
    if make.dtype == torch.float32:  # each part rounds once, which is one rounding too many in other dtypes
        yield merged("parts_merged_by_lse", {**call, "sink": None})
        yield merged("flash_merged_by_lse", {**flash, "sink": None})


def spread(indices: Tensor) -> Tensor:
    """A list with a column of -1 after each of its own."""
    return torch.stack((indices, torch.full_like(indices, -1)), dim=2).flatten(1)


def exchanged(call: Call) -> Call:
    """The second list first."""
    names = ("kv_cache", "indices", "topk_length", "block_table")
    pairs = [(name, f"extra_{name}") for name in names]
    return {ours: call.get(theirs) for pair in pairs for ours, theirs in (pair, pair[::-1])}


def narrowed(name: str, call: Call, width: int) -> Relation:
    """The first channels of the values are the values' first channels."""

    def assemble(parts: list[list[Tensor]]) -> list[Tensor]:
        return [parts[0][0][..., :width].contiguous(), parts[0][1]]

    return Relation(name=name, whole={**call, "value_dim": width}, parts=(call,), assemble=assemble)


def merged(name: str, call: Call) -> Relation:
    """Each pool in a call of its own, merged by lse."""
    one = {key: value for key, value in call.items() if not key.startswith("extra_")}
    other = {**one, **{key.removeprefix("extra_"): value for key, value in call.items() if key.startswith("extra_")}}

    def assemble(parts: list[list[Tensor]]) -> list[Tensor]:
        outs, lses = zip(*parts, strict=True)
        # An empty part has lse +inf, and weighs nothing.
        weights = [lse.double().masked_fill(lse.isposinf(), -torch.inf) for lse in lses]
        lse = torch.logaddexp(*weights)
        shares = [(weight - lse).exp().nan_to_num(0.0)[..., None] for weight in weights]
        out = sum((out.double() * share for out, share in zip(outs, shares, strict=True)), torch.zeros(()))
        return [out.to(outs[0].dtype), lse.masked_fill(lse.isneginf(), torch.inf).to(lses[0].dtype)]

    return Relation(name=name, whole=call, parts=(one, other), assemble=assemble)


def relations_of_layers(make: Make, batch: Callable[..., dict[str, Any]]) -> Iterator[Relation]:  # Any: arguments
    """Relations of hybrid_attention; `batch` makes a call over paged caches."""
    swa, hca, csa = (batch(make, [13, 6], [0, 3], **kind) for kind in ({}, {"ratio": 4}, {"ratio": 4, "k": 3}))
    for kind, call in (("swa", swa), ("hca", hca), ("csa", csa)):
        yield in_steps(f"{kind}_decode_is_prefill", call, [[1, 1]] * 6 + [[1, 0]] * 7, HYBRID)
        yield in_steps(f"{kind}_chunks_are_prefill", call, [[3, 0], [0, 5], [9, 1], [1, 0]], HYBRID)
    several = batch(make, [3, 1, 0, 7, 2], [0, 9, 4, 2, 125], 4)
    yield sequences_apart("sequences_apart", several, HYBRID)
    yield sequences_reordered("sequences_reordered", several, make.permutation(5), HYBRID)
    blocks = make.permutation(several["window_cache"].shape[0])
    yield pages_renumbered("window_renumbered", several, blocks, "window_cache", "window_block_table")
    blocks = make.permutation(several["compressed_cache"].shape[0])
    yield pages_renumbered("entries_renumbered", several, blocks, "compressed_cache", "compressed_block_table")
    # A list of more entries than any token sees: the invisible ones do not count.
    everything = make.place(make.permutation(40)[None].expand(13, -1).contiguous(), torch.int32)
    yield same("all_entries_listed", several, {"topk_indices": everything})
    powers = {"window_cache": 3, "compressed_cache": 3, "softmax_scale": -3}
    yield scaled("caches_times_8", csa, powers, [3, 0])
    flash: dict[str, Any] = {"window": 128, "heads": 64, "dim": 512}  # Any: options
    yield scaled("flash_hca_times_8", batch(make, [2], [1022], 128, **flash), powers, [3, 0])
    yield scaled("flash_csa_times_8", batch(make, [1, 1], [2303, 90], 4, k=512, **flash), powers, [3, 0])
