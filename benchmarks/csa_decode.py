"""One CSA layer's core decoding one token on the host: lightning_indexer, then sparse_attn over window and selection.

    python benchmarks/csa_decode.py [--contexts 65536 262144 1048576] [--repeats 20] [--threads 2]

Shapes of DeepSeek-V4-Flash: 64 heads of 512, window 128, 512 entries selected by an indexer of 64 heads of 128, one
entry per 4 tokens, blocks of 64 entries. Wall times in milliseconds after a warm-up call, median and least; the median
CPU time of the process, for a machine that others use too; and by how much the resident set grows at a call's peak.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import isolith
from isolith import Make
from isolith.numerics.byte_pools import byte_pool
from isolith.ops import attention

HEADS, DIM, WINDOW, K, INDEX_HEADS, INDEX_DIM, RATIO, BLOCK = 64, 512, 128, 512, 64, 128, 4, 64


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


def layer(formats: Formats, context: int) -> tuple[Callable[[], Any], Callable[[], Any]]:  # Any: tensors
    """(the indexer's call, the attention's call) for the last token of a context."""
    make = Make(formats.query)
    entries = context // RATIO
    blocks = -(-entries // BLOCK)
    keys, compressed = pool(make, formats.keys, blocks, INDEX_DIM), pool(make, formats.entries, blocks, DIM)
    recent = pool(make, formats.entries, -(-WINDOW // BLOCK), DIM)
    table, near = torch.randperm(blocks).int()[None], torch.arange(recent.shape[0]).int()[None]
    cu_seqlens, start_pos = make.batch([1], [context - 1])
    q, weights = make.normal(1, INDEX_HEADS, INDEX_DIM), make.normal(1, INDEX_HEADS)
    index: dict[str, Any] = {"q": q, "q_scale": None}  # Any: arguments
    if formats.keys == 132:
        index = {"q": q.to(torch.float8_e4m3fn), "q_scale": make.uniform(1, INDEX_HEADS, dtype=torch.float32)}
    if formats.keys == 68:
        packed = make.integers(0, 256, 1, INDEX_HEADS, INDEX_DIM // 2, dtype=torch.uint8)
        index = {"q": packed, "q_scale": make.full(1.0, 1, INDEX_HEADS, INDEX_DIM // 32, dtype=torch.float32)}
    index |= {"weights": weights, "k_cache": keys, "block_table": table, "cu_seqlens": cu_seqlens}
    index |= {"start_pos": start_pos, "ratio": RATIO, "k": K, "max_entries": entries, "softmax_scale": 2.0**-6.5}
    select = isolith.bind(attention.lightning_indexer, **index)
    selected, count = select(**index)
    given: dict[str, Any] = {
        "q": make.normal(1, HEADS, DIM),
        "kv_cache": recent,
        "indices": torch.arange(WINDOW).int()[None],
    }
    given |= {"softmax_scale": DIM**-0.5, "sink": make.normal(HEADS, dtype=torch.float32), "block_table": near}
    given |= {"cu_seqlens": cu_seqlens, "extra_kv_cache": compressed, "extra_indices": selected}
    given |= {"extra_topk_length": count, "extra_block_table": table}
    attend = isolith.bind(attention.sparse_attn, **given)
    return lambda: select(**index), lambda: attend(**given)


def timed(call: Callable[[], Any], repeats: int) -> tuple[float, float, float]:  # Any: tensors
    """(median wall, least wall, median CPU) milliseconds."""
    call()
    walls, processes = [], []
    for _ in range(repeats):
        wall, process = time.perf_counter(), time.process_time()
        call()
        walls.append((time.perf_counter() - wall) * 1e3)
        processes.append((time.process_time() - process) * 1e3)
    return statistics.median(walls), min(walls), statistics.median(processes)


def extra_memory(call: Callable[[], Any]) -> float:  # Any: tensors
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


def measure(formats: Formats, context: int, repeats: int) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    calls = layer(formats, context)
    (indexer, least_indexer, cpu_indexer), (attn, least_attn, cpu_attn) = (timed(call, repeats) for call in calls)
    memory = max(map(extra_memory, calls))
    return (
        f"{formats.name:16} {context:8}  indexer {indexer:8.2f} (least {least_indexer:7.2f}, cpu {cpu_indexer:7.2f})  "
        f"attention {attn:7.2f} (least {least_attn:6.2f}, cpu {cpu_attn:6.2f})  extra {memory:5.1f} MiB"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1 << 16, 1 << 18, 1 << 20])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.repeats} repeats; milliseconds")
    for context in options.contexts:
        for formats in FORMATS:
            print(measure(formats, context, options.repeats), flush=True)


if __name__ == "__main__":
    main()
