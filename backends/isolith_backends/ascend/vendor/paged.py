"""Requests in a batch of queries, and rows in pages: what the attention operators share."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from isolith_backends.ascend.vendor.rules import need, need_dtype


@dataclass(frozen=True)
class Queries:
    """Where each request's queries are.

    Args:
        begins: The first row of each request.
        lengths: How many of its rows are in use.
    """

    begins: list[int]
    lengths: list[int]

    @property
    def batch(self) -> int:
        """How many requests there are."""
        return len(self.begins)

    @classmethod
    def of(
        cls, name: str, q: Tensor, layout: str, ends: Tensor | None, used: Tensor | None, with_zero: bool
    ) -> "Queries":
        """Read the lengths: TND takes cumulated ones, with a leading 0 or without; BSND plain ones or none."""
        if layout == "BSND":
            need(name, q.dim() == 4, f"the query is {tuple(q.shape)} in layout BSND")
            plain = used if with_zero else ends
            lengths = [q.shape[1]] * q.shape[0] if plain is None else plain.tolist()
            return cls([batch * q.shape[1] for batch in range(q.shape[0])], lengths)
        need(name, q.dim() == 3, f"the query is {tuple(q.shape)} in layout TND")
        need(name, ends is not None, "layout TND needs the cumulated lengths of queries")
        assert ends is not None
        need_dtype(name, "the lengths of queries", ends, (torch.int32,))
        marks = ends.tolist()
        need(name, not with_zero or marks[0] == 0, f"cumulated lengths of queries must start with 0, not {marks[0]}")
        if not with_zero:
            # A leading 0 is taken for a request without queries.
            marks = [0, *marks]
        lengths = [end - begin for begin, end in itertools.pairwise(marks)]
        legal = all(length >= 0 for length in lengths) and marks[-1] <= q.shape[0]
        need(name, legal, f"cumulated lengths of queries are {marks}, the query has {q.shape[0]} rows")
        if used is not None:
            lengths = [min(a, b) for a, b in zip(lengths, used.tolist(), strict=True)]
        return cls(marks[:-1], lengths)

    def each(self) -> Iterator[tuple[int, int, int]]:
        """(request, row, place within the request) of every query."""
        for request, (begin, length) in enumerate(zip(self.begins, self.lengths, strict=True)):
            for index in range(length):
                yield request, begin + index, index


def rows_of_pages(pages: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """The rows at logical positions, as they are stored; a page outside of the pool is an exception of the device."""
    size = pages.shape[1]
    if not positions.numel():
        return pages.new_zeros((0, pages.shape[-1]))
    if int(positions.max()) // size >= table.shape[0]:
        raise RuntimeError(f"position {int(positions.max())} lies behind a table of {table.shape[0]} pages")
    blocks = table[positions // size].long()
    if bool(((blocks < 0) | (blocks >= pages.shape[0])).any()):
        raise RuntimeError(f"block {blocks.tolist()} is not in the pool of {pages.shape[0]} (aicore exception)")
    raw = pages.view(torch.uint8)  # not every dtype can be indexed
    return raw[blocks, positions % size].reshape(positions.numel(), -1).view(pages.dtype)
