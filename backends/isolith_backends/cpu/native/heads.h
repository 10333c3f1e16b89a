// Products of every head with its own matrix, before and after an attention over latents.
#pragma once

#include "tiles.h"

constexpr int64_t TOKENS = 64;  // that meet a matrix at a time

inline int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

struct Shape {
    int64_t tokens, heads, inner, outer;
    int64_t a_token, a_head, c_token, c_head;  // how far they lie apart
    int64_t units() const { return whole(inner, 2 * LANES); }
    int64_t lanes() const { return whole(outer, 2 * LANES); }
};

// A head's matrix as units of its inner axis by lanes of its outer one; given [outer, inner].
template <class Unit, class T>
void lay_rows(const Shape& shape, const T* w, int32_t* laid) {
    const int64_t units = std::is_same<Unit, Pairs>::value ? shape.units() / 2 : shape.units();
    for (int64_t n = 0; n < shape.lanes(); n += LANES)
        for (int64_t unit = 0; unit < units; unit += LANES) {
            i32 block[LANES] = {};
            for (int i = 0; i < LANES && n + i < shape.outer; ++i)
                block[i] = units_of(w + (n + i) * shape.inner, unit, shape.inner, Unit{});
            transpose(block);
            for (int i = 0; i < LANES; ++i) store_units(laid + (unit + i) * shape.lanes() + n, block[i]);
        }
}

// The same of a matrix given [inner, outer].
template <class Unit, class T>
void lay_columns(const Shape& shape, const T* w, int32_t* laid) {
    constexpr int64_t EACH = std::is_same<Unit, Pairs>::value ? 2 : 1;
    for (int64_t unit = 0; unit < shape.units() / EACH; ++unit)
        for (int64_t n = 0; n < shape.lanes(); n += EACH * LANES) {
            i32 rows[2] = {};
            for (int64_t i = 0; i < EACH && EACH * unit + i < shape.inner; ++i)
                rows[i] = units_of(w + (EACH * unit + i) * shape.outer, n / EACH, shape.outer, Unit{});
            int32_t* to = laid + unit * shape.lanes() + n;
            if constexpr (EACH == 2) {
                bf16x32 low, high;
                interleave((bf16x32)rows[0], (bf16x32)rows[1], low, high);
                store_units(to, (i32)low);
                store_units(to + LANES, (i32)high);
            } else {
                store_units(to, rows[0]);
            }
        }
}

template <class Unit, class T>
void head_product(const Shape& shape, const T* a, const int32_t* laid, T* c, int32_t* packed, float* sums) {
    const int64_t units = std::is_same<Unit, Pairs>::value ? shape.units() / 2 : shape.units(), lanes = shape.lanes();
    for (int64_t first = 0; first < shape.tokens; first += TOKENS) {
        const int64_t rows = std::min(TOKENS, shape.tokens - first);
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t unit = 0; unit < units; unit += LANES)
                store_units(packed + i * units + unit,
                            units_of(a + (first + i) * shape.a_token, unit, shape.inner, Unit{}));
        product<Unit>({packed, units, 1, laid, lanes, sums, lanes}, rows, lanes / LANES, units, false);
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t n = 0; n < shape.outer; n += LANES)
                store(c + (first + i) * shape.c_token + n, load(sums + i * lanes + n),
                      int(std::min<int64_t>(shape.outer - n, LANES)));
    }
}

template <class Unit, class T>
void all_heads(int threads, const Shape& shape, const T* a, const T* w, bool rows, T* c, int32_t* room, int64_t words) {
    parallel_uneven(threads, shape.heads, [&](int64_t head) {
        int32_t* laid = room + omp_get_thread_num() * words;
        int32_t* packed = laid + shape.units() * shape.lanes();
        const T* matrix = w + head * shape.inner * shape.outer;
        if (rows)
            lay_rows<Unit>(shape, matrix, laid);
        else
            lay_columns<Unit>(shape, matrix, laid);
        head_product<Unit>(shape, a + head * shape.a_head, laid, c + head * shape.c_head, packed,
                           (float*)(packed + TOKENS * shape.units()));
    });
}
