"""Paged caches: writing rows, and the compressor with its paged state.

Source: vllm-ascend 182b75ea csrc (npu_scatter_nd_update_v2; attention/compressor: legal shapes, the state's rows, block
0 for "do not write"); cann-recipes-infer fbc225d2 ops/ascendc (scatter_nd_update_asc, compressor).
"""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT, dtype_name
from isolith.numerics import windows
from isolith_backends.ascend import arch
from isolith_backends.ascend.rotary import by_signs
from isolith_backends.vendor_calls import VendorCall

SCATTER_PAIRS = VendorCall(("_C_ascend::npu_scatter_nd_update_v2",), ("var", "indices", "update"))
SCATTER_SLOTS = VendorCall(("custom::scatter_nd_update_asc",), ("var", "indices", "update"))
WIDTHS_OF_SLOTS = (1, 128, 512)
COMPRESSES = (
    *("x", "wkv", "wgate", "state_cache", "ape", "norm_weight", "rope_sin", "rope_cos", "state_block_table"),
    *("cu_seqlens", "start_pos", "rope_head_dim", "cmp_ratio", "coff", "norm_eps", "rotary_mode", "cache_mode"),
)
COMPRESSOR = VendorCall(("_C_ascend::compressor",), (*COMPRESSES, "seqused"))
COMPRESSOR_OF_RECIPES = VendorCall(("custom::compressor",), COMPRESSES)
LEGAL = {(4, 512, True): 2, (4, 128, True): 2, (128, 512, False): 1}
"""(ratio, dim, overlap) -> coff."""
ROPE, INTERLEAVED, PAGED = 64, 2, 1
LEAST_HIDDEN, MOST_HIDDEN, HIDDEN_STEP = 1024, 10240, 512


def why_not_rows(cache: Tensor, **_: object) -> WhyNot:
    if not cache.is_contiguous():
        return f"cache is not contiguous, strides {tuple(cache.stride())}; the vendor's scatter writes dense pools"
    return "cache has no entries" if cache.numel() == 0 else None


@implements(
    ops.attention.kv_cache_write,
    requires=Requires(dtypes={"cache": DEVICE_FLOAT, "x": DEVICE_FLOAT}, arch=">=2,<5", missing=SCATTER_PAIRS.missing),
    why_not=why_not_rows,
)
def kv_cache_write(
    cache: Tensor, x: Tensor, slot_mapping: Tensor, scale_format: str = "ue8m0", amax_floor: float | None = None
) -> None:
    if x.numel() == 0:
        return
    # Only the flat place of a pair is checked: [-1, block_size - 1] is none, [3, -1] would be the end of block 2.
    slots = slot_mapping.clamp(min=-1)
    pairs = torch.stack((slots.div(cache.shape[1], rounding_mode="floor"), slots % cache.shape[1]), dim=1)
    SCATTER_PAIRS(var=cache[:, :, None], indices=pairs.to(torch.int32), update=x.to(cache.dtype)[:, None].contiguous())


def why_not_slots(cache: Tensor, x: Tensor, **_: object) -> WhyNot:
    if cache.shape[2] not in WIDTHS_OF_SLOTS:
        return f"an entry has {cache.shape[2]} elements; scatter_nd_update_asc takes 1, 128 or 512"
    if x.shape[0] > cache.shape[0] * cache.shape[1]:
        return f"{x.shape[0]} rows for {cache.shape[0] * cache.shape[1]} entries; scatter_nd_update_asc takes no more"
    return why_not_rows(cache)


@implements(
    ops.attention.kv_cache_write,
    requires=Requires(dtypes={"cache": DEVICE_FLOAT, "x": DEVICE_FLOAT}, arch=">=2", missing=SCATTER_SLOTS.missing),
    why_not=why_not_slots,
)
def kv_cache_write_by_slot(
    cache: Tensor, x: Tensor, slot_mapping: Tensor, scale_format: str = "ue8m0", amax_floor: float | None = None
) -> None:
    if x.numel() == 0:
        return
    slots = slot_mapping.clamp(min=-1).to(torch.int32)[:, None].contiguous()
    SCATTER_SLOTS(var=cache.view(-1, cache.shape[2]), indices=slots, update=x.to(cache.dtype).contiguous())


def why_not_compress(
    x: Tensor,
    wkv: Tensor,
    wgate: Tensor,
    norm_weight: Tensor,
    cos_table: Tensor,
    state_cache: Tensor,
    ratio: int,
    overlap: bool,
    **_: object,
) -> WhyNot:
    dim, hidden, block_size = norm_weight.shape[0], x.shape[1], state_cache.shape[1]
    if (ratio, dim, overlap) not in LEGAL:
        return f"ratio={ratio}, dim={dim}, overlap={overlap}; compressor takes (4, 512 or 128, True), (128, 512, False)"
    if not LEAST_HIDDEN <= hidden <= MOST_HIDDEN or hidden % HIDDEN_STEP:
        return f"hidden={hidden}; compressor takes multiples of {HIDDEN_STEP} in {LEAST_HIDDEN}..{MOST_HIDDEN}"
    if 2 * cos_table.shape[1] != ROPE:
        return f"2*pairs={2 * cos_table.shape[1]}; compressor rotates {ROPE} dimensions"
    if {wkv.dtype, wgate.dtype} != {x.dtype}:
        return f"wkv is {dtype_name(wkv.dtype)} and x {dtype_name(x.dtype)}; compressor takes one dtype"
    if block_size & (block_size - 1) or block_size < 2:
        return f"block_size={block_size}; compressor is used with powers of two"
    if state_cache.stride()[1:] != (state_cache.shape[2], 1):
        return f"state_cache has strides {tuple(state_cache.stride())}; compressor takes gaps between blocks alone"
    return None


def why_not_narrow_norm(x: Tensor, norm_weight: Tensor, **others: Tensor) -> WhyNot:
    if norm_weight.dtype != x.dtype:
        kinds = f"norm_weight is {dtype_name(norm_weight.dtype)} and x {dtype_name(x.dtype)}"
        return f"{kinds}; _C_ascend::compressor on A2 and A3 takes one dtype"
    return why_not_compress(x=x, norm_weight=norm_weight, **others)  # type: ignore[arg-type]  # a call's own values


def compressed(
    call: VendorCall,
    x: Tensor,
    wkv: Tensor,
    wgate: Tensor,
    norm_weight: Tensor,
    tables: tuple[Tensor, Tensor],
    state_cache: Tensor,
    state_block_table: Tensor,
    cu_seqlens: Tensor,
    start_pos: Tensor,
    ratio: int,
    ape: Tensor | None,
    overlap: bool,
    rotate: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """kv_compress by a call."""
    tokens, dim = x.shape[0], norm_weight.shape[0]
    if tokens == 0 or start_pos.shape[0] == 0:
        rows = windows.max_entries_of_call(tokens, start_pos.shape[0], ratio)
        return x.new_empty((rows, dim)), torch.zeros_like(cu_seqlens, memory_format=torch.contiguous_format)
    entries = windows.entries_of_call(cu_seqlens, start_pos, tokens, ratio)
    # One row of the tables for each entry, at the position of its window's first token.
    cos, sin = (table[entries.window * ratio].float().repeat_interleave(2, dim=-1) for table in tables)
    if ape is None:
        ape = torch.zeros((ratio, wkv.shape[0]), dtype=torch.float32, device=x.device)
    state, is_copy = with_block_in_front(state_cache)
    # Block 0 means that a row is not kept; there are as many such columns more as the call can reach behind the table.
    table = torch.nn.functional.pad(state_block_table.clamp(min=-1) + 1, (0, tokens // state.shape[1] + 1))
    result: Tensor = call(
        x=x.contiguous(),
        wkv=wkv.contiguous(),
        wgate=wgate.contiguous(),
        state_cache=state,
        ape=ape.float().contiguous(),
        norm_weight=norm_weight.contiguous(),
        rope_sin=sin.contiguous(),
        rope_cos=cos.contiguous(),
        state_block_table=table.to(torch.int32),
        cu_seqlens=cu_seqlens.contiguous(),
        start_pos=start_pos.contiguous(),
        rope_head_dim=ROPE,
        cmp_ratio=ratio,
        coff=LEGAL[ratio, dim, overlap],
        norm_eps=eps,
        rotary_mode=INTERLEAVED,
        cache_mode=PAGED,
        **({"seqused": None} if "seqused" in call.passes else {}),
    )
    if is_copy:
        state_cache.copy_(state[1:])
    return by_signs(result) if rotate else result, entries.cu_entries.to(torch.int32)


def with_block_in_front(state: Tensor) -> tuple[Tensor, bool]:
    """The pool with one block more, its blocks numbered from 1 on, and whether it is a copy.

    The call never writes block 0. A pool that is cut out of a larger one, its first block left out, is not copied.
    """
    step = state.stride(0)
    if state.shape[0] and state.storage_offset() >= step:
        larger = (state.shape[0] + 1, *state.shape[1:])
        return state.as_strided(larger, state.stride(), state.storage_offset() - step), False
    return torch.cat((torch.zeros_like(state[:1]), state)), True


@implements(
    ops.attention.kv_compress,
    requires=Requires(
        dtypes={"x": (torch.bfloat16, torch.float16), "state_cache": (torch.float32,)},
        arch=">=2,<5",
        missing=COMPRESSOR.missing,
    ),
    why_not=why_not_narrow_norm,
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
    batch = (state_cache, state_block_table, cu_seqlens, start_pos)
    weights, tables = (x, wkv, wgate, norm_weight), (cos_table, sin_table)
    return compressed(COMPRESSOR, *weights, tables, *batch, ratio, ape, overlap, rotate, eps)


def float32_compressor() -> VendorCall:
    """The compressor whose norm weight is float32: vllm-ascend's on A5, cann-recipes' before."""
    return COMPRESSOR if arch() == "5" else COMPRESSOR_OF_RECIPES


def missing_float32_compressor() -> WhyNot:
    return float32_compressor().missing()


@implements(
    ops.attention.kv_compress,
    requires=Requires(
        dtypes={"x": (torch.bfloat16, torch.float16), "state_cache": (torch.float32,)},
        arch=">=2",
        missing=missing_float32_compressor,
    ),
    why_not=why_not_compress,
)
def kv_compress_of_float32_norm(
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
    batch = (state_cache, state_block_table, cu_seqlens, start_pos)
    weights, tables = (x, wkv, wgate, norm_weight.float()), (cos_table, sin_table)
    return compressed(float32_compressor(), *weights, tables, *batch, ratio, ape, overlap, rotate, eps)
