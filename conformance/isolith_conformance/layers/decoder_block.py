"""A decoder block: both sublayers, attention over the indexer's entries and a mixture of experts, in residual streams.

    x, post, comb = hc_pre(streams, attn_*);   streams = hc_post(attention(rms_norm(x, attn_norm)), streams, post, comb)
    x, post, comb = hc_pre(streams, ffn_*);    streams = hc_post(experts(rms_norm(x, ffn_norm)), streams, post, comb)
    experts(x)    = fused_moe(x, *moe_gate(gate x, per_token, gate_bias), w13, w2, shared_w13, shared_w2)

attention is the composition of isolith_conformance.layers.attention, whose arguments and caches the block has. Logits
of the router are in float32.

Source: DeepSeek-V4 inference/model.py, Block.forward and MoE.forward.
"""

# a layer's parts have the names of an operator's, and its docstring is its module's

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isolith import Cost, Operator, fused_moe, hc_post, hc_pre, moe_gate, quant_linear, rms_norm
from isolith.dtypes import FLOAT, WIDE, dtype_name, widen
from isolith.materials.relations import Ragged, in_steps
from isolith.sample import ErrorSample, Make, Relation, Sample
from isolith_conformance.layers import attention
from isolith_conformance.layers.batches import HIDDEN, INDEX_K, block
from isolith_conformance.layers.variants import in_variants

PARTS = (*attention.PARTS, *attention.COMPRESSOR_PARTS, *attention.INDEXER_PARTS, "hc_pre", "hc_post", "moe_gate")

TOKENS = Ragged(tokens=("streams",), sequences=())


def reference(
    streams: Tensor,
    attn_fn: Tensor,
    attn_scale: Tensor,
    attn_base: Tensor,
    attn_norm: Tensor,
    ffn_fn: Tensor,
    ffn_scale: Tensor,
    ffn_base: Tensor,
    ffn_norm: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    w13: Tensor,
    w2: Tensor,
    shared_w13: Tensor,
    shared_w2: Tensor,
    per_token: int = 2,
    routed_scale: float = 1.5,
    swiglu_limit: float = 10.0,
    **of_attention: Any,  # Any: the arguments of attention.reference
) -> Tensor:
    x, post, comb = hc_pre(streams, attn_fn, attn_scale, attn_base)
    y = attention.reference(rms_norm(x, attn_norm), **of_attention)
    streams = hc_post(y, streams, post, comb)
    x, post, comb = hc_pre(streams, ffn_fn, ffn_scale, ffn_base)
    x = rms_norm(x, ffn_norm)
    logits = quant_linear(x, gate, out_dtype=dtype_name(widen(x.dtype)))
    topk_idx, topk_weights = moe_gate(logits, per_token, gate_bias, routed_scale=routed_scale)
    y = fused_moe(
        *(x, topk_idx, topk_weights, w13, w2),
        shared_w13=shared_w13,
        shared_w2=shared_w2,
        swiglu_limit=swiglu_limit,
    )
    return hc_post(y, streams, post, comb)


def signature() -> inspect.Signature:
    """The block's own arguments and those of its attention, x apart."""
    own = [each for each in inspect.signature(reference).parameters.values() if each.kind is not each.VAR_KEYWORD]
    others = [each for each in inspect.signature(attention.reference).parameters.values() if each.name != "x"]
    given = sorted([*own, *others], key=lambda each: each.default is not each.empty)
    return inspect.Signature(given, return_annotation=Tensor)


reference.__signature__ = signature()  # type: ignore[attr-defined]  # read by inspect alone


def fake(streams: Tensor, **_: object) -> Tensor:
    return torch.empty_like(streams, memory_format=torch.contiguous_format)


def check(ratio: int, entries: Tensor | None, k: int, keys: Tensor | None, **_: object) -> None:
    attention.check(ratio, entries, k, keys)


def check_values(streams: Tensor, **arguments: Any) -> None:  # Any: an operator's arguments
    attention.check_values(x=streams, **arguments)


def cost(streams: Tensor, w13: Tensor, per_token: int, **arguments: Any) -> Cost:  # Any: an operator's arguments
    inner = attention.cost(x=streams[:, 0], **arguments)
    products = 3 * streams.shape[0] * per_token * w13.shape[1] * w13.shape[2]
    return Cost(
        flops=inner.flops + products,
        bytes_read=inner.bytes_read + w13.nbytes + streams.nbytes,
        bytes_written=streams.nbytes,
        math=inner.math,
    )


def samples(make: Make) -> Iterator[Sample]:
    def call(*batch: Any) -> dict[str, Any]:  # Any: an operator's arguments
        return block(make, decoder_block, *batch, ratio=4, k=INDEX_K)

    yield Sample("prefill", **call([3, 5, 21]))
    yield Sample("decode", **call([1] * 6, [0, 3, 4, 11, 15, 30]))
    yield Sample("chunks", **call([5, 0, 9], [6, 3, 14]))
    yield Sample("no_tokens", **call([0], [5]))


def errors(make: Make) -> Iterator[ErrorSample]:
    call = block(make, decoder_block, [3], ratio=4, k=INDEX_K)
    says = f"decoder_block: hidden is {HIDDEN} in streams but {HIDDEN - 1} in attn_norm."
    yield ErrorSample("norm_width", **call | {"attn_norm": call["attn_norm"][1:]}, says=says)


def relations(make: Make) -> Iterator[Relation]:
    carry = decoder_block.mutates
    call = block(make, decoder_block, [11, 6], [0, 13], ratio=4, k=INDEX_K)
    yield in_steps("decode_is_prefill", call, [[1, 1]] * 6 + [[1, 0]] * 5, TOKENS, carry=carry)
    call = block(make, decoder_block, [27, 6], [0, 13], ratio=4, k=INDEX_K)
    steps = [[2, 0], [1, 3], [0, 1], [13, 0], [11, 2]]
    yield in_steps("chunks_are_prefill", call, steps, TOKENS, carry=carry)


decoder_block: Operator[..., Tensor] = Operator(
    name="decoder_block",
    shapes="streams[tokens n hidden] attn_fn[mixes n*hidden] attn_scale[3] attn_base[mixes] attn_norm[hidden]"
    " ffn_fn[mixes n*hidden] ffn_scale[3] ffn_base[mixes] ffn_norm[hidden] gate[experts hidden] gate_bias[experts]"
    " w13[experts gate_up hidden] w2[experts hidden _] shared_w13[shared_gate_up hidden] shared_w2[hidden _]"
    f" {attention.SHAPES.partition(' ')[2].partition(' ')[2]} -> out[tokens n hidden]",
    dtypes={
        **dict.fromkeys(("streams", "attn_norm", "ffn_norm", "gate", "w13", "w2", "shared_w13", "shared_w2"), FLOAT),
        **dict.fromkeys(("attn_fn", "attn_scale", "attn_base", "ffn_fn", "ffn_scale", "ffn_base", "gate_bias"), WIDE),
        **{name: dtypes for name, dtypes in attention.DTYPES.items() if name != "x"},
    },
    reference=reference,
    variants=in_variants(reference, attention.VARIANTS),
    fake=fake,
    check=check,
    check_values=check_values,
    cost=cost,
    samples=samples,
    errors=errors,
    mutates=attention.STATE,
    defined=attention.defined,
    composed_of=(*PARTS, "fused_moe"),
    sample_dtypes=(torch.float32, torch.bfloat16),
    relations=relations,
)
