// What the indexer multiplies: queries as they stand, and tiles of keys, transposed.
#pragma once

#include "pages.h"
#include "tiles.h"

// ---- sixteen keys ------------------------------------------------------------------------------------------------------
// From their rows to lanes: unit u of key i goes to laid[u * step + i].

// Rows of bfloat16. Whether there is no subnormal number among them.
inline bool lay_bfloat16(const bf16* const (&rows)[LANES], int64_t dim, int32_t* laid, int64_t step) {
    bf16x32 least = ~bf16x32{};
    for (int64_t unit = 0; unit < dim / 2; unit += LANES) {
        i32 part[LANES];
        for (int i = 0; i < LANES; ++i) {
            const bf16x32 values = load_pairs(rows[i] + 2 * unit), each = (values & 0x7fff) - 1;
            least = each < least ? each : least;
            part[i] = (i32)values;
        }
        transpose(part);
        for (int i = 0; i < LANES; ++i) store_units(laid + (unit + i) * step, part[i]);
    }
    bool some = false;
    for (int i = 0; i < 2 * LANES; ++i) some |= least[i] < 0x7f;
    return !some;
}

#ifdef BYTE_TABLES
// Rows of 128 e4m3 codes, without their scales. Whether there is no NaN among them.
inline bool lay_e4m3(const uint8_t* const (&rows)[LANES], int32_t* laid, int64_t step) {
    const __m512i top = _mm512_set1_epi8(char(0x80)), nan = _mm512_set1_epi8(char(0xff));
    const __m512i low0 = _mm512_load_si512(table_of_e4m3.low), low1 = _mm512_load_si512(table_of_e4m3.low + 64);
    const __m512i high0 = _mm512_load_si512(table_of_e4m3.high), high1 = _mm512_load_si512(table_of_e4m3.high + 64);
    // Of the lower and upper bytes of a lane's four codes, those of the first two, and of the last two.
    alignas(64) uint8_t first[64], last[64];
    for (int i = 0; i < 64; ++i) {
        first[i] = uint8_t(i / 4 * 4 + i % 4 / 2 + i % 2 * 64);
        last[i] = uint8_t(first[i] + 2);
    }
    const __m512i to_first = _mm512_load_si512(first), to_last = _mm512_load_si512(last);
    __mmask64 bad = 0;
    for (int64_t half = 0; half < 2; ++half) {
        i32 codes[LANES];
        for (int i = 0; i < LANES; ++i) codes[i] = load_units((const int32_t*)(rows[i] + 64 * half));
        transpose(codes);
        for (int i = 0; i < LANES; ++i) {
            const __m512i code = (__m512i)codes[i], low = _mm512_permutex2var_epi8(low0, code, low1);
            const __m512i magnitude = _mm512_permutex2var_epi8(high0, code, high1);
            const __m512i high = _mm512_or_si512(magnitude, _mm512_and_si512(code, top));
            bad |= _mm512_cmpeq_epi8_mask(_mm512_or_si512(code, top), nan);
            int32_t* units = laid + (32 * half + 2 * i) * step;
            store_units(units, (i32)_mm512_permutex2var_epi8(low, to_first, high));
            store_units(units + step, (i32)_mm512_permutex2var_epi8(low, to_last, high));
        }
    }
    return !bad;
}
#endif

#ifdef AVX512
// Rows of 128 e2m1 codes with four ue8m0 scales each. Whether bfloat16 holds them all.
inline bool lay_e2m1(const uint8_t* const (&rows)[LANES], i32 scales, int32_t* laid, int64_t step) {
    i32 codes[LANES], bad = {};
    for (int i = 0; i < LANES; ++i) codes[i] = load_units((const int32_t*)rows[i]);
    transpose(codes);
    for (int group = 0; group < 4; ++group) {
        const i32 exponent = (scales >> (8 * group)) & 0xff, shift = ((exponent - 127) << 7) & 0xffff;
        const bf16x32 both = (bf16x32)(shift | (shift << 16));
        bad |= (exponent < 2) | (exponent > 252);
        for (int i = 4 * group; i < 4 * group + 4; ++i) {
            // Byte b to unit b: its low half to the first four bits of the lane, its high half to those 16 further on.
            const __m512i code = (__m512i)codes[i];
            const __m512i high[4] = {_mm512_slli_epi32(code, 12), _mm512_slli_epi32(code, 4),
                                     _mm512_srli_epi32(code, 4), _mm512_srli_epi32(code, 12)};
            for (int b = 0; b < 4; ++b) {
                const __m512i low = _mm512_srli_epi32(code, unsigned(8 * b));
                const __m512i index = _mm512_mask_blend_epi16(0xaaaaaaaa, low, high[b]);
                const bf16x32 values = (bf16x32)_mm512_permutexvar_epi16(index, (__m512i)TABLE_OF_E2M1);
                store_units(laid + (4 * i + b) * step, (i32)((values & 0x7fff) != 0 ? values + both : values));
            }
        }
    }
    int32_t any = 0;
    for (int i = 0; i < LANES; ++i) any |= bad[i];
    return !any;
}
#endif

// ---- the call ------------------------------------------------------------------------------------------------------------

// What Python's Indexer says.
struct Indexer {
    Pool pool;
    const void* q;
    int64_t q_kind;        // a dtype's code, 3: e4m3, 4: packed e2m1
    const float* q_scale;  // [tokens, heads] or [tokens, heads, dim / 32]
    const float* weights;  // [tokens, heads], the scale of the softmax in them
    const int32_t *table, *cu_seqlens, *start_pos;
    int64_t table_width, sequences, heads, dim, ratio, max_entries;
};

constexpr int64_t TILE = 2 * LANES;  // entries: 8 KiB of bfloat16 keys of 128, which stay beside a token's queries
constexpr int64_t BLOCK = 32;        // tokens that share a reading of the keys

inline int64_t padded(int64_t dim) { return (dim + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }

// Some tokens of one sequence, and which entries they see: the first counts[i], or of those alone that are listed.
struct Block {
    int64_t first, tokens;
    const int32_t* table;
    const int32_t* listed;
    int64_t counts[BLOCK];
    int64_t longest() const { return tokens ? counts[tokens - 1] : 0; }
};

// The block's queries as pairs [tokens, heads, units], where they can be, and the factors of their heads.
struct Queries {
    int32_t* pairs;
    float* factors;
    int32_t* exact;
    static int64_t words(int64_t heads, int64_t dim) { return BLOCK * (heads * (padded(dim) / 2 + 1) + 1); }
    Queries(int32_t* memory, int64_t heads, int64_t dim)
        : pairs(memory),
          factors((float*)(memory + BLOCK * heads * padded(dim) / 2)),
          exact(memory + BLOCK * heads * (padded(dim) / 2 + 1)) {}
};

// A thread's memory: keys as they are read and transposed in either unit, a token's queries as floats.
struct Tile {
    float* rows;
    int32_t *pairs, *floats, *query;
    float factors[TILE];
    bool exact, floats_laid;
    static int64_t words(int64_t heads, int64_t dim) { return padded(dim) * (LANES + TILE / 2 + TILE + heads); }
    Tile(int32_t* memory, int64_t heads, int64_t dim)
        : rows((float*)memory),
          pairs(memory + padded(dim) * LANES),
          floats(pairs + padded(dim) / 2 * TILE),
          query(floats + padded(dim) * TILE) {}
};

// ---- queries -----------------------------------------------------------------------------------------------------------

// The values of a head of a token, zeros behind them; e4m3 without its scale, which the head's factor has.
inline void query_row(const Indexer& call, int64_t row, float* room) {
    const int64_t dim = call.dim;
    std::fill(room + dim / LANES * LANES, room + padded(dim), 0.0f);
    if (call.q_kind < 3) {
        with_type(int(call.q_kind), [&](auto zero) {
            using T = decltype(zero);
            read_row<T>((const uint8_t*)((const T*)call.q + row * dim), dim, sizeof(T), room);
        });
        return;
    }
    const uint8_t* codes = (const uint8_t*)call.q + row * (call.q_kind == 3 ? dim : dim / 2);
    const float turned = call.q_kind == 3 && call.q_scale[row] < 0 ? -1.0f : 1.0f;
    for (int64_t i = 0; i < dim; i += LANES) {
        if (call.q_kind == 4) {
            store(room + i, load_e2m1(codes + i / 2) * call.q_scale[row * (dim / 32) + i / 32]);
            continue;
        }
        uint8_t some[LANES] = {};
        const int count = int(std::min<int64_t>(dim - i, LANES));
        std::memcpy(some, codes + i, size_t(count));
        store(room + i, load_e4m3(some) * turned, count);
    }
}

// Rounded to pairs; whether nothing was lost.
inline bool pairs_of(const float* row, int64_t units, bf16* room) {
    i32 lost = {};
    for (int64_t i = 0; i < units; i += LANES) {
        const f32 value = load(row + i);
        lost |= as_int(value) & 0xffff;
        store_exact(room + i, value);
    }
    for (int lane = 0; lane < LANES; ++lane)
        if (lost[lane]) return false;
    return !some_subnormal(room, units);
}

inline void prepare(const Indexer& call, const Block& block, const Queries& queries, int64_t at, float* room) {
    const int64_t token = block.first + at, units = padded(call.dim);
    queries.exact[at] = 1;
    for (int64_t head = 0; head < call.heads; ++head) {
        const int64_t row = token * call.heads + head;
        query_row(call, row, room);
        bf16* pairs = (bf16*)(queries.pairs + (at * call.heads + head) * units / 2);
        if (!pairs_of(room, units, pairs)) queries.exact[at] = 0;
        const float scale = call.q_kind == 3 ? std::fabs(call.q_scale[row]) : 1.0f;
        queries.factors[at * call.heads + head] = call.weights[row] * scale;
    }
}

// ---- keys ----------------------------------------------------------------------------------------------------------------

// The slot of an entry, -1 where its key is zeros.
inline int64_t slot_of(const Indexer& call, const int32_t* table, int64_t entry) {
    if (!call.pool.slots()) return -1;
    const int64_t column = call.pool.block(entry);
    if (column >= call.table_width || table[column] < 0) return -1;
    const int64_t slot = table[column] * call.pool.block_size + call.pool.within(entry);
    return slot < call.pool.slots() ? slot : -1;
}

// An entry's codes and scale apart; a negative scale turns the codes, since what follows is rectified.
template <class Put>
float read_132(const Pool& pool, int64_t slot, Put put) {
    const auto place = place_of(LAYOUT_132, pool.page(slot), pool.block_size, pool.within(slot));
    const float scale = scale_of(LAYOUT_132, place.scales, 0), turned = scale < 0 ? -1.0f : 1.0f;
    for (int64_t i = 0; i < 128; i += LANES) put(i, load_e4m3(place.codes + i) * turned);
    return std::fabs(scale);
}

template <class T>
bool read_key(const Pool& pool, int64_t slot, T* row, float& factor) {
    factor = 1.0f;
    if (pool.kind == 132) {
        factor = read_132(pool, slot, [&](int64_t at, f32 value) {
            if constexpr (std::is_same<T, float>::value)
                store(row + at, value);
            else
                store_exact(row + at, value);
        });
        return true;
    }
    if constexpr (std::is_same<T, float>::value) {
        read_entry(pool, slot, row);
        return true;
    } else {
        return read_entry(pool, slot, row);
    }
}

inline int64_t entry_at(const Block& block, int64_t at) { return block.listed ? block.listed[at] : at; }

// Sixteen keys from the forms that models use, straight to lanes; `done` says whether they have such a form.
inline bool lay_sixteen(const Indexer& call, const int64_t (&slots)[LANES], float* factors, int32_t* laid, bool& done) {
    alignas(64) static const uint8_t zeros[1024] = {};
    const Pool& pool = call.pool;
    const uint8_t* rows[LANES];
    int32_t scales[LANES];
    const int64_t row_bytes = pool.kind == 1 ? pool.row_bytes : pool.kind == 68 ? 64 : 128;
    for (int i = 0; i < LANES; ++i) {
        const uint8_t* page = slots[i] < 0 ? zeros : pool.page(slots[i]);
        const int64_t row = slots[i] < 0 ? 0 : pool.within(slots[i]);
        rows[i] = page + row * row_bytes;
        scales[i] = pool.kind == 68 ? 0x7f7f7f7f : bits_as<int32_t>(1.0f);
        if (pool.kind > 2 && slots[i] >= 0) std::memcpy(scales + i, page + pool.block_size * row_bytes + row * 4, 4);
        factors[i] = pool.kind == 132 ? bits_as<float>(scales[i]) : 1.0f;
        if (factors[i] < 0) return done = false;  // the codes have to be turned
    }
    done = true;
    if (pool.kind == 1 && pool.element_bytes == 2 && call.dim % (2 * LANES) == 0 && call.dim <= 512) {
        const bf16* values[LANES];
        for (int i = 0; i < LANES; ++i) values[i] = (const bf16*)rows[i];
        return lay_bfloat16(values, call.dim, laid, TILE);
    }
#ifdef BYTE_TABLES
    if (pool.kind == 132) return lay_e4m3(rows, laid, TILE);
#endif
#ifdef AVX512
    if (pool.kind == 68) return lay_e2m1(rows, load_units(scales), laid, TILE);
#endif
    return done = false;
}

// The keys of entries low, low+1, .. (or of those that are listed there), transposed: [units, TILE]. Whether exact.
template <class T>
bool lay_keys(const Indexer& call, const Block& block, int64_t low, int64_t count, Tile& tile, int32_t* laid) {
    const int64_t units = padded(call.dim), words = units * int64_t(sizeof(T)) / 4;
    T* rows = (T*)tile.rows;
    bool exact = true;
    for (int64_t first = 0; first < TILE; first += LANES) {
        int64_t slots[LANES];
        for (int64_t i = 0; i < LANES; ++i)
            slots[i] = first + i < count ? slot_of(call, block.table, entry_at(block, low + first + i)) : -1;
        if constexpr (std::is_same<T, bf16>::value) {
            bool done = false;
            const bool held = lay_sixteen(call, slots, tile.factors + first, laid + first, done);
            if (done) exact &= held;
            if (done) continue;
        }
        for (int64_t i = 0; i < LANES; ++i) {
            T* row = rows + i * units;
            const int64_t dim = slots[i] < 0 ? 0 : call.dim;
            tile.factors[first + i] = 1.0f;
            if (dim) exact &= read_key(call.pool, slots[i], row, tile.factors[first + i]);
            std::memset(row + dim, 0, size_t(units - dim) * sizeof(T));
        }
        for (int64_t unit = 0; unit < words; unit += LANES) {
            i32 part[LANES];
            for (int i = 0; i < LANES; ++i) part[i] = load_units((int32_t*)rows + i * words + unit);
            transpose(part);
            for (int i = 0; i < LANES; ++i) store_units(laid + (unit + i) * TILE + first, part[i]);
        }
    }
    return exact;
}

// Ask for the keys of entries that are laid soon: pages lie about.
inline void expect_keys(const Indexer& call, const Block& block, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < std::min(end, block.longest()); ++at)
        if (const int64_t slot = slot_of(call, block.table, entry_at(block, at)); slot >= 0) expect(call.pool, slot);
}
