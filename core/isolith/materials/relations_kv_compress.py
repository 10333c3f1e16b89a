"""What holds between calls of the compressor: tokens one by one, in chunks and at once, in any batch and any paging."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from isolith.materials.relations import Assemble, Call, Ragged, in_steps, pages_renumbered, same, scaled, take, times
from isolith.numerics.windows import max_entries_of_call
from isolith.sample import Make, Relation

COMPRESSOR = Ragged(tokens=("x",), sequences=("state_block_table",))


def relations_of_compressor(make: Make, batch: Callable[..., dict[str, Any]]) -> Iterator[Relation]:  # Any: arguments
    """Relations of kv_compress; `batch` makes a call."""
    csa, hca = batch(make, [21, 10], [0, 3]), batch(make, [300, 9], [0, 124], 128, overlap=False)
    chunks = [[2, 0], [0, 5], [9, 1], [1, 0], [9, 4]]
    yield steps("csa_decode_is_prefill", csa, [[1, 1]] * 10 + [[1, 0]] * 11)
    yield steps("csa_chunks_are_prefill", csa, chunks)
    yield steps("ring_in_chunks_is_prefill", batch(make, [21, 10], [0, 3], ring=8), chunks)
    yield steps("hca_chunks_are_prefill", hca, [[127, 0], [1, 3], [0, 1], [130, 5], [42, 0]])
    rotated = batch(make, [9, 6], [0, 6], dim=16, rotate=True)
    yield steps("indexer_decode_is_prefill", rotated, [[1, 1]] * 6 + [[1, 0]] * 3)
    several = batch(make, [5, 0, 1, 8, 2], [0, 3, 7, 6, 9])
    yield sequences_in_turn("sequences_apart", several)
    order = make.permutation(several["state_cache"].shape[0])
    renumbered = pages_renumbered("state_renumbered", several, order, "state_cache", "state_block_table")
    yield with_state(renumbered, lambda state: take(state, order.argsort()))
    yield scaled("entries_times_8", csa, {"norm_weight": 3}, [3, 0, 0])
    yield values_scaled("values_times_8", csa)
    yield same("tokens_not_pooled", *tails(make, batch))
    flash = batch(make, [4, 1], [0, 7], dim=512, hidden=4096, ring=8)
    yield scaled("flash_entries_times_8", flash, {"norm_weight": 3}, [3, 0, 0])


def tails(make: Make, batch: Callable[..., dict[str, Any]]) -> tuple[Call, Call]:  # Any: arguments
    """A call, and what may change in it: rows in the blocks of its sequences that it neither reads nor hands on."""
    call = batch(make, [5, 3], [2, 6])
    state, blocks = call["state_cache"].clone(), call["state_block_table"].unique()
    named = blocks[blocks >= 0].long()
    state[named] = state[named].nan_to_num(7.0)
    return call, {"state_cache": state}


def with_state(relation: Relation, change: Callable[[Tensor], Tensor]) -> Relation:
    """The relation, with the state of its one part changed before it counts as the whole's."""

    def assemble(parts: list[list[Tensor]]) -> list[Tensor]:
        entries, cu_entries, state = relation.assemble(parts)
        return [entries, cu_entries, change(state)]

    return Relation(name=relation.name, whole=relation.whole, parts=relation.parts, assemble=assemble)


def values_scaled(name: str, call: Call) -> Relation:
    """Values times 8, and eps times 64: the norm takes the factor out again."""
    channels = call["wkv"].shape[0]

    def with_values(state: Tensor) -> Tensor:
        return torch.cat((times(state[..., :channels], 3), state[..., channels:]), dim=-1)

    scales = {"wkv": times(call["wkv"], 3), "eps": 64e-6, "state_cache": with_values(call["state_cache"])}

    def assemble(parts: list[list[Tensor]]) -> list[Tensor]:
        entries, cu_entries, state = parts[0]
        return [entries, cu_entries, with_values(state)]

    return Relation(name=name, whole={**call, **scales}, parts=({**call, "eps": 1e-6},), assemble=assemble)


def steps(name: str, call: Call, counts: Sequence[Sequence[int]]) -> Relation:
    """The tokens of a call in several, the state handed from one to the next."""
    assemble = packed(call, [range(len(step)) for step in counts])
    return in_steps(name, call, counts, COMPRESSOR, carry=("state_cache",), assemble=assemble)


def sequences_in_turn(name: str, call: Call) -> Relation:
    """The sequences of a batch one after the other, in calls of their own on one state."""
    ends = call["cu_seqlens"].tolist()
    parts = []
    for row in range(len(ends) - 1):
        low, high, alone = ends[row], ends[row + 1], torch.tensor([row])
        tables = {key: take(call[key], alone) for key in ("state_block_table", "start_pos")}
        end = torch.tensor([0, high - low], dtype=torch.int32, device=call["x"].device)
        parts.append({**call, **tables, "x": call["x"][low:high], "cu_seqlens": end})
    assemble = packed(call, [[row] for row in range(len(parts))])
    return Relation(name=name, whole=call, parts=tuple(parts), assemble=assemble, carry=("state_cache",))


def packed(call: Call, sequences: Sequence[Sequence[int]]) -> Assemble:
    """Entries of several calls packed as one call packs them; `sequences` says whose rows each of the calls has."""
    batch = call["start_pos"].shape[0]
    rows = max_entries_of_call(call["x"].shape[0], batch, call["ratio"])

    def assemble(parts: list[list[Tensor]]) -> list[Tensor]:
        pieces: list[list[Tensor]] = [[] for _ in range(batch)]
        for (entries, cu_entries, _), owners in zip(parts, sequences, strict=True):
            ends = cu_entries.tolist()
            for place, owner in enumerate(owners):
                pieces[owner].append(entries[ends[place] : ends[place + 1]])
        counts = [sum(len(piece) for piece in each) for each in pieces]
        last = parts[-1]
        cu_entries = torch.tensor([0, *counts]).cumsum(0).to(last[1])
        rest = last[0].new_zeros(rows - sum(counts), last[0].shape[1])
        return [torch.cat([piece for each in pieces for piece in each] + [rest]), cu_entries, last[2]]

    return assemble
