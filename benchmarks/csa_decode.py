"""One CSA layer's core decoding one token on the host: lightning_indexer, then hybrid_attention over what it selects.

    python benchmarks/csa_decode.py [--contexts 65536 262144 1048576] [--repeats 20] [--threads 2]

Shapes of DeepSeek-V4-Flash: 64 heads of 512, window 128, 512 entries selected by an indexer of 64 heads of 128, one
entry per 4 tokens, blocks of 64 entries in random order. Milliseconds after a warm-up call: wall time, median and
least, and the CPU time of the process, likewise, for a machine that others use too. "extra" is by how much the resident
set grows at a call's peak. At the smallest context the judge compares what is timed with the references.

Where transformers is installed, the same core of the same layer in DeepseekV4Attention follows, on the same values, the
two called in turn: DeepseekV4IndexerScorer, topk, the mask and eager_attention_forward. It attends to all entries, most
of them masked, so that its time and memory grow with the context (--beside 16384 65536).
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import isolith
from isolith import Make
from isolith.materials.byte_pools import byte_pool
from isolith.ops import attention
from isolith_conformance.judge import judge

try:
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs
except ImportError:
    theirs = None  # type: ignore[assignment]  # a module, or none

HEADS, DIM, WINDOW, K, INDEX_HEADS, INDEX_DIM, RATIO, BLOCK = 64, 512, 128, 512, 64, 128, 4, 64

Call = dict[str, Any]  # Any: an operator's arguments
Run = Callable[[], Any]  # Any: tensors


@dataclass(frozen=True, kw_only=True)
class Formats:
    """How a layer keeps its queries, keys and entries: a float dtype, or bytes of an entry."""

    name: str
    query: torch.dtype
    keys: torch.dtype | int
    entries: torch.dtype | int


FORMATS = (
    Formats(name="float32", query=torch.float32, keys=torch.float32, entries=torch.float32),
    Formats(name="bfloat16", query=torch.bfloat16, keys=torch.bfloat16, entries=torch.bfloat16),
    Formats(name="132 + 584 bytes", query=torch.bfloat16, keys=132, entries=584),
    Formats(name="68 + 584 bytes", query=torch.bfloat16, keys=68, entries=584),
)


def pool(make: Make, kind: torch.dtype | int, blocks: int, dim: int) -> Tensor:
    """A pool of `blocks` blocks."""
    if isinstance(kind, int):
        return byte_pool(make, kind, blocks, BLOCK)
    return torch.randn(blocks, BLOCK, dim, dtype=torch.float32).to(kind)


def layer(formats: Formats, context: int) -> tuple[Call, Call]:
    """Arguments of the indexer and of the attention, for the last token of a context; the selection is missing."""
    torch.manual_seed(0)
    make = Make(formats.query)
    blocks = -(-context // RATIO // BLOCK)
    table = torch.randperm(blocks).int()[None]
    ring = torch.arange(-(-context // BLOCK)).remainder(-(-WINDOW // BLOCK)).int()[None]
    cu_seqlens, start_pos = make.batch([1], [context - 1])
    q: Call = {"q": make.normal(1, INDEX_HEADS, INDEX_DIM)}
    if formats.keys == 132:
        q = {"q": q["q"].to(torch.float8_e4m3fn), "q_scale": make.uniform(1, INDEX_HEADS, dtype=torch.float32)}
    if formats.keys == 68:
        packed = make.integers(0, 256, 1, INDEX_HEADS, INDEX_DIM // 2, dtype=torch.uint8)
        q = {"q": packed, "q_scale": make.full(1.0, 1, INDEX_HEADS, INDEX_DIM // 32, dtype=torch.float32)}
    batch = {"cu_seqlens": cu_seqlens, "start_pos": start_pos, "ratio": RATIO}
    index = q | batch | {"weights": make.normal(1, INDEX_HEADS), "block_table": table, "k": K}
    index |= {"k_cache": pool(make, formats.keys, blocks, INDEX_DIM), "max_entries": context // RATIO}
    index |= {"softmax_scale": (INDEX_DIM * INDEX_HEADS) ** -0.5}
    attend = batch | {"q": make.normal(1, HEADS, DIM), "window": WINDOW, "softmax_scale": DIM**-0.5}
    attend |= {"sink": make.normal(HEADS, dtype=torch.float32), "window_block_table": ring}
    attend |= {"window_cache": pool(make, formats.entries, -(-WINDOW // BLOCK), DIM)}
    attend |= {"compressed_cache": pool(make, formats.entries, blocks, DIM), "compressed_block_table": table}
    return index, attend


def bound(index: Call, attend: Call) -> tuple[Run, Run, Run]:
    """(the indexer's call, the attention's call on what it selects, both); `attend` gets the selection."""
    select = isolith.bind(attention.lightning_indexer, **index)
    attend["topk_indices"], attend["topk_length"] = select(**index)
    attended = isolith.bind(attention.hybrid_attention, **attend)

    def both() -> Any:  # Any: tensors
        indices, length = select(**index)
        return attended(**attend | {"topk_indices": indices, "topk_length": length})

    return lambda: select(**index), lambda: attended(**attend), both


def timed(calls: tuple[Run, ...], repeats: int) -> list[tuple[float, float, float, float]]:
    """Milliseconds of each call, one after the other in every round: wall, median and least; CPU, likewise."""
    walls: list[list[float]] = [[] for _ in calls]
    processes: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(repeats):
        for call, wall, process in zip(calls, walls, processes, strict=True):
            started = time.perf_counter(), time.process_time()
            call()
            wall.append((time.perf_counter() - started[0]) * 1e3)
            process.append((time.process_time() - started[1]) * 1e3)
    return [
        (statistics.median(wall), min(wall), statistics.median(process), min(process))
        for wall, process in zip(walls, processes, strict=True)
    ]


def said(times: tuple[float, float, float, float]) -> str:
    """Figures of one call."""
    return "{:8.2f} (least {:7.2f}, cpu {:8.2f}, least {:7.2f})".format(*times)


def extra_memory(call: Run) -> float:
    """MiB by which the resident set grows at the peak of a warm call; Linux alone can say."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    call()
    return (resident("VmHWM") - before) / 1024


def resident(field: str) -> int:
    """A KiB figure of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(formats: Formats, context: int, repeats: int, judged: bool) -> str:
    """One row of the table."""
    index, attend = layer(formats, context)
    select, attended, both = bound(index, attend)
    verdict = ""
    if judged:
        parts = ((attention.lightning_indexer, index, select()), (attention.hybrid_attention, attend, attended()))
        found = [judge(operator, operator.arguments(**call), list(result)) for operator, call, result in parts]
        verdict = "  " + "; ".join(each.problem or "correct" for each in found)
    rows = timed((both, select, attended), repeats)
    names = (f"{formats.name:16} {context:8}  both", "indexer", "attention")
    columns = (f"{name} {said(row)}" for name, row in zip(names, rows, strict=True))
    return "  ".join(columns) + f"  extra {extra_memory(both):5.1f} MiB{verdict}"


def core_of_transformers(index: Call, attend: Call) -> Run:
    """The same core by transformers' functions, on pages laid side by side before."""
    config = DeepseekV4Config(num_hidden_layers=1, layer_types=["compressed_sparse_attention"])
    scorer = theirs.DeepseekV4IndexerScorer(config)
    scorer.weights_proj = torch.nn.Identity()  # the weights are given
    module = SimpleNamespace(num_key_value_groups=HEADS, sinks=attend["sink"].to(attend["q"].dtype), training=False)
    table = index["block_table"][0].long()
    keys = index["k_cache"][table].flatten(0, 1)[None, : index["max_entries"]]
    entries = attend["compressed_cache"][table].flatten(0, 1)[None, None, : index["max_entries"]]
    window = attend["window_cache"].flatten(0, 1)[None, None]

    def run() -> Tensor:
        selected = scorer(index["q"][None], keys, index["weights"][None]).topk(K, dim=-1).indices
        kv = torch.cat((window, entries), dim=2)
        mask = kv.new_full((1, 1, 1, kv.shape[2]), -torch.inf)
        mask[..., :WINDOW] = 0.0
        mask.scatter_(-1, selected[:, None] + WINDOW, 0.0)
        query = attend["q"][:, :, None]
        out, _ = theirs.eager_attention_forward(module, query, kv, kv, mask, attend["softmax_scale"])
        return out[0]

    return run


@torch.inference_mode()
def compare(formats: Formats, context: int, repeats: int) -> str:
    """One row beside transformers."""
    index, attend = layer(formats, context)
    *_, both = bound(index, attend)
    other = core_of_transformers(index, attend)
    ours, others = both()[0].float(), other().float()
    (mine, their) = timed((both, other), repeats)
    ratios = f"ratio of medians {their[0] / mine[0]:.1f}, cpu {their[2] / mine[2]:.1f}"
    difference = f"largest difference {float((ours - others).abs().max()):.1e} of {float(ours.abs().max()):.2f}"
    return (
        f"{formats.name:16} {context:8}  isolith {said(mine)}  transformers {said(their)}  {ratios}  {difference}"
        f"  extra {extra_memory(both):.1f} and {extra_memory(other):.1f} MiB"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1 << 16, 1 << 18, 1 << 20])
    parser.add_argument("--beside", type=int, nargs="*", default=[1 << 14, 1 << 16])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.repeats} repeats; milliseconds")
    for context in options.contexts:
        for formats in FORMATS:
            print(measure(formats, context, options.repeats, context == min(options.contexts)), flush=True)
    for context in options.beside if theirs else ():
        for formats in FORMATS[:2]:
            print(compare(formats, context, options.repeats), flush=True)


if __name__ == "__main__":
    main()
