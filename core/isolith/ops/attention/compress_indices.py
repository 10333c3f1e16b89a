"""List every compressed entry that each token can see.

    indices[t, j] = j  for j < C(p[t]), else -1;   C(p) = floor((p+1) / ratio);   j = 0 .. max_entries-1

An entry can be seen as soon as the last token of its window has come, by that token too. Indices are logical: entries
of the token's own sequence. No tokens give an empty list, and a token before the end of the first window sees nothing.

Source: DeepSeek-V4 inference/model.py, get_compress_topk_idxs; arXiv:2606.19348, section 2.3 (causality).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from isolith.dtypes import INTEGER
from isolith.errors import ArgumentError
from isolith.materials.lists import wrong_list
from isolith.materials.relations import reordered, same
from isolith.operator import Cost, Operator
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(positions: Tensor, ratio: int, max_entries: int) -> Tensor:
    visible = (positions.long() + 1) // ratio
    entry = torch.arange(max_entries, device=positions.device)
    return torch.where(entry < visible[:, None], entry, -1).to(torch.int32)


def fake(positions: Tensor, ratio: int, max_entries: int) -> Tensor:
    return positions.new_empty(positions.shape[0], max_entries, dtype=torch.int32)


def check(positions: Tensor, ratio: int, max_entries: int) -> None:
    if ratio < 1:
        raise ArgumentError(f"compress_indices: ratio must be at least 1; got {ratio}.")
    if max_entries < 0:
        raise ArgumentError(f"compress_indices: max_entries must not be negative; got {max_entries}.")


def check_values(positions: Tensor, ratio: int, max_entries: int) -> None:
    if positions.numel() and int(positions.min()) < 0:
        raise ArgumentError(f"compress_indices: positions must not be negative; got {int(positions.min())}.")
    visible = (int(positions.max()) + 1) // ratio if positions.numel() else 0
    if visible > max_entries:
        raise ArgumentError(
            f"compress_indices: max_entries must be at least the {visible} entries that are seen; got {max_entries}."
        )


def cost(positions: Tensor, ratio: int, max_entries: int) -> Cost:
    entries = positions.shape[0] * max_entries
    return Cost(flops=entries, bytes_read=positions.nbytes, bytes_written=4 * entries)


def samples(make: Make) -> Iterator[Sample]:
    far = make.tensor([1_000_000, 999_999], torch.int64)
    yield Sample("flash_hca", "model", positions=far, ratio=128, max_entries=7813)
    # The contract's golden positions: an entry appears with the last token of its window.
    yield Sample("window_ends_of_4", positions=make.tensor(range(10), torch.int32), ratio=4, max_entries=3)
    yield Sample(
        "window_ends_of_128", positions=make.tensor([126, 127, 255, 256], torch.int64), ratio=128, max_entries=2
    )
    # No power of two, nor its inverse a number of any float.
    yield Sample("ratio_3", positions=make.tensor([1, 2, 3, 5, 8, 299], torch.int32), ratio=3, max_entries=100)
    yield Sample("ratio_1", positions=make.tensor([0, 2], torch.int32), ratio=1, max_entries=4)
    yield Sample("no_entries", positions=make.tensor([0, 2], torch.int32), ratio=4, max_entries=0)
    many = make.integers(0, 2**11, 70_000)
    yield Sample("tokens_70000", "invariants", positions=many, ratio=128, max_entries=16)
    yield Sample("no_tokens", positions=make.tensor([], torch.int32), ratio=4, max_entries=3)


def errors(make: Make) -> Iterator[ErrorSample]:
    positions = make.tensor([0, 7], torch.int32)
    says = "compress_indices: ratio must be at least 1; got 0."
    yield ErrorSample("zero_ratio", positions=positions, ratio=0, max_entries=2, says=says)
    says = "compress_indices: max_entries must not be negative; got -1."
    yield ErrorSample("negative_width", positions=positions, ratio=4, max_entries=-1, says=says)
    says = "compress_indices: max_entries must be at least the 2 entries that are seen; got 1."
    yield ErrorSample("too_narrow", positions=positions, ratio=4, max_entries=1, says=says)
    says = "compress_indices: positions must be int32 or int64; got float32."
    yield ErrorSample("float_positions", positions=positions.float(), ratio=4, max_entries=2, says=says)
    says = "compress_indices: positions must not be negative; got -1."
    yield ErrorSample("negative", positions=positions - 1, ratio=4, max_entries=2, says=says)


def relations(make: Make) -> Iterator[Relation]:
    call = {"positions": make.integers(0, 60, 33), "ratio": 4, "max_entries": 15}
    yield reordered("tokens_reordered", call, make.permutation(33), {"positions": 0}, {0: 0}, exact=True)

    def fewer(parts: list[list[Tensor]]) -> list[Tensor]:
        return [parts[0][0][:, :15].contiguous()]

    wider = {**call, "max_entries": 300}
    yield Relation(name="more_room", whole=call, parts=(wider,), assemble=fewer, exact=True)
    # The last token of window w of 4 sees what token w sees of windows of one.
    ends = make.integers(0, 60, 33) * 4 + 3
    yield same(
        "ratio_1",
        {**call, "positions": ends // 4, "ratio": 1, "max_entries": 60},
        {"positions": ends, "ratio": 4},
        exact=True,
    )


def invariants(results: list[Tensor], positions: Tensor, ratio: int, **_: object) -> str | None:
    visible = (positions.long() + 1) // ratio
    wrong = wrong_list(results[0].long(), visible, visible)
    steps = results[0].diff(dim=1)[results[0][:, 1:] >= 0]
    return wrong if wrong or bool((steps == 1).all()) else "a list does not rise by one"


compress_indices = Operator(
    name="compress_indices",
    shapes="positions[tokens] -> indices[tokens max_entries]",
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
