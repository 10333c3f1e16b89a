"""A layer over the window and the entries that its indexer lists (CSA), with its projections and compressors.

The composition is that of isolith_conformance.layers.attention, with ratio 4 and k entries a token.

Source: DeepSeek-V4 inference/model.py, Attention.
"""

# a layer's parts have the names of an operator's, and its docstring is its module's

from collections.abc import Iterator
from typing import Any

from isolith.materials.relations import in_steps
from isolith.sample import ErrorSample, Make, Relation, Sample
from isolith_conformance.layers.attention import attention_layer
from isolith_conformance.layers.batches import INDEX_K, TOKENS, batch

KIND: dict[str, Any] = {"ratio": 4, "k": INDEX_K}  # Any: options of `batch`


def samples(make: Make) -> Iterator[Sample]:
    # Fewer visible entries than k, as many, and more; lengths around the ratio and the window.
    yield Sample("prefill", **batch(make, csa_layer, [3, 4, 5, 8, 33], **KIND))
    yield Sample("decode", **batch(make, csa_layer, [1] * 7, [0, 2, 3, 4, 11, 15, 40], **KIND))
    yield Sample("chunks", **batch(make, csa_layer, [5, 0, 1, 12, 9], [6, 3, 7, 5, 30], **KIND))
    yield Sample("every_entry", **batch(make, csa_layer, [21, 2], [0, 18], ratio=4, k=9))
    yield Sample("no_tokens", **batch(make, csa_layer, [0, 0], [0, 5], **KIND))


def errors(make: Make) -> Iterator[ErrorSample]:
    call = batch(make, csa_layer, [3], **KIND)
    says = "attention layer: entries come with a ratio, and keys with k; got one of them."
    yield ErrorSample("keys_without_k", **call | {"k": 0}, says=says)


def relations(make: Make) -> Iterator[Relation]:
    call = batch(make, csa_layer, [15, 6], [0, 13], **KIND)
    yield in_steps("decode_is_prefill", call, [[1, 1]] * 6 + [[1, 0]] * 9, TOKENS, carry=csa_layer.mutates)
    call = batch(make, csa_layer, [37, 6], [0, 13], **KIND)
    steps = [[2, 0], [1, 3], [0, 1], [20, 0], [14, 2]]
    yield in_steps("chunks_are_prefill", call, steps, TOKENS, carry=csa_layer.mutates)


csa_layer = attention_layer("csa_layer", "csa", samples, errors, relations)
