"""kv_compress against a token-by-token oracle, in every division of a sequence into calls."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from isolith import Make
from isolith.numerics.rope_tables import rope_frequencies, rope_tables
from isolith.numerics.windows import live_rows
from isolith.ops.attention import kv_compress

LENGTHS = (0, 1, 3, 4, 5, 7, 8, 127, 128, 129, 300)
DIM, HIDDEN = 8, 12


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The parameters of one compressor."""

    wkv: Tensor
    wgate: Tensor
    norm_weight: Tensor
    cos_table: Tensor
    sin_table: Tensor
    ratio: int
    ape: Tensor | None
    overlap: bool
    rotate: bool = False

    @property
    def window(self):
        return self.ratio * (2 if self.overlap else 1)


def layer(ratio, overlap, dtype=torch.float64, **changes):
    make = Make(dtype, seed=3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    channels = DIM * (2 if overlap else 1)
    cos_table, sin_table = rope_tables(rope_frequencies(4, 160000.0), 400)
    return replace(
        Layer(
            wkv=make.normal(channels, HIDDEN, std=0.3),
            wgate=make.normal(channels, HIDDEN, std=0.6),
            norm_weight=make.normal(DIM, mean=1.0, std=0.3),
            cos_table=cos_table.to(wide),
            sin_table=sin_table.to(wide),
            ratio=ratio,
            ape=make.normal(ratio, channels, dtype=wide),
            overlap=overlap,
        ),
        **changes,
    )


CSA = layer(4, True)
HCA = layer(128, False)
KINDS = pytest.mark.parametrize("kind", [CSA, HCA], ids=["csa", "hca"])

DIVISIONS = pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        pytest.param(CSA, [1] * 41, id="csa decode"),
        pytest.param(CSA, [2] * 13, id="csa pairs"),
        pytest.param(CSA, [3] * 13, id="csa threes"),
        pytest.param(CSA, [8] * 5, id="csa whole windows"),
        pytest.param(CSA, [37, 0, 1, 2, 9, 9], id="csa mixed"),
        pytest.param(CSA, [301], id="csa prefill"),
        pytest.param(HCA, [125] + [1] * 6 + [123] + [1] * 6, id="hca decode over two window ends"),
        pytest.param(HCA, [130, 130, 0, 39], id="hca long chunks"),
        pytest.param(HCA, [299], id="hca prefill"),
    ],
)


def tokens(count, seed=1, dtype=torch.float64):
    return Make(dtype, seed=seed).normal(count, HIDDEN)


def pool(kind, items, ring=0):
    """(a state full of NaN, its block table) for sequences of so many tokens; `ring` rows each, or pages of 4."""
    make = Make(torch.float64, seed=5)
    pages = make.pages([ring or count for count in items], ring or 4)
    table = pages.block_table.repeat(1, max(items, default=0) // ring + 1) if ring else pages.block_table
    wide = kind.cos_table.dtype
    return make.full(torch.nan, pages.blocks, pages.block_size, 2 * kind.wkv.shape[0], dtype=wide), table


def compress(kind, parts, start, state, table):
    """One call with one tensor of tokens per sequence: (entries of each sequence, all rows, cu_entries)."""
    cu_seqlens, start_pos = Make().batch([len(part) for part in parts], start)
    rows, cu_entries = kv_compress(
        torch.cat(parts), state_cache=state, state_block_table=table, cu_seqlens=cu_seqlens, start_pos=start_pos,
        **{name: getattr(kind, name) for name in Layer.__dataclass_fields__},
    )  # fmt: skip
    return list(rows[: cu_entries[-1]].split(cu_entries.diff().tolist())), rows, cu_entries


def in_calls(kind, x, sizes, ring=0):
    """The entries of one sequence that comes in calls of these sizes, and the state that they leave."""
    state, table = pool(kind, [len(x)], ring)
    start, entries = 0, []
    for part in x.split(sizes):
        entries += compress(kind, [part], [start], state, table)[0]
        start += len(part)
    return torch.cat([x.new_zeros(0, DIM), *entries]), state, table


def oracle(kind, x):
    """The formula for one sequence, entry by entry and token by token."""
    x = x.double()
    u, z = x @ kind.wkv.double().T, x @ kind.wgate.double().T
    own = slice(-DIM, None)
    entries = []
    for w in range(len(x) // kind.ratio):
        now = range(w * kind.ratio, (w + 1) * kind.ratio)
        before = range((w - 1) * kind.ratio, w * kind.ratio) if kind.overlap and w > 0 else ()
        pairs = [(j, slice(0, DIM)) for j in before] + [(j, own) for j in now]
        biases = [0.0 if kind.ape is None else kind.ape[j % kind.ratio, half].double() for j, half in pairs]
        exponents = [(z[j, half] + bias).exp() for (j, half), bias in zip(pairs, biases, strict=True)]
        c = sum(e * u[j, half] for e, (j, half) in zip(exponents, pairs, strict=True)) / sum(exponents)
        c = c / (c.square().mean() + 1e-6).sqrt() * kind.norm_weight.double()
        for pair in range(kind.cos_table.shape[1]):
            low = DIM - 2 * kind.cos_table.shape[1] + 2 * pair
            a, b = c[low].clone(), c[low + 1].clone()
            cos, sin = kind.cos_table[w * kind.ratio, pair].double(), kind.sin_table[w * kind.ratio, pair].double()
            c[low], c[low + 1] = a * cos - b * sin, a * sin + b * cos
        entries.append(c)
    return torch.stack(entries) if entries else torch.zeros(0, DIM, dtype=torch.float64)


def same(left, right):
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-12, check_dtype=False)


@KINDS
@pytest.mark.parametrize("length", LENGTHS)
def test_one_call_gives_the_formula(kind, length):
    same(in_calls(kind, tokens(length), [length])[0], oracle(kind, tokens(length)))


@pytest.mark.parametrize(
    ("ratio", "overlap", "ape"),
    [(1, False, False), (2, False, False), (1, True, True), (2, True, True), (3, True, False)],
)
def test_any_ratio_gives_the_formula_with_and_without_overlap_and_ape(ratio, overlap, ape):
    kind = layer(ratio, overlap) if ape else layer(ratio, overlap, ape=None)
    same(in_calls(kind, tokens(11), [1, 4, 6])[0], oracle(kind, tokens(11)))


@pytest.mark.parametrize("cut", range(21))
def test_csa_may_be_cut_at_every_residue(cut):
    same(in_calls(CSA, tokens(20), [cut, 20 - cut])[0], oracle(CSA, tokens(20)))


@pytest.mark.parametrize("cut", [0, 1, 2, 64, 126, 127, 128, 129, 130, 255, 256, 257, 299])
def test_hca_may_be_cut_anywhere(cut):
    same(in_calls(HCA, tokens(300), [cut, 300 - cut])[0], oracle(HCA, tokens(300)))


@DIVISIONS
def test_calls_of_any_sizes_give_the_formula(kind, sizes):
    x = tokens(sum(sizes))
    same(in_calls(kind, x, sizes)[0], oracle(kind, x))


@DIVISIONS
def test_ring_of_the_windows_rows_equals_pages(kind, sizes):
    x = tokens(sum(sizes))
    same(in_calls(kind, x, sizes, ring=kind.window)[0], in_calls(kind, x, sizes)[0])


@DIVISIONS
def test_live_rows_hold_the_projections_however_they_came(kind, sizes):
    length = sum(sizes)
    x = tokens(length)
    state, table = in_calls(kind, x, sizes, ring=kind.window)[1:]
    position = torch.arange(kind.ratio * (length // kind.ratio - (1 if kind.overlap else 0)), length)
    z = x @ kind.wgate.T + kind.ape[torch.arange(length) % kind.ratio]
    same(state[table[0, 0], position % kind.window], torch.cat((x @ kind.wkv.T, z), dim=-1)[position])


@KINDS
def test_new_sequence_on_a_used_state_equals_one_on_a_fresh_state(kind):
    state, table = pool(kind, [300])
    compress(kind, [tokens(300)], [0], state, table)
    first, *_ = compress(kind, [tokens(2, seed=2)], [0], state, table)
    later, *_ = compress(kind, [tokens(298, seed=4)], [2], state, table)
    wanted, *_ = in_calls(kind, torch.cat((tokens(2, seed=2), tokens(298, seed=4))), [2, 298])
    assert torch.equal(torch.cat((first[0], later[0])), wanted)


@KINDS
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e30])
def test_rows_that_are_not_live_may_hold_anything(kind, poison):
    x = tokens(300)
    state, table = pool(kind, [300])
    entries, start = [], 0
    for part in x.split(43):
        state[~live_rows(state, table, torch.tensor([start]), kind.ratio, kind.overlap)] = poison
        entries += compress(kind, [part], [start], state, table)[0]
        start += len(part)
    same(torch.cat(entries), oracle(kind, x))


def test_sequences_at_different_positions_do_not_see_each_other():
    parts = [tokens(count, seed=count) for count in (21, 6, 0, 13)]
    state, table = pool(CSA, [21, 6, 0, 13])
    first, *_ = compress(CSA, [part[: 2 * i] for i, part in enumerate(parts)], [0] * 4, state, table)
    starts = [min(2 * i, len(part)) for i, part in enumerate(parts)]
    second, *_ = compress(CSA, [part[2 * i :] for i, part in enumerate(parts)], starts, state, table)
    same(
        torch.cat([torch.cat(pair) for pair in zip(first, second, strict=True)]),
        torch.cat([oracle(CSA, p) for p in parts]),
    )


def test_counts_of_the_contracts_golden_batch():
    counts = [3, 1, 0, 6]
    state, table = pool(CSA, [3, 4, 2, 13])
    _, rows, cu_entries = compress(CSA, [tokens(count) for count in counts], [0, 3, 2, 7], state.fill_(0.0), table)
    assert (cu_entries.tolist(), len(rows)) == ([0, 0, 1, 1, 3], 6)


def test_rows_behind_the_last_entry_are_zero_in_the_reference():
    state, table = pool(CSA, [9, 3])
    _, rows, cu_entries = compress(CSA, [tokens(9), tokens(3)], [0, 0], state, table)
    assert (len(rows), int(cu_entries[-1]), rows[2:].count_nonzero().item()) == (5, 2, 0)


def test_tokens_taken_back_leave_no_trace():
    # Of four tokens a call one is right; the three others are taken back, three rows beyond the window's.
    x, draft = tokens(40), tokens(43, seed=9)
    state, table = pool(CSA, [48], ring=CSA.window + 3)
    calls = [torch.cat((x[p : p + 1], draft[p + 1 : p + 4])) for p in range(40)]
    found = [compress(CSA, [part], [p], state, table)[0][0] for p, part in enumerate(calls)]
    same(torch.cat([entries[:1] for entries in found[3::4]]), oracle(CSA, x))


def test_sequence_without_tokens_leaves_its_rows_as_they_are():
    state, table = pool(CSA, [8, 8])
    compress(CSA, [tokens(6), tokens(5, seed=2)], [0, 0], state, table)
    before = state[table[1].long()].clone()
    compress(CSA, [tokens(2, seed=3), tokens(0)], [6, 5], state, table)
    assert torch.equal(state[table[1].long()].view(torch.int64), before.view(torch.int64))


def test_blocks_of_nobody_are_not_written():
    state, table = pool(CSA, [21])
    kept = table.clone()
    kept[0, :3] = -1
    compress(CSA, [tokens(21)], [0], state, kept)
    written = (~state.isnan().all(-1)).any(-1).nonzero().flatten().tolist()
    assert written == sorted(kept[0, 3:].tolist())


def test_tables_are_read_only_at_the_first_position_of_each_window():
    cos_table, sin_table = CSA.cos_table.clone(), CSA.sin_table.clone()
    for table in (cos_table, sin_table):
        table[torch.arange(len(table)) % 4 != 0] = torch.nan
    kind = replace(CSA, cos_table=cos_table, sin_table=sin_table)
    assert not in_calls(kind, tokens(20), [7, 13])[0].isnan().any()


def test_rotate_is_the_hadamard_rotation_of_the_entries():
    plain = in_calls(CSA, tokens(20), [20])[0]
    signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(DIM)] for i in range(DIM)]).double()
    same(in_calls(replace(CSA, rotate=True), tokens(20), [20])[0], plain @ signs / DIM**0.5)


@KINDS
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
def test_rounded_inputs_stay_near_the_oracle_of_their_values(kind, dtype, bound):
    rounded = layer(kind.ratio, kind.overlap, dtype)
    x = tokens(300, dtype=dtype)
    found = in_calls(rounded, x, [37, 64, 1, 157, 41])[0]
    torch.testing.assert_close(found.double(), oracle(rounded, x), rtol=bound, atol=bound)


def toy(z_of_second_window=0.6931471805599453):
    """The contract's golden 8: rows (F, L) given outright, and a norm and a rotation that change nothing."""
    u = [(1, 10), (2, 20), (3, 30), (4, 40), (5, 50), (6, 60)]
    z = [(0, 0), (0, 1.0986122886681098), (z_of_second_window, 0), (0, 0), (0, 0), (0, 0)]
    wkv, wgate = (torch.tensor(rows).double().T.repeat_interleave(2, 0) for rows in (u, z))
    kind = Layer(
        wkv=wkv, wgate=wgate, norm_weight=torch.full((2,), 1e8).double(), ratio=2, ape=None, overlap=True,
        cos_table=torch.ones(6, 1).double(), sin_table=torch.zeros(6, 1).double(),
    )  # fmt: skip
    state, table = pool(kind, [6])
    rows, _ = kv_compress(
        torch.eye(6).double(), state_cache=state, state_block_table=table, cu_seqlens=torch.tensor([0, 6]).int(),
        start_pos=torch.tensor([0]).int(), eps=1e16,
        **{name: getattr(kind, name) for name in Layer.__dataclass_fields__},
    )  # fmt: skip
    return rows[:3, 0].tolist()


def test_pooled_values_of_the_contracts_toy():
    assert toy()[:2] == pytest.approx([17.5, 18.25])


def test_first_half_of_a_row_counts_in_the_next_entry_only():
    changed = [a != b for a, b in zip(toy(), toy(3.0), strict=True)]
    assert changed == [False, False, True]


def test_float64_state_beside_float32_activations_is_legal():
    kind = layer(4, True, torch.float32)
    state, table = pool(kind, [9])
    entries, *_ = compress(kind, [tokens(9, dtype=torch.float32)], [0], state.double(), table)
    assert entries[0].dtype == torch.float32
