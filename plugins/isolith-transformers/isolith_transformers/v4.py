"""DeepSeek-V4: the forward functions of its modules, with isolith's operators in them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

import isolith
from isolith import ArgumentError
from isolith_transformers.cache import PagedLayer
from isolith_transformers.call import Call, Rotary
from isolith_transformers.modules import Module, mlp, rms_norm, router_logits, start, wide
from isolith_transformers.pages import Kind

CSA = "compressed_sparse_attention"
HCA = "heavily_compressed_attention"
COMPRESSING = (CSA, HCA)
SCORES = ("sqrtsoftplus", "sigmoid")


def kinds(config: Any, block_size: int) -> Mapping[str, Kind]:  # Any: a transformers configuration
    """What the layers' pools hold: "window", and for each kind of compressing layer its entries and its states."""
    found = {"window": Kind(block_size=block_size, window=config.sliding_window)}
    for name in COMPRESSING:
        if name in config.layer_types:
            ratio, overlap = config.compress_rates[name], name == CSA
            found[f"entries of {name}"] = Kind(block_size=block_size, ratio=ratio)
            states = ratio * (2 if overlap else 1)
            found[f"states of {name}"] = Kind(block_size=states, group=ratio, overlap=overlap)
    return found


def rotaries(base: Module) -> Mapping[str, Rotary]:
    """The tables of both kinds of layers: "main" (window alone) and "compress"."""
    rotary = base.rotary_emb
    return {
        name: Rotary(getattr(rotary, f"{name}_inv_freq"), getattr(rotary, f"{name}_attention_scaling"))
        for name in rotary.layer_types
    }


def rope_types(config: Any) -> tuple[str, ...]:  # Any: a transformers configuration
    """The kinds of rotary frequencies that the model uses."""
    return tuple(part["rope_type"] for part in config.rope_parameters.values())


def why_not(config: Any) -> str | None:  # Any: a transformers configuration
    """Why this model cannot be run, if so."""
    if config.scoring_func not in SCORES:
        return f"scoring_func must be {' or '.join(SCORES)}; got {config.scoring_func!r}"
    return None


@merge_with_config_defaults  # type: ignore[untyped-decorator]  # transformers has no types for it
@capture_outputs  # type: ignore[untyped-decorator]  # the same
@torch.no_grad()
def model(
    self: Module,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,  # Any: flags that transformers passes on to every module
) -> MoeModelOutputWithPast:
    """DeepseekV4Model: no mask is made, the call's description takes its place."""
    x, past_key_values, call = start(
        self, input_ids, inputs_embeds, past_key_values, use_cache, attention_mask, position_ids, kwargs
    )
    runtime = self.isolith_runtime
    angles = {name: rotary.covering(call.longest, x.device) for name, rotary in runtime.rotaries.items()}

    streams = x.unsqueeze(2).expand(-1, -1, self.config.hc_mult, -1).contiguous()
    for layer in self.layers:
        streams = layer(streams, input_ids=input_ids, call=call, angles=angles, past_key_values=past_key_values)
    hidden_states = self.norm(self.hc_head(streams))
    call.sequences.commit()
    return MoeModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)


def decoder_layer(
    self: Module,
    hidden_states: Tensor,
    input_ids: Tensor | None,
    call: Call,
    angles: Mapping[str, tuple[Tensor, Tensor]],
    past_key_values: Cache | None,
) -> Tensor:
    """DeepseekV4DecoderLayer, on [batch, columns, streams, hidden]."""
    post, comb, x = self.attn_hc(hidden_states)
    y, _ = self.self_attn(
        self.input_layernorm(x),
        call=call,
        tables=angles[self.self_attn.rope_layer_type],
        past_key_values=past_key_values,
    )
    hidden_states = expand(y, hidden_states, post, comb)
    post, comb, x = self.ffn_hc(hidden_states)
    y = self.mlp(self.post_attention_layernorm(x), input_ids=input_ids)
    return expand(y, hidden_states, post, comb)


def expand(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Put a sublayer's output back into the residual streams."""
    mixed = isolith.hc_post(y.flatten(0, 1), streams.flatten(0, 1), post.flatten(0, 1), comb.flatten(0, 1))
    return mixed.view_as(streams)


def hyper_connection(self: Module, hidden_streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DeepseekV4HyperConnection: (post, comb, x)."""
    x, post, comb = isolith.hc_pre(
        hidden_streams.flatten(0, 1),
        wide(self.fn),
        wide(self.scale),
        wide(self.base),
        sinkhorn_iters=self.hc_sinkhorn_iters,
        norm_eps=self.input_norm.eps,
        hc_eps=self.hc_eps,
    )
    shape = hidden_streams.shape[:2]
    return post.unflatten(0, shape), comb.unflatten(0, shape), x.unflatten(0, shape)


def hyper_head(self: Module, x: Tensor) -> Tensor:
    """DeepseekV4HyperHead."""
    y: Tensor = isolith.hc_head(
        x.flatten(0, 1),
        wide(self.hc_fn),
        wide(self.hc_scale),
        wide(self.hc_base),
        norm_eps=self.input_norm.eps,
        hc_eps=self.eps,
    )
    return y.view(*x.shape[:2], -1)


def score(self: Module) -> str:
    """A router's score, as the operators name it."""
    return "sigmoid" if isinstance(self.score_fn, torch.nn.Sigmoid) else "sqrtsoftplus"


def top_k_router(self: Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DeepseekV4TopKRouter: (logits, weights, experts)."""
    logits = router_logits(self, hidden_states.reshape(-1, self.hidden_dim))
    indices, weights = isolith.moe_gate(
        logits,
        self.top_k,
        bias=wide(self.e_score_correction_bias),
        score=score(self),
        routed_scale=self.routed_scaling_factor,
    )
    return logits, weights, indices


def hash_router(self: Module, hidden_states: Tensor, input_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """DeepseekV4HashRouter: (logits, weights, experts)."""
    if input_ids is None:
        raise ArgumentError("isolith_transformers: hash layers choose experts by input_ids; got inputs_embeds alone.")
    logits = router_logits(self, hidden_states.reshape(-1, self.hidden_dim))
    indices, weights = isolith.moe_hash_gate(
        logits,
        input_ids.reshape(-1),
        self.tid2eid,
        score=score(self),
        routed_scale=self.routed_scaling_factor,
    )
    return logits, weights, indices


def attention(
    self: Module,
    hidden_states: Tensor,
    call: Call,
    tables: tuple[Tensor, Tensor],
    past_key_values: Cache | None,
) -> tuple[Tensor, None]:
    """DeepseekV4Attention: writes what the call adds to the pools, then reads what each token sees."""
    x = call.pack(hidden_states)
    store = call.layer(past_key_values, self.layer_idx)
    q_residual = self.q_a_norm(self.q_a_proj(x))
    q = isolith.head_rms_norm(self.q_b_proj(q_residual).view(-1, self.num_heads, self.head_dim), self.q_b_norm.eps)
    q = isolith.rope(q, call.positions, *tables)
    kv = isolith.rope(self.kv_norm(self.kv_proj(x)), call.positions, *tables)

    window_cache = store.pool("window", "window", self.head_dim, kv)
    isolith.kv_cache_write(window_cache, kv, call.new_slots("window"))
    compressed: dict[str, Any] = {}  # Any: tensors and an int, by the operator's argument names
    if self.compressor is not None:
        compressed = self.compressor(x, q_residual, call, tables, store)
    y, _ = isolith.hybrid_attention(
        q,
        window_cache,
        call.table("window"),
        call.cu_seqlens,
        call.start_pos,
        self.sliding_window,
        self.scaling,
        sink=wide(self.sinks),
        **compressed,
    )
    y = isolith.rope(y, call.positions, *tables, inverse=True)
    wo_a = self.o_a_proj.weight.view(self.o_a_proj.n_groups, -1, self.o_a_proj.in_features)
    return call.unpack(isolith.grouped_output_proj(y, wo_a, self.o_b_proj.weight)), None


def compress(
    self: Module, x: Tensor, call: Call, tables: tuple[Tensor, Tensor], store: PagedLayer, name: str, kind: str
) -> Tensor:
    """Run one compressor and write its entries; the pool that they are in."""
    overlap = kind == CSA
    width = 2 * self.position_bias.shape[1]
    state_dtype = torch.promote_types(x.dtype, torch.float32)
    entries, _ = isolith.kv_compress(
        x,
        self.kv_proj.weight,
        self.gate_proj.weight,
        self.kv_norm.weight,
        *tables,
        store.pool(f"{name} states", f"states of {kind}", width, x, state_dtype),
        call.table(f"states of {kind}"),
        call.cu_seqlens,
        call.start_pos,
        self.compress_rate,
        ape=wide(self.position_bias),
        overlap=overlap,
        eps=self.kv_norm.variance_epsilon,
    )
    cache = store.pool(name, f"entries of {kind}", self.head_dim, x)
    isolith.kv_cache_write(cache, entries, call.new_slots(f"entries of {kind}"))
    return cache


def hca_compressor(
    self: Module, x: Tensor, q_residual: Tensor, call: Call, tables: tuple[Tensor, Tensor], store: PagedLayer
) -> dict[str, Any]:  # Any: tensors and an int
    """What hybrid_attention needs to see every entry."""
    cache = compress(self, x, call, tables, store, "entries", HCA)
    table = call.table(f"entries of {HCA}")
    return {"ratio": self.compress_rate, "compressed_cache": cache, "compressed_block_table": table}


def csa_compressor(
    self: Module, x: Tensor, q_residual: Tensor, call: Call, tables: tuple[Tensor, Tensor], store: PagedLayer
) -> dict[str, Any]:  # Any: tensors and an int
    """What hybrid_attention needs to see the entries that the indexer selects."""
    cache = compress(self, x, call, tables, store, "entries", CSA)
    indices, length = self.indexer(x, q_residual, call, tables, store)
    return {
        "ratio": self.compress_rate,
        "compressed_cache": cache,
        "compressed_block_table": call.table(f"entries of {CSA}"),
        "topk_indices": indices,
        "topk_length": length,
    }


def indexer(
    self: Module, x: Tensor, q_residual: Tensor, call: Call, tables: tuple[Tensor, Tensor], store: PagedLayer
) -> tuple[Tensor, Tensor]:
    """DeepseekV4Indexer: (entries, their number) that each token sees."""
    keys = compress(self, x, call, tables, store, "index keys", CSA)
    q = isolith.rope(self.q_b_proj(q_residual).view(-1, self.num_heads, self.head_dim), call.positions, *tables)
    kind = f"entries of {CSA}"
    found: tuple[Tensor, Tensor] = isolith.lightning_indexer(
        q,
        self.scorer.weights_proj(x),
        keys,
        call.table(kind),
        call.cu_seqlens,
        call.start_pos,
        self.compress_rate,
        min(self.index_topk, call.max_items(kind)),
        call.max_items(kind),
        softmax_scale=self.scorer.softmax_scale * self.scorer.weights_scaling,
    )
    return found


FORWARDS: Mapping[type, Callable[..., Any]] = {  # Any: each module's own result
    hf.DeepseekV4Model: model,
    hf.DeepseekV4DecoderLayer: decoder_layer,
    hf.DeepseekV4HyperConnection: hyper_connection,
    hf.DeepseekV4HyperHead: hyper_head,
    hf.DeepseekV4RMSNorm: rms_norm,
    hf.DeepseekV4MLP: mlp,
    hf.DeepseekV4TopKRouter: top_k_router,
    hf.DeepseekV4HashRouter: hash_router,
    hf.DeepseekV4Attention: attention,
    hf.DeepseekV4HCACompressor: hca_compressor,
    hf.DeepseekV4CSACompressor: csa_compressor,
    hf.DeepseekV4Indexer: indexer,
}
"""The forward function of each class of modules."""
