"""e4m3 on A5: activations in groups, and products, with scales for every 32 (MX), or for tiles of 128 in float32.

For MX a scale of 128 elements, or of a block of 128 by 128, is the same scale four times over, so that DeepSeek's
checkpoints are taken to the bit; it must be held as a power of two (e8m0), since a float32 scale may be none. Products
of packed e2m1 take weights that were laid out anew when they were loaded.

Source: Ascend/op-plugin docs of npu_dynamic_mx_quant (scale_alg 1: amax / 448 rounded up to a power of two, with
max_low_bound below amax; blocks in multiples of 32 up to 1024), npu_dynamic_block_quant and npu_grouped_matmul (tables
of dtypes and shapes), and of CANN's products (aclnnQuantMatmulV5, aclnnGroupedMatmulV5); vllm-ascend 182b75ea
vllm_ascend/quantization/methods (fp8.py, w8a8_mxfp8.py).
"""

import torch
from torch import Tensor

from isolith import Requires, WhyNot, implements, ops
from isolith.dtypes import DEVICE_FLOAT, FLOAT_NAMES, dtype_name
from isolith.numerics.codes import E4M3_MAX, groups_of
from isolith.numerics.scaled_matmul import resolve_act_quant
from isolith_backends.ascend.moe import CUMSUM, GROUPED_MATMUL, ends_of, why_not_weight
from isolith_backends.vendor_calls import VendorCall, first_missing

E4M3, E8M0 = 292, 293  # torch_npu's numbers
BLOCK, LARGEST_BLOCK, TILE, ROUNDED_UP = 32, 1024, 128, 1
HALF = (torch.bfloat16, torch.float16)
DYNAMIC_MX_QUANT = VendorCall(
    ("npu::npu_dynamic_mx_quant",), ("input", "dst_type", "block_size", "scale_alg", "max_low_bound")
)
DYNAMIC_BLOCK_QUANT = VendorCall(
    ("npu::npu_dynamic_block_quant",), ("x", "dst_type", "row_block_size", "col_block_size")
)
MX_MATMUL = VendorCall(
    ("npu::npu_quant_matmul",),
    (
        *("x1", "x2", "scale", "pertoken_scale", "output_dtype", "pertoken_scale_dtype", "scale_dtype"),
        "group_sizes",
    ),
)
MX_GROUPED_MATMUL = VendorCall(
    ("npu::npu_grouped_matmul",),
    (
        *("x", "weight", "scale", "per_token_scale", "group_list", "split_item", "group_type", "group_list_type"),
        *("output_dtype", "scale_dtype", "per_token_scale_dtype"),
    ),
)


def why_not_blocks(x: Tensor, group_size: int, scale_format: str, **_: object) -> WhyNot:
    if scale_format != "ue8m0":
        return f"scale_format is {scale_format!r}; npu_dynamic_mx_quant gives powers of two"
    if group_size % BLOCK or group_size > LARGEST_BLOCK:
        return f"group_size={group_size}; npu_dynamic_mx_quant takes multiples of {BLOCK} up to {LARGEST_BLOCK}"
    if x.dtype == torch.float32 and (group_size != BLOCK or x.shape[-1] < BLOCK):
        return f"float32 x in groups of {group_size}; npu_dynamic_mx_quant takes float32 in groups of {BLOCK}"
    return None


@implements(
    ops.quant.act_quant_fp8,
    requires=Requires(dtypes=DEVICE_FLOAT, arch=">=5", missing=DYNAMIC_MX_QUANT.missing),
    why_not=why_not_blocks,
)
def act_quant_fp8(
    x: Tensor, group_size: int = 128, scale_format: str = "ue8m0", amax_floor: float = 1e-4
) -> tuple[Tensor, Tensor]:
    groups = groups_of(x.shape[-1], group_size)
    if x.numel() == 0:
        scale = x.new_empty((*x.shape[:-1], groups), dtype=torch.float8_e8m0fnu)
        return torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format), scale
    q, pairs = DYNAMIC_MX_QUANT(
        input=x.reshape(-1, x.shape[-1]).contiguous(),
        dst_type=E4M3,
        block_size=group_size,
        scale_alg=ROUNDED_UP,
        max_low_bound=amax_floor,
    )
    # Scales come in pairs, the last of an odd number alone.
    scale = pairs.flatten(-2)[:, :groups].contiguous().view(torch.float8_e8m0fnu)
    return q.view(x.shape), scale.view(*x.shape[:-1], groups)


def why_not_tiles(x: Tensor, group_size: int, scale_format: str, **_: object) -> WhyNot:
    if scale_format != "float32":
        return f"scale_format is {scale_format!r}; npu_dynamic_block_quant gives float32"
    if group_size != TILE or x.shape[-1] % TILE:
        return f"{x.shape[-1]} columns in groups of {group_size}; npu_dynamic_block_quant takes whole ones of 128"
    return None


@implements(
    ops.quant.act_quant_fp8,
    requires=Requires(dtypes=HALF, arch=">=5", missing=DYNAMIC_BLOCK_QUANT.missing),
    why_not=why_not_tiles,
)
def act_quant_fp8_in_float32(
    x: Tensor, group_size: int = 128, scale_format: str = "ue8m0", amax_floor: float = 1e-4
) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], x.shape[-1] // TILE)
    if x.numel() == 0:
        q = torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
        return q, x.new_empty(shape, dtype=torch.float32)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    q, scale = DYNAMIC_BLOCK_QUANT(x=rows, dst_type=E4M3, row_block_size=1, col_block_size=TILE)
    # The call knows no floor, and divides a group of zeros by 0.
    least = amax_floor / E4M3_MAX
    at_floor = (rows.float() / least).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    is_below = (scale < least).repeat_interleave(TILE, dim=-1)
    q = torch.where(is_below, at_floor.view(torch.uint8), q.view(torch.uint8)).view(torch.float8_e4m3fn)
    return q.view(x.shape), scale.clamp(min=least).view(shape)


def in_pairs(scale: Tensor, rows: int, columns: int, block_n: int, block_k: int) -> Tensor:
    """e8m0 [*, ceil(rows/block_n), ceil(columns/block_k)] -> bytes [*, rows, pairs, 2], a scale for every 32."""
    spread = scale.view(torch.uint8).repeat_interleave(block_k // BLOCK, dim=-1)[..., : groups_of(columns, BLOCK)]
    if block_n != 1:
        spread = spread.repeat_interleave(block_n, dim=-2)[..., :rows, :]
    pairs: Tensor = torch.nn.functional.pad(spread, (0, spread.shape[-1] % 2)).unflatten(-1, (-1, 2))
    return pairs.contiguous()


def why_not_scales(
    weight: Tensor, weight_scale: Tensor | None, block_k: int, x_scale: Tensor | None, act_group: int
) -> WhyNot:
    """What both products say of e4m3 and its scales."""
    if weight.dtype != torch.float8_e4m3fn:
        return f"weight is {dtype_name(weight.dtype)}; MX products of e4m3 weights alone are adapted"
    for name, scale in {"weight_scale": weight_scale, "x_scale": x_scale}.items():
        if scale is not None and scale.dtype != torch.float8_e8m0fnu:
            return f"{name} is {dtype_name(scale.dtype)}; MX scales are powers of two, float8_e8m0fnu"
    if block_k % BLOCK or act_group % BLOCK:
        return f"block_k={block_k}, act_group={act_group}; MX scales are of {BLOCK} elements"
    return None


def why_not_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    x_scale: Tensor | None,
    act_quant: str,
    act_group: int,
    scale_format: str,
    block_k: int,
    out_dtype: str,
    **_: object,
) -> WhyNot:
    if reason := why_not_scales(weight, weight_scale, block_k, x_scale, act_group):
        return reason
    if x_scale is None and resolve_act_quant(act_quant, weight) != "fp8":
        return f"act_quant={act_quant!r}; MX takes e4m3 beside e4m3"
    if x_scale is None and (reason := why_not_blocks(x, act_group, scale_format)):
        return reason
    return f"out_dtype is {out_dtype}" if out_dtype == "float64" else None


def missing_linear() -> WhyNot:
    """What this installation lacks for a product of activations that it quantises first."""
    return first_missing(MX_MATMUL, DYNAMIC_MX_QUANT)


@implements(
    ops.quant.quant_linear,
    requires=Requires(dtypes={"x": (*DEVICE_FLOAT, torch.float8_e4m3fn)}, arch=">=5", missing=missing_linear),
    why_not=why_not_linear,
)
def quant_linear_of_e4m3(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    act_quant: str = "auto",
    act_group: int = 128,
    scale_format: str = "ue8m0",
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: str = "bfloat16",
) -> Tensor:
    outputs, inputs = weight.shape
    shape = (*x.shape[:-1], outputs)
    if 0 in shape or inputs == 0 or weight_scale is None:
        return x.new_zeros(shape, dtype=FLOAT_NAMES[out_dtype])
    if x_scale is None:
        x, x_scale = ops.quant.act_quant_fp8(x, group_size=act_group, scale_format=scale_format)
    rows = x.reshape(-1, inputs).contiguous()
    of_rows = in_pairs(x_scale.reshape(rows.shape[0], -1).contiguous(), rows.shape[0], inputs, 1, act_group)
    y: Tensor = MX_MATMUL(
        x1=rows,
        # The scale is a view exchanged as the weight is.
        x2=weight.contiguous().T,
        scale=in_pairs(weight_scale.contiguous(), outputs, inputs, block_n, block_k).transpose(0, 1),
        pertoken_scale=of_rows,
        output_dtype=FLOAT_NAMES[out_dtype],
        pertoken_scale_dtype=E8M0,
        scale_dtype=E8M0,
        group_sizes=[1, 1, BLOCK],
    )
    return y.view(shape)


def why_not_grouped(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    x_scale: Tensor | None,
    act_group: int,
    block_k: int,
    out_dtype: str,
    **_: object,
) -> WhyNot:
    if reason := why_not_scales(weight, weight_scale, block_k, x_scale, act_group):
        return reason
    return f"out_dtype is {out_dtype}" if out_dtype == "float64" else why_not_weight("weight", weight)


@implements(
    ops.moe.grouped_gemm,
    requires=Requires(dtypes={"x": (torch.float8_e4m3fn,)}, arch=">=5", missing=MX_GROUPED_MATMUL.missing),
    why_not=why_not_grouped,
)
def grouped_gemm_of_e4m3(
    x: Tensor,
    weight: Tensor,
    expert_counts: Tensor,
    alignment: int = 1,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    act_group: int = 128,
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: str = "bfloat16",
) -> Tensor:
    experts, outputs, inputs = weight.shape
    shape = (*x.shape[:-1], outputs)
    if 0 in shape or inputs == 0 or experts == 0 or weight_scale is None or x_scale is None:
        return x.new_zeros(shape, dtype=FLOAT_NAMES[out_dtype])
    rows = x.reshape(-1, inputs).contiguous()
    of_rows = in_pairs(x_scale.reshape(rows.shape[0], -1).contiguous(), rows.shape[0], inputs, 1, act_group)
    (y,) = MX_GROUPED_MATMUL(
        x=[rows],
        weight=[weight.contiguous().transpose(1, 2)],
        scale=[in_pairs(weight_scale.contiguous(), outputs, inputs, block_n, block_k).transpose(1, 2)],
        per_token_scale=[of_rows],
        group_list=ends_of(x, expert_counts, alignment),
        split_item=3,
        group_type=0,
        group_list_type=CUMSUM,
        output_dtype=FLOAT_NAMES[out_dtype],
        scale_dtype=E8M0,
        per_token_scale_dtype=E8M0,
    )
    return y.view(shape)  # type: ignore[no-any-return]  # the vendor's call


def why_not_tiled(
    x: Tensor,
    weight: Tensor,
    act_group: int,
    block_n: int,
    block_k: int,
    out_dtype: str,
    **_: object,
) -> WhyNot:
    if weight.dtype != torch.float8_e4m3fn:
        return f"weight is {dtype_name(weight.dtype)}; products in tiles of e4m3 weights alone are adapted"
    if {act_group, block_n, block_k} != {TILE}:
        return f"act_group={act_group}, block_n={block_n}, block_k={block_k}; tiles are of {TILE}"
    return f"out_dtype is {out_dtype}" if out_dtype == "float64" else why_not_weight("weight", weight)


@implements(
    ops.moe.grouped_gemm,
    requires=Requires(dtypes={"x": (torch.float8_e4m3fn,)}, arch=">=5", missing=GROUPED_MATMUL.missing),
    why_not=why_not_tiled,
)
def grouped_gemm_in_tiles(
    x: Tensor,
    weight: Tensor,
    expert_counts: Tensor,
    alignment: int = 1,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    act_group: int = 128,
    block_n: int = 128,
    block_k: int = 128,
    out_dtype: str = "bfloat16",
) -> Tensor:
    experts, outputs, inputs = weight.shape
    shape = (*x.shape[:-1], outputs)
    if 0 in shape or inputs == 0 or experts == 0 or weight_scale is None or x_scale is None:
        return x.new_zeros(shape, dtype=FLOAT_NAMES[out_dtype])
    (y,) = GROUPED_MATMUL(
        x=[x.reshape(-1, inputs).contiguous()],
        weight=[weight.contiguous().transpose(1, 2)],
        scale=[weight_scale.float().contiguous().transpose(1, 2)],
        per_token_scale=[x_scale.float().reshape(-1, x_scale.shape[-1]).contiguous()],
        group_list=ends_of(x, expert_counts, alignment),
        split_item=3,
        group_type=0,
        group_list_type=CUMSUM,
        act_type=0,
        output_dtype=FLOAT_NAMES[out_dtype],
    )
    return y.view(shape)  # type: ignore[no-any-return]  # the vendor's call
