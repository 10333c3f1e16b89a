"""List the positions that a sliding window shows to each token.

    indices[t, j] = max(0, p[t] - window + 1) + j  where that is at most p[t], else -1;   j = 0 .. window-1

The window counts the token itself: position p sees the last `window` positions up to p, ascending, then -1 where the
sequence is younger than the window. Indices are logical: positions of the token's own sequence. No tokens give an
empty list.

Source: DeepSeek-V4 inference/model.py, get_window_topk_idxs (there slots of a ring, of the same positions).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isolith.dtypes import INTEGER
from isolith.errors import ArgumentError
from isolith.materials.lists import wrong_list
from isolith.materials.relations import reordered
from isolith.operator import Cost, Operator
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(positions: Tensor, window: int) -> Tensor:
    last = positions.long()[:, None]
    listed = (last - window + 1).clamp(min=0) + torch.arange(window, device=positions.device)
    return torch.where(listed <= last, listed, -1).to(torch.int32)


def fake(positions: Tensor, window: int) -> Tensor:
    return positions.new_empty(positions.shape[0], window, dtype=torch.int32)


def check(positions: Tensor, window: int) -> None:
    if window < 1:
        raise ArgumentError(f"window_indices: window must be at least 1; got {window}.")


def check_values(positions: Tensor, window: int) -> None:
    if positions.numel() and int(positions.min()) < 0:
        raise ArgumentError(f"window_indices: positions must not be negative; got {int(positions.min())}.")


def cost(positions: Tensor, window: int) -> Cost:
    entries = positions.shape[0] * window
    return Cost(flops=entries, bytes_read=positions.nbytes, bytes_written=4 * entries)


def samples(make: Make) -> Iterator[Sample]:
    yield Sample("flash_window", "model", positions=make.integers(0, 1_000_000, 16), window=128)
    # Around the first position that loses sight of 0, where a window one too wide or too narrow shows.
    yield Sample("first_positions", positions=make.tensor(range(9), torch.int32), window=4)
    yield Sample("window_edge", positions=make.tensor([126, 127, 128, 129], torch.int64), window=128)
    yield Sample("window_of_one", positions=make.tensor([0, 5], torch.int32), window=1)
    yield Sample("sequences_in_any_order", positions=make.tensor([7, 0, 3, 1_048_575], torch.int64), window=5)
    many = make.integers(0, 2**30, 70_000)
    yield Sample("tokens_70000", "invariants", positions=many, window=17)
    yield Sample("no_tokens", positions=make.tensor([], torch.int32), window=4)


def errors(make: Make) -> Iterator[ErrorSample]:
    positions = make.tensor([0, 1], torch.int32)
    says = "window_indices: window must be at least 1; got 0."
    yield ErrorSample("zero_window", positions=positions, window=0, says=says)
    says = "window_indices: positions must not be negative; got -1."
    yield ErrorSample("negative", positions=positions - 1, window=4, says=says)
    says = "window_indices: positions must be int32 or int64; got float32."
    yield ErrorSample("float_positions", positions=positions.float(), window=4, says=says)


def relations(make: Make) -> Iterator[Relation]:
    call: dict[str, Any] = {"positions": make.integers(9, 1000, 33), "window": 9}
    later = {"positions": call["positions"] + 1000}

    def earlier(parts: list[list[Tensor]]) -> list[Tensor]:
        return [parts[0][0] - 1000]

    yield Relation(name="later_positions", whole=call, parts=({**call, **later},), assemble=earlier, exact=True)
    call = {"positions": make.integers(0, 30, 33), "window": 9}
    yield reordered("tokens_reordered", call, make.permutation(33), {"positions": 0}, {0: 0}, exact=True)
    # A longer window of a position that is younger than both has the same indices, and more of -1.
    young = {"positions": make.integers(0, 9, 33), "window": 9}

    def shorter(parts: list[list[Tensor]]) -> list[Tensor]:
        return [parts[0][0][:, :9].contiguous()]

    longer = {**young, "window": 128}
    yield Relation(name="longer_window", whole=young, parts=(longer,), assemble=shorter, exact=True)


def invariants(results: list[Tensor], positions: Tensor, window: int, **_: object) -> str | None:
    indices, last = results[0].long(), positions.long()
    wrong = wrong_list(indices, (last + 1).clamp(max=window), last + 1)
    if wrong is None and bool((indices.amax(1) != last).any()):
        return "a list does not reach its token's own position"
    steps = indices.diff(dim=1)[indices[:, 1:] >= 0]
    return wrong if wrong or bool((steps == 1).all()) else "a list does not rise by one"


window_indices = Operator(
    name="window_indices",
    shapes="positions[tokens] -> indices[tokens window]",
    dtypes={"positions": INTEGER},
    reference=reference,
    variants=(),
    fake=fake,
    check=check,
    check_values=check_values,
    cost=cost,
    samples=samples,
    errors=errors,
    bitwise=True,
    sample_dtypes=(torch.float32,),
    relations=relations,
    invariants=invariants,
)
