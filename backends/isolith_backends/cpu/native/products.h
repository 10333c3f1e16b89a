// Products of rows with weights, both along their inputs: every element is a sum of dot products of bfloat16, whose
// products are exact in float32. Codes of e4m3, e2m1 and int8 are exact in bfloat16; scales multiply partial sums.
#pragma once

#include "tiles.h"

enum Kind { BF16, E4M3, E2M1, INT8 };
constexpr int STEP = 32;  // inputs of a dot product

// ---- thirty-two weights ------------------------------------------------------------------------------------------------------

template <int KIND>
INLINE bf16x32 weights_at(const uint8_t* row, int64_t k);

template <>
INLINE bf16x32 weights_at<BF16>(const uint8_t* row, int64_t k) {
    return load_pairs((const bf16*)row + k);
}

// Two vectors of floats that bfloat16 holds exactly.
INLINE bf16x32 exact_pairs(f32 low, f32 high) {
    bf16 room[STEP];
    store(room, low);
    store(room + LANES, high);
    return load_pairs(room);
}

template <>
INLINE bf16x32 weights_at<E4M3>(const uint8_t* row, int64_t k) {
#ifdef AVX512
    const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(row + k)));
    const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7f));
    const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0x80)), 8);
    // The exponents of bfloat16 count from 120 more. Codes below 8 are subnormal, and looked up.
    __m512i value = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
    const __m512i small = _mm512_broadcast_i32x4(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    value = _mm512_mask_permutexvar_epi16(value, _mm512_cmplt_epi16_mask(magnitude, _mm512_set1_epi16(8)), magnitude, small);
    value = _mm512_mask_mov_epi16(value, _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f)), _mm512_set1_epi16(0x7fc0));
    return (bf16x32)_mm512_or_si512(value, sign);
#else
    return exact_pairs(load_e4m3(row + k), load_e4m3(row + k + LANES));
#endif
}

template <>
INLINE bf16x32 weights_at<E2M1>(const uint8_t* row, int64_t k) {
#if defined(AVX512) && defined(__AVX512VBMI__)
    // Two bytes in a quadword, and of it the eight bits from each of its nibbles on: a look-up sees the lowest alone.
    const __m512i pairs = _mm512_cvtepu16_epi64(_mm_loadu_si128((const __m128i*)(row + k / 2)));
    const __m512i nibble = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x0c0c080804040000), pairs);
    const __m256i half = _mm256_setr_epi16(0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, int16_t(0x8000),
                                           int16_t(0xbf00), int16_t(0xbf80), int16_t(0xbfc0), int16_t(0xc000),
                                           int16_t(0xc040), int16_t(0xc080), int16_t(0xc0c0));
    return (bf16x32)_mm512_permutexvar_epi16(nibble, _mm512_broadcast_i64x4(half));
#else
    return exact_pairs(load_e2m1(row + k / 2), load_e2m1(row + k / 2 + 8));
#endif
}

template <>
INLINE bf16x32 weights_at<INT8>(const uint8_t* row, int64_t k) {
#ifdef AVX512
    const __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(row + k)));
    const __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(row + k + LANES)));
    return exact_pairs((f32)_mm512_cvtepi32_ps(low), (f32)_mm512_cvtepi32_ps(high));
#else
    f32 low, high;
    for (int i = 0; i < LANES; ++i) {
        low[i] = float(int8_t(row[k + i]));
        high[i] = float(int8_t(row[k + LANES + i]));
    }
    return exact_pairs(low, high);
#endif
}

INLINE int64_t bytes_of(int kind, int64_t inputs) { return kind == BF16 ? 2 * inputs : kind == E2M1 ? inputs / 2 : inputs; }

// ---- scales --------------------------------------------------------------------------------------------------------------------

// Scales of rows: one for every `group` of inputs; null where there are none.
struct Scales {
    const float* values;
    int64_t stride, group;
    INLINE float at(int64_t row, int64_t k) const { return values[row * stride + k / group]; }
    INLINE Scales from(int64_t row) const { return {values ? values + row * stride : nullptr, stride, group}; }
};

// ---- few rows: weights go by once, decoded in registers ----------------------------------------------------------------------

// out[m * out_row + n] of N weights and M rows; weights are scaled in groups of `inner`, rows in groups of `outer`.
template <int KIND, int N, int M>
INLINE void stream(const uint8_t* weights, int64_t row_bytes, const bf16* x, int64_t inputs, const Scales& of_weights,
                   const Scales& of_rows, float* out, int64_t out_row) {
    const int64_t inner = of_weights.values ? of_weights.group : inputs, outer = of_rows.values ? of_rows.group : inputs;
    f32 total[N][M] = {};
    for (int64_t first = 0; first < inputs; first += outer) {
        f32 scaled[N][M] = {};
        for (int64_t from = first; from < first + outer; from += inner) {
            f32 part[N][M] = {};
            for (int64_t k = from; k < from + inner; k += STEP) {
                bf16x32 row[M];
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) row[m] = load_pairs(x + m * inputs + k);
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n) {
                    const uint8_t* at = weights + n * row_bytes;
                    if (KIND == BF16 || k % 128 == 0)
                        __builtin_prefetch(at + N * row_bytes + bytes_of(KIND, k), 0, 2);
                    const bf16x32 weight = weights_at<KIND>(at, k);
#pragma GCC unroll 8
                    for (int m = 0; m < M; ++m) part[n][m] = dot(part[n][m], weight, row[m]);
                }
            }
            for (int n = 0; n < N; ++n)
                for (int m = 0; m < M; ++m)
                    scaled[n][m] = of_weights.values ? fma(part[n][m], all(of_weights.at(n, from)), scaled[n][m]) : part[n][m];
        }
        for (int n = 0; n < N; ++n)
            for (int m = 0; m < M; ++m)
                total[n][m] = of_rows.values ? fma(scaled[n][m], all(of_rows.at(m, first)), total[n][m]) : scaled[n][m];
    }
    for (int n = 0; n < N; ++n)
        for (int m = 0; m < M; ++m) out[m * out_row + n] = sum(total[n][m]);
}

// ---- few rows, inputs turned so that codes are decoded where they lie -----------------------------------------------------------

#if defined(DOT_BF16) && defined(BYTE_TABLES)
#define TURNED 1

// The two bytes of bfloat16 by the seven bits of an e4m3 code's magnitude.
struct Bytes {
    alignas(64) uint8_t low[128], high[128];
    Bytes() {
        for (int code = 0; code < 128; ++code) {
            const int exponent = code >> 3, mantissa = code & 7;
            float value = exponent ? std::ldexp(8.0f + float(mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
            if (code == 127) value = NOT_A_NUMBER;
            const uint16_t bits = from_float<bf16>(value).bits;
            low[code] = uint8_t(bits);
            high[code] = uint8_t(bits >> 8);
        }
    }
};
static const Bytes BYTES;

constexpr int64_t turned_block(int kind) { return kind == E2M1 ? 128 : 64; }

// A row's inputs in the order in which `stream_turned` decodes weights: vector after vector of a block.
template <int KIND>
void turn_row(const bf16* x, bf16* to, int64_t inputs) {
    for (int64_t block = 0; block < inputs; block += turned_block(KIND))
        for (int64_t i = 0; i < turned_block(KIND); ++i) {
            const int64_t vector = i / STEP, lane = i % STEP;
            to[block + i] = x[block + (KIND == E2M1 ? 4 * lane + vector : lane / 8 * 16 + vector * 8 + lane % 8)];
        }
}

// The weights of a block in bfloat16: of e2m1 each nibble of 16 bits in a vector of its own, of e4m3 half of each 16.
template <int KIND>
INLINE void decode_block(const uint8_t* at, bf16x32 (&values)[turned_block(KIND) / STEP]) {
    const __m512i codes = _mm512_loadu_si512(at);
    if constexpr (KIND == E2M1) {
        const __m256i half = _mm256_setr_epi16(0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, int16_t(0x8000),
                                               int16_t(0xbf00), int16_t(0xbf80), int16_t(0xbfc0), int16_t(0xc000),
                                               int16_t(0xc040), int16_t(0xc080), int16_t(0xc0c0));
        const __m512i table = _mm512_broadcast_i64x4(half);  // twice: a look-up sees five bits, the last is not its own
        values[0] = (bf16x32)_mm512_permutexvar_epi16(codes, table);
        values[1] = (bf16x32)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table);
        values[2] = (bf16x32)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table);
        values[3] = (bf16x32)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table);
    } else {
        const __m512i* low = (const __m512i*)BYTES.low;
        const __m512i* high = (const __m512i*)BYTES.high;
        const __m512i bytes = _mm512_permutex2var_epi8(low[0], codes, low[1]);
        const __m512i magnitude = _mm512_permutex2var_epi8(high[0], codes, high[1]);
        const __m512i tops = _mm512_ternarylogic_epi64(magnitude, codes, _mm512_set1_epi8(-128), 0xF8);  // a | (b & c)
        values[0] = (bf16x32)_mm512_unpacklo_epi8(bytes, tops);
        values[1] = (bf16x32)_mm512_unpackhi_epi8(bytes, tops);
    }
}

// As `stream`, of turned rows. Weights are scaled in groups of `inner`, which for e2m1 is a quarter of a block.
template <int KIND, int N, int M>
INLINE void stream_turned(const uint8_t* weights, int64_t row_bytes, const bf16* x, int64_t inputs,
                          const Scales& of_weights, const Scales& of_rows, float* out, int64_t out_row) {
    constexpr int64_t BLOCK = turned_block(KIND), VECTORS = BLOCK / STEP;
    const int64_t span = KIND == E2M1 ? BLOCK : of_weights.group;
    f32 total[N][M] = {};
    for (int64_t first = 0; first < inputs; first += span) {
        f32 part[N][M] = {};
        for (int64_t k = first; k < first + span; k += BLOCK) {
            bf16x32 row[M][VECTORS];
            for (int m = 0; m < M; ++m)
                for (int v = 0; v < VECTORS; ++v) row[m][v] = load_pairs(x + m * inputs + k + v * STEP);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
                const uint8_t* at = weights + n * row_bytes + bytes_of(KIND, k);
                __builtin_prefetch(at + N * row_bytes, 0, 2);
                bf16x32 values[VECTORS];
                decode_block<KIND>(at, values);
#pragma GCC unroll 4
                for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; ++v) part[n][m] = dot(part[n][m], values[v], row[m][v]);
            }
        }
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            f32 scale;
            if (KIND == E2M1) {  // lanes 4g .. 4g+3 have the sums of group g
                const __m128 four = _mm_loadu_ps(of_weights.values + n * of_weights.stride + first / of_weights.group);
                const __m512i group = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
                scale = (f32)_mm512_permutexvar_ps(group, _mm512_castps128_ps512(four));
            } else {
                scale = all(of_weights.at(n, first));
            }
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                const f32 factor = of_rows.values ? scale * of_rows.at(m, first) : scale;
                total[n][m] = fma(part[n][m], factor, total[n][m]);
            }
        }
    }
    for (int n = 0; n < N; ++n)
        for (int m = 0; m < M; ++m) out[m * out_row + n] = sum(total[n][m]);
}
#endif

// ---- many rows: weights are decoded to bfloat16 once, then multiplied in tiles --------------------------------------------------

// Multiplies bfloat16 by a power of two; exact where no exponent leaves its range. Zeros and NaNs stay.
INLINE bf16x32 times_power(bf16x32 values, float power) {
#ifdef AVX512
    const __m512i bits = (__m512i)values, field = _mm512_and_si512(bits, _mm512_set1_epi16(0x7f80));
    const int shift = (int(bits_as<uint32_t>(power) >> 23) - 127) * 128;
    const __mmask32 normal = _mm512_test_epi16_mask(field, field) & _mm512_cmplt_epi16_mask(field, _mm512_set1_epi16(0x7f80));
    return (bf16x32)_mm512_mask_add_epi16(bits, normal, bits, _mm512_set1_epi16(int16_t(shift)));
#else
    bf16 room[STEP];
    std::memcpy(room, &values, sizeof room);
    for (int i = 0; i < STEP; ++i) room[i] = from_float<bf16>(to_float(room[i]) * power);
    return load_pairs(room);
#endif
}

// A row of weights in bfloat16; times its scales, powers of two, one a group of inputs, where they are given.
template <int KIND>
void decode_row(const uint8_t* row, int64_t inputs, bf16* to, const float* scales, int64_t group) {
    int64_t k = 0;
    const auto put = [&](bf16x32 values) {
        if (scales) values = times_power(values, scales[k / group]);
        std::memcpy(to + k, &values, sizeof values);
        k += STEP;
    };
#ifdef TURNED
    if constexpr (KIND == E4M3)
        while (k + 2 * STEP <= inputs) {  // eights of both vectors, put back in turn
            bf16x32 halves[2];
            decode_block<E4M3>(row + k, halves);
            const __m512i low = (__m512i)halves[0], high = (__m512i)halves[1];
            put((bf16x32)_mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high));
            put((bf16x32)_mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high));
        }
#endif
    while (k < inputs) put(weights_at<KIND>(row, k));
}

// sums[m * sum_row + n] += the products of N weights and M rows over inputs first .. last-1, or = where first is 0.
template <int N, int M>
INLINE void tile_part(const bf16* weights, const bf16* x, int64_t inputs, int64_t first, int64_t last, f32* sums,
                      int64_t sum_row) {
    f32 part[N][M] = {};
    if (first)
        for (int n = 0; n < N; ++n)
            for (int m = 0; m < M; ++m) part[n][m] = load((const float*)(sums + m * sum_row + n));
    for (int64_t k = first; k < last; k += STEP) {
        bf16x32 row[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) row[m] = load_pairs(x + m * inputs + k);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            const bf16x32 weight = load_pairs(weights + n * inputs + k);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) part[n][m] = dot(part[n][m], weight, row[m]);
        }
    }
    for (int n = 0; n < N; ++n)
        for (int m = 0; m < M; ++m) store((float*)(sums + m * sum_row + n), part[n][m]);
}

// out[m * out_row + n] of N decoded weights and M rows, scaled in groups that both share.
template <int N, int M>
INLINE void tile_of_groups(const bf16* weights, const bf16* x, int64_t inputs, int64_t group, const Scales& of_weights,
                           const Scales& of_rows, float* out, int64_t out_row) {
    f32 total[N][M] = {};
    for (int64_t first = 0; first < inputs; first += group) {
        f32 part[N][M] = {};
        for (int64_t k = first; k < first + group; k += STEP) {
            bf16x32 row[M];
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) row[m] = load_pairs(x + m * inputs + k);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                const bf16x32 weight = load_pairs(weights + n * inputs + k);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) part[n][m] = dot(part[n][m], weight, row[m]);
            }
        }
        for (int n = 0; n < N; ++n)
            for (int m = 0; m < M; ++m) {
                float factor = of_weights.values ? of_weights.at(n, first) : 1.0f;
                if (of_rows.values) factor *= of_rows.at(m, first);
                total[n][m] = fma(part[n][m], all(factor), total[n][m]);
            }
    }
    for (int n = 0; n < N; ++n)
        for (int m = 0; m < M; ++m) out[m * out_row + n] = sum(total[n][m]);
}
