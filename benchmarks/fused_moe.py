"""A mixture-of-experts layer on the host: the kernel, the composition of references, and transformers' grouped_mm.

    python benchmarks/fused_moe.py [--kinds bfloat16 float32 e2m1] [--tokens 1 16 256] [--repeats 7] [--threads 2]

Shapes of DeepSeek-V4-Flash on one rank: hidden 4096, inter 2048, 64 experts, 6 a token, clamp 10. The ways are called
round robin after a warm-up call. Wall times in milliseconds, median and least; the median CPU time of the process, for
a machine that others use too; the median of the ratios within a round; and the weights of active experts over the
median time, in GB/s. The reference is skipped with --skip-reference, since it takes seconds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import isolith

HIDDEN, INTER, EXPERTS, K, LIMIT = 4096, 2048, 64, 6, 10.0

Layer = dict[str, Any]  # Any: arguments of fused_moe


def layer(kind: str, tokens: int, weights: Layer) -> Layer:
    """Arguments of one call; every token chooses its experts at random."""
    generator = torch.Generator().manual_seed(tokens)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    chosen = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :K].int()
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    routing = torch.rand(tokens, K, generator=generator)
    return {"x": x, "topk_idx": chosen, "topk_weights": routing, **weights, "swiglu_limit": LIMIT}


def weights_of(kind: str) -> Layer:
    """Weights of all experts: copies of one random expert, each in memory of its own."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w13": (2 * INTER, HIDDEN), "w2": (HIDDEN, INTER)}
    if kind != "e2m1":
        one = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
        dtype = getattr(torch, kind)
        return {name: weight.to(dtype).expand(EXPERTS, -1, -1).contiguous() for name, weight in one.items()}
    made: Layer = {}
    for name, (n, k) in shapes.items():
        codes = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
        made[name] = codes.expand(EXPERTS, -1, -1).contiguous()
        made[f"{name}_scale"] = torch.full((EXPERTS, n, k // 32), 2.0**-8).to(torch.float8_e8m0fnu)
    return made


class Experts(torch.nn.Module):
    """The attributes that transformers' experts functions read from a module."""

    def __init__(self, w13: Tensor, w2: Tensor) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = w13, w2
        self.num_experts = w13.shape[0]
        self.has_gate, self.has_bias, self.is_transposed = True, False, False
        self._is_expert_parallel, self.has_post_expert_norm = False, False

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)


def ways(given: Layer, skip_reference: bool) -> dict[str, Callable[[], Tensor]]:
    """How to compute the layer, by name, ours first."""
    found: dict[str, Callable[[], Tensor]] = {"isolith cpu kernel": lambda: isolith.fused_moe(**given)}
    if given["w13"].dtype != torch.uint8:
        try:
            from transformers.integrations.moe import grouped_mm_experts_forward
        except ImportError:
            pass
        else:
            module = Experts(given["w13"], given["w2"])
            routing = (given["topk_idx"].long(), given["topk_weights"].to(given["x"].dtype))
            found["transformers grouped_mm"] = lambda: grouped_mm_experts_forward(module, given["x"], *routing)
    if not skip_reference:
        pins = dict.fromkeys(isolith.OPERATORS, "reference")

        def composition() -> Tensor:
            with isolith.override(kernels=pins):
                return isolith.fused_moe(**given)

        found["references"] = composition
    return found


def bytes_of_active(given: Layer) -> int:
    """Bytes of the weights, and their scales, of the experts that the tokens chose."""
    stored = sum(value.nbytes for name, value in given.items() if name.startswith("w"))
    return stored // EXPERTS * len(given["topk_idx"].unique())


def measure(calls: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) milliseconds of every call, round robin."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    with torch.inference_mode():
        for call in calls.values():
            call()
        for _ in range(repeats):
            for name, call in calls.items():
                wall, busy = time.perf_counter(), time.process_time()
                call()
                taken[name].append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - busy)))
    return taken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["bfloat16", "float32", "e2m1"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 256])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--skip-reference", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.repeats} repeats")
    print(f"{'kind':9} {'tokens':>6}  {'way':24} {'median':>9} {'least':>9} {'CPU':>9} {'ratio':>6} {'GB/s':>6}")
    for kind in options.kinds:
        weights = weights_of(kind)
        for tokens in options.tokens:
            given = layer(kind, tokens, weights)
            taken = measure(ways(given, options.skip_reference), options.repeats)
            ours = next(iter(taken.values()))
            for name, times in taken.items():
                wall = statistics.median(each[0] for each in times)
                ratio = statistics.median(each[0] / our[0] for each, our in zip(times, ours, strict=True))
                busy, least = statistics.median(each[1] for each in times), min(each[0] for each in times)
                rate = bytes_of_active(given) / wall / 1e6
                figures = f"{wall:9.1f} {least:9.1f} {busy:9.1f} {ratio:6.2f} {rate:6.1f}"
                print(f"{kind:9} {tokens:6}  {name:24} {figures}", flush=True)


if __name__ == "__main__":
    main()
