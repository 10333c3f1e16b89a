"""The activation of expert rows and the quantisation that follows, in one pass: nothing wide goes to memory between.

    v[r, i] = silu(min(gate, limit)) * clamp(up, -limit, limit) * row weight        [gate | up] = halves of row r

and then e4m3 codes in groups of columns, int8 codes with a scale a row, or v as it is. Memory is the floor: both halves
are read once, and a byte an element is written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from isolith_backends.cuda.kernels.act_quant_fp8 import e4m3_byte, scales_of_e4m3
from isolith_backends.cuda.kernels.act_quant_int8 import codes_and_scales
from isolith_backends.cuda.kernels.formats import FLOORS, stored_scale
from isolith_backends.cuda.kernels.groups import groups_of, places
from isolith_backends.cuda.kernels.swiglu import gated
from isolith_backends.cuda.kernels.tensors import stored
from isolith_backends.cuda.launch import capability, launch


@triton.jit
def swiglu_quant_groups(
    X,
    Q,
    S,
    ENDS,
    PAIR,
    WEIGHTS,
    total,
    a_row,
    columns,
    size,
    stride,
    inner,
    inner_stride,
    experts,
    limit,
    floor,
    QUANT: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    NATIVE: tl.constexpr,
    LIMITED: tl.constexpr,
    TOGETHER: tl.constexpr,
    PADDED: tl.constexpr,
    INDEX: tl.constexpr,
):
    group, row, start, column, inside = places(
        total, a_row, columns, size, stride, inner, inner_stride, TOGETHER, PADDED, INDEX
    )
    live = group < total
    if ENDS is not None:
        # Rows behind the last segment hold whatever the memory held.
        live = live & (row < tl.load(ENDS + experts - 1))
        inside = inside & live[:, None]
    at = X + start[:, None] + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + columns, mask=inside, other=0.0).to(tl.float32)
    value = gated(gate, up, limit, LIMITED)
    if WEIGHTS is not None:
        pair = tl.load(PAIR + row, mask=live, other=-1)
        weight = tl.load(WEIGHTS + pair, mask=pair >= 0, other=0.0)
        value *= weight[:, None]
    if QUANT == "none":
        tl.store(Q + row[:, None] * columns + column, value.to(Q.dtype.element_ty), mask=inside)
    else:
        amax = tl.maximum(tl.max(tl.abs(value), axis=1), floor)
        if QUANT == "fp8":
            scale, inverse = scales_of_e4m3(amax, POWER_OF_TWO)
            code = e4m3_byte(value * inverse[:, None], NATIVE)
        else:
            code, scale = codes_and_scales(value, amax)
        tl.store(Q + row[:, None] * columns + column, code, mask=inside)
        tl.store(S + group, scale, mask=live)


def swiglu_quant(
    hidden: Tensor,
    limit: float,
    quant: str,
    group: int,
    scale_format: str,
    ends: Tensor | None = None,
    pair: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Activated rows as codes with their scales, or as they are with None.

    Args:
        hidden: [rows, 2 * columns].
        limit: The clamp; 0 for none.
        quant: "none", "fp8" or "int8".
        group: Columns that share a scale of "fp8".
        scale_format: "ue8m0" or "float32", of the scales of "fp8".
        ends: Where expert segments end; rows behind the last are left out.
        pair: The pair of each row.
        weights: What multiplies the row of each pair.
    """
    rows, columns = hidden.shape[0], hidden.shape[1] // 2
    dtypes = {"none": hidden.dtype, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
    q = torch.empty((rows, columns), dtype=dtypes[quant], device=hidden.device)
    size = group if quant == "fp8" else max(columns, 1)
    power_of_two = quant == "fp8" and scale_format == "ue8m0"
    made = torch.float8_e8m0fnu if power_of_two else torch.float32
    scale = None if quant == "none" else torch.empty((rows, -(-columns // size)), dtype=made, device=hidden.device)
    if q.numel() == 0:
        return q, scale
    groups = groups_of(hidden[:, :columns], size if quant != "none" else min(size, 1024))
    launch(
        swiglu_quant_groups,
        groups.grid,
        groups.flat,
        stored(q),
        stored_scale(scale),
        ends,
        pair,
        weights,
        *groups.runtime,
        0 if ends is None else ends.shape[0],
        limit,
        FLOORS.get(quant, 0.0),
        warps=groups.warps,
        stages=1,
        QUANT=quant,
        POWER_OF_TWO=power_of_two,
        NATIVE=capability(hidden.device) >= 90,
        LIMITED=limit > 0,
        TOGETHER=groups.together,
        PADDED=groups.padded,
        INDEX=groups.index,
    )
    return q, scale
