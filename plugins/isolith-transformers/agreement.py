"""Print how far models changed by apply are from untouched ones, in float32, and how fast they are.

python agreement.py             # tables of agreement
python agreement.py --speed     # and of speed
"""

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import isolith_transformers
import torch
import transformers
from isolith_transformers import tiny
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import isolith

LENGTH = 300
CHUNKS = (37, 64, 1, 157, 41)
PROMPT = 130
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "V4, window layers alone": lambda: tiny.v4(["window"] * 3),
    "V4, CSA layers alone": lambda: tiny.v4(["csa"] * 3),
    "V4, HCA layers alone, ratio 128": lambda: tiny.v4(["hca"] * 3, hca_ratio=128),
    "V4, hash experts": lambda: tiny.v4(["window", "csa", "hca"], hash_layers=3, hca_ratio=128),
    "V4, all kinds, 6 layers": lambda: tiny.v4(
        ["window", "window", "csa", "hca", "csa", "window"], hash_layers=2, hca_ratio=128, index_topk=16
    ),
    "V3": tiny.v3,
    "V3 without YaRN": lambda: tiny.v3(yarn=False),
    "V3.2": tiny.v32,
}


def in_steps(model: Any, ids: Tensor, steps: Sequence[int]) -> Tensor:  # Any: a model with generate
    """Logits of `ids`, a cache passed from call to call."""
    cache, outputs, start = DynamicCache(config=model.config), [], 0
    for step in steps:
        outputs.append(model(ids[:, start : start + step], past_key_values=cache).logits)
        start += step
    return torch.cat(outputs, dim=1)


def generated(model: Any, ids: Tensor, beams: int) -> tuple[Tensor, Tensor]:  # Any: a model with generate
    """(tokens, logits) of 20 tokens after `ids`."""
    output = model.generate(
        ids,
        max_new_tokens=20,
        do_sample=False,
        num_beams=beams,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences, torch.stack(output.logits)


def agreement(make: Callable[[], PreTrainedModel]) -> dict[str, float]:
    """Largest absolute difference of logits, by kind of call."""
    untouched = make()
    changed = copy.deepcopy(untouched)
    isolith_transformers.apply(changed)
    ids = tiny.ids(2, LENGTH)
    wanted = untouched(ids, use_cache=False).logits
    decode = (PROMPT, *[1] * (LENGTH - PROMPT))
    found = {
        "order": float(wanted.std()),
        "prefill": difference(changed(ids, use_cache=False).logits, wanted),
        "chunks": difference(in_steps(changed, ids, CHUNKS), wanted),
        "decode": difference(in_steps(changed, ids, decode), wanted),
        "own decode": difference(in_steps(untouched, ids, decode), wanted),
    }
    for name, beams in (("greedy", 1), ("3 beams", 3)):
        (tokens, logits), (same, those) = (generated(model, ids[:, :PROMPT], beams) for model in (changed, untouched))
        found[name] = difference(logits, those) if torch.equal(tokens, same) else float("inf")
    return found


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return float((a - b).abs().max())


def mid_size() -> PreTrainedModel:
    """A V4 of 143 million parameters, with the head dimensions of the released ones."""
    return tiny.v4(
        ["window", "csa", "hca", "csa"],
        hash_layers=1,
        hca_ratio=128,
        hidden_size=1024,
        moe_intermediate_size=512,
        num_attention_heads=16,
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
        index_topk=128,
    )


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Median time of a run after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def speed(name: str, make: Callable[[], PreTrainedModel], length: int, repeats: int) -> None:
    """Print times of a prefill and of a decode step, of both models."""
    untouched = make()
    changed = copy.deepcopy(untouched)
    isolith_transformers.apply(changed)
    ids = tiny.ids(1, length)
    for call in ("prefill", "decode step"):
        times = []
        for model in (untouched, changed):
            if call == "prefill":
                times.append(median_ms(partial(model, ids, use_cache=False), repeats))
                continue
            cache = DynamicCache(config=model.config)
            model(ids, past_key_values=cache)
            times.append(median_ms(partial(model, ids[:, :1], past_key_values=cache), 40))
        before, after = times
        print(f"| {name} | {call}, {length} tokens | {before:.1f} | {after:.1f} | {after / before:.2f} |")


@torch.no_grad()
def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speed", action="store_true", help="measure times too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, isolith {isolith.__version__}, ", end=""
    )
    print(f"{platform.machine()}, 1 thread, float32\n")
    columns = ("order", "prefill", "chunks", "decode", "own decode", "greedy", "3 beams")
    print(f"| model | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, make in MODELS.items():
        found = agreement(make)
        print(f"| {name} | {' | '.join(f'{found[column]:.2g}' for column in columns)} |", flush=True)
    if arguments.speed:
        print("\n| model | call | untouched, ms | changed, ms | ratio |\n|---|---|---|---|---|")
        speed("V4 tiny", MODELS["V4, all kinds, 6 layers"], LENGTH, 5)
        speed("V3.2 tiny", MODELS["V3.2"], LENGTH, 5)
        speed("V4, 4 layers of 1024", mid_size, 512, 3)


if __name__ == "__main__":
    main()
