"""A sliding-window layer: attention over the last positions alone, with the projections around it.

The composition is that of isolith_conformance.layers.attention, with ratio 0.

Source: DeepSeek-V4 inference/model.py, Attention.
"""

# a layer's parts have the names of an operator's, and its docstring is its module's

from collections.abc import Iterator
from typing import Any

from isolith.materials.relations import in_steps
from isolith.sample import ErrorSample, Make, Relation, Sample
from isolith_conformance.layers.attention import attention_layer
from isolith_conformance.layers.batches import TOKENS, batch

KIND: dict[str, Any] = {"ratio": 0, "k": 0}  # Any: options of `batch`


def samples(make: Make) -> Iterator[Sample]:
    # Lengths around the window of 8, from nothing, and at the end of what is already there.
    yield Sample("prefill", **batch(make, swa_layer, [1, 7, 8, 9, 20], **KIND))
    yield Sample("decode", **batch(make, swa_layer, [1] * 6, [0, 1, 7, 8, 9, 30], **KIND))
    yield Sample("chunks", **batch(make, swa_layer, [5, 0, 1, 12], [6, 3, 8, 5], **KIND))
    yield Sample("no_tokens", **batch(make, swa_layer, [0, 0], [0, 5], **KIND))


def errors(make: Make) -> Iterator[ErrorSample]:
    call = batch(make, swa_layer, [3], **KIND)
    says = "attention layer: entries come with a ratio, and keys with k; got one of them."
    yield ErrorSample("ratio_without_entries", **call | {"ratio": 4}, says=says)


def relations(make: Make) -> Iterator[Relation]:
    call = batch(make, swa_layer, [11, 5], [0, 6], **KIND)
    yield in_steps("decode_is_prefill", call, [[1, 1]] * 5 + [[1, 0]] * 6, TOKENS, carry=swa_layer.mutates)
    yield in_steps("chunks_are_prefill", call, [[7, 0], [1, 3], [0, 1], [3, 1]], TOKENS, carry=swa_layer.mutates)


swa_layer = attention_layer("swa_layer", "swa", samples, errors, relations)
