"""Calls of torch_mlu_ops, in whichever form the release here has, and what a card takes of none of them.

1.12.1 and newer take arguments by keyword. Of the releases for DeepSeek-V4's day 0 only the calls of one stack are
public, the first arguments by place and the others by keyword: they are called so.

Source: domesticated_torch_mlu_ops 9fbf7df6 _ops.py (1.12.1), vllm-mlu b9925203 (tmo 1.8.1 and newer), torch_mlu
d578002c is_bf16_supported (bfloat16 from capability 5 on), FlagGems ed2508bc fused_moe (fp8 from 6 on).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from isolith import WhyNot
from isolith.kernel import in_range
from isolith_backends import cambricon
from isolith_backends.vendor_calls import VendorCall

PACKAGE = "torch_mlu_ops"
DAY0 = ">=1.8,<1.9"
"""Releases whose calls by place are public."""

BY_KEYWORD = ">=1.12"
"""Releases whose keywords are."""

HALF = (torch.bfloat16, torch.float16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def tmo(name: str, by_place: tuple[str, ...] = (), by_name: tuple[str, ...] = ()) -> VendorCall:
    """A function of torch_mlu_ops; `by_place` are the arguments that the day-0 stack gives by place."""
    return VendorCall((f"{PACKAGE}:{name}",), (*by_place, *by_name), by_place, is_day0)


def is_day0() -> bool:
    """Whether the release is one of day 0, by its version: the meaning of some arguments was another."""
    return in_range(cambricon.versions().get(PACKAGE, "0"), DAY0)


def why_not_card(**arguments: object) -> WhyNot:
    """What no call on this card takes: bfloat16 before capability 5, fp8 before 6."""
    card = cambricon.arch()
    major = int(card.partition(".")[0])
    for name, value in arguments.items():
        dtype = value.dtype if isinstance(value, Tensor) else value
        if major < 5 and dtype in (torch.bfloat16, "bfloat16"):
            return f"{name} is bfloat16; capability {card} has none, 5.0 has"
        if major < 6 and dtype in FP8:
            return f"{name} is fp8; capability {card} has none, 6.0 has"
    return None


def why_not(*refusals: Callable[..., WhyNot]) -> Callable[..., WhyNot]:
    """The card's refusal, then those of a kernel."""

    def first(**arguments: object) -> WhyNot:
        return next((reason for refuse in (why_not_card, *refusals) if (reason := refuse(**arguments))), None)

    return first


def int32(tensor: Tensor) -> Tensor:
    """Indices as every call takes them; the same tensor where it is so already."""
    return tensor.to(torch.int32).contiguous()
