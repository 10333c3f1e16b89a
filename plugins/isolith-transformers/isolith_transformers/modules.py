"""Forward functions of the modules that DeepSeek V3, V3.2 and V4 have in common.

Each takes the place of one module's own `forward`, so that hooks, outputs and parameters stay what they were.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

import isolith
from isolith import ArgumentError
from isolith_transformers.cache import Sequences, paged
from isolith_transformers.call import Call, Rotary, begin
from isolith_transformers.pages import Kind

EXPERTS = "isolith"
"""The name under which transformers' experts interface has `experts`."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What a changed model needs beside its own modules.

    Args:
        kinds: What the pools of its caches hold.
        rotaries: Its tables of angles.
    """

    kinds: Mapping[str, Kind]
    rotaries: Mapping[str, Rotary]

    @property
    def compresses(self) -> bool:
        """Whether layers compress tokens into entries."""
        return any(kind.ratio for kind in self.kinds.values())


Module = Any  # Any: transformers' modules set their attributes in ways that no type checker sees


def wide(parameter: Tensor) -> Tensor:
    """A small parameter in float32, or as it is in float64."""
    return parameter if parameter.dtype == torch.float64 else parameter.float()


def rms_norm(self: Module, hidden_states: Tensor) -> Tensor:
    """V4's order: one rounding."""
    return isolith.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def rms_norm_v3(self: Module, hidden_states: Tensor) -> Tensor:
    """V3's order: rounded before the weight and behind it."""
    return isolith.rms_norm(hidden_states, self.weight, self.variance_epsilon, round_before_weight=True)


def mlp(self: Module, x: Tensor) -> Tensor:
    """A dense or shared expert: SwiGLU, clamped in V4."""
    gate_up = torch.cat([self.gate_proj(x), self.up_proj(x)], dim=-1)
    y: Tensor = self.down_proj(isolith.swiglu(gate_up, getattr(self, "limit", 0.0)))
    return y


def experts(self: Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The routed experts, as transformers' experts interface calls them."""
    return isolith.fused_moe(
        hidden_states,
        top_k_index,
        top_k_weights,
        self.gate_up_proj,
        self.down_proj,
        swiglu_limit=getattr(self, "limit", 0.0),
    )


def router_logits(self: Module, flat: Tensor) -> Tensor:
    """[tokens, experts] in float32, whatever the model's dtype; float64 in float64."""
    return isolith.quant_linear(flat, self.weight, out_dtype="float64" if flat.dtype == torch.float64 else "float32")


def start(
    self: Module,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    past_key_values: Cache | None,
    use_cache: bool | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    kwargs: dict[str, Any],  # Any: whatever a caller passed
) -> tuple[Tensor, Cache | None, Call]:
    """(embeddings, cache, call) of a model's forward call.

    Raises:
        ArgumentError: for what no changed model can do.
    """
    if self.training:
        raise ArgumentError("isolith_transformers: a changed model is for inference; got one in training mode.")
    if kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)):
        raise ArgumentError(
            "isolith_transformers: attention weights are never made, so output_attentions must be False; got True."
        )
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ArgumentError(f"isolith_transformers: give input_ids or inputs_embeds; got {given}.")
    x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    runtime: Runtime = self.isolith_runtime
    if use_cache and past_key_values is None:
        past_key_values = DynamicCache(config=self.config)
    if past_key_values is None:
        sequences = Sequences(runtime.kinds)
    else:
        sequences = paged(past_key_values, runtime.kinds, len(self.layers), croppable=not runtime.compresses)
    shape = (x.shape[0], x.shape[1])
    call = begin(shape, x.device, sequences, attention_mask, position_ids, runtime.compresses)
    return x, past_key_values, call
