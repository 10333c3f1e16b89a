"""kv_compress against transformers' DeepSeek-V4 compressors, whole and in chunks through its cache.

In float32: transformers' bfloat16 path projects and multiplies in bfloat16, which the operator does not.
"""

from types import SimpleNamespace

import pytest
import torch

from isolith import Make
from isolith.ops.attention import kv_compress

pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
configuration = pytest.importorskip("transformers.models.deepseek_v4.configuration_deepseek_v4")

HIDDEN, HEAD_DIM, INDEX_DIM, ROPE = 48, 32, 16, 8
CHUNKS = [[300], [37, 64, 1, 157, 41], [1] * 9 + [130, 2, 1, 158], [3], [128], [129], [8, 0, 1]]
IDS = ["one call", "chunks", "decode and chunks", "no entry", "one window", "one token more", "short"]


@pytest.fixture(scope="module")
def config():
    return configuration.DeepseekV4Config(
        vocab_size=64, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, head_dim=HEAD_DIM,
        qk_rope_head_dim=ROPE, q_lora_rank=24, compress_ratios=[4, 128, 0], index_n_heads=4, index_head_dim=INDEX_DIM,
        index_topk=8, sliding_window=16, compress_rope_theta=160000.0, max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 256, "beta_fast": 32,
            "beta_slow": 1,
        },
    )  # fmt: skip


def filled(module, make):
    """The module with every parameter random, since transformers leaves some of them empty."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(make.normal(*parameter.shape, std=0.3, mean=float("norm" in name)))
    return module.eval()


def made(config, kind):
    """(the module of transformers to call, the compressor in it, the caches' layer, ratio, overlap)."""
    make = Make(seed=kind)
    if kind == "hca":
        module = filled(modeling.DeepseekV4HCACompressor(config), make)
        return module, module, modeling.DeepseekV4HCACache(config), 128, False
    module = filled(modeling.DeepseekV4CSACompressor(config), make)
    part = module.indexer if kind == "indexer" else module
    return module, part, modeling.DeepseekV4CSACache(config), 4, True


def theirs(module, layer, name, x, sizes):
    """The entries that transformers' cache holds after the chunks."""
    start, residual = 0, Make(seed=2).normal(1, len(x), 24)
    for part in x.split(sizes):
        if len(part):
            position = torch.arange(start, start + len(part))[None]
            span = slice(start, start + len(part))
            module(part[None], residual[:, span], position, SimpleNamespace(layers=[layer]), 0)
        start += len(part)
    return layer.compressed_kv[name][0]


def ours(part, ratio, overlap, x, sizes):
    """The entries of the operator, on a ring that holds no more than the contract asks for."""
    rows = ratio * (2 if overlap else 1)
    state = torch.full((1, rows, 2 * part.kv_proj.out_features), torch.nan)
    table = torch.zeros(1, len(x) // rows + 1, dtype=torch.int32)
    cos_table, sin_table = part.rotary_emb(x, torch.arange(len(x) + 1)[None], layer_type=part.rope_layer_type)
    entries, start = [], 0
    for chunk in x.split(sizes):
        cu_seqlens, start_pos = Make().batch([len(chunk)], [start])
        found, cu_entries = kv_compress(
            chunk, part.kv_proj.weight, part.gate_proj.weight, part.kv_norm.weight, cos_table[0], sin_table[0], state,
            table, cu_seqlens, start_pos, ratio, part.position_bias, overlap, False, part.kv_norm.variance_epsilon,
        )  # fmt: skip
        entries.append(found[: cu_entries[-1]])
        start += len(chunk)
    return torch.cat(entries)


@pytest.mark.parametrize("sizes", CHUNKS, ids=IDS)
@pytest.mark.parametrize("kind", ["hca", "csa", "indexer"])
def test_entries_equal_those_of_transformers(config, kind, sizes):
    module, part, layer, ratio, overlap = made(config, kind)
    x = Make(seed=1).normal(sum(sizes), HIDDEN)
    name = "indexer" if kind == "indexer" else "compressor"
    torch.testing.assert_close(
        ours(part, ratio, overlap, x, sizes), theirs(module, layer, name, x, sizes), rtol=1e-4, atol=1e-5
    )
