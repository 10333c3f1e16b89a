// Floats to codes, as isolith.numerics.codes has it: to nearest, ties to even, in float32.
#pragma once

#include "simd.h"

constexpr uint32_t INFINITE_BITS = 0x7f800000u;

INLINE i32 least_int(i32 a, i32 b) { return b < a ? b : a; }
INLINE i32 most_int(i32 a, i32 b) { return b > a ? b : a; }

// A format of MANTISSA bits whose smallest normal number has NORMAL as a float32's exponent, and MOST as its largest.
template <int MANTISSA, int NORMAL, uint32_t MOST>
struct Small {
    static INLINE i32 encode(f32 x) {
        constexpr int SHIFT = 23 - MANTISSA;
        const i32 sign = (i32)((u32)as_int(x) >> 31) << (NORMAL == 127 ? 3 : 7);
        const i32 magnitude = least_int(as_int(x) & 0x7fffffff, all_int(int32_t(MOST)));
        const i32 normal = ((magnitude + ((1 << (SHIFT - 1)) - 1) + ((magnitude >> SHIFT) & 1)) >> SHIFT) -
                           ((NORMAL - 1) << MANTISSA);
        // Added to a number whose last bit is worth a subnormal code, the value is rounded to such codes.
        const i32 magic = all_int((NORMAL - MANTISSA + 23) << 23);
        const i32 subnormal = as_int(as_float(magnitude) + as_float(magic)) - magic;
        return (magnitude < (NORMAL << 23) ? subnormal : normal) | sign;
    }
};
using E4m3 = Small<3, 121, 0x43e00000u>;  // to 448
using E2m1 = Small<1, 127, 0x40c00000u>;  // to 6

INLINE void store_bytes(uint8_t* p, i32 codes) {
#ifdef AVX512
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)codes));
#else
    for (int i = 0; i < LANES; ++i) p[i] = uint8_t(codes[i]);
#endif
}
INLINE void store_bytes(uint8_t* p, i32 codes, int count) {
    if (count >= LANES) return store_bytes(p, codes);
    uint8_t room[LANES];
    store_bytes(room, codes);
    std::memcpy(p, room, size_t(count));
}

// Two codes a byte, the first in the low half.
INLINE void store_nibbles(uint8_t* p, i32 codes) {
#ifdef AVX512
    const __m512i pairs = _mm512_or_si512((__m512i)codes, _mm512_srli_epi64((__m512i)codes, 28));
    _mm_storel_epi64((__m128i*)p, _mm512_cvtepi64_epi8(pairs));
#else
    for (int i = 0; i < LANES / 2; ++i) p[i] = uint8_t(codes[2 * i] | codes[2 * i + 1] << 4);
#endif
}
INLINE void store_nibbles(uint8_t* p, i32 codes, int count) {
    if (count >= LANES) return store_nibbles(p, codes);
    uint8_t room[LANES / 2];
    store_nibbles(room, codes);
    std::memcpy(p, room, size_t(count / 2));
}

// The bits of the largest magnitude, those of a NaN being the largest; floats ordered as integers.
INLINE i32 larger(i32 amax, f32 x) { return most_int(amax, as_int(x) & 0x7fffffff); }
INLINE int32_t largest_bits(i32 x) {
#ifdef AVX512
    return _mm512_reduce_max_epi32((__m512i)x);
#else
    int32_t most = x[0];
    for (int i = 1; i < LANES; ++i) most = x[i] > most ? x[i] : most;
    return most;
#endif
}
template <class T>
INLINE int32_t amax_bits(const T* x, int64_t count) {
    i32 amax = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) amax = larger(amax, load(x + i));
    if (i < count) amax = larger(amax, load(x + i, int(count - i)));
    return largest_bits(amax);
}
// Of bfloat16 the bits are ordered as integers before they are widened.
INLINE int32_t amax_bits(const bf16* x, int64_t count) {
    typedef int16_t i16 __attribute__((vector_size(64)));
    i16 most = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        const i16 each = (i16)(load_pairs(x + i) & 0x7fff);
        most = each > most ? each : most;
    }
    const i32 both = (i32)most;
    i32 amax = most_int(both & 0x7fff0000, both << 16);
    for (; i < count; i += LANES) amax = larger(amax, load(x + i, int(std::min<int64_t>(count - i, LANES))));
    return largest_bits(amax);
}

// The scale of a group, and its inverse.
struct Scale {
    float value, inverse;
    uint8_t ue8m0() const { return uint8_t(bits_as<uint32_t>(value) >> 23); }
};
INLINE Scale scale_of_group(int32_t amax, float floor, float most, bool power_of_two) {
    const float clamped = bits_as<float>(std::max(amax, bits_as<int32_t>(floor)));
    float scale = clamped / most;
    if (power_of_two) scale = bits_as<float>((bits_as<uint32_t>(scale) + 0x7fffffu) & INFINITE_BITS);
    return {scale, 1.0f / scale};
}

// x / scale as a division rounds it: from a product by the inverse, with what is left over; exact for powers of two.
template <bool POWER_OF_TWO>
INLINE f32 quotient(f32 x, const Scale& scale) {
    if constexpr (POWER_OF_TWO) return x * scale.inverse;
#ifdef AVX512
    const f32 close = x * scale.inverse;
    const f32 exact = fma(fma(close, all(-scale.value), x), all(scale.inverse), close);
    return as_float(as_int(exact) | (as_int(x) & int32_t(0x80000000)));  // of -0 too
#else
    return x / scale.value;
#endif
}

#ifdef AVX512
// e4m3 of thirty-two bfloat16 times a power of two that leaves none above 448. A float16 is an e4m3 with seven bits
// more, subnormal numbers included, its exponent counting from 8 more. The eight bits of a bfloat16 fit but for values
// below the smallest code; rounding those up keeps them on their side of its half, or on it from below, where it gives 0.
INLINE void store_e4m3_of(uint8_t* p, const bf16* x, float inverse) {
    const __m512 factor = _mm512_set1_ps(inverse * 0x1p-8f);
    const __m512i bits = _mm512_loadu_si512(x), magnitude = _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff));
    const auto half = [&](__m256i part) {
        const __m512 value = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16);
        return _mm512_cvtps_ph(_mm512_mul_ps(value, factor), _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
    };
    const __m512i codes = _mm512_inserti64x4(_mm512_castsi256_si512(half(_mm512_castsi512_si256(magnitude))),
                                             half(_mm512_extracti64x4_epi64(magnitude, 1)), 1);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(codes, 7), _mm512_set1_epi16(1));
    const __m512i rounded =
        _mm512_srli_epi16(_mm512_add_epi16(_mm512_add_epi16(codes, _mm512_set1_epi16(0x3f)), odd), 7);
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi16(bits, 8), _mm512_set1_epi16(0x80));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi16_epi8(_mm512_or_si512(rounded, sign)));
}
#endif

// The codes of a group of `count` values.
template <class T, bool POWER_OF_TWO>
INLINE void store_group_e4m3(const T* x, int64_t count, const Scale& scale, uint8_t* q) {
    int64_t i = 0;
#ifdef AVX512
    if constexpr (std::is_same<T, bf16>::value && POWER_OF_TWO)
        for (; i + 2 * LANES <= count; i += 2 * LANES) store_e4m3_of(q + i, x + i, scale.inverse);
#endif
    for (; i < count; i += LANES) {
        const int part = int(std::min<int64_t>(count - i, LANES));
        store_bytes(q + i, E4m3::encode(quotient<POWER_OF_TWO>(load(x + i, part), scale)), part);
    }
}
template <class T>
INLINE void store_group_e2m1(const T* x, int64_t count, const Scale& scale, uint8_t* q) {
    for (int64_t i = 0; i < count; i += LANES) {
        const int part = int(std::min<int64_t>(count - i, LANES));
        store_nibbles(q + i / 2, E2m1::encode(quotient<true>(load(x + i, part), scale)), part);
    }
}
