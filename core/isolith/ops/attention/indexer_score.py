"""Relevance of every visible entry to every token, by a few cheap heads (the lightning indexer's scores).

    scores[t, s] = softmax_scale * sum_i weights[t, i] * max(0, sum_c q[t, i, c] * k[s, c])   s < floor((p+1) / ratio)
    scores[t, s] = -inf                                                                      else

p is the position of token t in its sequence, k[s] entry s of that sequence; a weight may be negative. Keys are read
where the block table says and only as far as they are visible: what lies in other entries, NaN too, does not matter. A
visible entry without a block is a key of zeros.
q is float; or e4m3 with one q_scale per head; or packed e2m1 with a q_scale per 32 elements. Keys are float, or
quantised entries of 132 or 68 bytes, dequantised before the product. Products and the sum over heads in float32,
rounded once to out_dtype. A float64 q or out_dtype is computed in float64. ratio 1 is DeepSeek-V3.2: plain causality.

Source: DeepSeek-V3.2 (arXiv:2512.02556) eq. 1; DeepSeek-V4 (arXiv:2606.19348) section 2.3 and inference/model.py,
Indexer; DeepGEMM 54e2261 tests/test_attention.py (fp8_fp4_mqa_logits).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from isolith.dtypes import E4M3, FLOAT, FLOAT_NAMES, INT32, PACKED, SCALE, listed
from isolith.errors import ArgumentError
from isolith.materials.indexer import batch_of_scores, errors_of_indexer, quantised_kinds
from isolith.materials.relations_indexer import relations_of_scores
from isolith.numerics.codes import decode
from isolith.numerics.pages import check_block_table, check_cache, entry_dim, read_entries, slots_of_items
from isolith.numerics.ragged import check_cu_seqlens, check_start_pos, positions_of_tokens
from isolith.operator import Cost, Operator
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(
    q: Tensor,
    weights: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    max_entries: int,
    softmax_scale: float = 1.0,
    q_scale: Tensor | None = None,
    out_dtype: str = "float32",
) -> Tensor:
    dtype = wide_dtype(q, out_dtype)
    keys, visible = keys_of_tokens(k_cache, block_table, cu_seqlens, start_pos, q.shape[0], ratio, max_entries, dtype)
    dots = torch.einsum("thc,tsc->ths", dequantised(q, q_scale, dtype), keys).relu()
    scores = torch.einsum("ths,th->ts", dots, weights.to(dtype)) * softmax_scale
    return torch.where(visible, scores, -torch.inf).to(FLOAT_NAMES[out_dtype])


def wide_dtype(q: Tensor, out_dtype: str) -> torch.dtype:
    """The dtype to compute in; a quantised q has no float64 to ask for it by."""
    return torch.float64 if torch.float64 in (q.dtype, FLOAT_NAMES[out_dtype]) else torch.float32


def dequantised(q: Tensor, q_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """q [tokens, heads, head_dim] as values."""
    values = decode(q, dtype)
    if q_scale is None:
        return values
    groups = 1 if q_scale.dim() == 2 else q_scale.shape[2]
    scaled: Tensor = values.unflatten(-1, (groups, -1)) * q_scale.to(dtype).view(*q.shape[:2], groups, 1)
    return scaled.flatten(-2)


def keys_of_tokens(
    k_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    tokens: int,
    ratio: int,
    max_entries: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(keys [tokens, max_entries, head_dim], visible [tokens, max_entries]) of each token's own sequence."""
    sequence, position = positions_of_tokens(cu_seqlens, start_pos, tokens)
    entry = torch.arange(max_entries, device=k_cache.device)
    visible = entry < ((position + 1) // ratio)[:, None]
    slots = slots_of_items(block_table, sequence[:, None], entry, k_cache.shape[1])
    return read_entries(k_cache, torch.where(visible, slots, -1), dtype), visible


def folded_scales(
    q: Tensor,
    weights: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    max_entries: int,
    softmax_scale: float = 1.0,
    q_scale: Tensor | None = None,
    out_dtype: str = "float32",
) -> Tensor:
    """The scale of the softmax, and of an e4m3 head, in the weights; heads summed in blocks of 8."""
    dtype = wide_dtype(q, out_dtype)
    keys, visible = keys_of_tokens(k_cache, block_table, cu_seqlens, start_pos, q.shape[0], ratio, max_entries, dtype)
    factor = weights.to(dtype) * softmax_scale
    if q_scale is not None and q_scale.dim() == 2:
        factor, q_scale = factor * q_scale.to(dtype), None
    dots = torch.einsum("thc,tsc->ths", dequantised(q, q_scale, dtype), keys).relu() * factor[..., None]
    scores = torch.stack([part.sum(1) for part in dots.split(8, dim=1)]).sum(0)
    return torch.where(visible, scores, -torch.inf).to(FLOAT_NAMES[out_dtype])


def split_dot(
    q: Tensor,
    weights: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    max_entries: int,
    softmax_scale: float = 1.0,
    q_scale: Tensor | None = None,
    out_dtype: str = "float32",
) -> Tensor:
    """Dot products in steps of 16 elements, one after the other, as a matrix unit accumulates them."""
    dtype = wide_dtype(q, out_dtype)
    keys, visible = keys_of_tokens(k_cache, block_table, cu_seqlens, start_pos, q.shape[0], ratio, max_entries, dtype)
    dots = torch.zeros(*q.shape[:2], max_entries, dtype=dtype, device=q.device)
    for part, key in zip(dequantised(q, q_scale, dtype).split(16, dim=-1), keys.split(16, dim=-1), strict=True):
        dots = dots + torch.einsum("thc,tsc->ths", part, key)
    scores = (dots.relu() * weights.to(dtype)[..., None]).sum(1) * softmax_scale
    return torch.where(visible, scores, -torch.inf).to(FLOAT_NAMES[out_dtype])


def fake(q: Tensor, max_entries: int, out_dtype: str, **_: object) -> Tensor:
    return q.new_empty(q.shape[0], max_entries, dtype=FLOAT_NAMES[out_dtype])


def check(
    q: Tensor, k_cache: Tensor, ratio: int, max_entries: int, q_scale: Tensor | None, out_dtype: str, **_: object
) -> None:
    check_indexer("indexer_score", q, k_cache, ratio, max_entries, q_scale, out_dtype)


def check_indexer(
    operator: str, q: Tensor, k_cache: Tensor, ratio: int, max_entries: int, q_scale: Tensor | None, out_dtype: str
) -> None:
    """What the indexer's scores ask for beyond shapes and dtypes; for the composite too."""
    check_cache(operator, "k_cache", k_cache)
    if k_cache.dtype == torch.uint8 and k_cache.shape[2] not in (132, 68):
        raise ArgumentError(
            f"{operator}: a uint8 k_cache must have entries of 132 or 68 bytes; got {k_cache.shape[2]}."
        )
    dim = q.shape[2] * 2 if q.dtype == torch.uint8 else q.shape[2]
    if dim != entry_dim(k_cache):
        raise ArgumentError(f"{operator}: head_dim is {dim} in q but {entry_dim(k_cache)} in k_cache.")
    if ratio < 1:
        raise ArgumentError(f"{operator}: ratio must be at least 1; got {ratio}.")
    if max_entries < 0:
        raise ArgumentError(f"{operator}: max_entries must not be negative; got {max_entries}.")
    if out_dtype not in FLOAT_NAMES:
        raise ArgumentError(f"{operator}: out_dtype must be {listed(tuple(FLOAT_NAMES))}; got {out_dtype!r}.")
    wanted = {torch.uint8: (*q.shape[:2], dim // 32), torch.float8_e4m3fn: tuple(q.shape[:2])}.get(q.dtype)
    if q.dtype == torch.uint8 and dim % 32:
        raise ArgumentError(f"{operator}: head_dim of a packed q must be a multiple of 32; got {dim}.")
    given = None if q_scale is None else tuple(q_scale.shape)
    if given != wanted:
        raise ArgumentError(
            f"{operator}: q_scale of a {q.dtype} q must be {wanted}; got {given}.".replace("torch.", "")
        )


def check_values(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    max_entries: int,
    **_: object,
) -> None:
    check_indexer_values("indexer_score", q, k_cache, block_table, cu_seqlens, start_pos, ratio, max_entries)


def check_indexer_values(
    operator: str,
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    max_entries: int,
) -> None:
    """Raise ArgumentError for an illegal batch or table, or a token that sees more than max_entries entries."""
    check_cu_seqlens(operator, cu_seqlens, q.shape[0])
    check_start_pos(operator, start_pos)
    check_block_table(operator, "block_table", block_table, k_cache)
    if q.shape[0]:
        _, position = positions_of_tokens(cu_seqlens, start_pos, q.shape[0])
        most = (int(position.max()) + 1) // ratio
        if most > max_entries:
            raise ArgumentError(
                f"{operator}: max_entries must be at least the {most} entries that a token sees; got {max_entries}."
            )


def cost(
    q: Tensor,
    weights: Tensor,
    k_cache: Tensor,
    start_pos: Tensor,
    max_entries: int,
    q_scale: Tensor | None,
    out_dtype: str,
    **_: object,
) -> Cost:
    keys = min(start_pos.shape[0] * max_entries, k_cache.shape[0] * k_cache.shape[1])
    return Cost(
        # The dot products. Weighting and summing heads runs beside them in float32; published counts leave it out.
        flops=2 * q.shape[0] * max_entries * q.shape[1] * entry_dim(k_cache),
        bytes_read=bytes_of_queries(q, weights, q_scale) + keys * k_cache.shape[2] * k_cache.itemsize,
        bytes_written=q.shape[0] * max_entries * FLOAT_NAMES[out_dtype].itemsize,
        math=math_of_scores(q),
    )


def bytes_of_queries(q: Tensor, weights: Tensor, q_scale: Tensor | None) -> int:
    """The bytes of what every token brings."""
    return q.nbytes + weights.nbytes + (0 if q_scale is None else q_scale.nbytes)


def math_of_scores(q: Tensor) -> str:
    """The format of the products."""
    formats = {torch.uint8: "float4", torch.float8_e4m3fn: "float8", torch.float32: "float32", torch.float64: "float32"}
    return formats.get(q.dtype, "bfloat16")


def samples(make: Make) -> Iterator[Sample]:
    flash = batch_of_scores(make, [1, 1], [2047, 1021], 4, 64, 128, 64)
    yield Sample("flash_decode", "model", **flash)
    for name, call in quantised_kinds(make, flash, 64):
        yield Sample(name, "model", **call)
    # Positions 2, 3, 6, 7, ...: the last token of a window sees that window's entry, the one before does not.
    ragged = batch_of_scores(make, [9, 0, 1, 1, 5], [0, 8, 2, 3, 125], 4, 8, 32, 2)
    yield Sample("around_the_ratio", **ragged)
    yield Sample("more_entries_than_visible", **ragged | {"max_entries": 40})
    yield Sample("bfloat16_scores", **ragged | {"out_dtype": "bfloat16"})
    yield Sample("ratio_1", **batch_of_scores(make, [5, 3], [0, 70], 1, 4, 32, 61))
    yield Sample("ratio_128", **batch_of_scores(make, [4, 2], [125, 300], 128, 4, 32, 69))
    # A rectifier left out, or behind the weight, shows: most dots are negative, then all weights.
    against = batch_of_scores(make, [3], [60], 4, 8, 32, 16)
    against |= {"q": make.normal(3, 8, 32, mean=-0.3), "k_cache": against["k_cache"].abs()}
    yield Sample("negative_dots", **against)
    yield Sample("negative_weights", **against | {"weights": -against["weights"].abs()})
    exact = batch_of_scores(make, [3], [60], 4, 8, 32, 16) | {"softmax_scale": 0.125}
    integers = {"q": make.small_integers(3, 8, 32), "weights": make.small_integers(3, 8)}
    integers["k_cache"] = make.small_integers(*exact["k_cache"].shape)
    yield Sample("small_integers", "exact", **exact | integers)
    lost = batch_of_scores(make, [3], [60], 4, 4, 32, 4)
    lost["block_table"][0, 1] = -1
    yield Sample("entries_without_a_block", **lost)
    yield Sample("nothing_visible", **batch_of_scores(make, [3], [0], 4, 4, 32, 8))
    none = batch_of_scores(make, [0, 0], [5, 9], 4, 4, 128, 8)
    yield Sample("no_tokens", **none)
    for name, call in quantised_kinds(make, none, 8):
        yield Sample(f"no_tokens_{name}", **call)
    yield Sample("no_sequences", **batch_of_scores(make, [], [], 4, 4, 32, 8))


def errors(make: Make) -> Iterator[ErrorSample]:
    call = batch_of_scores(make, [2, 1], [6, 3], 4, 2, 128, 4)
    yield from errors_of_indexer(make, "indexer_score", call)


def relations(make: Make) -> Iterator[Relation]:
    yield from relations_of_scores(make)


indexer_score = Operator(
    name="indexer_score",
    shapes="q[tokens heads _] weights[tokens heads] k_cache[blocks block_size _] block_table[sequences max_blocks] "
    "cu_seqlens[sequences+1] start_pos[sequences] q_scale?[*] -> scores[tokens max_entries]",
    dtypes={
        "q": FLOAT + E4M3 + PACKED,
        "weights": FLOAT,
        "k_cache": FLOAT + PACKED,
        "block_table": INT32,
        "cu_seqlens": INT32,
        "start_pos": INT32,
        "q_scale": SCALE,
    },
    reference=reference,
    variants=(folded_scales, split_dot),
    fake=fake,
    check=check,
    check_values=check_values,
    cost=cost,
    samples=samples,
    errors=errors,
    relations=relations,
)
