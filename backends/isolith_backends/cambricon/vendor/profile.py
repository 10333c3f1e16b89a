"""Which card and which release of torch_mlu_ops (tmo) the twin stands for.

Names and versions that public stacks state: FlagGems@ed2508bc backends.yaml and vllm-mlu@b9925203 requirements.txt for
the pairs of torch, torch_mlu and tmo; Cambricon/torch_mlu@d578002c for the capability (3.x is MLU370, 5.x is MLU590)
and for bfloat16 from 5.0; FlagGems@ed2508bc fused_moe for fp8 from 6.0. The products from 6.0 on have no public name:
such a card goes by its compiler architecture, mtp_613. The minor numbers 7 and 0 are assumptions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

CHIPS = {"mlu370": ("MLU370-X8", (3, 7)), "mlu590": ("MLU590-M9DE", (5, 0)), "mtp613": ("mtp_613", (6, 0))}
RELEASES = {"1.12.1": ("1.12.1+torch2.11.0", "1.33.1+torch2.11.0"), "day0": ("1.8.1+torch2.9.1", "1.29.1+torch2.9.1")}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One card with one release.

    Args:
        chip: A key of CHIPS.
        release: A key of RELEASES; "day0" is the release that the DeepSeek-V4 day-0 stack calls.
        ties: Which of equal scores a selection takes. No source says; a kernel may not depend on it.
    """

    chip: str = "mlu590"
    release: str = "1.12.1"
    ties: Literal["lowest", "highest"] = "lowest"

    @property
    def device_name(self) -> str:
        """What the runtime calls the card."""
        return CHIPS[self.chip][0]

    @property
    def capability(self) -> tuple[int, int]:
        """(major, minor), as the runtime says."""
        return CHIPS[self.chip][1]

    @property
    def day0(self) -> bool:
        """Whether the calls have the form of the day-0 stack."""
        return self.release == "day0"

    @property
    def tmo_version(self) -> str:
        """`torch_mlu_ops.__version__`."""
        return RELEASES[self.release][0]

    @property
    def torch_mlu_version(self) -> str:
        """`torch_mlu.__version__`."""
        return RELEASES[self.release][1]


CURRENT: ContextVar[Profile] = ContextVar("tmo_profile")
DEFAULT = Profile()


def named(text: str) -> Profile:
    """The profile of a name such as "mlu370" or "mlu590-day0"; no text gives an MLU590 with tmo 1.12.1."""
    chip, _, release = (text or DEFAULT.chip).partition("-")
    profile = Profile(chip=chip, release=release or DEFAULT.release)
    if profile.chip not in CHIPS or profile.release not in RELEASES:
        legal = ", ".join(f"{chip}-{release}" for chip in CHIPS for release in RELEASES)
        raise ValueError(f"a Cambricon twin is one of {legal}; got {text!r}")
    return profile


def current() -> Profile:
    """The profile of the call that is running."""
    return CURRENT.get(DEFAULT)


@contextmanager
def standing_for(profile: Profile) -> Iterator[None]:
    """Run calls as this profile's."""
    token = CURRENT.set(profile)
    try:
        yield
    finally:
        CURRENT.reset(token)
