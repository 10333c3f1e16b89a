"""The compressor: every entry of a call is a sequence of tmo's decode form, with a state of its own.

The rows that an entry pools are gathered first, from the caller's state and from the call, into a state that only this
call has; the last of them is the sequence's token. So prefill, chunks and decode are one form, a block that the
caller's table lacks is never written, a ring may be shorter than a chunk, and both releases of the call serve. tmo's
prefill form takes projections in bfloat16, which the contract keeps in float32.

Rows before the first window have the value 0 and the score -inf, as the day-0 state starts with. The rows have ape
already, and tables of cos 1 and sin 0 leave the call's own rotation out: all sequences of a page stand at the same
positions, and their windows do not.

Source: domesticated_torch_mlu_ops 9fbf7df6 _ops.py (fused_compress_single_kv: its three modes, a table for 128 tokens);
xllm 3906f5a9 tests (pages of 16, values before scores); vllm-mlu b9925203 (the day-0 form and its dense states).
"""

from typing import Any

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT
from isolith.numerics import windows
from isolith.numerics.pages import read_entries, slots_of_items
from isolith.numerics.ragged import positions_of_tokens
from isolith_backends.cambricon.cache import WRITE
from isolith_backends.cambricon.calls import int32, tmo, why_not
from isolith_backends.cambricon.rotary import APPLY_ROTARY, MATMUL, hadamard, rope, why_not_rope
from isolith_backends.vendor_calls import first_missing

ROW = ("kv", "score", "position", "ape", "gamma", "sin", "cos", "hadamard_matrix", "slot_mapping", "kv_cache")
BOTH = (*ROW, "kv_cache_scale", "eps", "overlap")
PAGED = tmo(
    "fused_compress_single_kv",
    by_name=(*BOTH, "state_cache", "state_bt", "state_width", "state_block_size", "cu_query_len", "K"),
)
DENSE = tmo("fused_compress_single_kv", by_name=(*BOTH, "state_ids", "kv_state", "score_state"))
MODES = ((True, 4, 128), (True, 4, 512), (False, 128, 512))
"""(overlap, ratio, dim)."""

PAGE, STATE_TOKENS, ROTATED = 16, 128, 64
FLOAT32 = (torch.float32,)


def missing_compressor() -> WhyNot:
    """What this installation lacks: the call in either release's form, and what stands around it."""
    reasons = [call.missing() for call in (PAGED, DENSE)]
    return first_missing(WRITE, APPLY_ROTARY, MATMUL) if None in reasons else "; ".join(map(str, reasons))


def why_not_compressor(norm_weight: Tensor, state_cache: Tensor, ratio: int, overlap: bool, **_: object) -> WhyNot:
    mode = (overlap, ratio, norm_weight.shape[0])
    if mode not in MODES:
        return f"overlap={overlap}, ratio={ratio}, dim={mode[2]}; fused_compress_single_kv takes {listed(MODES)}"
    if not state_cache.is_contiguous():
        return f"state_cache has strides {tuple(state_cache.stride())}; reshape_paged_cache takes pools without gaps"
    return None


def listed(modes: tuple[tuple[bool, int, int], ...]) -> str:
    """Modes as text."""
    return " or ".join(f"({overlap}, {ratio}, {dim})" for overlap, ratio, dim in modes)


def gathered(rows: Tensor, state: Tensor, token: Tensor, slot: Tensor) -> Tensor:
    """The rows [entries, n, 2*width] that entries pool: of this call, of the state, or of nobody with score -inf."""
    taken = torch.where((token >= 0)[..., None], rows[token.clamp(min=0)], read_entries(state, slot, rows.dtype))
    nobody = ((token < 0) & (slot < 0))[..., None]
    value, score = taken.chunk(2, dim=-1)
    return torch.cat((value, score.masked_fill(nobody, -torch.inf)), dim=-1)


def compressed(pooled: Tensor, weight: Tensor, ratio: int, overlap: bool, eps: float) -> Tensor:
    """Pooled and normalised entries, float32 [entries, dim], of the rows [entries, n, 2*width] of each."""
    entries, n, width = pooled.shape[0], pooled.shape[1], pooled.shape[2] // 2
    device, sequence = pooled.device, torch.arange(pooled.shape[0], device=pooled.device)
    value, score = pooled[:, -1].chunk(2, dim=-1)
    out = torch.empty((entries, 1, weight.shape[0]), dtype=torch.float32, device=device)
    paged = PAGED.missing() is None
    # Two states of 8 rows share a page of 16, where their tokens stand at other positions.
    first = sequence * n % PAGE if paged else torch.zeros_like(sequence)
    tables = torch.zeros((max(n, PAGE), ROTATED), dtype=torch.float32, device=device)
    row: dict[str, Any] = {  # Any: a call's own values
        "kv": value.contiguous(),
        "score": score.contiguous(),
        "position": int32(first + n - 1),
        "ape": torch.zeros((ratio, width), dtype=torch.float32, device=device),
        "gamma": weight.float().contiguous(),
        "sin": tables,
        "cos": torch.ones_like(tables),
        "hadamard_matrix": None,
        "slot_mapping": int32(sequence),
        "kv_cache": out,
        "kv_cache_scale": None,
        "eps": eps,
        "overlap": overlap,
    }
    if not paged:
        states = [part.contiguous() for part in pooled.chunk(2, dim=-1)]
        row |= {"kv": row["kv"][:, None], "score": row["score"][:, None]}
        DENSE(**row, state_ids=int32(sequence), kv_state=states[0], score_state=states[1])
        return out[:, 0]
    rows = torch.nn.functional.pad(pooled.reshape(-1, 2 * width), (0, 0, 0, -entries * n % PAGE))
    column = torch.arange(STATE_TOKENS // PAGE, device=device).clamp(max=max(n // PAGE, 1) - 1)
    PAGED(
        **row,
        state_cache=rows.view(-1, PAGE, 2 * width),
        state_bt=int32((sequence * n // PAGE)[:, None] + column),
        state_width=width,
        state_block_size=PAGE,
        cu_query_len=torch.arange(entries + 1, dtype=torch.int32, device=device),
        K=0,
    )
    return out[:, 0]


def keep(state: Tensor, block_table: Tensor, sequence: Tensor, position: Tensor, rows: Tensor) -> None:
    """Write the row of every token that has a slot; of several with one slot the last one stays."""
    slots = slots_of_items(block_table, sequence, position, state.shape[1])
    ordered, order = slots.sort(stable=True)
    last = torch.nn.functional.pad(ordered[1:] != ordered[:-1], (0, 1), value=True)
    slots = slots.masked_fill(~torch.empty_like(last).scatter(0, order, last), -1)
    WRITE(k=rows[:, None], v=None, k_cache=state[:, None], v_cache=None, slot_mapping=int32(slots))


@implements(
    ops.attention.kv_compress,
    requires=Requires(
        dtypes={
            **dict.fromkeys(("x", "wkv", "wgate", "norm_weight"), DEVICE_FLOAT),
            **dict.fromkeys(("cos_table", "sin_table", "state_cache", "ape"), FLOAT32),
        },
        missing=missing_compressor,
    ),
    why_not=why_not(why_not_compressor, why_not_rope),
)
def kv_compress(
    x: Tensor,
    wkv: Tensor,
    wgate: Tensor,
    norm_weight: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    state_cache: Tensor,
    state_block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    ape: Tensor | None = None,
    overlap: bool = False,
    rotate: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    tokens = x.shape[0]
    if tokens == 0:
        return x.new_empty((0, norm_weight.shape[0])), torch.zeros_like(cu_seqlens)
    sequence, position = positions_of_tokens(cu_seqlens, start_pos, tokens)
    wide = x.float()
    score = torch.nn.functional.linear(wide, wgate.float())
    score = score if ape is None else score + ape[position % ratio]
    rows = torch.cat((torch.nn.functional.linear(wide, wkv.float()), score), dim=-1)
    entries = windows.entries_of_call(cu_seqlens, start_pos, tokens, ratio)
    token, slot = windows.sources(entries, cu_seqlens, start_pos, state_cache, state_block_table, ratio, overlap)
    pooled = gathered(rows, state_cache, token, slot)
    if state_cache.numel():
        keep(state_cache, state_block_table, sequence, position, rows)
    normed = compressed(pooled, norm_weight, ratio, overlap, eps)
    rotated = rope.fn(normed, entries.window * ratio, cos_table, sin_table)
    result = hadamard.fn(rotated) if rotate else rotated
    return result.to(x.dtype), entries.cu_entries.to(cu_seqlens.dtype)
