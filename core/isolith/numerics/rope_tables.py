"""Tables of rotary angles, with YaRN.

    f_i = theta^(-2i/dims);  angle = fp32(position) * fp32(f_i), rounded to float32; then cosine and sine

YaRN: c(r) = dims*ln(original_length/(2*pi*r)) / (2*ln(theta)); low = max(floor(c(beta_fast)), 0), high =
min(ceil(c(beta_slow)), dims-1), high + 0.001 where they are equal; ramp_i = clamp((i-low)/(high-low), 0, 1);
f_i <- f_i*(1-ramp_i) + f_i/factor*ramp_i. The amplitude stays 1. The angles are rounded to float32 as the model
definitions round them: at position 1e6 an exact angle differs by up to 0.04 rad from what checkpoints were trained on.

Source: arXiv:2309.00071 (YaRN); DeepSeek-V4 inference/model.py, precompute_freqs_cis.
"""

import math

import torch
from torch import Tensor


def rope_frequencies(
    dims: int,
    theta: float,
    *,
    factor: float = 1.0,
    original_length: int = 0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Tensor:
    """Frequencies [dims/2] float32; factor 1 or original_length 0 leaves YaRN out."""
    pair = torch.arange(0, dims, 2, dtype=torch.float32)
    frequency = 1.0 / theta ** (pair / dims)
    if factor == 1.0 or original_length == 0:
        return frequency

    def correction(rotations: float) -> float:
        return dims * math.log(original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(correction(beta_fast)), 0)
    high: float = min(math.ceil(correction(beta_slow)), dims - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dims // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequency * (1 - ramp) + frequency / factor * ramp


def rope_tables(frequencies: Tensor, length: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(cos_table, sin_table) for positions 0..length-1: [length, dims/2] float32 each, as `rope` takes them."""
    position = torch.arange(length, dtype=torch.float32)
    angle = position[:, None] * frequencies.to(torch.float32).cpu()
    return angle.cos().to(device), angle.sin().to(device)
