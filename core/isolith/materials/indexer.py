"""Calls of the lightning indexer for samples: ragged batches, every quantised form, and what must be refused."""

from collections.abc import Iterator
from typing import Any

import torch

from isolith.materials.batches import pool_of_items
from isolith.materials.byte_pools import byte_pool
from isolith.sample import ErrorSample, Make


def batch_of_scores(
    make: Make, tokens: list[int], start: list[int], ratio: int, heads: int, dim: int, block_size: int
) -> dict[str, Any]:  # Any: arguments
    """Arguments for a ragged batch of which nothing but visible entries may be read: the others are NaN."""
    ends = [(first + count) // ratio for first, count in zip(start, tokens, strict=True)]
    k_cache, block_table = pool_of_items(make, [range(end) for end in ends], block_size, dim)
    cu_seqlens, start_pos = make.batch(tokens, start)
    return {
        "q": make.normal(sum(tokens), heads, dim),
        "weights": make.normal(sum(tokens), heads),  # half of them negative
        "k_cache": k_cache,
        "block_table": block_table,
        "cu_seqlens": cu_seqlens,
        "start_pos": start_pos,
        "ratio": ratio,
        "max_entries": max(ends, default=0),
        "softmax_scale": (dim * heads) ** -0.5,
    }


def quantised_kinds(make: Make, call: dict[str, Any], block_size: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The call with q and keys in every quantised form, scales spread over 2^-6..2^6."""
    tokens, heads, dim = call["q"].shape
    blocks = int(call["k_cache"].shape[0])
    bytes_132, bytes_68 = (byte_pool(make, entry, blocks, block_size, spread=6) for entry in (132, 68))
    exponents = make.integers(-6, 7, tokens, heads, dim // 32, dtype=torch.float32)
    codes = make.normal(tokens, heads, dim, dtype=torch.float8_e4m3fn)
    packed = make.integers(0, 256, tokens, heads, dim // 2, dtype=torch.uint8)
    e8m0 = exponents.exp2().to(torch.float8_e8m0fnu)
    scale = make.uniform(tokens, heads, low=0.5, high=2.0, dtype=torch.float32)
    yield "float_q_132", call | {"k_cache": bytes_132}
    yield "e4m3_132", call | {"q": codes, "q_scale": scale, "k_cache": bytes_132}
    yield "e4m3_e8m0_scale", call | {"q": codes, "q_scale": e8m0[..., 0].contiguous()}
    yield "e2m1_68", call | {"q": packed, "q_scale": e8m0, "k_cache": bytes_68}
    yield "e2m1_float_scale", call | {"q": packed, "q_scale": exponents.exp2(), "k_cache": bytes_68}


def errors_of_indexer(make: Make, operator: str, call: dict[str, Any]) -> Iterator[ErrorSample]:  # Any: arguments
    """Illegal calls of the indexer's scores, and of the composite."""
    table, bytes_68 = call["block_table"], make.zeros(4, 4, 68, dtype=torch.uint8)
    packed = {"q": make.integers(0, 256, 3, 2, 64, dtype=torch.uint8), "k_cache": bytes_68}
    one_scale = make.full(1.0, 3, 2, dtype=torch.float32)
    illegal: dict[str, tuple[dict[str, Any], str]] = {
        "ratio_0": ({"ratio": 0}, "ratio must be at least 1; got 0."),
        "out_dtype": ({"out_dtype": "int8"}, "out_dtype must be bfloat16, float16, float32 or float64; got 'int8'."),
        "few_entries": ({"max_entries": 1}, "max_entries must be at least the 2 entries that a token sees; got 1."),
        "negative_entries": ({"max_entries": -1}, "max_entries must not be negative; got -1."),
        "head_dim": ({"q": make.normal(3, 2, 64)}, "head_dim is 64 in q but 128 in k_cache."),
        "float_with_scale": ({"q_scale": one_scale}, "q_scale of a float32 q must be None; got (3, 2)."),
        "packed_without_scale": (packed, "q_scale of a uint8 q must be (3, 2, 4); got None."),
        "scale_per_head": (packed | {"q_scale": one_scale}, "q_scale of a uint8 q must be (3, 2, 4); got (3, 2)."),
        "packed_width": (
            {"q": packed["q"][..., :8], "k_cache": make.normal(4, 4, 16)},
            "head_dim of a packed q must be a multiple of 32; got 16.",
        ),
        "not_for_keys": (
            {"k_cache": make.zeros(4, 4, 584, dtype=torch.uint8)},
            "a uint8 k_cache must have entries of 132 or 68 bytes; got 584.",
        ),
        "heads": ({"weights": make.normal(3, 3)}, "heads is 2 in q but 3 in weights."),
        "block": ({"block_table": table + 9}, f"block_table must be below blocks = 3; got {int(table.max()) + 9}."),
        "start_pos": ({"start_pos": call["start_pos"] - 7}, "start_pos must not be negative; got -4."),
        "cu_seqlens": ({"cu_seqlens": call["cu_seqlens"] + 1}, "cu_seqlens must start at 0; got 1."),
        "no_such_format": (
            {"k_cache": make.zeros(4, 4, 128, dtype=torch.uint8)},
            "a uint8 k_cache has entries of 584, 656, 132 or 68 bytes; got 128.",
        ),
        "integer_weights": (
            {"weights": call["weights"].int()},
            "weights must be bfloat16, float16, float32 or float64; got int32.",
        ),
    }
    for name, (change, says) in illegal.items():
        yield ErrorSample(name, says=f"{operator}: {says}", **call | change)
