"""The cache of a changed model: transformers' own Cache, holding layers with paged pools.

Sequences   what all layers share: how many tokens each sequence has seen, and the block tables
PagedLayer  a cache layer of transformers: one decoder layer's pools
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from isolith import ArgumentError
from isolith_transformers.pages import Kind, Pool, Table


class Sequences:
    """The sequences of a cache, and where their items lie.

    Args:
        kinds: What the layers keep, by name.
    """

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self.tables = {name: Table(kind) for name, kind in kinds.items()}
        self.seen: list[int] = []
        self.columns = 0  # tokens seen with padding, which transformers counts
        self.running: list[int] | None = None

    def begin(self, tokens: list[int], columns: int) -> None:
        """Find room for a call of so many tokens of each sequence."""
        if self.running is not None:
            raise ArgumentError(
                "isolith_transformers: this cache was left behind by a call that failed; reset it or make a new one."
            )
        if not self.columns:
            self.clear(len(tokens))
        if len(tokens) != len(self.seen):
            raise ArgumentError(
                f"isolith_transformers: the cache holds {len(self.seen)} sequences; got a batch of {len(tokens)}."
            )
        self.running = [old + new for old, new in zip(self.seen, tokens, strict=True)]
        for table in self.tables.values():
            table.begin(self.seen, tokens)
        self.columns += columns

    def commit(self) -> None:
        """Count the tokens of the call as seen."""
        assert self.running is not None, "commit follows begin"
        self.seen, self.running = self.running, None

    def clear(self, sequences: int = 0) -> None:
        """Forget everything."""
        self.seen, self.columns, self.running = [0] * sequences, 0, None
        for table in self.tables.values():
            table.clear(sequences)

    def select(self, rows: list[int]) -> None:
        """Keep the sequences `rows`, in this order and as often as named."""
        self.seen = [self.seen[row] for row in rows]
        for table in self.tables.values():
            table.select(rows)

    def crop(self, tokens: int) -> None:
        """Take back the last tokens of every sequence."""
        left = [seen - tokens for seen in self.seen]
        kept = all(table.holds(row, length) for table in self.tables.values() for row, length in enumerate(left))
        if min(left) < 0 or not kept:
            raise ArgumentError(
                "isolith_transformers: crop takes back as many tokens as their states are kept for, 16 at the least of"
                f" each sequence's own; got {tokens} of {min(self.seen)}."
            )
        self.seen, self.columns = left, self.columns - tokens


class PagedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # transformers has no types for it
    """The pools of one decoder layer.

    Args:
        sequences: What the layer shares with the others of its cache.
        leads: Whether a call to every layer (reset, reorder_cache, ...) is this layer's to carry out.
        croppable: Whether crop can take back any number of tokens.
    """

    supports_early_init = False

    def __init__(self, sequences: Sequences, *, leads: bool = False, croppable: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the same
        self.sequences = sequences
        self.leads = leads
        self.is_croppable = croppable
        self.pools: dict[str, Pool] = {}

    def pool(self, name: str, kind: str, width: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor of a pool, made on its first use with the dtype and on the device of `like`."""
        if name not in self.pools:
            self.pools[name] = Pool(self.sequences.tables[kind], width, dtype or like.dtype, like.device)
        return self.pools[name].ready()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: pools are made on first use."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG002  # Any: transformers' signature
        """Refuse: only a changed model can write here."""
        raise ArgumentError(
            "isolith_transformers: this cache belongs to a model that apply has changed; got a model without."
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys that a mask would cover."""
        return self.sequences.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.sequences.columns

    def get_max_length(self) -> int:
        """-1: a pool grows."""
        return -1

    def offload(self) -> None:
        """Refuse."""
        raise ArgumentError("isolith_transformers: a paged cache stays on its device; got a call to offload it.")

    def reset(self) -> None:
        """Forget everything."""
        if self.leads:
            self.sequences.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with the beams chosen."""
        if self.leads:
            self.sequences.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        if self.leads:
            self.sequences.select([row for row in range(len(self.sequences.seen)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences named, by number or by a boolean each."""
        if self.leads:
            chosen = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
            self.sequences.select(chosen.tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove tokens."""
        if tokens_to_remove > 0:
            raise ArgumentError(
                f"isolith_transformers: crop takes minus the number of tokens to remove; got {tokens_to_remove}."
            )
        if self.leads and tokens_to_remove and self.sequences.columns:
            self.sequences.crop(-tokens_to_remove)


def paged(cache: Cache, kinds: Mapping[str, Kind], layers: int, *, croppable: bool) -> Sequences:
    """The sequences of a cache; an empty DynamicCache gets paged layers in place of its own.

    Raises:
        ArgumentError: for another class of cache, and for one that another model has filled.
    """
    first = cache.layers[0] if cache.layers else None
    if isinstance(first, PagedLayer):
        return first.sequences
    if type(cache) is not DynamicCache or cache.offloading:
        name = f"offloading {type(cache).__name__}" if cache.offloading else type(cache).__name__
        raise ArgumentError(f"isolith_transformers: past_key_values must be None or a DynamicCache; got {name}.")
    if cache.get_seq_length():
        raise ArgumentError(
            "isolith_transformers: past_key_values must be empty or filled by this model; got a cache of "
            f"{cache.get_seq_length()} tokens that a model without apply has filled."
        )
    sequences = Sequences(kinds)
    cache.layers = [PagedLayer(sequences, leads=index == 0, croppable=croppable) for index in range(layers)]
    cache.layer_class_to_replicate = None
    return sequences
