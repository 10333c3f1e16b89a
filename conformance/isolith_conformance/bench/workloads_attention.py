"""What is timed of attention: compression, indexing, the cores, projection of the output, caches."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from isolith.models import V4, V32, Model, blocks
from isolith.ops import attention
from isolith_conformance.bench.fill import BLOCK, FP32, Fill, ring_blocks
from isolith_conformance.bench.workloads import Arguments, Parts, Setting, Workload, queries, weight_of


def attention_parts(at: Setting) -> Parts:
    """Everything between the projections of a layer, and the caches."""
    model = at.model
    yield from indexer_parts(at)
    if isinstance(model, V4):
        yield from compress_parts(at, model)
        yield from core_parts(at, model)
        yield from projection_parts(at, model)
    elif isinstance(model, V32):
        yield from latent_parts(at, model)
    yield from cache_parts(at)


def ratio_of(model: Model) -> int:
    """Tokens an indexed entry stands for."""
    return 4 if isinstance(model, V4) else 1


def visible(at: Setting, ratio: int) -> Tensor:
    """Entries that each token sees, on the host."""
    return (at.positions + 1) // ratio


def indexer_parts(at: Setting) -> Parts:
    """Scores, the choice by itself, and both."""
    model, ratio = at.model, ratio_of(at.model)
    entries, k = max(at.context // ratio, 1), model.index_topk
    heads, dim = model.index_heads, model.index_dim

    def score(fill: Fill) -> Arguments:
        if isinstance(model, V4):
            q, scale = fill.bytes(at.tokens, heads, dim // 2), fill.scales(at.tokens, heads, dim // 32, exponent=0)
        else:
            q, scale = fill.codes(at.tokens, heads, dim), fill.uniform(at.tokens, heads, low=0.5, high=1.5)
        return {
            "q": q,
            "q_scale": scale,
            "weights": fill.normal(at.tokens, heads, dtype=FP32),
            "k_cache": fill.pool(at.sequences * blocks(entries, BLOCK) * BLOCK, model.entry_bytes()[1]),
            "block_table": fill.table(at.sequences, entries),
            **at.batch(fill),
            "ratio": ratio,
            "max_entries": entries,
            "softmax_scale": (dim * heads) ** -0.5,
        }

    def topk(fill: Fill) -> Arguments:
        scores = fill.normal(at.tokens, entries, dtype=FP32)
        return {"scores": scores, "lengths": fill.given(visible(at, ratio)), "k": k}

    label = f"{'fp4' if ratio == 4 else 'fp8'}, ratio {ratio}"
    yield Workload(operator=attention.indexer_score, label=label, make=score)
    yield Workload(operator=attention.indexer_topk, label=f"{k} entries", make=topk)
    yield Workload(operator=attention.lightning_indexer, label=label, make=lambda fill: score(fill) | {"k": k})


def compress_parts(at: Setting, model: V4) -> Parts:
    """The compressors, and the lists of what a token sees."""
    shapes = (
        ("ratio 4", 4, model.head_dim),
        ("ratio 4 indexer", 4, model.index_dim),
        ("ratio 128", 128, model.head_dim),
    )
    for label, ratio, dim in shapes:

        def compress(fill: Fill, ratio: int = ratio, dim: int = dim) -> Arguments:
            overlap = ratio == 4
            rows, wide = ratio * (2 if overlap else 1), dim * (2 if overlap else 1)
            cos, sin = fill.angles(at.context, model.rope_dim // 2)
            held = torch.arange(at.sequences)[:, None].expand(-1, -(-at.context // rows))
            return {
                "x": fill.normal(at.tokens, model.hidden),
                "wkv": fill.normal(wide, model.hidden, std=model.hidden**-0.5),
                "wgate": fill.normal(wide, model.hidden, std=model.hidden**-0.5),
                "norm_weight": fill.normal(dim, std=0.1, mean=1.0, dtype=FP32),
                "cos_table": cos,
                "sin_table": sin,
                "state_cache": fill.normal(at.sequences, rows, 2 * wide, dtype=FP32),
                "state_block_table": fill.given(held.contiguous()),
                **at.batch(fill),
                "ratio": ratio,
                "ape": fill.normal(ratio, wide, dtype=FP32),
                "overlap": overlap,
                "rotate": dim == model.index_dim,
            }

        yield Workload(operator=attention.kv_compress, label=label, make=compress)

    def window(fill: Fill) -> Arguments:
        return {"positions": fill.given(at.positions, torch.int64), "window": model.window}

    def compressed(fill: Fill) -> Arguments:
        return {"positions": fill.given(at.positions, torch.int64), "ratio": 128, "max_entries": at.context // 128}

    yield Workload(operator=attention.window_indices, label=f"window {model.window}", make=window)
    yield Workload(operator=attention.compress_indices, label="ratio 128", make=compressed)


def core_parts(at: Setting, model: V4) -> Parts:
    """The cores of the three kinds of layers, on lists of slots and as a whole."""
    for ratio, name in ((0, "SWA"), (4, "CSA"), (128, "HCA")):
        if ratio <= at.context:
            yield Workload(operator=attention.sparse_attn, label=name, make=partial(listed, at, model, ratio))
            yield Workload(operator=attention.hybrid_attention, label=name, make=partial(hybrid, at, model, ratio))


def listed(at: Setting, model: V4, ratio: int, fill: Fill) -> Arguments:
    """sparse_attn on slots of the pools: the window's rows one after the other, entries wherever they lie."""
    rows = model.window + at.new - 1
    token = torch.arange(at.tokens)
    first = token if at.phase == "prefill" else token * rows
    near = first[:, None] + torch.arange(model.window)
    near = near.masked_fill(torch.arange(model.window) < model.window - 1 - at.positions[:, None], -1)
    given: Arguments = {
        "q": queries(at, fill),
        "kv_cache": fill.pool(at.sequences * rows, 584),
        "indices": fill.given(near),
        "softmax_scale": model.head_dim**-0.5,
        "sink": fill.normal(model.heads, dtype=FP32),
    }
    if not ratio:
        return given
    entries = at.context // ratio
    count = min(model.index_topk, entries) if ratio == 4 else entries
    base = (token if at.phase == "decode" else torch.zeros_like(token)) * entries
    given["extra_kv_cache"] = fill.pool(at.sequences * entries, 584)
    return given | {"extra_indices": fill.chosen(visible(at, ratio), count, base)}


def hybrid(at: Setting, model: V4, ratio: int, fill: Fill) -> Arguments:
    """hybrid_attention on block tables; of CSA with a selection."""
    held = model.window + at.new - 1
    given: Arguments = {
        "q": queries(at, fill),
        "window_cache": fill.pool(at.sequences * ring_blocks(at.context, held) * BLOCK, 584),
        "window_block_table": fill.ring(at.sequences, at.context, held),
        **at.batch(fill),
        "window": model.window,
        "softmax_scale": model.head_dim**-0.5,
        "sink": fill.normal(model.heads, dtype=FP32),
        "ratio": ratio,
    }
    if ratio:
        entries = at.context // ratio
        given["compressed_cache"] = fill.pool(at.sequences * blocks(entries, BLOCK) * BLOCK, 584)
        given["compressed_block_table"] = fill.table(at.sequences, entries)
    if ratio == 4:
        given["topk_indices"] = fill.chosen(visible(at, 4), model.index_topk)
    return given


def projection_parts(at: Setting, model: V4) -> Parts:
    """The output's two steps, in bfloat16 and in fp8."""
    wide, low = model.heads * model.head_dim // model.groups, model.groups * model.o_rank
    for kind in ("bf16", "fp8"):

        def project(fill: Fill, kind: str = kind) -> Arguments:
            return {
                "x": queries(at, fill),
                **weight_of(at, fill, kind, "wo_a", model.groups, model.o_rank, wide),
                **weight_of(at, fill, kind, "wo_b", model.hidden, low),
            }

        yield Workload(operator=attention.grouped_output_proj, label=kind, make=project)


def latent_parts(at: Setting, model: V32) -> Parts:
    """V3.2's core: absorbed over a selection, on slots, and dense for a prompt."""
    per_head, k = model.nope_dim + model.rope_dim, min(model.index_topk, at.context)

    def latent(fill: Fill, **more: Any) -> Arguments:  # Any: arguments
        std = model.latent**-0.5
        return {
            "q": queries(at, fill),
            "kv_cache": fill.pool(at.sequences * blocks(at.context, BLOCK) * BLOCK, 656),
            "w_uk": fill.normal(model.heads, model.nope_dim, model.latent, std=std),
            "w_uv": fill.normal(model.heads, model.value_dim, model.latent, std=std),
            "block_table": fill.table(at.sequences, at.context),
            **at.batch(fill),
            "softmax_scale": per_head**-0.5,
            **more,
        }

    def selected(fill: Fill) -> Arguments:
        return latent(fill, absorbed=True, topk_indices=fill.chosen(visible(at, 1), k))

    def core(fill: Fill) -> Arguments:
        token = torch.arange(at.tokens) if at.phase == "decode" else torch.zeros(at.tokens, dtype=torch.int64)
        return {
            "q": fill.normal(at.tokens, model.heads, model.latent + model.rope_dim),
            "kv_cache": fill.pool(at.sequences * at.context, 656),
            "indices": fill.chosen(visible(at, 1), k, token * at.context),
            "softmax_scale": per_head**-0.5,
            "value_dim": model.latent,
        }

    yield Workload(operator=attention.mla_attention, label=f"{k} selected, absorbed", make=selected)
    if at.phase == "prefill":
        yield Workload(operator=attention.mla_attention, label="dense", make=lambda fill: latent(fill, absorbed=False))
    yield Workload(operator=attention.sparse_attn, label=f"{k} latents", make=core)


def cache_parts(at: Setting) -> Parts:
    """Writing this step's rows, and reading a selection."""
    model, k = at.model, at.model.index_topk
    entry, key = model.entry_bytes()
    entries = max(at.context // ratio_of(model), 1)
    widths = {584: 512, 656: 576, 132: 128, 68: 128}
    for label, size in ((f"{entry} bytes", entry), (f"{key} bytes", key)):

        def write(fill: Fill, size: int = size) -> Arguments:
            rows = max(at.tokens, at.sequences * BLOCK)
            slots = fill.given(fill.permutation(rows)[: at.tokens], torch.int64)
            return {"cache": fill.pool(rows, size), "x": fill.normal(at.tokens, widths[size]), "slot_mapping": slots}

        yield Workload(operator=attention.kv_cache_write, label=label, make=write)

    def read(fill: Fill) -> Arguments:
        sequence = torch.arange(at.sequences)
        limits = torch.full((at.sequences,), entries)
        slots = fill.chosen(limits, min(k, entries), sequence * entries)
        return {"cache": fill.pool(at.sequences * entries, entry), "slot_mapping": slots}

    yield Workload(operator=attention.kv_cache_read, label=f"{entry} bytes, {min(k, entries)} entries", make=read)
