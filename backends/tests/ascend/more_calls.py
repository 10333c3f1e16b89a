"""Calls in the vendor's shapes that the operators' samples have in other shapes alone: they show a trap each."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from isolith import Make, Sample
from isolith.materials.indexer import batch_of_scores
from isolith.ops.attention.kv_compress import arguments


def of_indexer(make: Make) -> Iterator[Sample]:
    few = batch_of_scores(make, [3, 1], [0, 20], 1, 8, 128, 16)
    yield Sample("fewer_keys_than_listed", **few | {"k": 64})
    weights = make.normal(*few["weights"].shape, dtype=torch.float32)
    yield Sample("float32_weights", **few | {"k": 8, "weights": weights})


def of_compressor(make: Make) -> Iterator[Sample]:
    call = arguments(make, [21, 5], [0, 21], dim=128, hidden=1024, norm_of_x=True)
    table, spare = call["state_block_table"].clone(), torch.full_like(call["state_cache"][:1], torch.nan)
    table[0, :4] = table[1, :4] = -1
    call["state_block_table"] = torch.where(table >= 0, table + 1, -1).to(torch.int32)
    call["state_cache"] = torch.cat((spare, call["state_cache"], spare))
    yield Sample("old_rows_are_not_kept_128", **call)
    last = int((table[1] >= 0).nonzero()[-1])
    yield Sample("table_shorter_than_the_call", **call | {"state_block_table": call["state_block_table"][:, :last]})


def of_act_quant(make: Make) -> Iterator[Sample]:
    x = make.normal(4, 256)
    x[0, :128] = 0.0
    x[1, 128:] *= 1e-6
    for scale_format in ("float32", "ue8m0"):
        yield Sample(f"zeros_and_tiny_{scale_format}", x=x, scale_format=scale_format)


def of_permute(make: Make) -> Iterator[Sample]:
    rows = make.integers(-127, 128, 9, 16, dtype=torch.int8)
    scale = make.uniform(9, 1, dtype=torch.float32)
    yield Sample("int8_without_gaps", x=rows, x_scale=scale, topk_idx=make.integers(-1, 6, 9, 3), experts=6)


def of_projection(make: Make) -> Iterator[Sample]:
    weights = {"wo_a": make.normal(16, 16, 4096, std=4096**-0.5), "wo_b": make.normal(32, 256, std=0.0625)}
    yield Sample("rows_of_65536", x=make.normal(2, 128, 512), **weights)


MORE: dict[str, Callable[[Make], Iterator[Sample]]] = {
    "lightning_indexer": of_indexer,
    "kv_compress": of_compressor,
    "act_quant_fp8": of_act_quant,
    "moe_permute": of_permute,
    "grouped_output_proj": of_projection,
}


def samples_of(operator: Any, make: Make) -> Iterator[Sample]:  # Any: operators of every signature
    """The operator's own samples, and those of here."""
    yield from operator.samples(make)
    yield from MORE.get(operator.name, lambda _: iter(()))(make)
