"""Right kernels of the caches, and pools read byte by byte for those of attention."""

import torch
from variation import right

RIGHT = []

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
POSITIVE_E2M1 = E2M1[:8]
# bytes: (bytes of codes, elements of a group, whether scales stand behind the page's entries)
KINDS = {584: (448, 64, True), 656: (512, 128, False), 132: (128, 128, True), 68: (64, 32, True)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def e4m3_table():
    """The values of the 256 codes, from sign, exponent and mantissa."""
    code = torch.arange(256)
    exponent, mantissa = (code >> 3) & 15, (code & 7).double()
    normal = (1 + mantissa / 8) * torch.exp2(exponent.double() - 7)
    value = torch.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    value = torch.where((code & 127) == 127, torch.nan, value)
    return torch.where(code >= 128, -value, value)


E4M3 = e4m3_table()


def floats_of(raw, dtype):
    """Bytes [.., n] as numbers [.., n/itemsize], in float64."""
    return raw.contiguous().view(dtype).double()


def powers(raw):
    """e8m0 bytes as numbers."""
    return torch.exp2(raw.double() - 127)


def pages_apart(cache):
    """(entries, scales) of a page that has all entries first, then all scales; as bytes."""
    blocks, block_size, entry = cache.shape
    page = torch.stack([block.flatten() for block in cache]) if blocks else cache.reshape(0, block_size * entry)
    width = {584: 576, 132: 128, 68: 64}[entry]
    cut = block_size * width
    return page[:, :cut].reshape(blocks * block_size, width), page[:, cut:].reshape(blocks * block_size, entry - width)


def pool_values(cache):
    """The value of every slot, [slots, dim] float64."""
    slots, entry = cache.shape[0] * cache.shape[1], cache.shape[2]
    if cache.dtype != torch.uint8:
        return cache.double().reshape(slots, entry)
    width, group, apart = KINDS[entry]
    data, scales = (
        pages_apart(cache) if apart else (cache.reshape(slots, entry), cache.reshape(slots, entry)[:, 512:528])
    )
    if entry == 68:
        codes = torch.stack((E2M1[(data & 15).long()], E2M1[(data >> 4).long()]), -1).reshape(slots, 128)
    else:
        codes = E4M3[data[:, :width].long()]
    factor = floats_of(scales, torch.float32) if entry in (656, 132) else powers(scales)
    factor = factor[:, : codes.shape[1] // group]
    values = codes * factor.repeat_interleave(group, 1)
    if entry in (584, 656):
        values = torch.cat((values, floats_of(data[:, -128:], torch.bfloat16)), 1)
    return values


def slots_in_table(cache, table, sequence, item):
    """Slots of items [T, n] of the sequences [T], -1 where there is none."""
    block_size, width = cache.shape[1], table.shape[1]
    if not table.numel():
        return torch.full_like(item, -1).long()
    item = item.long()
    column = torch.where((item >= 0) & (item < width * block_size), item, 0) // block_size
    block = table[sequence.long()[:, None].expand_as(column), column].long()
    legal = (item >= 0) & (item < width * block_size) & (block >= 0)
    return torch.where(legal, block * block_size + item - column * block_size, -1)


@right(RIGHT, "kv_cache_read")
def pools_decoded_by_table(cache, slot_mapping, out_dtype):
    values = torch.cat((pool_values(cache), torch.zeros(1, pool_values(cache[:0]).shape[1], dtype=torch.float64)))
    slots = torch.where(slot_mapping < 0, len(values) - 1, slot_mapping.long())
    return values[slots].to(DTYPES[out_dtype])


@right(RIGHT, "kv_cache_read")
def rows_read_one_by_one_in_float32(cache, slot_mapping, out_dtype):
    values = pool_values(cache)
    rows = [values[s].float() if s >= 0 else values.new_zeros(values.shape[1]).float() for s in slot_mapping.flatten()]
    out = torch.stack(rows) if rows else values[:0].float()
    return out.reshape(*slot_mapping.shape, values.shape[1]).to(DTYPES[out_dtype])


def encoded(value, table):
    """The index of the nearest of the table's values, a tie going to the even index; value float64, table ascending."""
    above = torch.searchsorted(table, value).clamp(max=len(table) - 1)
    below = (above - 1).clamp(min=0)
    up, down = table[above] - value, value - table[below]
    take = (up < down) | ((up == down) & (above % 2 == 0))
    return torch.where(take, above, below)


def exponent_above(ratio):
    """The least e with 2^e >= ratio."""
    mantissa, exponent = torch.frexp(ratio)
    return torch.where(mantissa == 0.5, exponent - 1, exponent)


def row_bytes(x, entry, scale_format, amax_floor):
    """(codes, scales, rope) of a row, as bytes."""
    group = KINDS[entry][1]
    count = {584: 448, 656: 512, 132: 128, 68: 128}[entry]
    groups = x[:count].float().reshape(-1, group)
    most, table = (6.0, POSITIVE_E2M1) if entry == 68 else (448.0, E4M3[:127])
    floor = (6 * 2.0**-126 if entry == 68 else 1e-4) if amax_floor is None else amax_floor
    amax = groups.abs().amax(1).clamp(min=floor)
    if scale_format == "float32":
        scale, bytes_of_scale = amax / most, (amax / most).view(torch.uint8)
    else:
        exponent = exponent_above(amax / most)
        scale = torch.exp2(exponent.double()).float()
        bytes_of_scale = scale.view(torch.uint8) if entry in (656, 132) else (exponent + 127).to(torch.uint8)
    quotient = (groups / scale[:, None]).double().clamp(-most, most).flatten()
    code = encoded(quotient.abs(), table) + quotient.signbit() * (8 if entry == 68 else 128)
    codes = (code[0::2] + 16 * code[1::2] if entry == 68 else code).to(torch.uint8)
    return codes, bytes_of_scale, x[count:].to(torch.bfloat16).contiguous().view(torch.uint8)


@right(RIGHT, "kv_cache_write")
def bytes_put_one_row_after_the_other(cache, x, slot_mapping, scale_format, amax_floor):
    block_size, entry = cache.shape[1:]
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        block, at = divmod(slot, block_size)
        if cache.dtype != torch.uint8:
            cache[block, at] = x[row].to(cache.dtype)
            continue
        page = torch.as_strided(
            cache, (block_size * entry,), (1,), cache.storage_offset() + block * cache.stride(0)
        )  # a page is one run of bytes
        codes, scales, rope = row_bytes(x[row], entry, scale_format, amax_floor)
        if entry == 656:
            page[at * 656 : at * 656 + 656] = torch.cat((codes, scales, rope))
            continue
        width, apart = (entry - 8, 8) if entry == 584 else (entry - 4, 4)
        page[at * width : (at + 1) * width] = torch.cat((codes, rope))
        first = block_size * width + at * apart
        page[first : first + len(scales)] = scales


@right(RIGHT, "kv_cache_write")
def pages_read_changed_and_written_back(cache, x, slot_mapping, scale_format, amax_floor):
    # Rows from the last, by the formats' own casts; a page is taken out, changed and put back.
    for row in range(len(x) - 1, -1, -1):
        slot = int(slot_mapping[row])
        if slot >= 0:
            page = cache[slot // cache.shape[1]].clone()
            holder = page[None]
            at = slot_mapping[row : row + 1] * 0 + slot % cache.shape[1]
            bytes_put_one_row_after_the_other(holder, x[row : row + 1], at, scale_format, amax_floor)
            cache[slot // cache.shape[1]] = holder[0]


@right(RIGHT, "window_indices")
def windows_in_loops(positions, window):
    rows = [[*range(max(0, p - window + 1), p + 1)] for p in positions.tolist()]
    return torch.tensor([row + [-1] * (window - len(row)) for row in rows], dtype=torch.int32).reshape(
        len(rows), window
    )


@right(RIGHT, "window_indices")
def windows_counted_from_the_token(positions, window):
    back = torch.arange(window - 1, -1, -1)
    seen = positions.long()[:, None] - back
    ahead = (seen < 0).sum(1, keepdim=True)
    seen = seen.gather(1, (torch.arange(window) + ahead) % window)
    return torch.where(torch.arange(window) < window - ahead, seen, -1).int()


@right(RIGHT, "compress_indices")
def entries_in_loops(positions, ratio, max_entries):
    counts = [(p + 1) // ratio for p in positions.tolist()]
    rows = [[*range(count)] + [-1] * (max_entries - count) for count in counts]
    return torch.tensor(rows, dtype=torch.int32).reshape(len(counts), max_entries)


@right(RIGHT, "compress_indices")
def entries_by_their_last_token(positions, ratio, max_entries):
    entry = torch.arange(max_entries)
    seen = (entry + 1) * ratio - 1 <= positions.long()[:, None]
    return (entry * seen - (~seen).long()).int()
