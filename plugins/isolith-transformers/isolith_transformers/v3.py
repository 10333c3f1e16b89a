"""DeepSeek-V3 and V3.2: the forward functions of their modules, with isolith's operators in them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as v32
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

import isolith
from isolith_transformers.cache import PagedLayer
from isolith_transformers.call import Call, Rotary
from isolith_transformers.modules import Module, mlp, rms_norm_v3, router_logits, start, wide
from isolith_transformers.pages import Kind


def kinds(config: Any, block_size: int) -> Mapping[str, Kind]:  # Any: a transformers configuration
    """What the layers' pools hold: latents, and with an indexer its keys, one of each for every token."""
    return {"tokens": Kind(block_size=block_size)}


def rotaries(base: Module) -> Mapping[str, Rotary]:
    """The one table."""
    return {"main": Rotary(base.rotary_emb.inv_freq, base.rotary_emb.attention_scaling)}


def rope_types(config: Any) -> tuple[str, ...]:  # Any: a transformers configuration
    """The kinds of rotary frequencies that the model uses."""
    return (config.rope_parameters["rope_type"],)


def why_not(config: Any) -> str | None:  # Any: a transformers configuration
    """Why this model cannot be run, if so: there is no such reason."""
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
    """DeepseekV3Model, DeepseekV32Model: no mask is made, the call's description takes its place."""
    x, past_key_values, call = start(
        self, input_ids, inputs_embeds, past_key_values, use_cache, attention_mask, position_ids, kwargs
    )
    tables = self.isolith_runtime.rotaries["main"].covering(call.longest, x.device)
    for layer in self.layers:
        x = layer(x, call=call, tables=tables, past_key_values=past_key_values)
    x = self.norm(x)
    call.sequences.commit()
    return MoeModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values)


def decoder_layer(
    self: Module, hidden_states: Tensor, call: Call, tables: tuple[Tensor, Tensor], past_key_values: Cache | None
) -> Tensor:
    """DeepseekV3DecoderLayer, DeepseekV32DecoderLayer."""
    y: Tensor
    y, _ = self.self_attn(self.input_layernorm(hidden_states), call, tables, past_key_values)
    hidden_states = hidden_states + y
    y = self.mlp(self.post_attention_layernorm(hidden_states))
    return hidden_states + y


def router(self: Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DeepseekV3TopkRouter, DeepseekV32TopkRouter: (logits, weights, experts)."""
    logits = router_logits(self, hidden_states.reshape(-1, self.hidden_dim))
    indices, weights = isolith.moe_gate(
        logits,
        self.top_k,
        bias=wide(self.e_score_correction_bias),
        score="sigmoid",
        groups=self.num_group,
        topk_groups=self.topk_group,
        renormalize=self.norm_topk_prob,
        routed_scale=self.routed_scaling_factor,
    )
    return logits, weights, indices


def attention(
    self: Module, hidden_states: Tensor, call: Call, tables: tuple[Tensor, Tensor], past_key_values: Cache | None
) -> tuple[Tensor, None]:
    """DeepseekV3Attention, DeepseekV32Attention: writes the call's latents, then reads what each token sees."""
    x = call.pack(hidden_states)
    store = call.layer(past_key_values, self.layer_idx)
    q_residual = None
    if self.q_lora_rank is None:
        q = self.q_proj(x)
    else:
        q_residual = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(q_residual)
    interleaved = bool(getattr(self.config, "rope_interleave", True))
    q = isolith.rope(q.view(-1, self.num_heads, self.qk_head_dim), call.positions, *tables, interleaved=interleaved)
    latent, key = self.kv_a_proj_with_mqa(x).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
    latent = self.kv_a_layernorm(latent.contiguous())
    key = isolith.rope(key.contiguous(), call.positions, *tables, interleaved=interleaved)
    cache = store.pool("latents", "tokens", self.kv_lora_rank + self.qk_rope_head_dim, latent)
    isolith.kv_cache_write(cache, torch.cat([latent, key], dim=-1), call.new_slots("tokens"))

    selected: tuple[Tensor | None, Tensor | None] = (None, None)
    if hasattr(self, "indexer"):
        selected = self.indexer(x, q_residual, call, tables, store)
    up = self.kv_b_proj.weight.view(self.num_heads, -1, self.kv_lora_rank)
    y, _ = isolith.mla_attention(
        q,
        cache,
        up[:, : self.qk_nope_head_dim],
        up[:, self.qk_nope_head_dim :],
        call.table("tokens"),
        call.cu_seqlens,
        call.start_pos,
        self.scaling,
        # Keys and values of every head pay off where many queries read them; lists of tokens are read as latents.
        absorbed=call.adds_one_token or selected[0] is not None,
        topk_indices=selected[0],
        topk_length=selected[1],
    )
    return call.unpack(self.o_proj(y.flatten(1))), None


def indexer(
    self: Module, x: Tensor, q_residual: Tensor, call: Call, tables: tuple[Tensor, Tensor], store: PagedLayer
) -> tuple[Tensor, Tensor]:
    """DeepseekV32Indexer: (tokens, their number) that each token sees."""
    q = self.wq_b(q_residual).view(-1, self.n_heads, self.head_dim)
    q = isolith.rope(q, call.positions, *tables, interleaved=False, rope_first=True)
    key = isolith.rope(self.k_norm(self.wk(x)), call.positions, *tables, interleaved=False, rope_first=True)
    keys = store.pool("index keys", "tokens", self.head_dim, key)
    isolith.kv_cache_write(keys, key, call.new_slots("tokens"))
    found: tuple[Tensor, Tensor] = isolith.lightning_indexer(
        q,
        self.weights_proj(x.to(self.weights_proj.weight.dtype)),
        keys,
        call.table("tokens"),
        call.cu_seqlens,
        call.start_pos,
        1,
        min(self.index_topk, call.max_items("tokens")),
        call.max_items("tokens"),
        softmax_scale=self.softmax_scale * self.n_heads**-0.5,
    )
    return found


FORWARDS: Mapping[type, Callable[..., Any]] = {  # Any: each module's own result
    v3.DeepseekV3Model: model,
    v3.DeepseekV3DecoderLayer: decoder_layer,
    v3.DeepseekV3RMSNorm: rms_norm_v3,
    v3.DeepseekV3MLP: mlp,
    v3.DeepseekV3TopkRouter: router,
    v3.DeepseekV3Attention: attention,
    v32.DeepseekV32Model: model,
    v32.DeepseekV32DecoderLayer: decoder_layer,
    v32.DeepseekV32RMSNorm: rms_norm_v3,
    v32.DeepseekV32MLP: mlp,
    v32.DeepseekV32TopkRouter: router,
    v32.DeepseekV32Attention: attention,
    v32.DeepseekV32Indexer: indexer,
}
"""The forward function of each class of modules."""
