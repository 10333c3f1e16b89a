"""Mixture of experts."""

from isolith.ops.moe.fused_moe import fused_moe as fused_moe
from isolith.ops.moe.grouped_gemm import grouped_gemm as grouped_gemm
from isolith.ops.moe.moe_gate import moe_gate as moe_gate
from isolith.ops.moe.moe_hash_gate import moe_hash_gate as moe_hash_gate
from isolith.ops.moe.moe_permute import moe_permute as moe_permute
from isolith.ops.moe.moe_unpermute import moe_unpermute as moe_unpermute
from isolith.ops.moe.swiglu import swiglu as swiglu
