"""Every wrong adapter of this folder on the twin, judged as the suite judges; or the right ones, with the same calls.

Run as a program it prints, as JSON, what the judge says of the first call that shows each, "" where none does. The twin
takes the one place that torch has for a device, so that tests run this in a process of its own:

    trials.py [NAME ..]    the wrong adapters of the card and release that ISOLITH_TWIN names
    trials.py right        what is wrong with the right ones in the calls below
"""

import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import wrong_adapters as wrong

from isolith import OPERATORS, Make, Sample, plugins
from isolith.config import from_environment
from isolith.materials.indexer import batch_of_scores
from isolith.ops.attention.kv_compress import HCA, arguments
from isolith.ops.residual.hc_pre import weights
from isolith_backends.vendor_calls import VendorCall
from isolith_conformance.judge import Expectation, expect

Given = dict[str, Any]


def compressor_calls(make: Make) -> Iterator[Sample]:
    """Calls of the sizes that tmo takes: pages, rings shorter than the call, rows without a block, an odd number."""
    small: Given = {"dim": 128, "hidden": 16}
    yield Sample("pages", **arguments(make, [9, 1, 0, 5], [0, 7, 3, 2], **small))
    yield Sample("ring", **arguments(make, [13, 3, 1], [0, 6, 11], ring=8, rotate=True, **small))
    call = arguments(make, [21, 5], [0, 21], **small)
    call["state_block_table"][0, :4] = call["state_block_table"][1, :4] = -1
    table, spare = call["state_block_table"], torch.full_like(call["state_cache"][:1], torch.nan)
    call["state_block_table"] = torch.where(table >= 0, table + 1, -1).to(torch.int32)
    yield Sample("old_rows", **call | {"state_cache": torch.cat((spare, call["state_cache"], spare))})
    yield Sample("without_ape", **arguments(make, [4, 4], [0, 4], ape=False, **small))
    yield Sample("hca", **arguments(make, [130, 1, 3], [0, 127, 250], dim=512, hidden=16, **HCA))
    call = arguments(make, [3], **small)
    nowhere = {"state_cache": call["state_cache"][:0], "state_block_table": call["state_block_table"] * 0 - 1}
    yield Sample("no_blocks", **call | nowhere)


def indexer_calls(make: Make) -> Iterator[Sample]:
    """Visible entries without a block, in the middle and behind the table."""
    call = batch_of_scores(make, [3, 1, 2], [60, 39, 80], 4, 32, 128, 4) | {"k": 6}
    hidden = call["block_table"].clone()
    hidden[0, 1] = hidden[2, 3] = hidden[1, 0] = -1
    yield Sample("no_block", **call | {"block_table": hidden})
    # Scores that are one in bfloat16, in ascending order.
    call = batch_of_scores(make, [1], [95], 4, 32, 128, 4) | {"k": 4, "softmax_scale": 1.0}
    steps = 1 + torch.arange(24, dtype=torch.float32).view(6, 4, 1) / 512
    same = {name: torch.ones_like(call[name]) for name in ("q", "weights")}
    call |= same | {"k_cache": torch.zeros_like(call["k_cache"])}
    call["k_cache"][call["block_table"][0].long()] = steps.expand(6, 4, 128).to(call["k_cache"].dtype)
    yield Sample("close_scores", **call)
    call = batch_of_scores(make, [3, 1, 2], [60, 39, 80], 4, 32, 128, 4) | {"k": 6}
    yield Sample("short_table", **call | {"block_table": call["block_table"][:, :3].contiguous()})


def streams_of_a_large_model(make: Make) -> Iterator[Sample]:
    yield Sample("above_4096", streams=make.normal(1, 4, 4104), **weights(make, 4, 4104))


def other_streams(make: Make) -> Iterator[Sample]:
    wide = {"post": make.normal(2, 4, dtype=torch.float32), "comb": make.normal(2, 4, 4, dtype=torch.float32)}
    yield Sample("four_streams", x=make.normal(2, 64), streams=make.normal(2, 4, 64), **wide)


def unusual_routers(make: Make) -> Iterator[Sample]:
    """A group that wins has a score of 0 beside those of the group that loses; scores whose sum is not 1."""
    logits = make.tensor([[0.0, 0.0, 0.0, 200.0]], torch.float32)
    yield Sample("scores_of_0", logits=logits, k=2, score="softmax", groups=2, topk_groups=1)
    yield Sample("bare", logits=make.normal(3, 8, dtype=torch.float32), k=2, renormalize=False)


def pools_with_gaps(make: Make) -> Iterator[Sample]:
    slots = make.tensor([1, 9], torch.int32)
    yield Sample("gaps", cache=make.normal(3, 5, 8)[:, :4], x=make.normal(2, 8), slot_mapping=slots)


MORE: dict[str, Callable[[Make], Iterator[Sample]]] = {
    "kv_compress": compressor_calls,
    "lightning_indexer": indexer_calls,
    "hc_pre": streams_of_a_large_model,
    "hc_post": other_streams,
    "moe_gate": unusual_routers,
    "kv_cache_write": pools_with_gaps,
}


@functools.cache
def kernels() -> Given:
    """Every kernel of the backend, by its operator's name; its twin's device is made first."""
    importlib.import_module("isolith_backends.cambricon.twin")
    (row,) = (row for row in plugins.discover() if row.name == "cambricon")
    found, _ = plugins.kernels_of(plugins.load(row).backend)
    return {name: rows[0] for name, rows in found.items()}


@functools.cache
def due(name: str, dtype: str, sample: str) -> Expectation:
    """What is due for a call."""
    (found,) = (each for each in samples(name, dtype) if each.name == sample)
    operator = OPERATORS[name]
    return expect(operator, operator.arguments(**found.arguments), "exact" in found.tags, tuple(operator.declared))


def samples(name: str, dtype: str, more_alone: bool = False) -> Iterator[Sample]:
    """The calls below, then the operator's own."""
    make = Make(getattr(torch, dtype), seed=f"{name}-{dtype}")
    yield from MORE.get(name, lambda _: iter(()))(make)
    yield from () if more_alone else OPERATORS[name].samples(Make(getattr(torch, dtype), seed=f"{name}-{dtype}"))


def calls(name: str, dtype: str, taken: str, more_alone: bool = False) -> Iterator[tuple[str, Given]]:
    """(sample, arguments) that a kernel takes, or refuses with the words `taken`."""
    operator, kernel = OPERATORS[name], kernels()[name]
    for sample in samples(name, dtype, more_alone):
        call = operator.arguments(**sample.arguments)
        refused = kernel.requires.why_not(call) or (kernel.why_not and kernel.why_not(**call)) or ""
        large = {"invariants", "slow", "model"} & set(sample.tags) and name != "lightning_indexer"
        if not large and (taken in refused if taken else not refused):
            yield sample.name, call


def on_device(value: Any) -> Any:
    """A copy on the device with the same strides."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="mlu").copy_(value)


def problems(
    name: str, dtype: str, change: Callable[[Given], Given] = dict, taken: str = "", more_alone: bool = False
) -> Iterator[str]:
    """What is wrong with the results of every call, "" for nothing."""
    operator, kernel = OPERATORS[name], kernels()[name]
    for sample, call in calls(name, dtype, taken, more_alone):
        given = {key: on_device(value) for key, value in call.items()}
        try:
            made = kernel.fn(**change(given))
        except Exception as error:  # the vendor's call may raise anything
            yield f"{sample}: raises {type(error).__name__}: {error}"
            continue
        outputs = () if made is None else (made,) if isinstance(made, torch.Tensor) else made
        results = [each.cpu() for each in (*outputs, *(given[key] for key in operator.mutates))]
        problem = due(name, dtype, sample).verdict_on(results).problem
        yield "" if problem is None else f"{sample}: {problem}"


@contextmanager
def calling(function: str, change: Callable[[Given], Given], result: Callable[[Any], Any]) -> Iterator[None]:
    """Every call of one of tmo's functions with other arguments, or with other results."""
    right = VendorCall.__call__

    def call(self: VendorCall, **given: Any) -> Any:
        if self.names != (f"torch_mlu_ops:{function}",):
            return right(self, **given)
        return result(right(self, **change(given)))

    VendorCall.__call__ = call
    try:
        yield
    finally:
        VendorCall.__call__ = right


@contextmanager
def replacing(part: str, by: Callable[[Any], Any]) -> Iterator[None]:
    """Something else in the place of "module.name" of the backend."""
    module = importlib.import_module(f"isolith_backends.cambricon.{part.partition('.')[0]}")
    name = part.partition(".")[2]
    right = vars(module)[name]
    vars(module)[name] = by(right)
    try:
        yield
    finally:
        vars(module)[name] = right


def first(found: Iterator[str]) -> str:
    return next(filter(None, found), "")


def shown_by_calls(operator: str, function: str, dtype: str, change: Callable[[Given], Given]) -> str:
    with calling(function, change, lambda found: found):
        return first(problems(operator, dtype))


def shown_by_results(operator: str, function: str, dtype: str, result: Callable[[Any], Any]) -> str:
    with calling(function, dict, result):
        return first(problems(operator, dtype))


def shown_by_parts(operator: str, dtype: str, part: str, by: Callable[[Any], Any]) -> str:
    with replacing(part, by):
        return first(problems(operator, dtype))


def shown_by_arguments(operator: str, dtype: str, change: Callable[[Given], Given]) -> str:
    return first(problems(operator, dtype, change))


def shown_by_taking(operator: str, dtype: str, words: str) -> str:
    return first(problems(operator, dtype, taken=words))


KINDS: dict[str, list[tuple[dict[str, Any], Callable[..., str]]]] = {
    "mlu590-1.12.1": [
        (wrong.WRONG, shown_by_calls),
        (wrong.GIVEN_BACK, shown_by_results),
        (wrong.REPLACED, shown_by_parts),
        (wrong.IGNORED, shown_by_arguments),
        (wrong.TAKEN, shown_by_taking),
    ],
    "mlu590-day0": [
        (wrong.DAY0, shown_by_calls),
        (wrong.REPLACED_DAY0, shown_by_parts),
        (wrong.TAKEN_DAY0, shown_by_taking),
    ],
    "mtp613-1.12.1": [(wrong.CARD6, shown_by_calls)],
}


def main(names: list[str]) -> None:
    """Print what the first words of the command line ask for."""
    kernels()
    if names == ["right"]:
        said = {
            f"{name} {dtype}": list(filter(None, problems(name, dtype, more_alone=True)))
            for name in MORE
            for dtype in ("float32", "bfloat16")
        }
    else:
        rows = [
            (name, row, show)
            for each, show in KINDS[from_environment().twin or "mlu590-1.12.1"]
            for name, row in each.items()
        ]
        said = {name: show(*row) for name, row, show in rows if not names or name in names}
    print(json.dumps(said, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
