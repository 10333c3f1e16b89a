"""One set of MoE and hybrid-attention operators, the same on every accelerator.

import torch, isolith
y = isolith.rms_norm(torch.randn(4, 4096), torch.ones(4096))
"""

from isolith.backend import API_VERSION, Backend, KernelPack
from isolith.bisect import Bisection, Culprit, bisect
from isolith.dispatch import FallbackRecord, Handle, bind, explain, fallbacks, override, record
from isolith.errors import (
    ArgumentError,
    ConfigError,
    FallbackWarning,
    FrozenError,
    IsolithError,
    NoKernelError,
    OutOfMemoryError,
    PluginError,
    ShadowWarning,
    Unsupported,
)
from isolith.freeze import Manifest, freeze
from isolith.hooks import hookimpl
from isolith.kernel import Kernel, Requires, WhyNot, implements
from isolith.numerics.rope_tables import rope_frequencies, rope_tables
from isolith.operator import Cost, Operator
from isolith.ops import OPERATORS
from isolith.ops.attention import (
    compress_indices,
    grouped_output_proj,
    hybrid_attention,
    indexer_score,
    indexer_topk,
    kv_cache_read,
    kv_cache_write,
    kv_compress,
    lightning_indexer,
    mla_attention,
    sparse_attn,
    window_indices,
)
from isolith.ops.moe import fused_moe, grouped_gemm, moe_gate, moe_hash_gate, moe_permute, moe_unpermute, swiglu
from isolith.ops.norm import head_rms_norm, rms_norm
from isolith.ops.quant import act_quant_fp4, act_quant_fp8, act_quant_int8, block_dequant, quant_linear
from isolith.ops.residual import hc_head, hc_post, hc_pre, sinkhorn
from isolith.ops.rotary import hadamard, rope
from isolith.sample import ErrorSample, Make, Sample
from isolith.select import Explanation
from isolith.shadow import ShadowRecord, shadows

__version__ = "0.1.0.dev0"

__all__ = [
    "API_VERSION",
    "OPERATORS",
    "ArgumentError",
    "Backend",
    "Bisection",
    "ConfigError",
    "Cost",
    "Culprit",
    "ErrorSample",
    "Explanation",
    "FallbackRecord",
    "FallbackWarning",
    "FrozenError",
    "Handle",
    "IsolithError",
    "Kernel",
    "KernelPack",
    "Make",
    "Manifest",
    "NoKernelError",
    "Operator",
    "OutOfMemoryError",
    "PluginError",
    "Requires",
    "Sample",
    "ShadowRecord",
    "ShadowWarning",
    "Unsupported",
    "WhyNot",
    "act_quant_fp4",
    "act_quant_fp8",
    "act_quant_int8",
    "bind",
    "bisect",
    "block_dequant",
    "compress_indices",
    "explain",
    "fallbacks",
    "freeze",
    "fused_moe",
    "grouped_gemm",
    "grouped_output_proj",
    "hadamard",
    "hc_head",
    "hc_post",
    "hc_pre",
    "head_rms_norm",
    "hookimpl",
    "hybrid_attention",
    "implements",
    "indexer_score",
    "indexer_topk",
    "kv_cache_read",
    "kv_cache_write",
    "kv_compress",
    "lightning_indexer",
    "mla_attention",
    "moe_gate",
    "moe_hash_gate",
    "moe_permute",
    "moe_unpermute",
    "override",
    "quant_linear",
    "record",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_tables",
    "shadows",
    "sinkhorn",
    "sparse_attn",
    "swiglu",
    "window_indices",
]
