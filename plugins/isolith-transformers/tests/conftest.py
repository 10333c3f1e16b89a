"""Models before and after `apply`, made once for all tests of a kind."""

import copy
from collections.abc import Callable

import isolith_transformers
import pytest
import torch
from isolith_transformers import tiny
from transformers import PreTrainedModel

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "window": lambda: tiny.v4(["window", "window"]),
    "csa": lambda: tiny.v4(["csa", "csa"]),
    "hca": lambda: tiny.v4(["hca", "hca"]),
    "hash": lambda: tiny.v4(["window", "csa"], hash_layers=2),
    "v4": lambda: tiny.v4(["window", "csa", "hca"], hash_layers=1),
    "v3": tiny.v3,
    "v3 without yarn": lambda: tiny.v3(yarn=False, q_lora_rank=None, rope_interleave=False),
    "v3 amplified": lambda: tiny.v3(mscale=0.5),
    "v3.2": tiny.v32,
}


class Pair:
    """A model and its changed copy, whose blocks are small so that sequences cross many."""

    def __init__(self, name: str) -> None:
        self.untouched = MODELS[name]()
        self.changed = copy.deepcopy(self.untouched)
        isolith_transformers.apply(self.changed, block_size=8)


@pytest.fixture(scope="session")
def pairs() -> Callable[[str], Pair]:
    """The pair of a name."""
    made: dict[str, Pair] = {}

    def pair(name: str) -> Pair:
        if name not in made:
            made[name] = Pair(name)
        return made[name]

    return pair


@pytest.fixture(autouse=True)
def _inference():
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
