"""Peers of the operators: torch's own functions here, transformers' in peers_transformers.py; a new one is a line."""

import torch
from torch import Tensor
from torch.nn import functional

from isolith_conformance.bench import peers_transformers
from isolith_conformance.bench.peer import Arguments, Peer, Run, clamped, floating


def rms_norm(given: Arguments) -> Run:
    """torch's norm with a weight."""
    x, weight = given["x"], given["weight"].to(given["x"].dtype)
    return lambda: functional.rms_norm(x, (x.shape[-1],), weight, given["eps"])


def head_rms_norm(given: Arguments) -> Run:
    """torch's norm without one."""
    x = given["x"]
    return lambda: functional.rms_norm(x, (x.shape[-1],), None, given["eps"])


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


def swiglu(given: Arguments) -> Run:
    """The activation and the row weight."""
    weight = given["row_weight"]
    scale = 1 if weight is None else weight[..., None].to(given["x"].dtype)
    return lambda: clamped(given["x"], given["limit"]) * scale


def linear(given: Arguments) -> Run | None:
    """torch's linear layer, floats alone."""
    x, weight = given["x"], given["weight"]
    return (lambda: functional.linear(x, weight)) if floating(x) and weight.dtype == x.dtype else None


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
    *peers_transformers.PEERS,
    Peer(
        operator="rms_norm",
        name="torch rms_norm",
        computes="F.rms_norm, with the weight in x's dtype",
        prepare=rms_norm,
    ),
    Peer(
        operator="head_rms_norm",
        name="torch rms_norm",
        computes="F.rms_norm without a weight",
        prepare=head_rms_norm,
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
        operator="sparse_attn",
        name="torch sdpa",
        computes="F.scaled_dot_product_attention over entries gathered and dequantised before; no sink, no lse",
        prepare=attention,
    ),
)
"""Each a small adapter."""
