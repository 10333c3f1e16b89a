"""Tiny models with random weights, for tests and for agreement.py."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    PreTrainedModel,
)

VOCAB = 257
LAYER_TYPES = {
    "window": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}


def v4(layers: Sequence[str], *, hash_layers: int = 0, hca_ratio: int = 16, **changes: Any) -> PreTrainedModel:
    """A DeepSeek-V4.

    Args:
        layers: "window", "csa" or "hca", one a layer.
        hash_layers: Leading layers that choose experts by the token's id.
        hca_ratio: Tokens of an entry of an hca layer; 128 in the released models.
        changes: Fields of the configuration.
    """
    fields: dict[str, Any] = {  # Any: fields are of many types
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "moe_intermediate_size": 48,
        "num_hidden_layers": len(layers),
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "num_experts_per_tok": 2,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "max_position_embeddings": 4096,
        "layer_types": [LAYER_TYPES[layer] for layer in layers],
        "compress_rates": {LAYER_TYPES["csa"]: 4, LAYER_TYPES["hca"]: hca_ratio},
        "num_hash_layers": hash_layers,
        "sliding_window": 16,
        "o_groups": 2,
        "o_lora_rank": 16,
        "index_n_heads": 32,  # with fewer, all heads are negative at once and scores tie at zero
        "index_head_dim": 16,
        "index_topk": 8,
        "hc_mult": 4,
        "swiglu_limit": 0.7,  # low enough to be met
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 256,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "num_nextn_predict_layers": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    return randomised(DeepseekV4ForCausalLM(DeepseekV4Config(**{**fields, **changes})))


def v3(*, yarn: bool = True, mscale: float = 1.0, **changes: Any) -> PreTrainedModel:
    """A DeepSeek-V3 with one dense layer and two of experts; `mscale` other than 1 gives the angles an amplitude."""
    torch.manual_seed(0)
    return randomised(DeepseekV3ForCausalLM(DeepseekV3Config(**{**latent_fields(yarn, mscale), **changes})))


def v32(*, yarn: bool = True, **changes: Any) -> PreTrainedModel:  # Any: fields are of many types
    """A DeepSeek-V3.2: a V3 with an indexer in every layer."""
    fields = {**latent_fields(yarn), "index_topk": 16, "index_head_dim": 16, "index_n_heads": 32}
    torch.manual_seed(0)
    return randomised(DeepseekV32ForCausalLM(DeepseekV32Config(**{**fields, **changes})))


def latent_fields(yarn: bool, mscale: float = 1.0) -> dict[str, Any]:  # Any: fields are of many types
    """What V3 and V3.2 have in common."""
    scaled = {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": 1.0,
        "rope_theta": 10000.0,
    }
    return {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_group": 4,
        "topk_group": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 2560,
        "rope_parameters": scaled if yarn else {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "attn_implementation": "eager",
    }


@torch.no_grad()
def randomised(model: Any) -> PreTrainedModel:  # Any: transformers' own methods have no types
    """Fill weights so that every part of the model matters: a constructor leaves many at zero or one."""
    drawn = torch.Generator().manual_seed(1)

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=drawn)

    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        last = name.rsplit(".", 1)[-1]
        if last == "tid2eid":
            rows = [torch.randperm(model.config.n_routed_experts, generator=drawn) for _ in range(len(tensor))]
            tensor.copy_(torch.stack(rows)[:, : tensor.shape[1]])
        elif last in ("sinks", "position_bias", "base", "hc_base", "e_score_correction_bias", "bias"):
            tensor.copy_(normal(tensor) / 2)
        elif "norm" in name:
            tensor.copy_(1 + normal(tensor) / 5)
        elif tensor.dim() > 1:
            tensor.copy_(normal(tensor) * tensor.shape[-1] ** -0.5)
    changed: PreTrainedModel = model.eval()
    return changed


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens, none of them padding."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
