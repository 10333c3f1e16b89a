"""transformers' ways to compute what an operator computes, timed beside it: its DeepSeek-V4 modules and functions."""

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from isolith_conformance.bench.peer import Arguments, Peer, Run, clamped, floating

MOST_BYTES = 2**33
"""Of what a peer holds beyond the arguments; a call for which it would be more is not timed."""


def modeling() -> Any:  # Any: transformers' module
    """DeepSeek-V4 in transformers."""
    return importlib.import_module("transformers.models.deepseek_v4.modeling_deepseek_v4")


def peer(operator: str, computes: str, prepare: Callable[[Arguments], Run | None]) -> Peer:
    """A peer that is transformers'."""
    return Peer(operator=operator, name="transformers", computes=computes, prepare=prepare, module="transformers")


def rms_norm_module(given: Arguments) -> Run:
    """transformers' norm."""
    module = modeling().DeepseekV4RMSNorm(given["x"].shape[-1], eps=given["eps"])
    module.weight = torch.nn.Parameter(given["weight"], requires_grad=False)
    return lambda: module(given["x"])


def hyper_connection(given: Arguments) -> Run:
    """transformers' hyper-connection."""
    theirs = modeling()
    streams = given["streams"]
    config: Any = SimpleNamespace(  # Any: of transformers' configuration the parts that are read
        hc_mult=streams.shape[1],
        hc_sinkhorn_iters=given["sinkhorn_iters"],
        hc_eps=given["hc_eps"],
        rms_norm_eps=given["norm_eps"],
        hidden_size=streams.shape[2],
    )
    module = theirs.DeepseekV4HyperConnection(config)
    for name in ("fn", "base", "scale"):
        setattr(module, name, torch.nn.Parameter(given[name], requires_grad=False))
    return lambda: module(streams[None])


def experts(given: Arguments) -> Run | None:
    """transformers' experts, floats alone."""
    if not floating(given["w13"]) or (given["shared_w13"] is not None and not floating(given["shared_w13"])):
        return None
    from transformers.integrations.moe import grouped_mm_experts_forward

    x, limit = given["x"], given["swiglu_limit"]
    module: Any = SimpleNamespace(  # Any: of transformers' module the parts that the function reads
        gate_up_proj=given["w13"],
        down_proj=given["w2"],
        num_experts=given["w13"].shape[0],
        has_gate=True,
        has_bias=False,
        is_transposed=False,
        _is_expert_parallel=False,
        has_post_expert_norm=False,
        _apply_gate=lambda gate_up: clamped(gate_up, limit),
    )
    chosen, weights = given["topk_idx"].long(), given["topk_weights"].to(x.dtype)

    def run() -> Tensor:
        routed: Tensor = grouped_mm_experts_forward(module, x, chosen, weights)
        if given["shared_w13"] is None:
            return routed
        return routed + functional.linear(clamped(functional.linear(x, given["shared_w13"]), limit), given["shared_w2"])

    return run


def unweighted_norm(given: Arguments) -> Run:
    """The norm of query heads."""
    module = modeling().DeepseekV4UnweightedRMSNorm(given["eps"])
    return lambda: module(given["x"])


def hyper_head(given: Arguments) -> Run:
    """The collapse of the streams."""
    streams = given["streams"]
    config: Any = SimpleNamespace(  # Any: of transformers' configuration the parts that are read
        hc_mult=streams.shape[1], hc_eps=given["hc_eps"], rms_norm_eps=given["norm_eps"], hidden_size=streams.shape[2]
    )
    module = modeling().DeepseekV4HyperHead(config)
    for name in ("fn", "base", "scale"):
        setattr(module, f"hc_{name}", torch.nn.Parameter(given[name], requires_grad=False))
    return lambda: module(streams[None])


def rotated(given: Arguments) -> Run | None:
    """The rotation of the last dimensions, in interleaved pairs."""
    x, theirs = given["x"], modeling()
    if not given["interleaved"] or given["rope_first"] or x.dim() != 3:
        return None
    cos, sin = (given[name][given["positions"]][None] for name in ("cos_table", "sin_table"))
    signed = -sin if given["inverse"] else sin
    return lambda: theirs.apply_rotary_pos_emb(x[None], cos, signed, unsqueeze_dim=2)


def projected(given: Arguments) -> Run | None:
    """The output's two steps, floats alone."""
    x, first, second = given["x"], given["wo_a"], given["wo_b"]
    if not (floating(x) and first.dtype == second.dtype == x.dtype):
        return None
    groups, rank, wide = first.shape
    with torch.device("meta"):
        module = modeling().DeepseekV4GroupedLinear(wide, groups * rank, groups)
    module.weight = torch.nn.Parameter(first.flatten(0, 1), requires_grad=False)
    return lambda: functional.linear(module(x.flatten(1).unflatten(1, (groups, wide))).flatten(1), second)


def dense_attention(given: Arguments) -> Run | None:
    """One token's attention over everything that its context has, most of it masked, as a layer's forward does it."""
    from isolith.ops.attention import kv_cache_read

    q, theirs = given["q"], modeling()
    pools = [(given["kv_cache"], given["indices"]), (given["extra_kv_cache"], given["extra_indices"])]
    known = [(cache, listed) for cache, listed in pools if cache is not None]
    counts = [cache.shape[0] * cache.shape[1] for cache, _ in known]
    if q.shape[0] != 1 or given["block_table"] is not None or given["value_dim"] or not floating(q):
        return None
    if 2 * sum(counts) * q.shape[1] * q.shape[2] * q.itemsize > MOST_BYTES:
        return None
    slots = [torch.arange(count, device=q.device)[None] for count in counts]
    entries = torch.cat([kv_cache_read(cache, every)[0] for (cache, _), every in zip(known, slots, strict=True)])
    mask = q.new_full((sum(counts),), -torch.inf)
    for first, (_, listed) in zip((0, *counts), known, strict=False):
        mask[first + listed[listed >= 0].long()] = 0.0
    module = SimpleNamespace(num_key_value_groups=q.shape[1], sinks=given["sink"].to(q.dtype), training=False)
    query, kv = q[:, :, None], entries.to(q.dtype)[None, None]
    return lambda: theirs.eager_attention_forward(module, query, kv, kv, mask, given["softmax_scale"])


def indexer(given: Arguments) -> Run | None:
    """One sequence's scores and the choice, on keys dequantised and side by side before."""
    from isolith.ops.attention import kv_cache_read
    from isolith.ops.attention.indexer_score import dequantised

    table, cache = given["block_table"], given["k_cache"]
    if len(table) != 1 or given["candidates"] is not None:
        return None
    block = cache.shape[1]
    slots = (table[0].long()[:, None] * block + torch.arange(block, device=table.device)).flatten()
    keys = kv_cache_read(cache, slots[None, : given["max_entries"]])
    q = dequantised(given["q"], given["q_scale"], torch.float32)[None]
    if q.shape[1] * q.shape[2] * keys.shape[1] * 4 > MOST_BYTES:
        return None
    config: Any = SimpleNamespace(index_head_dim=q.shape[3], index_n_heads=q.shape[2], hidden_size=1)
    scorer = modeling().DeepseekV4IndexerScorer(config)
    scorer.weights_proj = torch.nn.Identity()  # the weights are given
    weights, k = given["weights"][None], min(given["k"], keys.shape[1])
    return lambda: scorer(q, keys, weights).topk(k, dim=-1).indices


PEERS: tuple[Peer, ...] = (
    peer("rms_norm", "DeepseekV4RMSNorm, the same rounding", rms_norm_module),
    peer("head_rms_norm", "DeepseekV4UnweightedRMSNorm, the factor rounded to x's dtype", unweighted_norm),
    peer("hc_pre", "DeepseekV4HyperConnection, the same formula", hyper_connection),
    peer("hc_head", "DeepseekV4HyperHead, the same formula", hyper_head),
    peer("rope", "apply_rotary_pos_emb, angles looked up before", rotated),
    peer("fused_moe", "grouped_mm_experts_forward, and F.linear for the shared expert", experts),
    peer("grouped_output_proj", "DeepseekV4GroupedLinear and F.linear", projected),
    peer(
        "sparse_attn",
        "eager_attention_forward over every entry of the context, the unlisted masked; dequantised before",
        dense_attention,
    ),
    peer("lightning_indexer", "DeepseekV4IndexerScorer and topk, keys dequantised before, no causal mask", indexer),
)
