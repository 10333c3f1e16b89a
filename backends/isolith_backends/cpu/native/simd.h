// Sixteen floats at a time. With AVX-512 a value is one register; without it the same code is compiled to whatever the
// machine has, slower and with the same results but for the order in which a fused multiply-add rounds.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define AVX512 1
#include <immintrin.h>
#endif
#if defined(AVX512) && defined(__AVX512BF16__)
#define DOT_BF16 1
#endif
#if defined(AVX512) && defined(__AVX512VBMI__)
#define BYTE_TABLES 1
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE inline __attribute__((always_inline))

constexpr int LANES = 16;
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

typedef float f32 __attribute__((vector_size(64)));
typedef int32_t i32 __attribute__((vector_size(64)));
typedef uint32_t u32 __attribute__((vector_size(64)));
typedef uint16_t u16 __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// f(T{}) for the type that Python's CODES spell so.
template <class F>
void with_type(int type, F f) {
    if (type == 0) f(float{});
    if (type == 1) f(bf16{});
    if (type == 2) f(f16{});
}

// ---- threads -------------------------------------------------------------------------------------------------------

// f(begin, end) over parts of 0..items, at least `grain` items each. What an item gives must not depend on the part.
template <class F>
void parallel(int threads, int64_t items, int64_t grain, F f) {
    const int64_t parts = std::min<int64_t>(threads, (items + grain - 1) / std::max<int64_t>(grain, 1));
    if (parts <= 1) {
        if (items > 0) f(int64_t(0), items);
        return;
    }
#pragma omp parallel num_threads(int(parts))
    {
        const int64_t count = omp_get_num_threads(), number = omp_get_thread_num();
        const int64_t begin = items * number / count, end = items * (number + 1) / count;
        if (begin < end) f(begin, end);
    }
}

// f(item) for items that take unlike times.
template <class F>
void parallel_uneven(int threads, int64_t items, F f) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1 && items > 1)
    for (int64_t item = 0; item < items; ++item) f(item);
}

// ---- scalars -------------------------------------------------------------------------------------------------------

template <class To, class From>
INLINE To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
INLINE float to_float(f16 x) {
    // Shifted into place, a float16 is a float32 whose exponent counts from 112 less; multiplying mends subnormals too.
    const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = uint32_t(x.bits & 0x8000u) << 16;
    const float value = magnitude >= (31u << 23) ? bits_as<float>(magnitude | 0x7f800000u)
                                                 : bits_as<float>(magnitude) * bits_as<float>(uint32_t(239) << 23);
    return bits_as<float>(bits_as<uint32_t>(value) | sign);
}

template <class T>
INLINE T from_float(float x);
template <>
INLINE float from_float<float>(float x) {
    return x;
}
template <>
INLINE bf16 from_float<bf16>(float x) {
    const uint32_t bits = bits_as<uint32_t>(x);
    if (x != x) return {uint16_t((bits >> 16) | 0x40)};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
INLINE f16 from_float<f16>(float x) {
    const uint32_t bits = bits_as<uint32_t>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to at least 65536
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the bits at the end, rounded
        const float shifted = bits_as<float>(magnitude) + 0.5f;
        return {uint16_t(sign | (bits_as<uint32_t>(shifted) - 0x3f000000u))};
    }
    return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13))};
}

// ---- sixteen values --------------------------------------------------------------------------------------------------

INLINE f32 all(float x) { return f32{} + x; }
INLINE i32 all_int(int32_t x) { return i32{} + x; }
INLINE i32 lane_numbers() { return i32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
INLINE f32 as_float(i32 x) { return (f32)x; }
INLINE i32 as_int(f32 x) { return (i32)x; }

INLINE f32 load(const float* p) {
    f32 x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
INLINE f32 load(const bf16* p) {
#ifdef AVX512
    return (f32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
    f32 x;
    for (int i = 0; i < LANES; ++i) x[i] = to_float(p[i]);
    return x;
#endif
}
INLINE f32 load(const f16* p) {
#ifdef AVX512
    return (f32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
    f32 x;
    for (int i = 0; i < LANES; ++i) x[i] = to_float(p[i]);
    return x;
#endif
}

// The first `count` values; the other lanes are 0.
template <class T>
INLINE f32 load(const T* p, int count) {
    if (count >= LANES) return load(p);
    T room[LANES] = {};
    for (int i = 0; i < count; ++i) room[i] = p[i];
    return load(room);
}

INLINE void store(float* p, f32 x) { std::memcpy(p, &x, sizeof x); }
INLINE void store(bf16* p, f32 x) {
#ifdef AVX512
    // Not the instruction for it, which takes subnormal numbers for 0.
    const __m512i bits = (__m512i)x;
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#else
    for (int i = 0; i < LANES; ++i) p[i] = from_float<bf16>(x[i]);
#endif
}
INLINE void store(f16* p, f32 x) {
#ifdef AVX512
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < LANES; ++i) p[i] = from_float<f16>(x[i]);
#endif
}

// The first `count` values alone.
template <class T>
INLINE void store(T* p, f32 x, int count) {
    if (count >= LANES) return store(p, x);
    T room[LANES];
    store(room, x);
    for (int i = 0; i < count; ++i) p[i] = room[i];
}

INLINE f32 select(i32 condition, f32 yes, f32 no) { return condition ? yes : no; }
INLINE f32 fma(f32 a, f32 b, f32 c) {
#ifdef AVX512
    return (f32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}
// A NaN in `a` stays one, as torch's clamp has it.
INLINE f32 least(f32 a, f32 b) { return b < a ? b : a; }
INLINE f32 most(f32 a, f32 b) { return b > a ? b : a; }
INLINE f32 absolute(f32 x) { return as_float(as_int(x) & 0x7fffffff); }
INLINE f32 root(f32 x) {
#ifdef AVX512
    return (f32)_mm512_sqrt_ps((__m512)x);
#else
    for (int i = 0; i < LANES; ++i) x[i] = std::sqrt(x[i]);
    return x;
#endif
}
INLINE f32 nearest(f32 x) {  // ties to even
#ifdef AVX512
    return (f32)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    for (int i = 0; i < LANES; ++i) x[i] = std::nearbyintf(x[i]);
    return x;
#endif
}
INLINE i32 whole(f32 x) {  // of values that are integers already
#ifdef AVX512
    return (i32)_mm512_cvtps_epi32((__m512)x);
#else
    i32 y;
    for (int i = 0; i < LANES; ++i) y[i] = int32_t(x[i]);
    return y;
#endif
}
INLINE f32 floating(i32 x) {
#ifdef AVX512
    return (f32)_mm512_cvtepi32_ps((__m512i)x);
#else
    f32 y;
    for (int i = 0; i < LANES; ++i) y[i] = float(x[i]);
    return y;
#endif
}

// Sums and maxima over the lanes: halves on halves, the same order on every machine.
INLINE float sum(f32 x) {
#ifdef AVX512
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    float room[LANES];
    store(room, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) room[i] += room[i + half];
    return room[0];
#endif
}
INLINE float largest(f32 x) {  // NaN where a lane is NaN
    float room[LANES];
    store(room, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i)
            room[i] = room[i + half] > room[i] || room[i + half] != room[i + half] ? room[i + half] : room[i];
    return room[0];
}

// e^x to about one unit in the last place; 0 below -104, infinity above 88.7, NaN stays.
INLINE f32 exponential(f32 x) {
    const f32 n = nearest(least(most(x, all(-104.0f)), all(128.0f)) * all(1.44269504088896341f));
    f32 r = fma(n, all(-0.693145751953125f), least(most(x, all(-104.0f)), all(128.0f)));
    r = fma(n, all(-1.428606765330187045e-06f), r);
    f32 p = all(1.9875691500e-4f);
    p = fma(p, r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    p = fma(p, r * r, r) + all(1.0f);
    // 2^n in two factors, so that the ends of the range are reached.
    const i32 half = whole(n) >> 1, rest = whole(n) - half;
    const f32 value = p * as_float((half + 127) << 23) * as_float((rest + 127) << 23);
    return select(x != x, x, value);
}

// ---- sixteen codes -----------------------------------------------------------------------------------------------------

// e4m3 codes as floats; both NaN codes give NaN.
INLINE f32 load_e4m3(const uint8_t* p) {
#ifdef AVX512
    const i32 code = (i32)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#else
    i32 code;
    for (int i = 0; i < LANES; ++i) code[i] = p[i];
#endif
    const i32 magnitude = code & 0x7f, sign = (code & 0x80) << 24;
    // In the place of a float32 the code's exponent counts from 120 less; multiplying mends subnormal codes too.
    const f32 value = as_float(magnitude << 20) * as_float(all_int((127 + 120) << 23));
    return select(magnitude == 0x7f, all(NOT_A_NUMBER), as_float(as_int(value) | sign));
}

// Packed e2m1 codes as floats, sixteen from eight bytes; the low half of a byte comes first.
INLINE f32 load_e2m1(const uint8_t* p) {
    const f32 table = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
#ifdef AVX512
    // A byte in the place of two floats; its copy moved up by 28 bits puts the high half into the second.
    const __m512i pairs = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)p));
    const __m512i both = _mm512_or_si512(pairs, _mm512_slli_epi64(pairs, 28));
    return (f32)_mm512_permutexvar_ps(both, (__m512)table);  // which looks at four bits of a lane alone
#else
    f32 x;
    for (int i = 0; i < LANES; ++i) x[i] = table[(p[i / 2] >> (4 * (i % 2))) & 15];
    return x;
#endif
}

// A ue8m0 byte as a float: 0 is 2^-127, 255 is NaN.
INLINE float from_ue8m0(uint8_t code) {
    if (code == 255) return NOT_A_NUMBER;
    return bits_as<float>(code ? uint32_t(code) << 23 : uint32_t(1) << 22);
}

// ---- thirty-two bfloat16 -----------------------------------------------------------------------------------------------

typedef uint16_t bf16x32 __attribute__((vector_size(64)));

INLINE bf16x32 load_pairs(const bf16* p) {
    bf16x32 x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

// sum + a.b: lane i gets the products of elements 2i and 2i+1. Subnormal operands count as 0.
INLINE f32 dot(f32 sum, bf16x32 a, bf16x32 b) {
#ifdef DOT_BF16
    return (f32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    const i32 wide_a = (i32)a, wide_b = (i32)b;
    sum = fma(as_float(wide_a << 16), as_float(wide_b << 16), sum);
    return fma(as_float(wide_a & int32_t(0xffff0000)), as_float(wide_b & int32_t(0xffff0000)), sum);
#endif
}

// a0 b0 a1 b1 .. of the first sixteen of each, and of the last.
INLINE void interleave(bf16x32 a, bf16x32 b, bf16x32& low, bf16x32& high) {
#ifdef AVX512
    // Quarters of 128 bits are interleaved by themselves, so they are put in their places before.
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i x = _mm512_permutexvar_epi64(order, (__m512i)a), y = _mm512_permutexvar_epi64(order, (__m512i)b);
    low = (bf16x32)_mm512_unpacklo_epi16(x, y);
    high = (bf16x32)_mm512_unpackhi_epi16(x, y);
#else
    for (int i = 0; i < LANES; ++i) {
        low[2 * i] = a[i];
        low[2 * i + 1] = b[i];
        high[2 * i] = a[i + LANES];
        high[2 * i + 1] = b[i + LANES];
    }
#endif
}

// ---- lanes among themselves ------------------------------------------------------------------------------------------------

// Lanes whose numbers differ by DISTANCE, a power of two below 16, in their bits change places.
template <int DISTANCE>
INLINE f32 exchanged(f32 x) {
#ifdef AVX512
    if constexpr (DISTANCE == 1) return (f32)_mm512_permute_ps((__m512)x, 0xB1);
    if constexpr (DISTANCE == 2) return (f32)_mm512_permute_ps((__m512)x, 0x4E);
    if constexpr (DISTANCE == 4) return (f32)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0xB1);
    return (f32)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0x4E);
#else
    f32 y;
    for (int i = 0; i < LANES; ++i) y[i] = x[i ^ DISTANCE];
    return y;
#endif
}

// log(1 + x) for x in 0 .. 1, to about one unit in the last place.
INLINE f32 log_one_plus(f32 x) {
    const f32 s = x / (x + 2.0f), q = s * s;  // twice the area tangent of s, as a series
    f32 p = all(1.0f / 15.0f);
    p = fma(p, q, all(1.0f / 13.0f));
    p = fma(p, q, all(1.0f / 11.0f));
    p = fma(p, q, all(1.0f / 9.0f));
    p = fma(p, q, all(1.0f / 7.0f));
    p = fma(p, q, all(1.0f / 5.0f));
    p = fma(p, q, all(1.0f / 3.0f));
    return 2.0f * fma(p * q, s, s);
}
