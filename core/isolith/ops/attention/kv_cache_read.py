"""Read entries of a paged cache, dequantised.

    y[..., :] = value(cache[slot_mapping[...] // block_size, slot_mapping[...] % block_size])

A negative slot gives zeros, whatever the pool holds; a slot beyond the pool is an error; a slot may be named more than
once, and one that was never written gives what lies there. A pool of floats gives its entries in out_dtype. A uint8
pool has entries whose number of bytes names the format (isolith.numerics.pages has the layouts): the quantised elements
are code * scale, of 584, 656 and 132 e4m3, of 68 e2m1; the last 64 of 584 and 656 are bfloat16. Any value of a scale is
read, power of two or not. The product is taken in float32 (float64 for out_dtype "float64") and rounded to out_dtype,
or rounded once; with scales that are powers of two it is exact in bfloat16.

Source: FlashMLA 9241ae3 tests/quant.py (584, 656); DeepGEMM 54e2261 tests/test_attention.py (132, 68).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from isolith.dtypes import FLOAT, FLOAT_NAMES, INTEGER, PACKED
from isolith.materials.relations import inverse, joined, same, take
from isolith.numerics.codes import check_out_dtype
from isolith.numerics.pages import FORMATS, check_cache, check_slots, entry_dim, read_entries
from isolith.operator import Cost, Operator
from isolith.ops.attention.kv_cache_write import random_pool, rows_for
from isolith.ops.attention.kv_cache_write import reference as kv_cache_write
from isolith.sample import ErrorSample, Make, Relation, Sample


def reference(cache: Tensor, slot_mapping: Tensor, out_dtype: str = "bfloat16") -> Tensor:
    return read_entries(cache, slot_mapping, FLOAT_NAMES[out_dtype])


def one_rounding(cache: Tensor, slot_mapping: Tensor, out_dtype: str = "bfloat16") -> Tensor:
    """The exact product of code and scale, rounded once to out_dtype."""
    return read_entries(cache, slot_mapping, torch.float64).to(FLOAT_NAMES[out_dtype])


def fake(cache: Tensor, slot_mapping: Tensor, out_dtype: str = "bfloat16") -> Tensor:
    return cache.new_empty((*slot_mapping.shape, entry_dim(cache)), dtype=FLOAT_NAMES[out_dtype])


def check(cache: Tensor, slot_mapping: Tensor, out_dtype: str = "bfloat16") -> None:
    check_cache("kv_cache_read", "cache", cache)
    check_out_dtype("kv_cache_read", out_dtype)


def check_values(cache: Tensor, slot_mapping: Tensor, out_dtype: str = "bfloat16") -> None:
    check_slots("kv_cache_read", "slot_mapping", slot_mapping, cache)


def cost(cache: Tensor, slot_mapping: Tensor, out_dtype: str = "bfloat16") -> Cost:
    elements = slot_mapping.numel() * entry_dim(cache)
    entries = min(slot_mapping.numel(), cache.shape[0] * cache.shape[1])
    return Cost(
        flops=elements if cache.dtype == torch.uint8 else 0,
        bytes_read=entries * cache.shape[-1] * cache.itemsize + slot_mapping.nbytes,
        bytes_written=elements * FLOAT_NAMES[out_dtype].itemsize,
    )


def written(make: Make, blocks: int, block_size: int, entry: int, scale_format: str = "ue8m0") -> tuple[Tensor, Tensor]:
    """A uint8 pool of NaN scales and codes in which 9 shuffled slots hold rows; and these slots."""
    cache = random_pool(make, blocks, block_size, entry, spare=32).fill_(0xFF)
    slots = make.permutation(blocks * block_size)[:9].to(torch.int32).to(make.device)
    kv_cache_write(cache, rows_for(make, slots.shape[0], entry), slots, scale_format)
    return cache, slots


def samples(make: Make) -> Iterator[Sample]:
    out = str(make.dtype).removeprefix("torch.")
    for entry in FORMATS:
        for block_size in (1, 2, 32, 64):
            cache, slots = written(make, max(80 // block_size, 3), block_size, entry)
            yield Sample(
                f"{entry}_bytes_block_{block_size}", "exact", cache=cache, slot_mapping=slots, out_dtype="bfloat16"
            )
        # Any shape of slots, one of them twice, and -1, for which NaN of slot 0 must not show.
        mixed = torch.stack((slots[:3], slots[:3].flip(0), slots.new_full((3,), -1)))
        yield Sample(f"{entry}_bytes_two_axes", cache=cache, slot_mapping=mixed.long(), out_dtype=out)
    for entry in (656, 132):
        cache, slots = written(make, 3, 8, entry, scale_format="float32")
        yield Sample(f"{entry}_bytes_float32_scale", cache=cache, slot_mapping=slots, out_dtype=out)
    yield Sample("permuted_slots", cache=cache, slot_mapping=slots.view(3, 3).T, out_dtype=out)
    pool = make.normal(3, 9, 512)[:, :8]
    slots = make.tensor([5, -1, 17, 0, 5], torch.int32)
    yield Sample("floats", cache=pool, slot_mapping=slots, out_dtype=out)
    far = make.integers(65536, 70000, 5)  # more than 16 bits count
    yield Sample("slots_beyond_16_bits", cache=make.normal(4375, 16, 4), slot_mapping=far, out_dtype=out)
    # NaN in every slot but those read.
    pool = make.full(torch.nan, 3, 8, 128)
    pool[1, 3] = make.normal(128)
    yield Sample("nan_in_other_slots", cache=pool, slot_mapping=make.tensor([11, -1, -7], torch.int64), out_dtype=out)
    yield Sample("no_slots", cache=cache, slot_mapping=make.tensor([], torch.int32), out_dtype=out)
    for entry in FORMATS:  # pages of 64 entries, as released engines have them
        cache, _ = written(make, 4, 64, entry)
        yield Sample(f"{entry}_bytes_pages_of_64", "model", cache=cache, slot_mapping=make.integers(-1, 256, 7))
    yield Sample("no_blocks", cache=pool[:0], slot_mapping=make.tensor([-1, -1], torch.int32), out_dtype=out)


def errors(make: Make) -> Iterator[ErrorSample]:
    cache, slots = random_pool(make, 2, 4, 584), make.tensor([0, 5, -1], torch.int32)
    says = "kv_cache_read: a uint8 cache has entries of 584, 656, 132 or 68 bytes; got 576."
    yield ErrorSample("unknown_format", cache=random_pool(make, 2, 4, 576), slot_mapping=slots, says=says)
    says = "kv_cache_read: slot_mapping must be below blocks*block_size = 8; got 9."
    yield ErrorSample("slot_beyond_the_pool", cache=cache, slot_mapping=slots + 4, says=says)
    says = "kv_cache_read: out_dtype must be 'bfloat16', 'float16', 'float32' or 'float64'; got 'bf16'."
    yield ErrorSample("unknown_out_dtype", cache=cache, slot_mapping=slots, out_dtype="bf16", says=says)
    says = "kv_cache_read: cache must be [blocks block_size _], 3 axes; got shape (4, 584)."
    yield ErrorSample("cache_rank", cache=cache[0], slot_mapping=slots, says=says)
    says = "kv_cache_read: cache must be bfloat16, float16, float32, float64 or uint8; got int8."
    yield ErrorSample("int8_cache", cache=cache.view(torch.int8), slot_mapping=slots, says=says)


def relations(make: Make) -> Iterator[Relation]:
    for entry in FORMATS:
        cache, slots = written(make, 3, 8, entry)
        slots = make.integers(-1, 24, 30)
        call = {"cache": cache, "slot_mapping": slots, "out_dtype": "float32"}
        yield joined(f"{entry}_bytes_rows_apart", call, [1, 7], ["slot_mapping"])
        order = make.permutation(3)
        block = inverse(order).to(make.device)[slots.clamp(min=0).long() // 8] * 8
        moved = torch.where(slots < 0, slots, (block + slots % 8).to(slots.dtype))
        pool = {"cache": take(cache, order), "slot_mapping": moved}
        yield same(f"{entry}_bytes_blocks_renumbered", call, pool)


kv_cache_read = Operator(
    name="kv_cache_read",
    shapes="cache[blocks block_size _] slot_mapping[*] -> y[* _]",
    dtypes={"cache": FLOAT + PACKED, "slot_mapping": INTEGER},
    reference=reference,
    variants=(one_rounding,),
    fake=fake,
    check=check,
    check_values=check_values,
    cost=cost,
    samples=samples,
    errors=errors,
    relations=relations,
)
