"""Facts of kv_cache_write and kv_cache_read that no sample states."""

import pytest
import torch

from isolith import ArgumentError, Make
from isolith.numerics.codes import amax_of_groups, spread_groups
from isolith.numerics.pages import FORMATS
from isolith.ops.attention.kv_cache_read import kv_cache_read
from isolith.ops.attention.kv_cache_write import kv_cache_write, random_pool
from isolith.ops.quant.act_quant_fp4 import act_quant_fp4
from isolith.ops.quant.act_quant_fp8 import act_quant_fp8
from isolith.ops.quant.block_dequant import block_dequant

EVERY = pytest.mark.parametrize("entry", FORMATS)
SLOTS = torch.tensor([9, 0, 4, 7, 3])


def rows(entry, seed=1, std=3.0, dtype=torch.float32):
    return Make(dtype, seed=seed).normal(5, FORMATS[entry].dim, std=std)


def pool(entry, blocks=3, block_size=4):
    return random_pool(Make(seed=2), blocks, block_size, entry, spare=32)


def read_back(entry, x, **rules):
    cache = pool(entry)
    kv_cache_write(cache, x, SLOTS, **rules)
    return kv_cache_read(cache, SLOTS, "float32")


def test_584_is_act_quant_fp8_in_groups_of_64():
    x = rows(584)
    q, scale = act_quant_fp8(x[:, :448].contiguous(), 64)
    assert torch.equal(read_back(584, x)[:, :448], block_dequant(q, scale, 1, 64, "float32"))


@pytest.mark.parametrize("scale_format", ["ue8m0", "float32"])
@pytest.mark.parametrize(("entry", "width"), [(656, 512), (132, 128)])
def test_656_and_132_are_act_quant_fp8_in_groups_of_128(entry, width, scale_format):
    x = rows(entry)
    q, scale = act_quant_fp8(x[:, :width].contiguous(), 128, scale_format)
    back = read_back(entry, x, scale_format=scale_format)[:, :width]
    assert torch.equal(back, block_dequant(q, scale, 1, 128, "float32"))


def test_68_is_act_quant_fp4_in_groups_of_32():
    x = rows(68)
    assert torch.equal(read_back(68, x), block_dequant(*act_quant_fp4(x), 1, 32, "float32"))


@pytest.mark.parametrize("entry", [584, 656])
def test_last_64_elements_are_kept_as_bfloat16(entry):
    x = rows(entry, dtype=torch.bfloat16)
    assert torch.equal(read_back(entry, x)[:, -64:], x[:, -64:].float())


@pytest.mark.parametrize(
    ("entry", "largest", "smallest_normal", "mantissa_bits"),
    [(584, 448.0, 2.0**-6, 3), (656, 448.0, 2.0**-6, 3), (132, 448.0, 2.0**-6, 3), (68, 6.0, 1.0, 1)],
)
def test_round_trip_is_within_half_an_ulp_times_the_scale(entry, largest, smallest_normal, mantissa_bits):
    x, layout = rows(entry), FORMATS[entry]
    values = x[:, : layout.quantised]
    scale = torch.exp2((amax_of_groups(values, layout.group) / largest).log2().ceil())
    each = spread_groups(scale, layout.quantised, layout.group)
    ulp = torch.exp2((values.abs() / each).clamp(min=smallest_normal).log2().floor() - mantissa_bits)
    error = (read_back(entry, x)[:, : layout.quantised] - values).abs()
    assert bool((error <= ulp / 2 * each).all())


@EVERY
def test_reading_and_writing_again_changes_no_value(entry):
    once = read_back(entry, rows(entry))
    assert torch.equal(read_back(entry, once), once)


@EVERY
def test_bytes_are_equal_for_float32_and_float64(entry):
    pools = [pool(entry), pool(entry)]
    for cache, dtype in zip(pools, (torch.float32, torch.float64), strict=True):
        kv_cache_write(cache, rows(entry).to(dtype), SLOTS)
    assert torch.equal(*pools)


@EVERY
def test_entries_that_are_not_written_keep_their_value(entry):
    cache = pool(entry)
    kv_cache_write(cache, rows(entry), SLOTS)
    others = torch.tensor([slot for slot in range(12) if slot not in SLOTS.tolist()])
    before = kv_cache_read(pool(entry), others)
    assert torch.equal(kv_cache_read(cache, others).view(torch.uint8), before.view(torch.uint8))


@EVERY
def test_bytes_between_pages_stay(entry):
    flat = torch.full((3, 4 * entry + 32), 0xAA, dtype=torch.uint8)
    kv_cache_write(flat.as_strided((3, 4, entry), (flat.shape[1], entry, 1)), rows(entry), SLOTS)
    assert flat[:, 4 * entry :].unique().tolist() == [0xAA]


def test_unused_scale_byte_of_584_stays():
    cache = torch.full((3, 4, 584), 0xAA, dtype=torch.uint8)
    kv_cache_write(cache, rows(584), SLOTS)
    assert cache.flatten(1)[:, 4 * 576 :].unflatten(1, (4, 8))[..., 7].unique().tolist() == [0xAA]


@EVERY
def test_order_of_the_rows_does_not_matter(entry):
    pools, order = [pool(entry), pool(entry)], torch.tensor([3, 1, 4, 0, 2])
    kv_cache_write(pools[0], rows(entry), SLOTS)
    kv_cache_write(pools[1], rows(entry)[order], SLOTS[order])
    assert torch.equal(*pools)


@EVERY
def test_a_call_for_each_row_equals_one_call(entry):
    pools = [pool(entry), pool(entry)]
    kv_cache_write(pools[0], rows(entry), SLOTS)
    for row in range(5):
        kv_cache_write(pools[1], rows(entry)[row : row + 1], SLOTS[row : row + 1])
    assert torch.equal(*pools)


@EVERY
def test_nan_in_other_slots_is_not_read(entry):
    cache = torch.full((3, 4, entry), 0xFF, dtype=torch.uint8)
    kv_cache_write(cache, rows(entry), SLOTS)
    assert bool(kv_cache_read(cache, SLOTS).isfinite().all())


def test_floor_of_amax_is_where_flashmla_has_it_on_request():
    tiny = torch.full((5, 512), 1e-5)
    caches = [pool(584), pool(584)]
    for cache, floor in zip(caches, (None, 448 * 2.0**-13), strict=True):
        kv_cache_write(cache, tiny, SLOTS, amax_floor=floor)
    scales = [cache.flatten(1)[0, 4 * 576].item() - 127 for cache in caches]
    assert scales == [-22, -13]


def test_ceiling_of_656_scales_is_left_out_on_request():
    x = torch.full((5, 576), 3.0)
    caches = [pool(656), pool(656)]
    for cache, scale_format in zip(caches, ("ue8m0", "float32"), strict=True):
        kv_cache_write(cache, x, SLOTS, scale_format=scale_format)
    scales = [cache[0, 0, 512:516].contiguous().view(torch.float32).item() for cache in caches]
    assert scales == [2.0**-7, (torch.tensor(3.0) / 448).item()]


@pytest.mark.parametrize("entry", [68, 584])
def test_subnormal_group_has_the_scale_of_the_floor(entry):
    back = read_back(entry, torch.full((5, FORMATS[entry].dim), 1e-41))
    assert back[:, :64].abs().sum().item() == 0.0


def test_arbitrary_float32_scales_are_read_as_they_are():
    cache = torch.zeros(1, 1, 132, dtype=torch.uint8)
    cache[0, 0, :128] = 0x38  # 1.0
    cache[0, 0, 128:] = torch.tensor([0.3]).view(torch.uint8)
    assert kv_cache_read(cache, torch.tensor([0]), "float32").unique().tolist() == [torch.tensor(0.3).item()]


def test_pool_of_floats_is_read_as_it_was_written():
    cache, x = torch.zeros(3, 4, 24), Make(seed=3).normal(5, 24)
    kv_cache_write(cache, x, SLOTS)
    assert torch.equal(kv_cache_read(cache, SLOTS.view(5, 1), "float32")[:, 0], x)


def test_torn_pages_are_refused():
    with pytest.raises(ArgumentError) as caught:
        kv_cache_write(pool(584, block_size=8)[:, ::2], rows(584), SLOTS)
    says = "kv_cache_write: a page of cache is one run of bytes, strides (any, 584, 1); got (4704, 1168, 1)."
    assert str(caught.value) == says


def test_nothing_is_written_where_a_slot_stands_twice():
    cache = pool(584)
    with pytest.raises(ArgumentError):
        kv_cache_write(cache, rows(584), torch.tensor([1, 2, 3, 2, -1]))
    assert torch.equal(cache, pool(584))


@pytest.mark.parametrize(("floor", "wanted"), [(None, -126), (1.5, -2)], ids=["default", "given"])
def test_floor_of_68_is_the_least_that_e2m1_scales_need(floor, wanted):
    cache = pool(68)
    kv_cache_write(cache, torch.full((5, 128), 1e-41), SLOTS, amax_floor=floor)
    assert cache.flatten(1)[0, 4 * 64].item() - 127 == wanted


def test_last_64_elements_are_rounded_to_nearest():
    x = rows(656)
    assert torch.equal(read_back(656, x)[:, -64:], x[:, -64:].bfloat16().float())


def test_one_slot_without_an_axis_is_read():
    cache = torch.arange(24.0).view(2, 3, 4)
    assert kv_cache_read(cache, torch.tensor(4), "float32").tolist() == [16.0, 17.0, 18.0, 19.0]
