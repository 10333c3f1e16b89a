"""Run a DeepSeek-V4 on a backend, prompt and decoding with paged caches, and compare its logits with the host's.

python whole_model.py cuda                  # on the backend's device
python whole_model.py ascend --twin         # on its twin; ISOLITH_TWIN says which chip that stands for
python whole_model.py ascend --hidden 4096  # as wide as V4-Flash

Both run the same 16-bit weights; the errors are those against transformers' untouched model in float32. The exit code
is 1 where the backend's error is more than 1.5 times the host's, or where decoding departs from the prompt's logits.
"""

import argparse
import copy
import importlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import isolith_transformers
import torch
from isolith_transformers import tiny
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import isolith
from isolith.dispatch import dispatcher

LAYERS = ("window", "csa", "hca", "csa")
LIMIT = 1.5  # as the conformance suite's R1: how much worse than PyTorch in the same dtype is still right


def model(hidden: int, layers: Sequence[str]) -> PreTrainedModel:
    """A V4 with the released ones' heads, windows and compressors, narrow and with 16 experts."""
    return tiny.v4(
        layers,
        hash_layers=1,
        hca_ratio=128,
        hidden_size=hidden,
        moe_intermediate_size=512,
        num_attention_heads=64,
        head_dim=512,
        q_lora_rank=256,
        qk_rope_head_dim=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        o_groups=4,
        o_lora_rank=256,
        sliding_window=128,
        index_n_heads=64,
        index_head_dim=128,
        index_topk=512,
    )


def logits(model: Any, ids: Tensor, steps: Sequence[int]) -> Tensor:  # Any: transformers' models have no types
    """[batch, tokens, vocabulary] float64 on the host, a cache passed from call to call."""
    cache, outputs, start = DynamicCache(config=model.config), [], 0
    for step in steps:
        outputs.append(model(ids[:, start : start + step], past_key_values=cache).logits.cpu().double())
        start += step
    return torch.cat(outputs, dim=1)


def rms(values: Tensor) -> float:
    """Root of the mean square."""
    return float(values.square().mean().sqrt())


@torch.no_grad()
def compare(device: str, arguments: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """Errors of a prompt alone and of a prompt with decoding, what ran, and what stepped down."""
    dtype = getattr(torch, arguments.dtype)
    untouched = model(arguments.hidden, arguments.layers).to(dtype).float()
    host = isolith_transformers.apply(copy.deepcopy(untouched).to(dtype)).model
    there = isolith_transformers.apply(copy.deepcopy(untouched).to(dtype).to(device)).model
    ids = tiny.ids(2, arguments.tokens + arguments.decode)
    wanted = untouched(ids, use_cache=False).logits.double()
    found: dict[str, Any] = {}  # Any: JSON
    calls: Counter[tuple[str, str]] = Counter()
    fallbacks: dict[str, str] = {}
    for name, steps in (
        ("prompt", [arguments.tokens + arguments.decode]),
        ("prompt, then token by token", [arguments.tokens, *[1] * arguments.decode]),
    ):
        with isolith.override(backend="cpu"):
            own = rms(logits(host, ids, steps) - wanted)
        with isolith.override(fallback="allow"), isolith.record() as counted:
            error = rms(logits(there, ids.to(device), steps) - wanted)
            fallbacks.update({record.operator: record.reason for record in isolith.fallbacks()})
        calls.update(counted)
        found[name] = {"host": own, "backend": error, "ratio": error / own}
    return {
        "order": rms(wanted),
        "errors": found,
        "calls": {f"{operator}: {kernel}": count for (operator, kernel), count in sorted(calls.items())},
        "fallbacks": fallbacks,
    }


def main() -> int:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend")
    parser.add_argument("--twin", action="store_true", help="on the backend's twin instead of its device")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", nargs="+", default=LAYERS, choices=sorted(tiny.LAYER_TYPES))
    parser.add_argument("--tokens", type=int, default=290, help="of the prompt")
    parser.add_argument("--decode", type=int, default=10, help="tokens after it, one a call")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = {backend.name: backend for backend in dispatcher().registry.backends}
    if arguments.backend not in known:
        parser.error(f"there is no backend {arguments.backend!r}; known: {', '.join(known)}")
    backend = known[arguments.backend]
    if arguments.twin:
        if backend.twin is None:
            parser.error(f"{backend.name} has no twin")
        importlib.import_module(backend.twin)
    with isolith.override(backend=backend.name):
        found = compare(backend.device_type, arguments)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        print_table(found)
    worst = max(error["ratio"] for error in found["errors"].values())
    return int(not worst <= LIMIT)


def print_table(found: dict[str, Any]) -> None:  # Any: JSON
    """For a terminal."""
    print(f"logits of order {found['order']:.2g}; root mean square of errors against float32")
    for name, error in found["errors"].items():
        print(f"  {name:<30} host {error['host']:.4g}  backend {error['backend']:.4g}  ratio {error['ratio']:.2f}")
    print("what ran")
    for name, count in found["calls"].items():
        print(f"  {count:>6}  {name}")
    print("what has no kernel for a call")
    for operator, reason in found["fallbacks"].items():
        print(f"  {operator}: {reason}")


if __name__ == "__main__":
    sys.exit(main())
