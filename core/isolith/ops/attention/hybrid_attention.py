"""Attention of a decoder layer over a sliding window and the compressed entries of each token's sequence.

    near[t] = window_indices(p[t], window);   far[t] = topk_indices[t], or compress_indices(p[t], ratio, all)
    out, lse = sparse_attn(q, window_cache, near, compressed_cache, far, sink), one softmax over both

p[t] is the position of token t in its sequence. ratio 0 is SWA: the window alone. A ratio without topk_indices is HCA:
every entry that the token sees, the first C(p) = floor((p+1) / ratio). With them it is CSA: the entries listed, in any
order, -1 anywhere, at most topk_length[t] columns; a listed entry from C(p) on is not seen. A token in the window and
in a compressed entry counts in both. Block tables give each sequence its positions (window) and entries (compressed).

Nothing is written: the tokens and entries of this call are in the caches before it. The window cache holds positions
max(0, start_pos - window + 1) to the end of the call, which in a ring takes window + tokens - 1 rows. Positions and
entries without a block are left out. A token that sees nothing gets out 0 and lse +inf; lse leaves the sink out. Rows
that no token sees may hold anything, NaN too.

Source: DeepSeek-V4 inference/model.py, Attention (between cache write and inverse rotation); arXiv:2606.19348, section
2.3; vllm-ascend npu_sparse_attn_sharedkv (the same, fused).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from isolith.dtypes import FLOAT, INT32, INTEGER, PACKED, WIDE, widen
from isolith.errors import ArgumentError
from isolith.materials.batches import pool_of_items
from isolith.materials.byte_pools import byte_pool
from isolith.materials.relations_attention import relations_of_layers
from isolith.numerics.pages import check_block_table, check_cache, check_held, entry_dim, slots_of_items
from isolith.numerics.ragged import check_cu_seqlens, check_start_pos, items_of_spans, positions_of_tokens
from isolith.operator import Cost, Operator
from isolith.ops.attention.compress_indices import compress_indices
from isolith.ops.attention.sparse_attn import online, rounded_halves, sparse_attn
from isolith.ops.attention.window_indices import window_indices
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(
    q: Tensor,
    window_cache: Tensor,
    window_block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    window: int,
    softmax_scale: float,
    sink: Tensor | None = None,
    ratio: int = 0,
    compressed_cache: Tensor | None = None,
    compressed_block_table: Tensor | None = None,
    topk_indices: Tensor | None = None,
    topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    near, far = lists(q, cu_seqlens, start_pos, window, ratio, compressed_cache, compressed_block_table, topk_indices)
    return sparse_attn(
        *(q, window_cache, near, softmax_scale, sink, None, window_block_table, cu_seqlens),
        *(compressed_cache, far, topk_length, compressed_block_table),
    )


def lists(
    q: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    window: int,
    ratio: int,
    compressed_cache: Tensor | None,
    compressed_block_table: Tensor | None,
    topk_indices: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The positions and the entries that each token sees."""
    _, position = positions_of_tokens(cu_seqlens, start_pos, q.shape[0])
    near = window_indices(position, window)
    if compressed_cache is None or compressed_block_table is None:
        return near, None
    if topk_indices is None:
        return near, compress_indices(position, ratio, compressed_block_table.shape[1] * compressed_cache.shape[1])
    visible = topk_indices < (position[:, None] + 1) // ratio
    return near, torch.where(visible, topk_indices, -1)


def streamed(
    q: Tensor,
    window_cache: Tensor,
    window_block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    window: int,
    softmax_scale: float,
    sink: Tensor | None = None,
    ratio: int = 0,
    compressed_cache: Tensor | None = None,
    compressed_block_table: Tensor | None = None,
    topk_indices: Tensor | None = None,
    topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """sparse_attn with a running maximum over blocks of entries."""
    near, far = lists(q, cu_seqlens, start_pos, window, ratio, compressed_cache, compressed_block_table, topk_indices)
    return online(
        *(q, window_cache, near, softmax_scale, sink, None, window_block_table, cu_seqlens),
        *(compressed_cache, far, topk_length, compressed_block_table),
    )


def rounded_weights(
    q: Tensor,
    window_cache: Tensor,
    window_block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    window: int,
    softmax_scale: float,
    sink: Tensor | None = None,
    ratio: int = 0,
    compressed_cache: Tensor | None = None,
    compressed_block_table: Tensor | None = None,
    topk_indices: Tensor | None = None,
    topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """sparse_attn in two halves, with weights in q's dtype."""
    near, far = lists(q, cu_seqlens, start_pos, window, ratio, compressed_cache, compressed_block_table, topk_indices)
    return rounded_halves(
        *(q, window_cache, near, softmax_scale, sink, None, window_block_table, cu_seqlens),
        *(compressed_cache, far, topk_length, compressed_block_table),
    )


def fake(q: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[0], q.shape[1], dtype=widen(q.dtype))


def check(
    q: Tensor,
    window_cache: Tensor,
    window: int,
    ratio: int,
    compressed_cache: Tensor | None,
    compressed_block_table: Tensor | None,
    topk_indices: Tensor | None,
    topk_length: Tensor | None,
    **_: object,
) -> None:
    if window < 1:
        raise ArgumentError(f"hybrid_attention: window must be at least 1; got {window}.")
    if ratio < 0:
        raise ArgumentError(f"hybrid_attention: ratio must not be negative; got {ratio}.")
    compressed = {"compressed_cache": compressed_cache, "compressed_block_table": compressed_block_table}
    for name, given in compressed.items():
        if ratio > 0 and given is None:
            raise ArgumentError(f"hybrid_attention: ratio = {ratio} needs {name}; got None.")
    selection = {"topk_indices": topk_indices, "topk_length": topk_length}
    for name, given in {**compressed, **selection}.items():
        if ratio == 0 and given is not None:
            raise ArgumentError(f"hybrid_attention: {name} needs a ratio of at least 1; got 0.")
    if topk_length is not None and topk_indices is None:
        raise ArgumentError("hybrid_attention: topk_length needs topk_indices; got None.")
    for name, cache in (("window_cache", window_cache), ("compressed_cache", compressed_cache)):
        if cache is not None:
            check_cache("hybrid_attention", name, cache)
            if entry_dim(cache) != q.shape[2]:
                raise ArgumentError(
                    f"hybrid_attention: {name} must have entries of head_dim = {q.shape[2]}; got {entry_dim(cache)}."
                )


def check_values(
    q: Tensor,
    window_cache: Tensor,
    window_block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    window: int,
    ratio: int,
    compressed_cache: Tensor | None,
    compressed_block_table: Tensor | None,
    topk_indices: Tensor | None,
    **_: object,
) -> None:
    check_cu_seqlens("hybrid_attention", cu_seqlens, q.shape[0])
    check_start_pos("hybrid_attention", start_pos)
    check_block_table("hybrid_attention", "window_block_table", window_block_table, window_cache)
    # A sequence without tokens in this call looks at nothing: its rows and entries may be gone.
    end = torch.where(cu_seqlens.diff() > 0, start_pos + cu_seqlens.diff(), 0)
    sequence, position = items_of_spans((start_pos - window + 1).clamp(min=0), end)
    check_held("hybrid_attention", "window_cache", window_cache, window_block_table, sequence, position)
    if compressed_cache is None or compressed_block_table is None:
        return
    check_block_table("hybrid_attention", "compressed_block_table", compressed_block_table, compressed_cache)
    room = compressed_block_table.shape[1] * compressed_cache.shape[1]
    most = max((end // ratio).tolist(), default=0)
    if topk_indices is None and most > room:
        raise ArgumentError(
            f"hybrid_attention: compressed_block_table must have room for all {most} entries seen; got {room}."
        )


def cost(
    q: Tensor,
    window_cache: Tensor,
    window: int,
    sink: Tensor | None,
    compressed_cache: Tensor | None,
    compressed_block_table: Tensor | None,
    topk_indices: Tensor | None,
    **_: object,
) -> Cost:
    tokens, heads, head_dim = q.shape
    columns, read = window, 0
    if compressed_cache is not None and compressed_block_table is not None:
        room = compressed_block_table.shape[1] * compressed_cache.shape[1]
        far = room if topk_indices is None else topk_indices.shape[1]
        columns += far
        entries = min(tokens * far, compressed_cache.shape[0] * compressed_cache.shape[1])
        read += entries * compressed_cache.shape[2] * compressed_cache.itemsize
        read += 0 if topk_indices is None else topk_indices.nbytes
    entries = min(tokens * window, window_cache.shape[0] * window_cache.shape[1])
    read += entries * window_cache.shape[2] * window_cache.itemsize
    return Cost(
        flops=4 * tokens * heads * columns * head_dim,
        bytes_read=q.nbytes + read + (0 if sink is None else sink.nbytes),
        bytes_written=q.nbytes + tokens * heads * widen(q.dtype).itemsize,
        math="bfloat16" if q.itemsize == 2 else "float32",
    )


def arguments(
    make: Make,
    tokens: Sequence[int],
    start: Sequence[int] = (),
    ratio: int = 0,
    *,
    k: int = 0,
    window: int = 5,
    heads: int = 4,
    dim: int = 16,
    ring: int = 0,
    block_sizes: tuple[int, int] = (4, 3),
) -> dict[str, Any]:  # Any: an operator's arguments
    """A call whose pools hold values in the rows that a token may see and NaN elsewhere; k > 0 lists entries (CSA)."""
    cu_seqlens, start_pos = make.batch(tokens, start)
    starts = start or [0] * len(tokens)
    seen = [range(max(0, s - window + 1), s + t) for s, t in zip(starts, tokens, strict=True)]
    window_cache, window_block_table = pool_of_items(make, seen, block_sizes[0], dim, ring)
    call: dict[str, Any] = {
        "q": make.normal(sum(tokens), heads, dim),
        "window_cache": window_cache,
        "window_block_table": window_block_table,
        "cu_seqlens": cu_seqlens,
        "start_pos": start_pos,
        "window": window,
        "softmax_scale": dim**-0.5,
        "sink": make.normal(heads, dtype=torch.float32),
        "ratio": ratio,
    }
    if ratio:
        entries = [range(positions.stop // ratio) for positions in seen]
        call["compressed_cache"], call["compressed_block_table"] = pool_of_items(make, entries, block_sizes[1], dim)
    if k:
        # -1, what is not yet visible, and what lies behind the table, among the visible entries in any order.
        most = max(k, max(positions.stop for positions in seen) // ratio + 3)
        ranks = torch.stack([make.permutation(most)[:k] - 1 for _ in range(sum(tokens))])
        call["topk_indices"] = make.place(ranks, torch.int32)
    return call


CALLS: dict[str, dict[str, Any]] = {  # Any: options of `arguments`
    "swa_prefill": {"tokens": [9, 1, 4, 5, 6]},
    "swa_decode": {"tokens": [1] * 5, "start": [0, 3, 4, 5, 20]},
    "swa_ring": {"tokens": [3, 1], "start": [9, 20], "ring": 7},
    "window_of_one": {"tokens": [3], "window": 1},
    "hca_prefill": {"tokens": [9, 3, 4], "ratio": 4},
    "hca_decode": {"tokens": [1] * 5, "start": [0, 2, 3, 6, 7], "ratio": 4},
    "hca_ratio_128": {"tokens": [1, 3, 2], "start": [126, 126, 300], "ratio": 128},
    "csa_prefill": {"tokens": [21, 3], "ratio": 4, "k": 3},
    "csa_chunks": {"tokens": [5, 0, 1, 8], "start": [7, 9, 14, 0], "ratio": 4, "k": 3},
    "ratio_1": {"tokens": [4, 1], "start": [0, 7], "ratio": 1, "k": 4},
    "ratio_2": {"tokens": [5, 1], "start": [0, 8], "ratio": 2},
    "no_tokens": {"tokens": [0, 0], "start": [0, 9], "ratio": 4},
    "no_sequences": {"tokens": []},
}


def samples(make: Make) -> Iterator[Sample]:
    for name, options in CALLS.items():
        yield Sample(name, **arguments(make, **options))
    call = arguments(make, [9, 2], [0, 11], 4, k=3)
    yield Sample("csa_lengths", **call | {"topk_length": make.integers(0, 4, 11)})
    yield Sample("no_sink", **call | {"sink": None})
    sink = make.tensor([6.0, -torch.inf, torch.inf, 0.0], torch.float32)
    yield Sample("extreme_sinks", **call | {"sink": sink})
    yield Sample("nothing_selected", **call | {"topk_indices": torch.full_like(call["topk_indices"], -1)})
    # The keys at p-window and p-window+1 outweigh all others, so that a window one off is far off.
    call = arguments(make, [1], [12])
    slots = slots_of_items(call["window_block_table"], call["start_pos"] * 0, make.tensor([7, 8], torch.int64), 4)
    call["window_cache"][slots // 4, slots % 4] = 4 * call["q"][0, :2]
    yield Sample("dominant_keys_at_the_edge", **call)
    call = arguments(make, [4], [9], 4)
    call["window_block_table"][0, 2] = -1
    lost = {"compressed_block_table": call["compressed_block_table"].clamp(max=-1)}
    yield Sample("lost_blocks", **call | lost)
    # The first sequence has no token in this call, and nothing that it was looking at is left.
    call = arguments(make, [0, 2], [90, 9], 4)
    call["window_block_table"][0] = call["window_block_table"][0, 0]
    yield Sample("idle_sequence", **call | {"compressed_block_table": call["compressed_block_table"][:, :1]})
    # Heads and pages of the sizes that libraries ask for.
    wide: dict[str, Any] = {"window": 20, "dim": 512, "block_sizes": (16, 32)}
    yield Sample("head_dim_512_swa", **arguments(make, [9, 0, 1, 2], [0, 7, 40, 19], **wide))
    yield Sample("head_dim_512_hca", **arguments(make, [5, 1, 3], [0, 300, 126], 128, **wide) | {"sink": None})
    call = arguments(make, [9, 1, 0, 2], [0, 190, 5, 61], 4, k=37, **wide)
    yield Sample("head_dim_512_csa", **call | {"topk_length": make.integers(20, 40, 12)})
    flash: dict[str, Any] = {"window": 128, "heads": 64, "dim": 512}
    yield Sample("flash_swa", "model", **arguments(make, [1, 2], [300, 5], **flash, ring=129))
    yield Sample("flash_csa", "model", **arguments(make, [1, 1], [2303, 90], 4, k=512, **flash))
    yield Sample("flash_hca", "model", **(call := arguments(make, [2], [1022], 128, **flash)))
    pools = {name: byte_pool(make, 584, *call[name].shape[:2]) for name in ("window_cache", "compressed_cache")}
    yield Sample("flash_hca_584_bytes", "model", **call | pools)


def errors(make: Make) -> Iterator[ErrorSample]:
    call = arguments(make, [3, 1], [5, 7], 4, k=2)
    plain = arguments(make, [3, 1], [5, 7])

    def wrong(name: str, call: dict[str, Any], says: str) -> ErrorSample:  # Any: an operator's arguments
        return ErrorSample(name, says=f"hybrid_attention: {says}", **call)

    yield wrong("zero_window", plain | {"window": 0}, "window must be at least 1; got 0.")
    yield wrong("negative_ratio", plain | {"ratio": -1}, "ratio must not be negative; got -1.")
    yield wrong("no_pool", call | {"compressed_cache": None}, "ratio = 4 needs compressed_cache; got None.")
    yield wrong(
        "no_table", call | {"compressed_block_table": None}, "ratio = 4 needs compressed_block_table; got None."
    )
    yield wrong("ratio_0", call | {"ratio": 0}, "compressed_cache needs a ratio of at least 1; got 0.")
    lists = {"topk_indices": call["topk_indices"]}
    yield wrong("list_without_ratio", plain | lists, "topk_indices needs a ratio of at least 1; got 0.")
    lengths = {"topk_length": make.integers(0, 3, 4)}
    yield wrong("length_alone", call | lengths | {"topk_indices": None}, "topk_length needs topk_indices; got None.")
    says = "compressed_cache must have entries of head_dim = 16; got 15."
    yield wrong("entry_width", call | {"compressed_cache": call["compressed_cache"][..., :15]}, says)
    says = "a uint8 window_cache has entries of 584, 656, 132 or 68 bytes; got 16."
    yield wrong("no_such_format", call | {"window_cache": make.zeros(5, 4, 16, dtype=torch.uint8)}, says)
    says = "window_block_table must be below blocks = 5; got 5."
    yield wrong("window_block", call | {"window_block_table": call["window_block_table"].clamp(min=5)}, says)
    says = "compressed_block_table must be below blocks = 3; got 3."
    yield wrong("entry_block", call | {"compressed_block_table": call["compressed_block_table"].clamp(min=3)}, says)
    says = "cu_seqlens must end at the number of tokens, 4; got 3."
    yield wrong("cu_seqlens", plain | {"cu_seqlens": make.batch([2, 1])[0]}, says)
    yield wrong("start_pos", plain | {"start_pos": plain["start_pos"] - 6}, "start_pos must not be negative; got -1.")
    says = "tokens is 4 in q but 3 in topk_indices."
    yield wrong("tokens", call | {"topk_indices": call["topk_indices"][:3]}, says)
    says = "window_cache must hold positions 1..7 of sequence 0 at once; got 4 rows."
    yield wrong("short_ring", arguments(make, [3, 1], [5, 7], ring=4), says)
    says = "compressed_block_table must have room for all 4 entries seen; got 3."
    yield wrong("short_table", call | {"topk_indices": None, "start_pos": call["start_pos"] + 8}, says)


def relations(make: Make) -> Iterator[Relation]:
    yield from relations_of_layers(make, arguments)


hybrid_attention = Operator(
    name="hybrid_attention",
    shapes="q[tokens heads head_dim] window_cache[window_blocks window_block_size _]"
    " window_block_table[sequences max_window_blocks] cu_seqlens[sequences+1] start_pos[sequences] sink?[heads]"
    " compressed_cache?[blocks block_size _] compressed_block_table?[sequences max_blocks] topk_indices?[tokens k]"
    " topk_length?[tokens] -> out[tokens heads head_dim] lse[tokens heads]",
    dtypes={
        "q": FLOAT,
        **dict.fromkeys(("window_cache", "compressed_cache"), FLOAT + PACKED),
        **dict.fromkeys(("window_block_table", "compressed_block_table", "cu_seqlens", "start_pos"), INT32),
        **dict.fromkeys(("topk_indices", "topk_length"), INTEGER),
        "sink": WIDE,
    },
    reference=reference,
    variants=(streamed, rounded_weights),
    fake=fake,
    check=check,
    check_values=check_values,
    cost=cost,
    samples=samples,
    errors=errors,
    composed_of=("window_indices", "compress_indices", "sparse_attn"),
    relations=relations,
)
