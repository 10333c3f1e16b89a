"""What all the functions share: refusals in the vendor's manner, poison, and the hardware's number formats."""

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
HALVES = (torch.float16, torch.bfloat16)

POISON = {
    torch.int8: -128,
    torch.uint8: 0xFF,
    torch.int16: -(1 << 14),
    torch.int32: -(1 << 30),
    torch.int64: -(1 << 62),
    torch.bool: True,
}


def need(operator: str, holds: bool, rule: str) -> None:
    """Raise as the tiling of an operator does when a rule is broken."""
    if not holds:
        raise RuntimeError(f"call aclnn of {operator} failed, error code is 161002: {rule}")


def need_dtype(operator: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise unless a tensor has one of the dtypes."""
    need(operator, tensor.dtype in dtypes, f"{name} is {tensor.dtype}, not one of {list(dtypes)}")


def need_shape(operator: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless a tensor has the shape; -1 stands for any size."""
    fits = tensor.dim() == len(shape) and all(a in (-1, b) for a, b in zip(shape, tensor.shape, strict=True))
    need(operator, fits, f"{name} has shape {tuple(tensor.shape)}, not {shape}")


def poison(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """Memory that was never written: NaN, or a number far below every legal one."""
    return torch.full(tuple(shape), float("nan") if dtype.is_floating_point else POISON[dtype], dtype=dtype)


def hf32(values: Tensor) -> Tensor:
    """float32 with ten bits of mantissa, rounded toward zero, as the cube takes it in HF32."""
    return (values.float().contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def to_int8(values: Tensor, scale: Tensor) -> Tensor:
    """values / scale, rounded half to even; a row whose scale is no positive number holds nothing."""
    legal = scale > 0
    codes = (values / torch.where(legal, scale, 1.0)).round().clamp(-128, 127)
    return torch.where(legal, codes, float(POISON[torch.int8])).to(torch.int8)


def per_token(values: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 codes, float32 scales of rows): scale = amax / 127."""
    wide = values.float()
    scale = wide.abs().amax(-1) / 127.0 if wide.shape[-1] else wide.new_zeros(wide.shape[:-1])
    return to_int8(wide, scale[..., None]), scale


def rotated(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    """x*cos + rotate(x)*sin in float32: halves of the axis turned ("half") or neighbours ("interleave")."""
    wide = x.float()
    if mode == "half":
        first, second = wide.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    else:
        turned = torch.stack((-wide[..., 1::2], wide[..., ::2]), dim=-1).flatten(-2)
    return wide * cos.float() + turned * sin.float()
