"""Write rows into the entries of a paged cache, quantising where the cache holds bytes.

    cache[slot_mapping[n] // block_size, slot_mapping[n] % block_size] = entry(x[n])

A negative slot skips its row, whatever the row has. Nothing else of the pool changes: not the other entries, not the
unused scale byte of 584, not what lies between pages (stride(0)). The same slot twice, or one beyond the pool, is an
error. A pool of floats takes x rounded to its dtype, and neither `scale_format` nor `amax_floor` matters. A uint8 pool
takes entries whose number of bytes names the format (isolith.numerics.pages has the layouts):

    584  x[448 | 64]   act_quant_fp8 of the first 448 in groups of 64; the last 64 rounded to bfloat16
    656  x[512 | 64]   act_quant_fp8 of the first 512 in groups of 128; the last 64 rounded to bfloat16
    132  x[128]        act_quant_fp8 in one group
     68  x[128]        act_quant_fp4 in groups of 32

584 and 68 have e8m0 scales. The float32 scales of 656 and 132 are powers of two as well, unless `scale_format` is
"float32" (amax/448). `amax_floor` None is 1e-4, for 68 6*2^-126. The sign of zeros in 68 and the last bit of "float32"
scales are as free as in act_quant_fp4 and act_quant_fp8; the samples hold values where all kernels agree to the bit.

Source: FlashMLA 9241ae3 tests/quant.py (584, 656; its floor is on the scale: amax_floor = 448e-4 rounded up to 448 *
2^-13); DeepGEMM 54e2261 tests/test_attention.py (132, 68); DeepSeek-V4 inference/model.py (floor of amax).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from isolith.dtypes import FLOAT, INTEGER, PACKED
from isolith.errors import ArgumentError
from isolith.materials.relations import reordered
from isolith.numerics.codes import E2M1_MAX, E4M3_MAX, SMALLEST_SCALE, check_amax_floor, check_scale_format
from isolith.numerics.pages import FORMATS, check_cache, check_slots, entry_dim, format_of, write_entries, write_rows
from isolith.operator import Cost, Operator
from isolith.ops.quant.act_quant_fp4 import reference as act_quant_fp4
from isolith.ops.quant.act_quant_fp4 import without_negative_zeros
from isolith.ops.quant.act_quant_fp8 import reference as act_quant_fp8
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(
    cache: Tensor, x: Tensor, slot_mapping: Tensor, scale_format: str = "ue8m0", amax_floor: float | None = None
) -> None:
    layout = format_of(cache)
    if layout is None:
        write_rows(cache, slot_mapping, x)
        return
    values, rope = x.split((layout.quantised, layout.dim - layout.quantised), dim=-1)
    if layout.entry == 68:
        codes, scale = act_quant_fp4(
            values, layout.group, E2M1_MAX * SMALLEST_SCALE if amax_floor is None else amax_floor
        )
    else:
        codes, scale = act_quant_fp8(values, layout.group, scale_format, 1e-4 if amax_floor is None else amax_floor)
    write_entries(cache, slot_mapping, codes, scale.to(layout.scale_dtype), rope)


def fake(**_: object) -> None:
    return None


def check(cache: Tensor, x: Tensor, scale_format: str, amax_floor: float | None, **_: object) -> None:
    check_cache("kv_cache_write", "cache", cache)
    check_scale_format("kv_cache_write", scale_format)
    if x.shape[-1] != entry_dim(cache):
        raise ArgumentError(
            f"kv_cache_write: an entry of cache must have x's {x.shape[-1]} elements; got {entry_dim(cache)}."
        )
    layout = format_of(cache)
    if layout is None:
        return
    if scale_format == "float32" and layout.scale_dtype != torch.float32:
        raise ArgumentError(
            f"kv_cache_write: scale_format 'float32' needs entries of 656 or 132 bytes; got {layout.entry}."
        )
    if amax_floor is not None:
        check_amax_floor("kv_cache_write", amax_floor, E2M1_MAX if layout.entry == 68 else E4M3_MAX)


def check_values(cache: Tensor, slot_mapping: Tensor, **_: object) -> None:
    check_slots("kv_cache_write", "slot_mapping", slot_mapping, cache)
    slot, count = slot_mapping[slot_mapping >= 0].unique(return_counts=True)
    if slot.numel() and int(count.max()) > 1:
        twice = int(slot[count > 1][0])
        raise ArgumentError(f"kv_cache_write: slot_mapping must name a slot at most once; got {twice} again.")


def cost(cache: Tensor, x: Tensor, slot_mapping: Tensor, **_: object) -> Cost:
    quantised = cache.dtype == torch.uint8
    return Cost(
        flops=4 * x.numel() if quantised else 0,  # magnitude, maximum, division, rounding
        bytes_read=x.nbytes + slot_mapping.nbytes,
        bytes_written=x.shape[0] * cache.shape[-1] * cache.itemsize,
    )


def random_pool(make: Make, blocks: int, block_size: int, entry: int, spare: int = 0) -> Tensor:
    """A uint8 pool of random bytes, its pages `spare` bytes apart."""
    pages = make.integers(0, 256, blocks, block_size * entry + spare, dtype=torch.uint8)
    return pages.as_strided((blocks, block_size, entry), (block_size * entry + spare, entry, 1))


def rows_for(make: Make, count: int, entry: int) -> Tensor:
    """Rows for a byte format, their elements' sizes spread over 2^-6..2^5 and groups of zeros among them."""
    layout = FORMATS[entry]
    sizes = torch.exp2(make.integers(-6, 6, count, layout.dim // 32, 1, dtype=torch.float64))
    sizes[::3, :4] = 0
    groups = make.normal(count, layout.dim // 32, 32, dtype=torch.float64) * sizes
    rows = groups.flatten(1).to(make.dtype)
    return without_negative_zeros(rows) if entry == 68 else rows


def samples(make: Make) -> Iterator[Sample]:
    for entry in FORMATS:
        for block_size in (1, 2, 32, 64):
            cache = random_pool(make, max(80 // block_size, 3), block_size, entry, spare=96)
            slots = make.permutation(cache.shape[0] * block_size)[:9].to(torch.int32).to(make.device)
            slots[4] = -1
            yield Sample(
                f"{entry}_bytes_block_{block_size}", cache=cache, x=rows_for(make, 9, entry), slot_mapping=slots
            )
        # The last entry of a page, and the first of the next.
        slots = make.tensor([63, 64, 127, 0], torch.int64)
        cache = random_pool(make, 3, 64, entry)
        yield Sample(f"{entry}_bytes_page_boundary", cache=cache, x=rows_for(make, 4, entry), slot_mapping=slots)
        slots = make.tensor([], torch.int32)
        yield Sample(f"{entry}_bytes_no_rows", cache=cache.clone(), x=rows_for(make, 0, entry), slot_mapping=slots)
    yield from special_samples(make)


def special_samples(make: Make) -> Iterator[Sample]:
    """Pools of floats, scales that are no powers of two, floors, and rows that nobody may read."""
    slots = make.tensor([5, -1, 17, 0], torch.int32)
    padded = make.normal(3, 9, 512)[:, :8]
    yield Sample("floats", cache=padded, x=make.normal(4, 512), slot_mapping=slots)
    dense = make.tensor([5, -1, 17, 0, 23, -7, 16, 31, -16, -17], torch.int32)
    yield Sample("dense_floats", cache=make.normal(2, 16, 512), x=make.normal(10, 512), slot_mapping=dense)
    cache = make.normal(3, 8, 576, dtype=torch.bfloat16)
    yield Sample("floats_rounded_to_the_pool", cache=cache, x=make.normal(4, 576), slot_mapping=slots)
    far = make.tensor([65535, 65536, 69999], torch.int32)  # more than 16 bits count
    yield Sample("slots_beyond_16_bits", cache=make.normal(4375, 16, 4), x=make.normal(3, 4), slot_mapping=far)
    # The amax of each group is the first value beyond one that the largest code holds with half the scale.
    for entry, most in ((584, 448.0), (656, 448.0), (132, 448.0), (68, 6.0)):
        x = make.normal(4, FORMATS[entry].dim, std=0.1).abs()
        x[:, :: FORMATS[entry].group] = most * (1 + torch.finfo(make.dtype).eps)
        cache = random_pool(make, 3, 8, entry)
        yield Sample(f"{entry}_bytes_amax_beyond_a_power_of_two", cache=cache, x=x, slot_mapping=slots)
    x = make.normal(4, 512)
    x[1] = torch.nan
    yield Sample("skipped_row_is_nan", cache=random_pool(make, 3, 8, 584), x=x, slot_mapping=slots)
    x = make.normal(576, 4).T
    yield Sample("permuted_axes", cache=random_pool(make, 3, 8, 656), x=x, slot_mapping=slots)
    none = make.full(-1, 4, dtype=torch.int32)
    yield Sample("all_skipped", cache=random_pool(make, 3, 8, 584), x=make.normal(4, 512), slot_mapping=none)
    for entry in (656, 132):
        # 1.25 times values of e4m3, amax 560: the scale is 1.25 and every quotient exact, however it is computed.
        codes = make.integers(0, 120, 4, FORMATS[entry].dim, dtype=torch.uint8).view(torch.float8_e4m3fn)
        x = codes.to(torch.float64) * 1.25
        x[:, ::128] = -560.0
        arguments = {"cache": random_pool(make, 3, 8, entry), "x": x.to(make.dtype), "slot_mapping": slots}
        yield Sample(f"{entry}_bytes_float32_scale", **arguments, scale_format="float32")
        arguments["cache"] = random_pool(make, 3, 8, entry)
        yield Sample(f"{entry}_bytes_power_of_two_scale", **arguments)
    tiny = make.normal(4, 512, std=1e-3)
    yield Sample("584_bytes_tiny", cache=random_pool(make, 3, 8, 584), x=tiny, slot_mapping=slots)
    arguments = {"cache": random_pool(make, 3, 8, 584), "x": tiny, "slot_mapping": slots}
    yield Sample("584_bytes_floor_of_flashmla", **arguments, amax_floor=448 * 2.0**-13)
    arguments = {"cache": random_pool(make, 3, 8, 68), "x": tiny[:, :128].abs(), "slot_mapping": slots}
    yield Sample("68_bytes_floor", **arguments, amax_floor=1e-2)
    slots = make.place(make.permutation(256)[:7], torch.int32)
    for entry in FORMATS:  # pages of 64 entries, as released engines have them
        cache, x = random_pool(make, 4, 64, entry), rows_for(make, 7, entry)
        yield Sample(f"{entry}_bytes_pages_of_64", "model", cache=cache, x=x, slot_mapping=slots)


def errors(make: Make) -> Iterator[ErrorSample]:
    x, slots = make.normal(3, 512), make.tensor([0, 5, -1], torch.int32)
    good = {"cache": random_pool(make, 2, 4, 584), "x": x, "slot_mapping": slots}
    sizes = "a uint8 cache has entries of 584, 656, 132 or 68 bytes; got 512."
    choices = "scale_format must be 'ue8m0' or 'float32'; got 'e8m0'."
    no_float32 = "scale_format 'float32' needs entries of 656 or 132 bytes; got 584."
    cases = (
        ("unknown_format", {"cache": random_pool(make, 2, 4, 512)}, sizes),
        ("x_width", {"x": x[:, :511]}, "an entry of cache must have x's 511 elements; got 512."),
        (
            "float_pool_width",
            {"cache": make.zeros(2, 4, 576)},
            "an entry of cache must have x's 512 elements; got 576.",
        ),
        ("rows", {"slot_mapping": slots[:2]}, "tokens is 3 in x but 2 in slot_mapping."),
        ("unknown_scale_format", {"scale_format": "e8m0"}, choices),
        ("float32_scale_of_584", {"scale_format": "float32"}, no_float32),
        ("no_floor", {"amax_floor": 0.0}, "amax_floor must be at least 448*2^-126; got 0.0."),
        (
            "slot_beyond_the_pool",
            {"slot_mapping": slots + 3},
            "slot_mapping must be below blocks*block_size = 8; got 8.",
        ),
        ("slot_twice", {"slot_mapping": slots * 0 + 5}, "slot_mapping must name a slot at most once; got 5 again."),
        ("float_slots", {"slot_mapping": slots.float()}, "slot_mapping must be int32 or int64; got float32."),
    )
    for name, arguments, says in cases:
        yield ErrorSample(name, **{**good, **arguments}, says=f"kv_cache_write: {says}")


def relations(make: Make) -> Iterator[Relation]:
    def last(parts: list[list[Tensor]]) -> list[Tensor]:
        return parts[-1]

    for entry in FORMATS:
        slots = make.place(make.permutation(24)[:9], torch.int32)
        slots[3] = -1
        call = {"cache": random_pool(make, 3, 8, entry), "x": rows_for(make, 9, entry), "slot_mapping": slots}
        order = make.permutation(9)
        axes = {"x": 0, "slot_mapping": 0}
        yield reordered(f"{entry}_bytes_rows_reordered", call, order, axes, {}, exact=True)
        pieces = tuple(
            {**call, "x": call["x"][low:high].contiguous(), "slot_mapping": slots[low:high].contiguous()}
            for low, high in ((0, 1), (1, 5), (5, 9))
        )
        name = f"{entry}_bytes_in_three_calls"
        yield Relation(name=name, whole=call, parts=pieces, assemble=last, carry=("cache",), exact=True)


kv_cache_write = Operator(
    name="kv_cache_write",
    shapes="cache[blocks block_size _] x[tokens _] slot_mapping[tokens] ->",
    dtypes={"cache": FLOAT + PACKED, "x": FLOAT, "slot_mapping": INTEGER},
    reference=reference,
    variants=(),
    fake=fake,
    check=check,
    check_values=check_values,
    cost=cost,
    samples=samples,
    errors=errors,
    mutates=("cache",),
    bitwise=True,
    relations=relations,
)
