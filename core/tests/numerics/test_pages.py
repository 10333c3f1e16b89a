"""Paged pools: byte layouts against offsets written out, and which slots are touched."""

import struct

import pytest
import torch

from isolith import ArgumentError, Make
from isolith.numerics import pages

SIZES = [584, 656, 132, 68]
PADDING = 96


def pool_of(blocks, block_size, entry, fill=0xAA):
    """A pool whose pages are PADDING bytes apart, and the bytes that it lies in."""
    flat = torch.full((blocks, block_size * entry + PADDING), fill, dtype=torch.uint8)
    return flat.as_strided((blocks, block_size, entry), (flat.shape[1], entry, 1)), flat


def entries_of(entry, count=1):
    """Codes, scales and rope of entries."""
    make, layout = Make(seed=1), pages.FORMATS[entry]
    codes = make.integers(1, 120, count, layout.code_bytes, dtype=torch.uint8)
    codes = codes if entry == 68 else codes.view(torch.float8_e4m3fn)
    scales = torch.exp2(make.integers(-8, 0, count, layout.scales).float()).to(layout.scale_dtype)
    return codes, scales, make.normal(count, layout.dim - layout.quantised, dtype=torch.bfloat16)


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).flatten().tolist()


def page_of(entry, slot):
    """The page that `entry_of` is written to, as bytes."""
    cache, flat = pool_of(3, 4, entry)
    pages.write_entries(cache, torch.tensor([slot]), *entries_of(entry))
    return flat[slot // 4].tolist()


def test_584_entry_lies_as_flashmla_lays_it():
    codes, scales, rope = map(raw, entries_of(584))
    page = page_of(584, 6)
    assert (page[2 * 576 : 3 * 576], page[4 * 576 + 16 : 4 * 576 + 23]) == (codes + rope, scales)


def test_656_entry_lies_as_flashmla_lays_it():
    codes, scales, rope = map(raw, entries_of(656))
    assert page_of(656, 6)[2 * 656 : 3 * 656] == codes + scales + rope


def test_132_entry_lies_as_deepgemm_lays_it():
    codes, scales, _ = map(raw, entries_of(132))
    page = page_of(132, 6)
    assert (page[2 * 128 : 3 * 128], page[4 * 128 + 8 : 4 * 128 + 12]) == (codes, scales)


def test_68_entry_lies_as_deepgemm_lays_it():
    codes, scales, _ = map(raw, entries_of(68))
    page = page_of(68, 6)
    assert (page[2 * 64 : 3 * 64], page[4 * 64 + 8 : 4 * 64 + 12]) == (codes, scales)


def test_float32_scale_is_little_endian():
    page = page_of(656, 0)
    _, scales, _ = entries_of(656)
    assert struct.unpack("<4f", bytes(page[512:528])) == tuple(scales[0].tolist())


@pytest.mark.parametrize("entry", SIZES)
def test_write_changes_as_many_bytes_as_an_entry_has(entry):
    (one, ones), (other, others) = pool_of(3, 4, entry, fill=0xAA), pool_of(3, 4, entry, fill=0x55)
    for cache in (one, other):
        pages.write_entries(cache, torch.tensor([6]), *entries_of(entry))
    assert int((ones == others).sum()) == entry - (entry == 584)  # 584 counts a byte of padding


@pytest.mark.parametrize("entry", SIZES)
def test_padding_between_pages_stays(entry):
    cache, flat = pool_of(2, 4, entry)
    pages.write_entries(cache, torch.tensor([3]), *entries_of(entry))
    assert flat[:, 4 * entry :].unique().tolist() == [0xAA]


@pytest.mark.parametrize("entry", SIZES)
def test_negative_slot_writes_nothing(entry):
    cache, flat = pool_of(2, 4, entry)
    pages.write_entries(cache, torch.tensor([-1]), *entries_of(entry))
    assert flat.unique().tolist() == [0xAA]


@pytest.mark.parametrize("entry", SIZES)
@pytest.mark.parametrize("block_size", [1, 2, 32, 64])
def test_what_is_written_is_read_back(entry, block_size):
    cache, _ = pool_of(2, block_size, entry, fill=0xFF)
    layout, slots = pages.FORMATS[entry], torch.tensor([block_size, block_size - 1])
    codes, scales, rope = entries_of(entry, 2)
    pages.write_entries(cache, slots, codes, scales, rope)
    values = pages.decode(codes, torch.float32).unflatten(1, (layout.scales, layout.group)) * scales.float()[..., None]
    assert torch.equal(pages.read_entries(cache, slots, torch.float32), torch.cat((values.flatten(1), rope.float()), 1))


@pytest.mark.parametrize("entry", SIZES)
def test_negative_slot_reads_zeros_out_of_nan(entry):
    cache, _ = pool_of(2, 4, entry, fill=0xFF)
    assert pages.read_entries(cache, torch.tensor([-1, -9]), torch.float32).abs().sum() == 0


def test_rows_are_rounded_to_the_pool():
    cache = torch.zeros(2, 2, 3, dtype=torch.bfloat16)
    pages.write_rows(cache, torch.tensor([-1, 2]), torch.full((2, 3), 1.00390625 + 2**-20))
    assert cache.tolist() == [[[0.0] * 3] * 2, [[1.0078125] * 3, [0.0] * 3]]


@pytest.mark.parametrize(
    ("item", "slot"),
    [(0, 14), (1, 15), (2, 8), (3, 9), (4, -1), (6, -1), (-1, -1), (2**31, -1)],
    ids=["first", "same_block", "page_boundary", "last", "no_block", "behind_the_table", "negative", "huge"],
)
def test_slot_of_an_item_is_its_place_in_the_table(item, slot):
    table = torch.tensor([[0, 1, 2], [7, 4, -1]], dtype=torch.int32)
    assert pages.slots_of_items(table, torch.tensor(1), torch.tensor([item]), 2).tolist() == [slot]


def test_item_right_behind_a_full_table_has_no_slot():
    table = torch.tensor([[7, 4]], dtype=torch.int32)
    assert pages.slots_of_items(table, torch.tensor(0), torch.tensor([3, 4]), 2).tolist() == [9, -1]


def test_no_item_has_a_slot_in_an_empty_table():
    table = torch.zeros(2, 0, dtype=torch.int32)
    assert pages.slots_of_items(table, torch.tensor([0, 1]), torch.tensor([0, 5]), 4).tolist() == [-1, -1]


def held(table, items, sequence=0):
    table, items = torch.tensor([[-1] * len(table), table]), torch.tensor(items, dtype=torch.int64)
    pages.check_held("op", "cache", torch.zeros(4, 3, 8), table, torch.full_like(items, sequence), items)


@pytest.mark.parametrize("items", [[0, 1, 2], [2, 3, 4], [1, 2, 3], [0, 9], []], ids=str)
def test_items_that_lie_apart_are_held(items):
    held([2, 2, 2], items, 1)


@pytest.mark.parametrize("items", [[0, 3], [2, 3, 4, 5], [4, 1]], ids=str)
def test_items_that_share_a_slot_are_refused(items):
    with pytest.raises(ArgumentError, match=f"op: cache must hold positions {min(items)}..{max(items)} of sequence 1"):
        held([2, 2, 2], items, 1)


def test_equal_slots_of_two_sequences_are_no_matter():
    table, items = torch.tensor([[1], [1]]), torch.tensor([2, 2])
    pages.check_held("op", "cache", torch.zeros(4, 3, 8), table, torch.tensor([0, 1]), items)


def test_items_without_a_block_share_nothing():
    held([-1, -1], [0, 3], 1)


def test_page_of_a_single_entry_may_have_any_inner_stride():
    flat = torch.zeros(3, 1152, dtype=torch.uint8)
    pages.check_cache("op", "cache", flat.as_strided((3, 1, 584), (1152, 1152, 1)))


def test_page_that_is_not_one_run_of_bytes_is_refused():
    cache = torch.zeros(2, 8, 584, dtype=torch.uint8)[:, ::2]
    with pytest.raises(ArgumentError) as caught:
        pages.check_cache("op", "cache", cache)
    says = "op: a page of cache is one run of bytes, strides (any, 584, 1); got (4672, 1168, 1)."
    assert str(caught.value) == says


def test_block_beyond_the_pool_is_refused():
    with pytest.raises(ArgumentError) as caught:
        pages.check_block_table("op", "block_table", torch.tensor([[0, 2]]), torch.zeros(2, 1, 1))
    assert str(caught.value) == "op: block_table must be below blocks = 2; got 2."
