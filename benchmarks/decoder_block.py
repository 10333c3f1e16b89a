"""One decoder block of DeepSeek-V4-Flash on the host: a CSA layer with its residual streams and its experts.

    python benchmarks/decoder_block.py [--decode 4096 65536 1048576] [--prefill 512 1024 2048 4096] [--experts 64]
    python benchmarks/decoder_block.py --beside 4096 --decode --prefill    # transformers alone

bfloat16 weights and caches; the layer is `isolith_conformance.layers.decoder_block`. Each row has the median of the
block, the sum of its operators' least times (each operator's own `cost` under the stream and product rates measured in
the same run), the ratio of the two, and what the operators took of it. `--beside N` runs a model of this one layer in
transformers, untouched and with Isolith's operators, on the same weights: a prompt of N tokens, then one token at
position N.
"""

import argparse
import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from isolith.dispatch import Recorder, dispatcher, references, using
from isolith.models import MODELS, V4
from isolith.operator import AnyOperator
from isolith.select import Explanation
from isolith_conformance.bench.clock import Clock
from isolith_conformance.bench.fill import BLOCK, FP32, Fill
from isolith_conformance.bench.machine import measure_limits, roofline
from isolith_conformance.bench.record import Limits
from isolith_conformance.bench.text import seconds
from isolith_conformance.bench.workloads import Setting
from isolith_conformance.judge import judge_beside
from isolith_conformance.layers import decoder_block

Arguments = dict[str, Any]  # Any: an operator's arguments
RATIO = 4


def compressor(model: V4, fill: Fill, at: Setting, name: str, dim: int) -> Arguments:
    """A compressor's weights, its state, and the pool that takes what it emits."""
    wide, blocks = 2 * dim, -(-at.context // RATIO // BLOCK)
    pool = "entries" if name == "main" else "keys"
    held = torch.arange(at.sequences)[:, None].expand(-1, -(-at.context // (2 * RATIO)))
    return {
        f"{name}_wkv": fill.normal(wide, model.hidden, std=model.hidden**-0.5),
        f"{name}_wgate": fill.normal(wide, model.hidden, std=model.hidden**-0.5),
        f"{name}_norm": fill.normal(dim, std=0.1, mean=1.0),
        f"{name}_ape": fill.normal(RATIO, wide, dtype=FP32),
        f"{name}_state": fill.normal(at.sequences, 2 * RATIO, 2 * wide, dtype=FP32),
        f"{name}_state_table": fill.given(held.contiguous()),
        pool: fill.normal(at.sequences * blocks, BLOCK, dim),
        f"{pool}_table": fill.table(at.sequences, at.context // RATIO),
    }


def attention(model: V4, fill: Fill, at: Setting) -> Arguments:
    """Weights and caches of a CSA layer."""
    wide, low = model.heads * model.head_dim, model.groups * model.o_rank
    cos, sin = fill.angles(at.context, model.rope_dim // 2)
    ring = -(-(model.window + at.new) // BLOCK) + 1
    table = torch.arange(-(-at.context // BLOCK)) % ring + ring * torch.arange(at.sequences)[:, None]
    return {
        "wq_a": fill.normal(model.q_rank, model.hidden, std=model.hidden**-0.5),
        "q_norm": fill.normal(model.q_rank, std=0.1, mean=1.0),
        "wq_b": fill.normal(wide, model.q_rank, std=model.q_rank**-0.5),
        "wkv": fill.normal(model.head_dim, model.hidden, std=model.hidden**-0.5),
        "kv_norm": fill.normal(model.head_dim, std=0.1, mean=1.0),
        "wo_a": fill.normal(model.groups, model.o_rank, wide // model.groups, std=(wide // model.groups) ** -0.5),
        "wo_b": fill.normal(model.hidden, low, std=low**-0.5),
        "sink": fill.normal(model.heads, dtype=FP32),
        "cos_table": cos,
        "sin_table": sin,
        **at.batch(fill),
        "window_cache": fill.normal(at.sequences * ring, BLOCK, model.head_dim),
        "window_table": fill.given(table),
        "window": model.window,
        "ratio": RATIO,
        "k": model.index_topk,
        "index_wq": fill.normal(model.index_heads * model.index_dim, model.q_rank, std=model.q_rank**-0.5),
        "index_weights": fill.normal(model.index_heads, model.hidden, std=model.hidden**-0.5),
        **compressor(model, fill, at, "main", model.head_dim),
        **compressor(model, fill, at, "index", model.index_dim),
    }


def block(model: V4, fill: Fill, at: Setting) -> Arguments:
    """Everything that the block takes; the router's bias makes its choice a balanced one."""
    n, hidden, inter = model.streams, model.hidden, model.inter
    given: Arguments = {"streams": fill.normal(at.tokens, n, hidden)}
    for name in ("attn", "ffn"):
        given[f"{name}_fn"] = fill.normal((2 + n) * n, n * hidden, std=(n * hidden) ** -0.5, dtype=FP32)
        given[f"{name}_scale"] = fill.uniform(3, low=0.5, high=1.5)
        given[f"{name}_base"] = fill.normal((2 + n) * n, std=0.5, dtype=FP32)
        given[f"{name}_norm"] = fill.normal(hidden, std=0.1, mean=1.0)
    return given | {
        "gate": fill.normal(at.experts, hidden, std=hidden**-0.5),
        "gate_bias": fill.normal(at.experts, std=0.1, dtype=FP32),
        "w13": fill.normal(at.experts, 2 * inter, hidden, std=hidden**-0.5),
        "w2": fill.normal(at.experts, hidden, inter, std=inter**-0.5),
        "shared_w13": fill.normal(2 * inter, hidden, std=hidden**-0.5),
        "shared_w2": fill.normal(hidden, inter, std=inter**-0.5),
        "per_token": model.experts_per_token,
        **attention(model, fill, at),
    }


class Parts(Recorder):
    """What the block's operators cost and take; the parts of an operator count as the operator."""

    def __init__(self, limits: Limits) -> None:
        active = dispatcher()
        super().__init__(active.registry, active.settings)
        self.limits, self.depth = limits, 0
        self.least: dict[str, float] = defaultdict(float)
        self.took: dict[str, float] = defaultdict(float)

    def function(self, operator: AnyOperator, explanation: Explanation) -> Callable[..., Any]:
        """The function, timed."""
        run = super().function(operator, explanation)
        if operator.name == decoder_block.name:
            return run

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            started = time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.took[operator.name] += time.perf_counter() - started
                    cost = operator.cost(**operator.arguments(*args, **kwargs))
                    self.least[operator.name] += roofline(cost, self.limits)[0]

        return timed


def row(model: V4, phase: str, context: int, tokens: int, options: argparse.Namespace, limits: Limits) -> float:
    """Print one step's row, and its operators; gives the median."""
    at = Setting(model=model, phase=phase, context=context, tokens=tokens, experts=options.experts)  # type: ignore[arg-type]
    given = decoder_block.arguments(**block(model, Fill(), at))
    before = {name: given[name].clone() for name in decoder_block.mutates} if phase == "decode" else {}

    def call() -> Any:  # Any: a tensor
        return decoder_block.reference(**given)

    call()
    wall = []
    for _ in range(options.repeats if phase == "decode" else 3):
        started = time.perf_counter()
        result = call()
        wall.append(time.perf_counter() - started)
    parts = Parts(limits)
    with using(parts):
        call()
    median, least = statistics.median(wall), sum(parts.least.values())
    quickest = f"least of {len(wall)} {seconds(min(wall))}"
    print(f"\n{phase}, context {context:,}, {tokens} tokens: {seconds(median)} ({quickest});")
    print(f"  its operators' least times {seconds(least)}; ratio {median / least:.2f}", flush=True)
    for name, took in sorted(parts.took.items(), key=lambda item: -item[1]):
        share = 100 * parts.least[name] / took
        print(f"    {name:22}{seconds(took):>9}  least {seconds(parts.least[name]):>9}  {share:5.1f} %")
    if before and options.check:
        print(f"  {checked(given, before, result)}", flush=True)
    return median


def checked(given: Arguments, before: Arguments, result: torch.Tensor) -> str:
    """The judge's verdict on a step of decoding, beside the references' results."""
    results = [result, *(given[name].clone() for name in decoder_block.mutates)]
    for name, value in before.items():
        given[name].copy_(value)
    with using(references(dispatcher())):
        expected = decoder_block.reference(**given)
    found = judge_beside(decoder_block, given, [expected, *(given[name] for name in before)], results)
    return found.problem or "right, beside the references"


def beside(context: int, experts: int) -> None:
    """A model of one layer, untouched and with Isolith's operators."""
    import isolith_transformers
    from isolith_transformers import tiny
    from transformers import DynamicCache

    model = MODELS["v4-flash"]
    assert isinstance(model, V4), "Flash is a V4"
    torch.set_default_dtype(torch.bfloat16)
    untouched = tiny.v4(
        ["csa"],
        hca_ratio=128,
        hidden_size=model.hidden,
        moe_intermediate_size=model.inter,
        num_attention_heads=model.heads,
        head_dim=model.head_dim,
        q_lora_rank=model.q_rank,
        qk_rope_head_dim=model.rope_dim,
        n_routed_experts=experts,
        num_experts_per_tok=model.experts_per_token,
        o_groups=model.groups,
        o_lora_rank=model.o_rank,
        sliding_window=model.window,
        index_n_heads=model.index_heads,
        index_head_dim=model.index_dim,
        index_topk=model.index_topk,
    ).to(torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    ours = isolith_transformers.apply(copy.deepcopy(untouched)).model
    ids = tiny.ids(1, context + 8)
    found: dict[str, list[tuple[str, float, Any]]] = {"transformers": [], "isolith": []}
    for name, one in (("isolith", ours), ("transformers", untouched)):
        cache = DynamicCache(config=one.config)
        for what, part in [("prompt", ids[:, :context])] + [
            ("one token", ids[:, at : at + 1]) for at in range(context, context + 8)
        ]:
            started = time.perf_counter()
            logits = one(part, past_key_values=cache).logits[:, -1].float()
            found[name].append((what, time.perf_counter() - started, logits))
        print(f"  {name}: prompt {seconds(found[name][0][1])}, one token {seconds(token(found[name]))}", flush=True)
    theirs, mine = found["transformers"], found["isolith"]
    # The median: where rounding flips the choice of an expert, a token moves far, in either model.
    apart = statistics.median(float((a[2] - b[2]).norm() / a[2].norm()) for a, b in zip(theirs, mine, strict=True))
    print(f"beside transformers at {context:,} tokens: prompt {theirs[0][1] / mine[0][1]:.2f} times as fast,")
    print(
        f"  one token {token(theirs) / token(mine):.2f} times; the median token's logits differ by {100 * apart:.1f} %"
    )


def token(found: list[tuple[str, float, Any]]) -> float:
    """The median time of one token, the first apart."""
    return statistics.median(took for _, took, _ in found[2:])


@torch.no_grad()
def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decode", type=int, nargs="*", default=[4096, 65536, 1048576], help="contexts")
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 1024, 2048, 4096], help="tokens")
    parser.add_argument("--beside", type=int, nargs="*", default=[], help="contexts at which transformers runs too")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--check", action="store_true", help="judge the steps of decoding beside the references")
    options = parser.parse_args()
    model = MODELS["v4-flash"]
    assert isinstance(model, V4), "Flash is a V4"
    limits = measure_limits(Clock())
    rates = ", ".join(f"{name} {rate:,.0f} GFLOP/s" for name, rate in limits.gflops.items())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; reads {limits.read_gbs:.1f} GB/s; {rates}")
    for context in options.decode:
        row(model, "decode", context, 1, options, limits)
    medians = {tokens: row(model, "prefill", tokens, tokens, options, limits) for tokens in options.prefill}
    if len(medians) > 1:
        from isolith_conformance.bench.growth import slope

        print(f"\nprefill: time grows with tokens to the power {slope([*medians], [*medians.values()]):.2f}")
    for context in options.beside:
        beside(context, options.experts)


if __name__ == "__main__":
    main()
