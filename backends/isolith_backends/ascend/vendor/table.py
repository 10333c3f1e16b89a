"""Which function stands behind which registered operator, and on which chips it exists.

Source: vllm-ascend 182b75ea csrc/build_aclnn.sh for its extension; the operators' documents for the others.
"""

import functools
from collections.abc import Callable
from typing import Any

from isolith_backends.ascend.vendor import (
    cache,
    compressor,
    gating,
    grouped,
    indexer,
    latent,
    microscaling,
    norm,
    packed,
    pages,
    permute,
    quant,
    residual,
    rotary,
    shared,
    swiglu,
)

ALL, SERVERS, TRAINED, NEWEST = ("310P", "A2", "A3", "A5"), ("A2", "A3", "A5"), ("A2", "A3"), ("A5",)
RECIPES = ("A3", "A5")
"""The chips that cann-recipes is for."""

OFFERED: tuple[tuple[str, Callable[..., Any], tuple[str, ...]], ...] = (
    ("npu::npu_rms_norm", norm.npu_rms_norm, ALL),
    ("npu::npu_rotary_mul", rotary.npu_rotary_mul, ALL),
    ("_C_ascend::inplace_partial_rotary_mul", rotary.inplace_partial_rotary_mul, SERVERS),
    ("custom::inplace_partial_rotary_mul", rotary.inplace_partial_rotary_mul, RECIPES),
    ("_C_ascend::npu_hc_pre_v2", residual.npu_hc_pre, SERVERS),
    ("_C_ascend::npu_hc_post", residual.npu_hc_post, SERVERS),
    ("custom::npu_hc_pre", residual.npu_hc_pre, RECIPES),
    ("custom::npu_hc_post", residual.npu_hc_post, RECIPES),
    ("npu::npu_mhc_post", residual.npu_mhc_post, NEWEST),
    ("npu::npu_moe_gating_top_k", gating.npu_moe_gating_top_k, SERVERS),
    ("_C_ascend::moe_gating_top_k", gating.moe_gating_top_k, TRAINED),
    ("_C_ascend::moe_gating_top_k_hash", gating.moe_gating_top_k_hash, SERVERS),
    ("custom::npu_moe_gating_top_k", gating.custom_gating_top_k, RECIPES),
    ("npu::npu_moe_init_routing_v2", permute.npu_moe_init_routing_v2, ALL),
    ("npu::npu_moe_token_permute", permute.npu_moe_token_permute, TRAINED),
    ("npu::npu_moe_token_unpermute", permute.npu_moe_token_unpermute, TRAINED),
    ("npu::npu_moe_finalize_routing", permute.npu_moe_finalize_routing, SERVERS),
    ("npu::npu_swiglu", swiglu.npu_swiglu, ALL),
    ("npu::npu_clipped_swiglu", swiglu.npu_clipped_swiglu, TRAINED),
    ("npu::npu_dequant_swiglu_quant", swiglu.TORCH_NPU, SERVERS),
    ("_C_ascend::npu_dequant_swiglu_quant", swiglu.EXTENSIONS, TRAINED),
    ("custom::npu_dequant_swiglu_clamp_quant", swiglu.EXTENSIONS, RECIPES),
    ("npu::npu_grouped_matmul", grouped.npu_grouped_matmul, ALL),
    ("_C_ascend::moe_grouped_matmul", grouped.moe_grouped_matmul, TRAINED),
    ("_C_ascend::grouped_matmul_swiglu_quant", grouped.grouped_matmul_swiglu_quant, TRAINED),
    ("_C_ascend::grouped_matmul_swiglu_quant_weight_nz", grouped.grouped_matmul_swiglu_quant, TRAINED),
    (
        "_C_ascend::grouped_matmul_swiglu_quant_weight_nz_tensor_list",
        grouped.weight_list_swiglu_quant,
        TRAINED,
    ),
    ("npu::npu_grouped_matmul_swiglu_quant_v2", grouped.npu_grouped_matmul_swiglu_quant_v2, SERVERS),
    ("npu::npu_dynamic_mx_quant", microscaling.npu_dynamic_mx_quant, NEWEST),
    ("npu::npu_dynamic_block_quant", microscaling.npu_dynamic_block_quant, NEWEST),
    ("npu::npu_swiglu_group_quant", microscaling.npu_swiglu_group_quant, NEWEST),
    ("npu::npu_scatter_pa_kv_cache", pages.npu_scatter_pa_kv_cache, SERVERS),
    ("npu::npu_gather_pa_kv_cache", pages.npu_gather_pa_kv_cache, SERVERS),
    ("npu::npu_dynamic_quant", quant.npu_dynamic_quant, SERVERS),
    ("npu::npu_quant_matmul", quant.npu_quant_matmul, SERVERS),
    ("npu::npu_transpose_batchmatmul", quant.npu_transpose_batchmatmul, SERVERS),
    ("npu::npu_fused_matmul", quant.npu_fused_matmul, SERVERS),
    ("_C_ascend::npu_rms_norm_dynamic_quant", quant.npu_rms_norm_dynamic_quant, TRAINED),
    ("custom::npu_rms_norm_dynamic_quant", quant.npu_rms_norm_dynamic_quant, RECIPES),
    ("_C_ascend::npu_scatter_nd_update_v2", cache.npu_scatter_nd_update_v2, TRAINED),
    ("custom::scatter_nd_update_asc", cache.scatter_nd_update_asc, RECIPES),
    ("_C_ascend::compressor", compressor.compressor, SERVERS),
    ("custom::compressor", functools.partial(compressor.compressor, all_float32=True), RECIPES),
    ("_C_ascend::compressor_metadata", compressor.compressor_metadata, SERVERS),
    ("_C_ascend::compressor_metadata_out", compressor.compressor_metadata_out, SERVERS),
    ("_C_ascend::npu_sparse_attn_sharedkv", shared.npu_sparse_attn_sharedkv, TRAINED),
    ("_C_ascend::npu_sparse_attn_sharedkv_metadata", shared.npu_sparse_attn_sharedkv_metadata, TRAINED),
    ("custom::npu_sparse_attn_sharedkv", shared.npu_sparse_attn_sharedkv, ("A3",)),
    ("custom::npu_sparse_attn_sharedkv_metadata", shared.npu_sparse_attn_sharedkv_metadata, ("A3",)),
    ("_C_ascend::kv_compress_epilog", packed.kv_compress_epilog, NEWEST),
    ("_C_ascend::npu_kv_quant_sparse_attn_sharedkv", packed.npu_kv_quant_sparse_attn_sharedkv, NEWEST),
    ("_C_ascend::npu_kv_quant_sparse_attn_sharedkv_metadata", shared.npu_sparse_attn_sharedkv_metadata, NEWEST),
    ("custom::npu_kv_quant_sparse_attn_sharedkv", packed.npu_kv_quant_sparse_attn_sharedkv, NEWEST),
    ("custom::npu_kv_quant_sparse_attn_sharedkv_metadata", shared.npu_sparse_attn_sharedkv_metadata, NEWEST),
    ("npu::npu_lightning_indexer", indexer.npu_lightning_indexer, SERVERS),
    ("_C_ascend::npu_lightning_indexer", indexer.npu_lightning_indexer, TRAINED),
    ("_C_ascend::npu_vllm_quant_lightning_indexer", indexer.npu_vllm_quant_lightning_indexer, SERVERS),
    ("_C_ascend::npu_vllm_quant_lightning_indexer_metadata", indexer.quant_metadata, SERVERS),
    ("custom::npu_quant_lightning_indexer", indexer.npu_vllm_quant_lightning_indexer, RECIPES),
    ("custom::npu_quant_lightning_indexer_metadata", indexer.quant_metadata, RECIPES),
    ("npu::npu_sparse_flash_attention", latent.npu_sparse_flash_attention, SERVERS),
    ("_C_ascend::npu_sparse_flash_attention", latent.npu_sparse_flash_attention, TRAINED),
)
"""(operator, function, the families that have it)."""
