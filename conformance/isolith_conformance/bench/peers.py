"""Other ways to compute what an operator computes, timed beside it: torch's own functions, transformers' modules.

A peer says what it computes, since that is seldom the same to the last rule; its results are not judged. A peer is a
function of the call's arguments that gives the function to time, or None where it does not take this call.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Arguments = dict[str, Any]  # Any: an operator's arguments
Run = Callable[[], Any]  # Any: tensors
Prepare = Callable[[Arguments], Run | None]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One way.

    Args:
        operator: The operator that it is beside.
        name: Whose it is.
        computes: What it computes, where that differs from the operator.
        prepare: From the call's arguments the function to time; what it does beforehand is not timed.
        module: What must be installed.
    """

    operator: str
    name: str
    computes: str
    prepare: Prepare
    module: str = "torch"

    @property
    def installed(self) -> bool:
        """Whether its module is."""
        return importlib.util.find_spec(self.module) is not None


def floating(value: Any) -> bool:  # Any: an argument
    """Whether an argument is a tensor of floats that torch multiplies."""
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16, torch.float32)


def rms_norm(given: Arguments) -> Run:
    """torch's norm with a weight."""
    x, weight = given["x"], given["weight"].to(given["x"].dtype)
    return lambda: functional.rms_norm(x, (x.shape[-1],), weight, given["eps"])


def head_rms_norm(given: Arguments) -> Run:
    """torch's norm without one."""
    x = given["x"]
    return lambda: functional.rms_norm(x, (x.shape[-1],), None, given["eps"])


def rms_norm_module(given: Arguments) -> Run:
    """transformers' norm."""
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RMSNorm

    module = DeepseekV4RMSNorm(given["x"].shape[-1], eps=given["eps"])
    module.weight = torch.nn.Parameter(given["weight"], requires_grad=False)
    return lambda: module(given["x"])


def hyper_connection(given: Arguments) -> Run:
    """transformers' hyper-connection."""
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs

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


def mixed_streams(given: Arguments) -> Run:
    """transformers' way to put a result back, from DeepseekV4DecoderLayer."""
    x, streams, post, comb = (given[name] for name in ("x", "streams", "post", "comb"))
    low = streams.dtype

    def run() -> Tensor:
        mixed: Tensor = comb.to(low).transpose(-1, -2) @ streams
        mixed += post.to(low)[..., None] * x[:, None]
        return mixed

    return run


def hadamard(given: Arguments) -> Run:
    """The rotation as a product."""
    x = given["x"]
    matrix = torch.ones(1, 1)
    while len(matrix) < x.shape[-1]:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    turned = (matrix * x.shape[-1] ** -0.5).to(x)
    return lambda: x @ turned


def topk(given: Arguments) -> Run | None:
    """torch's selection."""
    scores, k = given["scores"], min(given["k"], given["scores"].shape[1])
    return None if not k else lambda: scores.topk(k, dim=-1)


def gate(given: Arguments) -> Run | None:
    """The router in torch's parts; without groups."""
    logits, bias = given["logits"], given["bias"]
    if given["groups"] != 1 or bias is None or given["score"] != "sqrtsoftplus":
        return None

    def run() -> tuple[Tensor, Tensor]:
        scores = functional.softplus(logits).sqrt()
        chosen = (scores + bias).topk(given["k"], dim=-1, sorted=False).indices
        weights = scores.gather(1, chosen)
        return chosen, weights / (weights.sum(-1, keepdim=True) + 1e-20) * given["routed_scale"]

    return run


def sorted_rows(given: Arguments) -> Run | None:
    """Dispatch by a sort."""
    x, chosen = given["x"], given["topk_idx"]
    if given["x_scale"] is not None:
        return None

    def run() -> tuple[Tensor, Tensor]:
        order = chosen.flatten().sort(stable=True).indices
        return x[order // chosen.shape[1]], chosen.flatten().bincount(minlength=given["experts"])

    return run


def gathered_sum(given: Arguments) -> Run | None:
    """Combination by a gather."""
    rows, places, weights = given["rows"], given["pair_to_pos"], given["topk_weights"]
    if weights is None or bool((places < 0).any()):
        return None
    residual = given["residual"] if given["residual"] is not None else 0

    def run() -> Tensor:
        summed: Tensor = (rows[places.long()] * weights[..., None]).sum(1)
        return summed.to(rows.dtype) + residual

    return run


def grouped_product(given: Arguments) -> Run | None:
    """torch's grouped product, bfloat16 alone."""
    x, weight = given["x"], given["weight"]
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16 or x.dim() != 2:
        return None
    ends, turned = given["expert_counts"].cumsum(0).to(torch.int32), weight.transpose(1, 2)
    return lambda: torch._grouped_mm(x, turned, offs=ends)


def clamped(gate_up: Tensor, limit: float) -> Tensor:
    """The activation by torch's parts."""
    gate, up = gate_up.chunk(2, dim=-1)
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return functional.silu(gate) * up


def swiglu(given: Arguments) -> Run:
    """The activation and the row weight."""
    weight = given["row_weight"]
    scale = 1 if weight is None else weight[..., None].to(given["x"].dtype)
    return lambda: clamped(given["x"], given["limit"]) * scale


def linear(given: Arguments) -> Run | None:
    """torch's linear layer, floats alone."""
    x, weight = given["x"], given["weight"]
    return (lambda: functional.linear(x, weight)) if floating(x) and weight.dtype == x.dtype else None


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


def attention(given: Arguments) -> Run | None:
    """torch's attention, for few tokens."""
    from isolith.ops.attention import kv_cache_read

    q, width = given["q"], given["value_dim"] or given["q"].shape[2]
    if given["block_table"] is not None or q.dtype != torch.bfloat16 or q.shape[0] > 64:
        return None
    parts = [(given["kv_cache"], given["indices"]), (given["extra_kv_cache"], given["extra_indices"])]
    known = [(cache, listed) for cache, listed in parts if cache is not None]
    entries = torch.cat([kv_cache_read(cache, listed) for cache, listed in known], dim=1)[:, None]
    seen = torch.cat([listed >= 0 for _, listed in known], dim=1)[:, None, None]
    heads, values = q[:, :, None].transpose(1, 2), entries[..., :width]
    return lambda: functional.scaled_dot_product_attention(
        heads, entries, values, attn_mask=seen, scale=given["softmax_scale"]
    )


PEERS: tuple[Peer, ...] = (
    Peer(
        operator="rms_norm",
        name="torch rms_norm",
        computes="F.rms_norm, with the weight in x's dtype",
        prepare=rms_norm,
    ),
    Peer(
        operator="rms_norm",
        name="transformers",
        computes="DeepseekV4RMSNorm, the same rounding",
        prepare=rms_norm_module,
        module="transformers",
    ),
    Peer(
        operator="head_rms_norm",
        name="torch rms_norm",
        computes="F.rms_norm without a weight",
        prepare=head_rms_norm,
    ),
    Peer(
        operator="hc_pre",
        name="transformers",
        computes="DeepseekV4HyperConnection, the same formula",
        prepare=hyper_connection,
        module="transformers",
    ),
    Peer(
        operator="hc_post",
        name="torch",
        computes="post * x + comb^T @ streams with all of it in the streams' dtype, as transformers does",
        prepare=mixed_streams,
    ),
    Peer(
        operator="hadamard",
        name="torch matmul",
        computes="the product with the whole matrix, in x's dtype",
        prepare=hadamard,
    ),
    Peer(
        operator="indexer_topk",
        name="torch topk",
        computes="torch.topk over whole rows: no lengths, ties as they come",
        prepare=topk,
    ),
    Peer(
        operator="moe_gate",
        name="torch",
        computes="softplus, sqrt, torch.topk, gather, division; ties as they come",
        prepare=gate,
    ),
    Peer(
        operator="moe_permute",
        name="torch sort",
        computes="a stable sort, the rows and the counts; no padding and no inverse lists",
        prepare=sorted_rows,
    ),
    Peer(
        operator="moe_unpermute",
        name="torch",
        computes="rows[pair_to_pos] times weights, summed in float32; no -1",
        prepare=gathered_sum,
    ),
    Peer(
        operator="grouped_gemm",
        name="torch grouped_mm",
        computes="torch._grouped_mm, offsets made before",
        prepare=grouped_product,
    ),
    Peer(
        operator="swiglu",
        name="torch",
        computes="clamp, F.silu, products, each rounded to x's dtype",
        prepare=swiglu,
    ),
    Peer(
        operator="quant_linear",
        name="torch linear",
        computes="F.linear, rounded to x's dtype",
        prepare=linear,
    ),
    Peer(
        operator="fused_moe",
        name="transformers",
        computes="grouped_mm_experts_forward, and F.linear for the shared expert",
        prepare=experts,
        module="transformers",
    ),
    Peer(
        operator="sparse_attn",
        name="torch sdpa",
        computes="F.scaled_dot_product_attention over entries gathered and dequantised before; no sink, no lse",
        prepare=attention,
    ),
)
"""Each a small adapter; a new one is a line here."""
