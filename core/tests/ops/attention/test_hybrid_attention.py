"""hybrid_attention behind kv_compress, in every division of a sequence into calls, against dense attention."""

from dataclasses import dataclass

import pytest
import torch

from isolith import ArgumentError, Make
from isolith.numerics.pages import slots_of_items
from isolith.numerics.rope_tables import rope_frequencies, rope_tables
from isolith.ops.attention import hybrid_attention, kv_compress

LENGTH, WINDOW, HEADS, DIM, HIDDEN, K = 40, 6, 3, 8, 12, 3
WIDE = torch.float64


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A layer kind: its ratio, whether windows overlap, and whether tokens list what they select."""

    ratio: int
    overlap: bool = False
    selects: bool = False


KINDS = pytest.mark.parametrize(
    "kind", [Kind(ratio=0), Kind(ratio=4, overlap=True, selects=True), Kind(ratio=8)], ids=["swa", "csa", "hca"]
)
SPLITS = [[1] * LENGTH, [13, 1, 1, 8, 17], [7] * 5 + [5], [39, 1], [3, 4, 0, 33]]


class Sequence:
    """Queries, window rows, compressor inputs and selections of one sequence, and its caches full of NaN."""

    def __init__(self, kind, seed=1, ring=0):
        make = Make(WIDE, seed=seed)
        self.kind, self.ring, self.lengths = kind, ring, None
        self.q, self.kv, self.x = make.normal(LENGTH, HEADS, DIM), make.normal(LENGTH, DIM), make.normal(LENGTH, HIDDEN)
        self.sink = make.normal(HEADS)
        # Of the entries that each token sees, some in no order, and -1 among them.
        most = [(p + 1) // max(kind.ratio, 1) for p in range(LENGTH)]
        picks = [make.permutation(count + 1)[:K] - 1 for count in most]
        self.picks = torch.stack([torch.nn.functional.pad(pick, (0, K - len(pick)), value=-1) for pick in picks]).int()
        self.compressor = Compressor(kind, make) if kind.ratio else None
        pages = make.pages([ring or LENGTH], ring or 4)
        self.table = pages.block_table.repeat(1, LENGTH // ring + 1) if ring else pages.block_table
        self.window_cache = make.full(torch.nan, pages.blocks, pages.block_size, DIM)
        pages = make.pages([LENGTH // max(kind.ratio, 1)], 3)
        self.entry_table = pages.block_table
        self.entry_cache = make.full(torch.nan, pages.blocks, pages.block_size, DIM)
        self.start = 0

    def call(self, tokens):
        """The next tokens: write the window rows, compress, write the entries, attend."""
        start, end, ratio = self.start, self.start + tokens, self.kind.ratio
        self.start = end
        put(self.window_cache, self.table, start, self.kv[start:end])
        cu_seqlens, start_pos = Make().batch([tokens], [start])
        far = {}
        if ratio:
            entries = self.compressor.compress(self.x[start:end], cu_seqlens, start_pos)
            put(self.entry_cache, self.entry_table, start // ratio, entries)
            far = {"compressed_cache": self.entry_cache, "compressed_block_table": self.entry_table, "ratio": ratio}
        if self.kind.selects:
            far["topk_indices"] = self.picks[start:end]
        if self.lengths is not None:
            far["topk_length"] = self.lengths[start:end]
        return hybrid_attention(
            self.q[start:end], self.window_cache, self.table, cu_seqlens, start_pos, WINDOW, 0.4, self.sink, **far
        )


class Compressor:
    """kv_compress on a ring."""

    def __init__(self, kind, make):
        rows = kind.ratio * (2 if kind.overlap else 1)
        channels = DIM * (2 if kind.overlap else 1)
        self.weights = (make.normal(channels, HIDDEN), make.normal(channels, HIDDEN), make.normal(DIM, mean=1.0))
        self.tables = [table.double() for table in rope_tables(rope_frequencies(4, 160000.0), LENGTH)]
        self.state = make.full(torch.nan, 1, rows, 2 * channels)
        self.table = torch.zeros(1, LENGTH // rows + 1, dtype=torch.int32)
        self.options = {"ratio": kind.ratio, "overlap": kind.overlap, "ape": make.normal(kind.ratio, channels)}

    def compress(self, x, cu_seqlens, start_pos):
        entries, cu_entries = kv_compress(
            x, *self.weights, *self.tables, self.state, self.table, cu_seqlens, start_pos, **self.options
        )
        return entries[: cu_entries[-1]]


def put(cache, table, first, rows):
    """Write rows as items first .. of the only sequence."""
    items = torch.arange(first, first + len(rows))
    slots = slots_of_items(table, torch.tensor(0), items, cache.shape[1])
    cache[slots // cache.shape[1], slots % cache.shape[1]] = rows


def in_calls(kind, sizes, ring=0):
    sequence = Sequence(kind, ring=ring)
    parts = [sequence.call(size) for size in sizes]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def dense(kind):
    """Each token by itself over the rows that it sees, written out."""
    sequence = Sequence(kind)
    entries = torch.zeros(0, DIM, dtype=WIDE)
    if kind.ratio:
        entries = sequence.compressor.compress(sequence.x, *Make().batch([LENGTH]))
    outs, lses = [], []
    for p in range(LENGTH):
        picks = [w for w in sequence.picks[p].tolist() if w >= 0]
        seen = picks if kind.selects else range((p + 1) // kind.ratio if kind.ratio else 0)
        keys = torch.cat((sequence.kv[max(0, p - WINDOW + 1) : p + 1], entries[list(seen)]))
        logits = sequence.q[p] @ keys.T * 0.4
        lses.append(logits.logsumexp(-1))
        outs.append(torch.cat((logits, sequence.sink[:, None]), -1).softmax(-1)[:, :-1] @ keys)
    return torch.stack(outs), torch.stack(lses)


def same(left, right):
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-12)


@KINDS
def test_one_call_gives_dense_attention_over_what_each_token_sees(kind):
    same(in_calls(kind, [LENGTH]), dense(kind))


@KINDS
@pytest.mark.parametrize("sizes", SPLITS, ids=["decode", "mixed", "sevens", "prefill and one", "with an empty call"])
def test_any_division_into_calls_equals_one_call(kind, sizes):
    same(in_calls(kind, sizes), in_calls(kind, [LENGTH]))


@KINDS
@pytest.mark.parametrize("size", [1, 5, 8])
def test_ring_of_window_and_tokens_less_one_rows_equals_pages(kind, size):
    same(in_calls(kind, [size] * (LENGTH // size), ring=WINDOW + size - 1), in_calls(kind, [LENGTH]))


def test_ring_one_row_shorter_is_refused():
    with pytest.raises(ArgumentError, match="at once; got 9 rows"):
        in_calls(Kind(ratio=0), [5, 5, 5], ring=WINDOW + 5 - 2)


def test_every_visible_entry_listed_is_hca():
    kind = Kind(ratio=8)
    listed, plain = Sequence(Kind(ratio=8, selects=True)), Sequence(kind)
    listed.picks = torch.arange(LENGTH // 8).flip(0).int().expand(LENGTH, -1)  # those not yet visible too
    same(listed.call(LENGTH), plain.call(LENGTH))


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_length_cuts_the_list_of_entries_and_not_the_window(length):
    kind = Kind(ratio=4, selects=True)
    cut, short = Sequence(kind), Sequence(kind)
    cut.lengths = torch.full((LENGTH,), length)
    short.picks = torch.where(torch.arange(K) < length, short.picks, -1)
    same(cut.call(LENGTH), short.call(LENGTH))


@pytest.mark.parametrize(("position", "seen"), [(2, False), (3, True), (6, False), (7, True)])
def test_entry_is_seen_from_the_last_token_of_its_window_on(position, seen):
    sequence = Sequence(Kind(ratio=4))
    before = sequence.call(LENGTH)[1][position]
    sequence.entry_cache[sequence.entry_table[0, 0], (position + 1) // 4 - seen] += 1.0
    sequence.start = 0
    sequence.compressor.compress = lambda *_: torch.zeros(0, DIM, dtype=WIDE)  # leave the changed entry alone
    after = sequence.call(LENGTH)[1][position]
    assert (before != after).any().item() == seen


@KINDS
def test_sequences_of_a_batch_do_not_see_each_other(kind):
    one, two = Sequence(kind, seed=1), Sequence(kind, seed=2)
    alone = one.call(9), two.call(LENGTH)
    blocks = len(one.window_cache)
    cu_seqlens, start_pos = Make().batch([9, LENGTH])
    far = {}
    if kind.ratio:
        tables = one.entry_table, torch.where(two.entry_table < 0, -1, two.entry_table + len(one.entry_cache))
        far = {"ratio": kind.ratio, "compressed_cache": torch.cat((one.entry_cache, two.entry_cache))}
        far["compressed_block_table"] = torch.cat(tables)
    if kind.selects:
        far["topk_indices"] = torch.cat((one.picks[:9], two.picks))
    _, lse = hybrid_attention(
        torch.cat((one.q[:9], two.q)), torch.cat((one.window_cache, two.window_cache)),
        torch.cat((one.table, two.table + blocks)), cu_seqlens, start_pos, WINDOW, 0.4, None, **far,
    )  # fmt: skip
    same(lse, torch.cat([lse for _, lse in alone]))
