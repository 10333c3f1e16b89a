// Entries of a paged pool: where they lie, and their values as float32 or bfloat16.
// The byte formats are those of isolith.numerics.pages.
#pragma once

#include "simd.h"

// The bytes of a quantised entry: codes, scales (behind all entries of the page where `apart`), trailing bfloat16.
struct Layout {
    int64_t entry, dim, quantised, group, code_bytes, data_bytes, scale_bytes;
    bool apart;
};
constexpr Layout LAYOUT_584 = {584, 512, 448, 64, 448, 576, 8, true};
constexpr Layout LAYOUT_656 = {656, 576, 512, 128, 512, 656, 16, false};
constexpr Layout LAYOUT_132 = {132, 128, 128, 128, 128, 128, 4, true};
constexpr Layout LAYOUT_68 = {68, 128, 128, 32, 64, 64, 4, true};

// f(layout) of a byte format: *layout() is a constant.
template <class F>
void with_layout(int64_t kind, F f) {
    if (kind == 584) f(std::integral_constant<const Layout*, &LAYOUT_584>{});
    if (kind == 656) f(std::integral_constant<const Layout*, &LAYOUT_656>{});
    if (kind == 132) f(std::integral_constant<const Layout*, &LAYOUT_132>{});
    if (kind == 68) f(std::integral_constant<const Layout*, &LAYOUT_68>{});
}

// What Python's pages.Pool says: kind is a dtype's code, or the bytes of a quantised entry.
struct Pool {
    const uint8_t* data;
    int64_t kind, dim, blocks, block_size, block_bytes, row_bytes, element_bytes;
    int64_t shift;  // block_size = 2^shift, or -1: a division takes as long as reading a line of an entry

    int64_t slots() const { return blocks * block_size; }
    int64_t block(int64_t item) const { return shift >= 0 ? item >> shift : item / block_size; }
    int64_t within(int64_t item) const { return item - block(item) * block_size; }
    const uint8_t* page(int64_t slot) const { return data + block(slot) * block_bytes; }
    const uint8_t* row(int64_t slot) const { return page(slot) + within(slot) * row_bytes; }  // of floats
};

// Where the parts of an entry lie, of a page that may be written too.
template <class Byte>
struct Place {
    Byte *codes, *scales, *rope;
};
template <class Byte>
INLINE Place<Byte> place_of(const Layout& layout, Byte* page, int64_t block_size, int64_t row) {
    Byte* entry = page + row * layout.data_bytes;
    Byte* scales = layout.apart ? page + block_size * layout.data_bytes + row * layout.scale_bytes
                                : entry + layout.code_bytes;
    return {entry, scales, entry + layout.data_bytes - 2 * (layout.dim - layout.quantised)};
}

INLINE float scale_of(const Layout& layout, const uint8_t* scales, int64_t group) {
    if (layout.entry == 584 || layout.entry == 68) return from_ue8m0(scales[group]);
    float scale;
    std::memcpy(&scale, scales + 4 * group, 4);
    return scale;
}

INLINE f32 load_codes(const Layout& layout, const uint8_t* codes, int64_t at) {
    return layout.entry == 68 ? load_e2m1(codes + at / 2) : load_e4m3(codes + at);
}

// The values of an entry of bytes, each an f32 given to put(at, value).
template <class Put>
INLINE void values_of(const Layout& layout, const Place<const uint8_t>& place, Put put) {
    for (int64_t group = 0; group < layout.quantised / layout.group; ++group) {
        const f32 scale = all(scale_of(layout, place.scales, group));
        for (int64_t at = group * layout.group; at < (group + 1) * layout.group; at += LANES)
            put(at, load_codes(layout, place.codes, at) * scale);
    }
    for (int64_t at = layout.quantised; at < layout.dim; at += LANES)
        put(at, load((const bf16*)place.rope + (at - layout.quantised)));
}

// Ask for an entry that is read soon: entries lie about, and no hardware foresees the next.
inline void expect(const Pool& pool, int64_t slot) {
    const uint8_t* row = pool.row(slot);
    int64_t bytes = pool.dim * pool.element_bytes;
    with_layout(pool.kind, [&](auto layout) {
        const auto place = place_of(*layout(), pool.page(slot), pool.block_size, pool.within(slot));
        row = place.codes;
        bytes = layout()->data_bytes;
        __builtin_prefetch(place.scales);
    });
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
}

// ---- as float32 ------------------------------------------------------------------------------------------------------

template <class T>
void read_row(const uint8_t* row, int64_t dim, int64_t element_bytes, float* room) {
    if (element_bytes != int64_t(sizeof(T))) {
        for (int64_t i = 0; i < dim; ++i) {
            T value;
            std::memcpy(&value, row + i * element_bytes, sizeof value);
            room[i] = to_float(value);
        }
        return;
    }
    for (int64_t i = 0; i < dim; i += LANES) {
        const int count = int(std::min<int64_t>(dim - i, LANES));
        store(room + i, load((const T*)row + i, count), count);
    }
}

// The `dim` values of the entry in a slot.
inline void read_entry(const Pool& pool, int64_t slot, float* room) {
    if (pool.kind < 3) {
        with_type(int(pool.kind), [&](auto zero) {
            read_row<decltype(zero)>(pool.row(slot), pool.dim, pool.element_bytes, room);
        });
        return;
    }
    with_layout(pool.kind, [&](auto layout) {
        const auto place = place_of(*layout(), pool.page(slot), pool.block_size, pool.within(slot));
        values_of(*layout(), place, [&](int64_t at, f32 value) { store(room + at, value); });
    });
}

// ---- as bfloat16 -----------------------------------------------------------------------------------------------------

// Whether some of the values is subnormal, which the instruction that multiplies bfloat16 takes for 0.
inline bool some_subnormal(const bf16* values, int64_t count) {
    bf16x32 least = ~bf16x32{};
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        const bf16x32 each = (load_pairs(values + i) & 0x7fff) - 1;  // of 0 the largest
        least = each < least ? each : least;
    }
    bool some = false;
    for (; i < count; ++i) some = some || uint16_t((values[i].bits & 0x7fff) - 1) < 0x7f;
    uint64_t found[8];
    const auto small = least < 0x7f;
    std::memcpy(found, &small, sizeof found);
    for (const uint64_t part : found) some = some || part;
    return some;
}

INLINE void store_exact(bf16* room, f32 value) {  // of values whose lower half is 0
#ifdef AVX512
    _mm256_storeu_si256((__m256i*)room, _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)value, 16)));
#else
    for (int i = 0; i < LANES; ++i) room[i].bits = uint16_t(bits_as<uint32_t>(float(value[i])) >> 16);
#endif
}

// The ue8m0 code of a scale with which bfloat16 holds every code, and as a normal number; 0 where it does not.
INLINE int exponent_of(const Layout& layout, const uint8_t* scales, int64_t group) {
    const uint32_t bits = bits_as<uint32_t>(scale_of(layout, scales, group));
    const uint32_t least = layout.entry == 68 ? 2 : 10, most = layout.entry == 68 ? 252 : 246;
    return (bits & 0x7fffff) == 0 && bits >= (least << 23) && bits <= (most << 23) ? int(bits >> 23) : 0;
}

#ifdef BYTE_TABLES
// The two bytes of the bfloat16 of e4m3 codes without their sign.
struct TableOfE4m3 {
    alignas(64) uint8_t low[128], high[128];
    TableOfE4m3() {
        for (int i = 0; i < 128; i += LANES) {
            uint8_t codes[LANES];
            bf16 values[LANES];
            for (int lane = 0; lane < LANES; ++lane) codes[lane] = uint8_t(i + lane);
            store_exact(values, load_e4m3(codes));
            for (int lane = 0; lane < LANES; ++lane) {
                low[i + lane] = uint8_t(values[lane].bits);
                high[i + lane] = uint8_t(values[lane].bits >> 8);
            }
        }
    }
};
inline const TableOfE4m3 table_of_e4m3;
#endif

INLINE bf16x32 scaled(bf16x32 values, uint16_t shift) {  // zeros stay
    return (values & 0x7fff) != 0 ? values + shift : values;
}

// Sixty-four e4m3 codes times 2^(exponent - 127). False where one is NaN.
INLINE bool store_e4m3(const uint8_t* codes, int exponent, bf16* room) {
#ifdef BYTE_TABLES
    const uint16_t shift = uint16_t((exponent - 127) << 7);
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), top = _mm512_set1_epi8(char(0x80));
    const __m512i code = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(codes));
    const auto half = [&](const uint8_t* bytes) {
        return _mm512_permutex2var_epi8(_mm512_load_si512(bytes), code, _mm512_load_si512(bytes + 64));
    };
    const __m512i low = half(table_of_e4m3.low);
    const __m512i high = _mm512_or_si512(half(table_of_e4m3.high), _mm512_and_si512(code, top));
    const bf16x32 first = scaled((bf16x32)_mm512_unpacklo_epi8(low, high), shift);
    const bf16x32 last = scaled((bf16x32)_mm512_unpackhi_epi8(low, high), shift);
    std::memcpy(room, &first, sizeof first);
    std::memcpy(room + 2 * LANES, &last, sizeof last);
    return !_mm512_cmpeq_epi8_mask(_mm512_or_si512(code, top), _mm512_set1_epi8(char(0xff)));
#else
    const f32 scale = all(bits_as<float>(uint32_t(exponent) << 23));
    i32 lost = {};
    for (int i = 0; i < 64; i += LANES) {
        const f32 value = load_e4m3(codes + i);
        lost |= value != value;
        store_exact(room + i, value * scale);
    }
    for (int lane = 0; lane < LANES; ++lane)
        if (lost[lane]) return false;
    return true;
#endif
}

// The bfloat16 of e2m1 codes, twice, since whoever looks them up has a fifth bit that says nothing.
const bf16x32 TABLE_OF_E2M1 = {0,      0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80,
                               0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0, 0,      0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040,
                               0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};

// Thirty-two e2m1 codes likewise.
INLINE void store_e2m1(const uint8_t* codes, int exponent, bf16* room) {
#ifdef AVX512
    // The high half of a byte moves into the second half of a lane.
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes));
    const __m512i both = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
    const bf16x32 plain = (bf16x32)_mm512_permutexvar_epi16(both, (__m512i)TABLE_OF_E2M1);
    const bf16x32 values = scaled(plain, uint16_t((exponent - 127) << 7));
    std::memcpy(room, &values, sizeof values);
#else
    const f32 scale = all(bits_as<float>(uint32_t(exponent) << 23));
    for (int i = 0; i < 2 * LANES; i += LANES) store_exact(room + i, load_e2m1(codes + i / 2) * scale);
#endif
}

// Whether entries of this kind may be read so at all.
INLINE bool some_in_bfloat16(const Pool& pool) { return pool.kind == 1 || pool.kind > 2; }

// As read_entry; false, and nothing of use in `room`, where bfloat16 does not hold all values as normal numbers.
inline bool read_entry(const Pool& pool, int64_t slot, bf16* room) {
    if (pool.kind == 1) {
        const uint8_t* row = pool.row(slot);
        if (pool.element_bytes == 2)
            std::memcpy(room, row, size_t(2 * pool.dim));
        else
            for (int64_t i = 0; i < pool.dim; ++i) std::memcpy(room + i, row + i * pool.element_bytes, 2);
        return !some_subnormal(room, pool.dim);
    }
    bool exact = pool.kind > 2;
    with_layout(pool.kind, [&](auto named) {
        constexpr const Layout& layout = *named();
        const auto place = place_of(layout, pool.page(slot), pool.block_size, pool.within(slot));
        for (int64_t group = 0; group < layout.quantised / layout.group; ++group) {
            const int exponent = exponent_of(layout, place.scales, group);
            if (!exponent) exact = false;
            if (layout.entry == 68) store_e2m1(place.codes + 16 * group, exponent, room + 32 * group);
            for (int64_t i = group * layout.group; layout.entry != 68 && i < (group + 1) * layout.group; i += 64)
                exact &= store_e4m3(place.codes + i, exponent, room + i);
        }
        const int64_t rest = layout.dim - layout.quantised;
        std::memcpy(room + layout.quantised, place.rope, size_t(2 * rest));
        exact = exact && !some_subnormal(room + layout.quantised, rest);
    });
    return exact;
}
