"""Published model configurations, and the operator calls that decode one token of them.

Source: config.json of the DeepSeek-V4-Flash, -V4-Pro and -V3.2 releases; arXiv:2606.19348, section 4.2.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from isolith.operator import AnyOperator
from isolith.ops import attention, moe, norm, quant, residual, rotary

BF16, FP32, E4M3, UINT8, E8M0 = torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.uint8, torch.float8_e8m0fnu
BLOCK = 64  # entries of a cache page; costs count entries, so any size does


@dataclass(frozen=True, kw_only=True)
class Call:
    """One operator call of a decoding step, on tensors without memory, and how many layers make it."""

    part: str
    operator: AnyOperator
    arguments: dict[str, Any]  # Any: a call's own values
    times: int


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the released models have in common."""

    name: str
    title: str
    hidden: int
    heads: int
    q_rank: int
    index_topk: int
    experts: int
    experts_per_token: int
    inter: int
    vocab: int = 129280
    index_heads: int = 64
    index_dim: int = 128

    def entry_bytes(self) -> tuple[int, int]:
        """(bytes of a cached latent or compressed entry, bytes of an indexer key)."""
        raise NotImplementedError

    def cache_bytes_per_token(self) -> float:
        """Cache bytes that one more token of context adds."""
        raise NotImplementedError

    def fixed_bytes(self) -> int:
        """Cache and state bytes of a sequence, whatever its length."""
        raise NotImplementedError

    def calls(self, context: int) -> Iterator[Call]:
        """The calls that decode the token at position `context`-1."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class V4(Model):
    """DeepSeek-V4: sliding windows, compressed sparse (ratio 4) and heavily compressed (ratio 128) attention."""

    ratios: tuple[int, ...]
    groups: int
    o_rank: int = 1024
    head_dim: int = 512
    rope_dim: int = 64
    window: int = 128
    streams: int = 4

    @cached_property
    def layers_of(self) -> dict[int, int]:
        """How many layers have each compression ratio."""
        return {ratio: self.ratios.count(ratio) for ratio in (0, 4, 128)}

    def entry_bytes(self) -> tuple[int, int]:
        """The 584-byte entry and the 68-byte fp4 key."""
        return 584, 68

    def cache_bytes_per_token(self) -> float:
        """Ratio-4 layers keep an entry and a key for every 4 tokens, ratio-128 layers an entry for every 128."""
        entry, key = self.entry_bytes()
        return self.layers_of[4] * (entry + key) / 4 + self.layers_of[128] * entry / 128

    def fixed_bytes(self) -> int:
        """Windows, and the float32 rows that the compressors carry."""
        states = {0: 0, 4: 8 * 2 * 2 * (self.head_dim + self.index_dim) * 4, 128: 128 * 2 * self.head_dim * 4}
        return sum(self.window * self.entry_bytes()[0] + states[ratio] for ratio in self.ratios)

    def calls(self, context: int) -> Iterator[Call]:
        """Every layer, then the head."""
        yield from self.residual_calls()
        yield from self.projection_calls()
        for ratio in (0, 4, 128):
            yield from self.attention_calls(ratio, context)
        yield from self.expert_calls()
        yield Call(part="lm head", operator=quant.quant_linear, arguments=linear(self.vocab, self.hidden), times=1)

    def residual_calls(self) -> Iterator[Call]:
        """Hyper-connections and norms, twice a layer."""
        n, twice = self.streams, 2 * len(self.ratios)
        mixes = (2 + n) * n
        streams = empty(1, n, self.hidden)
        x = empty(1, self.hidden)
        pre = {
            "streams": streams,
            "fn": empty(mixes, n * self.hidden, dtype=FP32),
            "scale": empty(3, dtype=FP32),
            "base": empty(mixes, dtype=FP32),
        }
        post = {"x": x, "streams": streams, "post": empty(1, n, dtype=FP32), "comb": empty(1, n, n, dtype=FP32)}
        yield Call(part="small linears", operator=residual.hc_pre, arguments=pre, times=twice)
        yield Call(part="small linears", operator=residual.hc_post, arguments=post, times=twice)
        scaled = {"x": x, "weight": empty(self.hidden, dtype=FP32)}
        yield Call(part="norms and rope", operator=norm.rms_norm, arguments=scaled, times=twice)

    def projection_calls(self) -> Iterator[Call]:
        """Queries, keys and values, and the output."""
        layers = len(self.ratios)
        wide = self.heads * self.head_dim
        for rows, columns in ((self.q_rank, self.hidden), (wide, self.q_rank), (self.head_dim, self.hidden)):
            part = linear(rows, columns, fp8=True)
            yield Call(part="attention linears", operator=quant.quant_linear, arguments=part, times=layers)
        q = empty(1, self.heads, self.head_dim)
        table = empty(2, self.rope_dim // 2, dtype=FP32)
        turned = {"x": q, "positions": empty(1, dtype=torch.int64), "cos_table": table, "sin_table": table}
        yield Call(part="norms and rope", operator=norm.head_rms_norm, arguments={"x": q}, times=layers)
        # Forward on the queries, backward on the output.
        yield Call(part="norms and rope", operator=rotary.rope, arguments=turned, times=2 * layers)
        per_group = wide // self.groups
        output = {
            "x": q,
            "wo_a": empty(self.groups, self.o_rank, per_group, dtype=E4M3),
            "wo_a_scale": empty(self.groups, blocks(self.o_rank), blocks(per_group), dtype=E8M0),
            "wo_b": empty(self.hidden, self.groups * self.o_rank, dtype=E4M3),
            "wo_b_scale": empty(blocks(self.hidden), blocks(self.groups * self.o_rank), dtype=E8M0),
            "act_quant_a": "fp8",
        }
        yield Call(part="attention linears", operator=attention.grouped_output_proj, arguments=output, times=layers)

    def attention_calls(self, ratio: int, context: int) -> Iterator[Call]:
        """The layers of one ratio: compressor, indexer, core attention."""
        times = self.layers_of[ratio]
        entries = context // ratio if ratio else 0
        if ratio:
            yield self.compress_call(ratio, self.head_dim, times)
        if ratio == 4:
            yield self.compress_call(ratio, self.index_dim, times)
            entries = min(self.index_topk, entries)
            yield from self.indexer_calls(context // ratio, times)
        core: dict[str, Any] = {
            "q": empty(1, self.heads, self.head_dim),
            "kv_cache": pool(self.window, 584),
            "indices": empty(1, self.window, dtype=torch.int32),
            "softmax_scale": self.head_dim**-0.5,
            "sink": empty(self.heads, dtype=FP32),
        }
        if ratio:
            core["extra_kv_cache"] = pool(entries, 584)
            core["extra_indices"] = empty(1, entries, dtype=torch.int32)
        yield Call(part="core attention", operator=attention.sparse_attn, arguments=core, times=times)

    def compress_call(self, ratio: int, dim: int, times: int) -> Call:
        """One compressor; ratio 4 has overlapping windows."""
        overlap = ratio == 4
        wide = dim * (2 if overlap else 1)
        weight = empty(wide, self.hidden)
        table = empty(2, self.rope_dim // 2, dtype=FP32)
        arguments = {
            "x": empty(1, self.hidden),
            "wkv": weight,
            "wgate": weight,
            "norm_weight": empty(dim, dtype=FP32),
            "cos_table": table,
            "sin_table": table,
            "state_cache": empty(1, 2 * ratio, 2 * wide, dtype=FP32),
            "state_block_table": empty(1, 1, dtype=torch.int32),
            **ragged(),
            "ratio": ratio,
            "ape": empty(ratio, wide, dtype=FP32),
            "overlap": overlap,
        }
        return Call(part="small linears", operator=attention.kv_compress, arguments=arguments, times=times)

    def indexer_calls(self, entries: int, times: int) -> Iterator[Call]:
        """fp4 queries against fp4 keys, the projection of queries in fp8, that of head weights in bfloat16."""
        queries = linear(self.index_heads * self.index_dim, self.q_rank, fp8=True)
        weights = linear(self.index_heads, self.hidden, out_dtype="float32")
        scores = {
            "q": empty(1, self.index_heads, self.index_dim // 2, dtype=UINT8),
            "q_scale": empty(1, self.index_heads, self.index_dim // 32, dtype=E8M0),
            "weights": empty(1, self.index_heads, dtype=FP32),
            "k_cache": pool(entries, 68),
            "block_table": empty(1, blocks(entries, BLOCK), dtype=torch.int32),
            **ragged(),
            "ratio": 4,
            "max_entries": entries,
        }
        yield Call(part="attention linears", operator=quant.quant_linear, arguments=queries, times=times)
        yield Call(part="small linears", operator=quant.quant_linear, arguments=weights, times=times)
        yield Call(part="indexer scores", operator=attention.indexer_score, arguments=scores, times=times)

    def expert_calls(self) -> Iterator[Call]:
        """The gate, fp4 routed experts, an fp8 shared expert."""
        layers = len(self.ratios)
        gate = linear(self.experts, self.hidden, out_dtype="float32")
        yield Call(part="small linears", operator=quant.quant_linear, arguments=gate, times=layers)
        yield from routed_calls(self, layers, packed=True)


@dataclass(frozen=True, kw_only=True)
class V32(Model):
    """DeepSeek-V3.2: latent attention restricted to the indexer's selection, in every layer."""

    layers: int = 61
    dense_layers: int = 3
    dense_inter: int = 18432
    latent: int = 512
    rope_dim: int = 64
    nope_dim: int = 128
    value_dim: int = 128

    def entry_bytes(self) -> tuple[int, int]:
        """The 656-byte latent and the 132-byte fp8 key."""
        return 656, 132

    def cache_bytes_per_token(self) -> float:
        """Every layer keeps a latent and a key of every token."""
        return float(self.layers * sum(self.entry_bytes()))

    def fixed_bytes(self) -> int:
        """Nothing."""
        return 0

    def calls(self, context: int) -> Iterator[Call]:
        """Every layer, then the head."""
        per_head = self.nope_dim + self.rope_dim
        shapes = (
            (self.q_rank, self.hidden),
            (self.heads * per_head, self.q_rank),
            (self.latent + self.rope_dim, self.hidden),
            # The up-projections of keys and values, absorbed into the queries and the output.
            (self.heads * (self.nope_dim + self.value_dim), self.latent),
            (self.hidden, self.heads * self.value_dim),
            (self.index_heads * self.index_dim, self.q_rank),
            (self.index_dim, self.hidden),
        )
        for rows, columns in shapes:
            part = linear(rows, columns, fp8=True)
            yield Call(part="attention linears", operator=quant.quant_linear, arguments=part, times=self.layers)
        yield from self.attention_calls(context)
        sparse_layers = self.layers - self.dense_layers
        gate = linear(self.experts, self.hidden, out_dtype="float32")
        yield Call(part="small linears", operator=quant.quant_linear, arguments=gate, times=sparse_layers)
        yield from routed_calls(self, sparse_layers, packed=False)
        for rows, columns in ((2 * self.dense_inter, self.hidden), (self.hidden, self.dense_inter)):
            part = linear(rows, columns, fp8=True)
            yield Call(part="dense MLP", operator=quant.quant_linear, arguments=part, times=self.dense_layers)
        yield Call(part="lm head", operator=quant.quant_linear, arguments=linear(self.vocab, self.hidden), times=1)

    def attention_calls(self, context: int) -> Iterator[Call]:
        """The indexer over every token, then the absorbed core over the selected ones."""
        weights = linear(self.index_heads, self.hidden, out_dtype="float32")
        scores = {
            "q": empty(1, self.index_heads, self.index_dim, dtype=E4M3),
            "q_scale": empty(1, self.index_heads, dtype=FP32),
            "weights": empty(1, self.index_heads, dtype=FP32),
            "k_cache": pool(context, 132),
            "block_table": empty(1, blocks(context, BLOCK), dtype=torch.int32),
            **ragged(),
            "ratio": 1,
            "max_entries": context,
        }
        selected = min(self.index_topk, context)
        core = {
            "q": empty(1, self.heads, self.latent + self.rope_dim),
            "kv_cache": pool(selected, 656),
            "indices": empty(1, selected, dtype=torch.int32),
            "softmax_scale": (self.nope_dim + self.rope_dim) ** -0.5,
            "value_dim": self.latent,
        }
        yield Call(part="small linears", operator=quant.quant_linear, arguments=weights, times=self.layers)
        yield Call(part="indexer scores", operator=attention.indexer_score, arguments=scores, times=self.layers)
        yield Call(part="core attention", operator=attention.sparse_attn, arguments=core, times=self.layers)


def routed_calls(model: Model, layers: int, packed: bool) -> Iterator[Call]:
    """The routed experts of a token, and the shared one."""
    k, inter, hidden = model.experts_per_token, model.inter, model.hidden
    for rows, columns in ((2 * inter, hidden), (hidden, inter)):
        kind = (
            {
                "weight": empty(k, rows, columns // 2, dtype=UINT8),
                "weight_scale": empty(k, rows, columns // 32, dtype=E8M0),
            }
            if packed
            else {
                "weight": empty(k, rows, columns, dtype=E4M3),
                "weight_scale": empty(k, blocks(rows), blocks(columns), dtype=FP32),
            }
        )
        routed = {
            "x": empty(k, columns, dtype=E4M3),
            "x_scale": empty(k, blocks(columns), dtype=FP32),
            "expert_counts": empty(k, dtype=torch.int32),
            **kind,
        }
        yield Call(part="routed experts", operator=moe.grouped_gemm, arguments=routed, times=layers)
        shared = linear(rows, columns, fp8=True)
        yield Call(part="shared expert", operator=quant.quant_linear, arguments=shared, times=layers)


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def blocks(size: int, block: int = 128) -> int:
    """Blocks that cover `size`."""
    return -(-size // block)


def pool(entries: int, entry: int) -> Tensor:
    """A byte pool of so many entries."""
    return empty(blocks(entries, BLOCK), BLOCK, entry, dtype=UINT8)


def ragged() -> dict[str, Tensor]:
    """A batch of one sequence."""
    return {"cu_seqlens": empty(2, dtype=torch.int32), "start_pos": empty(1, dtype=torch.int32)}


def linear(rows: int, columns: int, fp8: bool = False, out_dtype: str = "bfloat16") -> dict[str, Any]:  # Any: arguments
    """The arguments of `quant_linear` for one token."""
    x = empty(1, columns)
    if not fp8:
        return {"x": x, "weight": empty(rows, columns), "out_dtype": out_dtype}
    scale = empty(blocks(rows), blocks(columns), dtype=E8M0)
    return {"x": x, "weight": empty(rows, columns, dtype=E4M3), "weight_scale": scale, "out_dtype": out_dtype}


MODELS = {
    model.name: model
    for model in (
        V4(
            name="v4-flash",
            title="V4-Flash",
            hidden=4096,
            heads=64,
            q_rank=1024,
            groups=8,
            ratios=(0, 0, 4, *(128, 4) * 20),
            index_topk=512,
            experts=256,
            experts_per_token=6,
            inter=2048,
        ),
        V4(
            name="v4-pro",
            title="V4-Pro",
            hidden=7168,
            heads=128,
            q_rank=1536,
            groups=16,
            ratios=(128, 128, 4, *(128, 4) * 29),
            index_topk=1024,
            experts=384,
            experts_per_token=6,
            inter=3072,
        ),
        V32(
            name="v3.2",
            title="V3.2",
            hidden=7168,
            heads=128,
            q_rank=1536,
            index_topk=2048,
            experts=256,
            experts_per_token=8,
            inter=2048,
        ),
    )
}
