"""What holds between calls of the lightning indexer: of its scores, and of what it selects by them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isolith.materials.indexer import batch_of_scores
from isolith.materials.relations import (
    Call,
    Ragged,
    in_steps,
    inverse,
    joined,
    pages_renumbered,
    reordered,
    same,
    scaled,
    sequences_apart,
    sequences_reordered,
    take,
)
from isolith.sample import Make, Relation

INDEXER = Ragged(tokens=("q", "weights", "q_scale", "candidates"), sequences=("block_table",))


def relations_of_scores(make: Make) -> Iterator[Relation]:
    """Relations of indexer_score."""
    yield from relations_of_batches(make, {})
    flash = batch_of_scores(make, [1, 1], [2047, 1021], 4, 64, 128, 64)
    yield scaled("flash_keys_times_8", flash, {"k_cache": 3}, [3])
    yield scaled("flash_weights_times_8", flash, {"weights": 3}, [3])
    yield same("heads_in_halves", *heads_split(make))


def heads_split(make: Make) -> tuple[Call, Call]:
    """Every head twice at half its weight, which is exact."""
    call = batch_of_scores(make, [5, 1], [0, 90], 4, 4, 32, 8)
    halves = call["weights"].repeat(1, 2) * 0.5
    return call, {"q": call["q"].repeat(1, 2, 1), "weights": halves}


def relations_of_selection(make: Make) -> Iterator[Relation]:
    """Relations of lightning_indexer."""
    yield from relations_of_batches(make, {"k": 5})
    call = batch_of_scores(make, [9, 2], [0, 70], 4, 8, 32, 4) | {"k": 6}
    yield same("keys_times_8", call, {"k_cache": call["k_cache"] * 8})
    blocks = make.place(torch.arange(7).flip(0)[None].repeat(11, 1), torch.int32)
    yield same("all_blocks_are_candidates", call, {"candidates": blocks, "candidate_block": 3})


def relations_of_batches(make: Make, extra: dict[str, Any]) -> Iterator[Relation]:  # Any: arguments
    """Relations that a batch has, of scores or of what is selected by them."""
    call = batch_of_scores(make, [13, 6], [0, 30], 4, 8, 32, 4) | extra
    yield in_steps("decode_is_prefill", call, [[1, 1]] * 6 + [[1, 0]] * 7, INDEXER)
    yield in_steps("chunks_are_prefill", call, [[3, 0], [0, 5], [9, 1], [1, 0]], INDEXER)
    several = batch_of_scores(make, [3, 1, 0, 7, 2], [0, 9, 4, 2, 125], 4, 8, 32, 4) | extra
    yield sequences_apart("sequences_apart", several, INDEXER)
    yield sequences_reordered("sequences_reordered", several, make.permutation(5), INDEXER)
    blocks = make.permutation(several["k_cache"].shape[0])
    yield pages_renumbered("keys_renumbered", several, blocks, "k_cache", "block_table")
    yield reordered("heads_reordered", several, make.permutation(8), {"q": 1, "weights": 1}, {})


def relations_of_topk(make: Make) -> Iterator[Relation]:
    """Relations of indexer_topk."""
    call: dict[str, Any] = {"scores": make.normal(12, 300), "lengths": make.integers(0, 301, 12), "k": 40}
    yield reordered("tokens_reordered", call, make.permutation(12), {"scores": 0, "lengths": 0}, {0: 0, 1: 0})
    yield joined("tokens_apart", call, [1, 5], ["scores", "lengths"])
    yield same("scores_times_8", call, {"scores": call["scores"] * 8})
    unseen = torch.arange(300, device=make.device) >= call["lengths"][:, None]
    for name, value in (("nan", torch.nan), ("infinite", torch.inf)):
        yield same(f"unseen_scores_are_{name}", call, {"scores": call["scores"].masked_fill(unseen, value)})
    blocks = make.place(torch.stack([make.permutation(43) for _ in range(12)]), torch.int32)
    yield same("all_blocks_are_candidates", call, {"candidates": blocks, "candidate_block": 7})
    all_seen = {**call, "lengths": make.full(300, 12, dtype=torch.int32)}
    yield entries_reordered("entries_reordered", all_seen, make.permutation(300))
    flash = {"scores": make.normal(3, 5000), "lengths": make.tensor([5000, 4097, 600], torch.int32), "k": 512}
    yield joined("flash_tokens_apart", flash, [1, 2], ["scores", "lengths"])


def entries_reordered(name: str, call: Call, order: Tensor) -> Relation:
    """The entries in another order; no two scores of a row are equal, so that the same ones are selected."""
    distinct = torch.arange(300, dtype=torch.float64).sub(150)[inverse(order * 7 % 300)] / 256
    whole = {**call, "scores": distinct.to(call["scores"]).repeat(12, 1)}
    part = {**whole, "scores": take(whole["scores"], order, 1)}

    def assemble(parts: list[list[Tensor]]) -> list[Tensor]:
        indices, length = parts[0]
        number = order.to(indices.device, indices.dtype)[indices.clamp(min=0).long()]
        return [torch.where(indices < 0, indices, number), length]

    return Relation(name=name, whole=whole, parts=(part,), assemble=assemble)
