"""The compressor of the KV cache, and what is prepared for it.

Source: vllm-ascend 182b75ea csrc/attention/compressor (compressor_block_vec_perf.h: scores are stored with ape added;
every token of a call is stored) and tests/…/test_compressor_metadata.py; cann-recipes-infer fbc225d2 ops/ascendc.
"""

import torch
from torch import Tensor

from isolith_backends.ascend.vendor.rules import HALVES, need, need_dtype, need_shape, poison, rotated
from isolith_backends.ascend.vendor.soc import current

LEGAL = ((4, 512, 2), (4, 128, 2), (128, 512, 1))
"""(ratio, D, coff)."""
ROPE = 64


def check(
    name: str,
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    state_cache: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    rope: tuple[Tensor, Tensor],
    ratio: int,
    coff: int,
    all_float32: bool,
) -> int:
    """The rules of the tiling; gives D."""
    need_dtype(name, "x", x, HALVES)
    hidden, size = x.shape[-1], norm_weight.shape[0]
    need(name, 1024 <= hidden <= 10240 and hidden % 512 == 0, f"H is {hidden}; 1K to 10K, a multiple of 512")
    need(name, (ratio, size, coff) in LEGAL, f"(cmp_ratio, D, coff) is {(ratio, size, coff)}, not one of {LEGAL}")
    for which, weight in zip(("wkv", "wgate"), weights, strict=True):
        need_dtype(name, which, weight, (x.dtype,))
        need_shape(name, which, weight, (coff * size, hidden))
        need(name, weight.is_contiguous(), f"{which} is not contiguous")
    need_dtype(name, "state_cache", state_cache, (torch.float32,))
    need_shape(name, "state_cache", state_cache, (-1, -1, 2 * coff * size))
    inner = state_cache.shape[0] == 0 or state_cache[0].is_contiguous()
    need(name, inner, f"state_cache may be strided over its blocks alone, not {state_cache.stride()}")
    need_dtype(name, "ape", ape, (torch.float32,))
    need_shape(name, "ape", ape, (ratio, coff * size))
    wide = all_float32 or current().name == "A5"
    need_dtype(name, "norm_weight", norm_weight, (torch.float32,) if wide else (x.dtype,))
    for which, table in zip(("rope_sin", "rope_cos"), rope, strict=True):
        need_dtype(name, which, table, (torch.float32,) if wide else (x.dtype, torch.float32))
        need(name, table.shape == rope[0].shape and table.shape[-1] == ROPE, f"{which} is {tuple(table.shape)}")
    return size


def compressor(
    x: Tensor,
    wkv: Tensor,
    wgate: Tensor,
    state_cache: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    rope_sin: Tensor,
    rope_cos: Tensor,
    state_block_table: Tensor | None,
    cu_seqlens: Tensor | None,
    seqused: Tensor | None,
    start_pos: Tensor | None,
    rope_head_dim: int,
    cmp_ratio: int,
    coff: int,
    norm_eps: float,
    rotary_mode: int,
    cache_mode: int,
    all_float32: bool = False,
) -> Tensor:
    name = "compressor"
    need(name, rotary_mode == 2, f"rotary_mode is {rotary_mode}; only 2 (interleave)")
    need(name, cache_mode == 1, f"cache_mode is {cache_mode}; only 1 (paged)")
    need(name, rope_head_dim == ROPE, f"rope_head_dim is {rope_head_dim}; only {ROPE}")
    rope = rope_sin, rope_cos
    size = check(name, x, (wkv, wgate), state_cache, ape, norm_weight, rope, cmp_ratio, coff, all_float32)
    need(name, x.dim() == (3 if cu_seqlens is None else 2), f"x is {tuple(x.shape)} with cu_seqlens {cu_seqlens}")
    need(name, x.numel() > 0, "nothing may be empty")
    spans = requests(name, x, cu_seqlens, seqused, start_pos)
    table = whole_table(name, state_block_table, spans, state_cache.shape[1])
    flat = x.flatten(0, -2).float()
    rows = torch.cat((flat @ wkv.float().T, flat @ wgate.float().T), dim=-1)
    if cu_seqlens is not None:
        due = min(flat.shape[0], flat.shape[0] // cmp_ratio + len(spans))
        need_shape(name, "rope_sin", rope_sin, (due, ROPE))
    sin, cos = (part.flatten(0, -2) for part in rope)
    out, at = poison((sin.shape[0], size), x.dtype), 0
    for request, (start, length, begin) in enumerate(spans):
        if cu_seqlens is None:  # every request has as many rows
            at = request * rope_sin.shape[1]
        mine = rows[begin : begin + length].clone()
        mine[:, coff * size :] += ape[torch.arange(start, start + length) % cmp_ratio]
        before = read_before(state_cache, table[request], start, mine.shape[1], cmp_ratio * coff)
        write(state_cache, table[request], start, mine)
        windows = pooled(torch.cat((before, mine)), start, length, cmp_ratio, coff, size)
        normed = windows * (windows.square().mean(-1, keepdim=True) + norm_eps).rsqrt() * norm_weight.float()
        end = at + normed.shape[0]
        need(name, end <= out.shape[0], f"row {end} of {out.shape[0]} is written (aicore exception)")
        normed[:, -ROPE:] = rotated(normed[:, -ROPE:], cos[at:end], sin[at:end], "interleave")
        out[at:end] = normed.to(x.dtype)
        at = end
    return out.view(*rope_sin.shape[:-1], size)


Span = tuple[int, int, int]
"""The position before the call, the tokens in use and the first row of x, of a request."""


def whole_table(name: str, table: Tensor | None, spans: list[Span], block_size: int) -> Tensor:
    """The table of states, which must reach as far as every request."""
    need(name, table is not None, "state_block_table is not given")
    assert table is not None
    need_dtype(name, "state_block_table", table, (torch.int32,))
    pages = -(-max(start + length for start, length, _ in spans) // block_size)
    fits = table.dim() == 2 and table.shape[0] == len(spans) and table.shape[1] >= pages
    need(name, fits, f"state_block_table is {tuple(table.shape)}, {len(spans)} requests reach {pages} pages")
    return table


def requests(
    name: str, x: Tensor, cu_seqlens: Tensor | None, seqused: Tensor | None, start_pos: Tensor | None
) -> list[Span]:
    """Where each request is."""
    if cu_seqlens is None:
        begins = [batch * x.shape[1] for batch in range(x.shape[0])]
        lengths = [x.shape[1]] * x.shape[0]
    else:
        need_dtype(name, "cu_seqlens", cu_seqlens, (torch.int32,))
        need(name, cu_seqlens.dim() == 1 and int(cu_seqlens[0]) == 0, "cu_seqlens must start with 0")
        need(name, int(cu_seqlens[-1]) <= x.shape[0], f"cu_seqlens ends at {int(cu_seqlens[-1])} of {x.shape[0]} rows")
        begins, lengths = cu_seqlens[:-1].tolist(), torch.diff(cu_seqlens).tolist()
    for which, tensor in (("seqused", seqused), ("start_pos", start_pos)):
        if tensor is not None:
            need_dtype(name, which, tensor, (torch.int32,))
            need_shape(name, which, tensor, (len(begins),))
    if seqused is not None:
        lengths = [min(used, length) for used, length in zip(seqused.tolist(), lengths, strict=True)]
    starts = [0] * len(begins) if start_pos is None else start_pos.tolist()
    return list(zip(starts, lengths, begins, strict=True))


def read_before(state: Tensor, table: Tensor, start: int, width: int, count: int) -> Tensor:
    """The rows of the `count` tokens before the call; nothing guards block 0. Before the sequence there is NaN."""
    rows = poison((count, width), torch.float32)
    for back in range(1, min(count, start) + 1):
        position = start - back
        rows[-back] = state[int(table[position // state.shape[1]]), position % state.shape[1]]
    return rows


def write(state: Tensor, table: Tensor, start: int, rows: Tensor) -> None:
    """Store every token of the call, but where its block is 0."""
    for at in range(rows.shape[0]):
        block, place = int(table[(start + at) // state.shape[1]]), (start + at) % state.shape[1]
        if block:
            state[block, place] = rows[at]


def pooled(rows: Tensor, start: int, length: int, ratio: int, coff: int, size: int) -> Tensor:
    """The softmax-weighted sums of the windows that the call closes; `rows` begins ratio*coff tokens before it."""
    first, end = start // ratio, (start + length) // ratio
    kv, score = rows.split(coff * size, dim=1)
    made = []
    for window in range(first, end):
        at = window * ratio - start + ratio * coff
        values, scores = kv[at : at + ratio, -size:], score[at : at + ratio, -size:]
        if coff == 2:
            before = slice(at - ratio, at)
            earlier, weights = kv[before, :size], score[before, :size]
            if window == 0:
                earlier, weights = torch.zeros_like(earlier), torch.full_like(weights, float("-inf"))
            values, scores = torch.cat((earlier, values)), torch.cat((weights, scores))
        made.append((scores.softmax(0) * values).sum(0))
    return torch.stack(made) if made else rows.new_empty((0, size))


def compressor_metadata(
    rope_cos: Tensor,
    rope_sin: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    kv_block_table: Tensor,
    kv_block_size: int,
    slot_mapping_format: int,
    compress_ratio: int,
    num_compressed_tokens: int,
    num_reqs_actual: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Full tables in, cos first; (cos, sin) [n, 1, 1, 64] and the places of the compressed rows out."""
    name = "compressor_metadata"
    for which, tensor in (("cu_seqlens", cu_seqlens), ("start_pos", start_pos), ("kv_block_table", kv_block_table)):
        need_dtype(name, which, tensor, (torch.int32,))
    need(name, slot_mapping_format in (1, 2), f"slot_mapping_format is {slot_mapping_format}")
    cos = torch.ones((num_compressed_tokens, rope_cos.shape[1]), dtype=rope_cos.dtype)
    sin = torch.zeros_like(cos)
    flat = slot_mapping_format == 1
    nothing = -1 if flat else [-1, kv_block_size - 1]
    slots = torch.tensor([nothing] * num_compressed_tokens, dtype=torch.int32)
    at = 0
    for request in range(num_reqs_actual):
        start, length = int(start_pos[request]), int(cu_seqlens[request + 1] - cu_seqlens[request])
        for row in range(start // compress_ratio, (start + length) // compress_ratio):
            need(name, at < num_compressed_tokens, f"row {at} of {num_compressed_tokens} (aicore exception)")
            cos[at], sin[at] = rope_cos[row * compress_ratio], rope_sin[row * compress_ratio]
            block, place = int(kv_block_table[request, row // kv_block_size]), row % kv_block_size
            slots[at] = torch.tensor(block * kv_block_size + place if flat else [block, place])
            at += 1
    return cos[:, None, None], sin[:, None, None], slots


def compressor_metadata_out(
    compress_cos: Tensor, compress_sin: Tensor, slot_mapping: Tensor, **given: Tensor | int
) -> tuple[Tensor, Tensor, Tensor]:
    """Into memory that is there."""
    outputs = compress_cos, compress_sin, slot_mapping
    made = compressor_metadata(num_compressed_tokens=slot_mapping.shape[0], **given)  # type: ignore[arg-type]  # as given
    for output, values in zip(outputs, made, strict=True):
        output.copy_(values.view(output.shape))
    return outputs
