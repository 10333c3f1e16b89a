"""A layer over the window and every compressed entry (HCA), with its projections and its compressor.

The composition is that of isolith_conformance.layers.attention, with ratio 128.

Source: DeepSeek-V4 inference/model.py, Attention.
"""

# a layer's parts have the names of an operator's, and its docstring is its module's

from collections.abc import Iterator
from typing import Any

from isolith.materials.relations import in_steps
from isolith.sample import ErrorSample, Make, Relation, Sample
from isolith_conformance.layers.attention import attention_layer
from isolith_conformance.layers.batches import TOKENS, batch

KIND: dict[str, Any] = {"ratio": 128, "k": 0}  # Any: options of `batch`


def samples(make: Make) -> Iterator[Sample]:
    # An entry appears with the last token of its window, at positions 127 and 255.
    yield Sample("prefill", **batch(make, hca_layer, [130, 3, 127, 128], **KIND))
    yield Sample("decode", **batch(make, hca_layer, [1] * 5, [0, 126, 127, 128, 255], **KIND))
    yield Sample("chunks", **batch(make, hca_layer, [5, 0, 140, 1], [126, 127, 120, 3], **KIND))
    yield Sample("no_tokens", **batch(make, hca_layer, [0, 0], [0, 127], **KIND))


def errors(make: Make) -> Iterator[ErrorSample]:
    call = batch(make, hca_layer, [3], **KIND)
    says = "attention layer: ratio and k must not be negative; got 128, -1."
    yield ErrorSample("negative_k", **call | {"k": -1}, says=says)


def relations(make: Make) -> Iterator[Relation]:
    call = batch(make, hca_layer, [9, 4], [122, 250], **KIND)
    yield in_steps(
        "decode_is_prefill", call, [[1, 0]] * 3 + [[1, 1]] * 4 + [[1, 0]] * 2, TOKENS, carry=hca_layer.mutates
    )
    call = batch(make, hca_layer, [270, 6], [0, 124], **KIND)
    steps = [[127, 0], [1, 3], [0, 1], [140, 0], [2, 2]]
    yield in_steps("chunks_are_prefill", call, steps, TOKENS, carry=hca_layer.mutates)


hca_layer = attention_layer("hca_layer", "hca", samples, errors, relations)
