// Small matrix products in registers. A unit is 32 bits: a float, or two bfloat16 whose products are both added.
#pragma once

#include "simd.h"

struct Floats {
    static INLINE f32 join(f32 sum, i32 a, i32 b) { return fma(as_float(a), as_float(b), sum); }
};
struct Pairs {
    static INLINE f32 join(f32 sum, i32 a, i32 b) { return dot(sum, (bf16x32)a, (bf16x32)b); }
};

INLINE i32 load_units(const int32_t* p) {
    i32 x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
INLINE void store_units(int32_t* p, i32 x) { std::memcpy(p, &x, sizeof x); }

// Sixteen units of a row of `dim` values from one on, zeros behind its end.
INLINE i32 units_of(const bf16* row, int64_t unit, int64_t dim, Pairs) {
    int32_t room[LANES] = {};
    const int64_t left = dim - 2 * unit;
    if (left >= 2 * LANES) return load_units((const int32_t*)(row + 2 * unit));
    std::memcpy(room, row + 2 * unit, size_t(2 * std::max<int64_t>(left, 0)));
    return load_units(room);
}
template <class T>
INLINE i32 units_of(const T*, int64_t, int64_t, Pairs) {  // never multiplied so
    return i32{};
}
template <class T>
INLINE i32 units_of(const T* row, int64_t unit, int64_t dim, Floats) {
    return as_int(load(row + unit, int(std::max<int64_t>(0, std::min<int64_t>(dim - unit, LANES)))));
}

// Column i of the sixteen rows becomes row i.
INLINE void transpose(i32 (&x)[LANES]) {
#ifdef AVX512
    __m512i a[LANES], b[LANES];
    for (int i = 0; i < LANES; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)x[i], (__m512i)x[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)x[i], (__m512i)x[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    // b[4g + c] has, in each quarter q, column 4q + c of rows 4g .. 4g+3.
    for (int c = 0; c < 4; ++c) {
        const __m512i low0 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88), high0 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd);
        const __m512i low1 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88);
        const __m512i high1 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
        x[c] = (i32)_mm512_shuffle_i32x4(low0, low1, 0x88);
        x[8 + c] = (i32)_mm512_shuffle_i32x4(low0, low1, 0xdd);
        x[4 + c] = (i32)_mm512_shuffle_i32x4(high0, high1, 0x88);
        x[12 + c] = (i32)_mm512_shuffle_i32x4(high0, high1, 0xdd);
    }
#else
    int32_t room[LANES][LANES];
    std::memcpy(room, x, sizeof room);
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < LANES; ++j) x[i][j] = room[j][i];
#endif
}

// sums[m][n] += sum over s of a[m, s] * b[s, 16 n ..]; a's units are spread over lanes, b's stand along them.
template <class Unit, int M, int N>
INLINE void multiply(f32 (&sums)[M][N], const int32_t* a, int64_t a_row, int64_t a_step, const int32_t* b,
                     int64_t b_step, int64_t steps) {
    for (int64_t s = 0; s < steps; ++s, a += a_step, b += b_step) {
        i32 columns[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) columns[n] = load_units(b + n * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const i32 row = all_int(a[m * a_row]);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) sums[m][n] = Unit::join(sums[m][n], row, columns[n]);
        }
    }
}

// f(size) for size = most, most - 1, .. 1 as a constant.
template <int MOST, class F>
INLINE void with_size(int64_t size, F f) {
    if (size >= MOST)
        f(std::integral_constant<int, MOST>{});
    else if constexpr (MOST > 1)
        with_size<MOST - 1>(size, f);
}

// Two matrices of units and a float one, by where they begin and how far rows, or steps of the sum, lie apart.
struct Product {
    const int32_t* a;
    int64_t a_row, a_step;
    const int32_t* b;
    int64_t b_step;
    float* c;
    int64_t c_row;
};

// c = a.b, or c += a.b; columns in vectors of sixteen. Every element's sum is taken in the order of steps.
template <class Unit>
void product(const Product& p, int64_t rows, int64_t columns, int64_t steps, bool add) {
    constexpr int64_t ROWS = 6, COLUMNS = 4, STEPS = 64;  // 24 sums in registers, and 16 KiB of b beside them
    for (int64_t step = 0; step < steps; step += STEPS)
        for (int64_t column = 0; column < columns; column += COLUMNS)
            for (int64_t row = 0; row < rows; row += ROWS)
                with_size<ROWS>(rows - row, [&](auto height) {
                    with_size<COLUMNS>(columns - column, [&](auto width) {
                        float* c = p.c + row * p.c_row + column * LANES;
                        f32 sums[height()][width()] = {};
                        if (add || step)
                            for (int m = 0; m < height(); ++m)
                                for (int n = 0; n < width(); ++n) sums[m][n] = load(c + m * p.c_row + n * LANES);
                        multiply<Unit>(sums, p.a + row * p.a_row + step * p.a_step, p.a_row, p.a_step,
                                       p.b + step * p.b_step + column * LANES, p.b_step, std::min(STEPS, steps - step));
                        for (int m = 0; m < height(); ++m)
                            for (int n = 0; n < width(); ++n) store(c + m * p.c_row + n * LANES, sums[m][n]);
                    });
                });
}
