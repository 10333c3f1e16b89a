// Codes of activations, and values of codes.
#include "codes.h"
#include "pages.h"

namespace {

constexpr int64_t GRAIN = 16384;  // elements that a thread is worth starting for

int64_t rows_each(int64_t columns) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(columns, 1)); }

// ---- activations -----------------------------------------------------------------------------------------------------

template <class T, bool POWER_OF_TWO>
void quantise_e4m3(const T* x, uint8_t* q, void* scales, int64_t columns, int64_t group, float floor) {
    for (int64_t i = 0, number = 0; i < columns; i += group, ++number) {
        const int64_t count = std::min(group, columns - i);
        const Scale scale = scale_of_group(amax_bits(x + i, count), floor, 448.0f, POWER_OF_TWO);
        store_group_e4m3<T, POWER_OF_TWO>(x + i, count, scale, q + i);
        if (POWER_OF_TWO)
            ((uint8_t*)scales)[number] = scale.ue8m0();
        else
            ((float*)scales)[number] = scale.value;
    }
}

template <class T>
void quantise_e2m1(const T* x, uint8_t* q, uint8_t* scales, int64_t columns, int64_t group, float floor) {
    for (int64_t i = 0; i < columns; i += group) {
        const Scale scale = scale_of_group(amax_bits(x + i, group), floor, 6.0f, true);
        store_group_e2m1(x + i, group, scale, q + i / 2);
        *scales++ = scale.ue8m0();
    }
}

template <class T, class S>
INLINE f32 smoothed(const T* x, const S* smooth, int64_t i, int count) {
    const f32 value = load(x + i, count);
    return smooth ? value * load(smooth + i, count) : value;
}

template <class T, class S>
void quantise_int8(const T* x, const S* smooth, uint8_t* q, float* scale_out, int64_t columns, float floor) {
    i32 amax[2] = {};
    for (int64_t i = 0; i < columns; i += LANES) {
        const int count = int(std::min<int64_t>(columns - i, LANES));
        i32& most = amax[i / LANES % 2];
        most = larger(most, smoothed(x, smooth, i, count));
    }
    const Scale scale = scale_of_group(largest_bits(most_int(amax[0], amax[1])), floor, 127.0f, false);
    for (int64_t i = 0; i < columns; i += LANES) {
        const int count = int(std::min<int64_t>(columns - i, LANES));
        const f32 exact = nearest(quotient<false>(smoothed(x, smooth, i, count), scale));
        store_bytes(q + i, whole(least(most(exact, all(-127.0f)), all(127.0f))), count);
    }
    *scale_out = scale.value;
}

// ---- values of codes ---------------------------------------------------------------------------------------------------

struct E4m3Codes {
    static constexpr int EACH = 1;
    static INLINE f32 values(const uint8_t* p) { return load_e4m3(p); }
};
struct E2m1Codes {
    static constexpr int EACH = 2;
    static INLINE f32 values(const uint8_t* p) { return load_e2m1(p); }
};
struct Int8Codes {
    static constexpr int EACH = 1;
    static INLINE f32 values(const uint8_t* p) {
#ifdef AVX512
        return floating((i32)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
        f32 x;
        for (int i = 0; i < LANES; ++i) x[i] = float(int8_t(p[i]));
        return x;
#endif
    }
};

template <class Codes>
INLINE f32 values_at(const uint8_t* q, int64_t i, int count) {
    if (count >= LANES) return Codes::values(q + i / Codes::EACH);
    uint8_t room[LANES] = {};
    std::memcpy(room, q + i / Codes::EACH, size_t((count + Codes::EACH - 1) / Codes::EACH));
    return Codes::values(room);
}

// Memory that is not read soon is written past the caches, where that is known to be possible.
INLINE void store_lines(bf16* to, const bf16* from, bool past) {
#ifdef AVX512
    if (past) {
        _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(from));
        _mm512_stream_si512((__m512i*)(to + 2 * LANES), _mm512_loadu_si512(from + 2 * LANES));
        return;
    }
#endif
    std::memcpy(to, from, 4 * LANES * sizeof(bf16));
}

// Sixty-four values where bfloat16 holds them all, as it does times most powers of two; false, and nothing, otherwise.
template <class Codes>
INLINE bool store_exact_values(const uint8_t* q, float scale, bf16* y, bool past) {
    const uint32_t bits = bits_as<uint32_t>(scale);
    alignas(64) bf16 room[4 * LANES];
    if constexpr (std::is_same<Codes, E4m3Codes>::value) {
        if ((bits & 0x7fffff) || bits < (10u << 23) || bits > (246u << 23)) return false;
        if (!store_e4m3(q, int(bits >> 23), room)) return false;
    } else if constexpr (std::is_same<Codes, E2m1Codes>::value) {
        if ((bits & 0x7fffff) || bits < (2u << 23) || bits > (252u << 23)) return false;
        store_e2m1(q, int(bits >> 23), room);
        store_e2m1(q + LANES, int(bits >> 23), room + 2 * LANES);
    } else {
        return false;
    }
    store_lines(y, room, past);
    return true;
}

INLINE float scale_at(const uint8_t* scales, int64_t i) { return from_ue8m0(scales[i]); }
INLINE float scale_at(const float* scales, int64_t i) { return scales[i]; }

template <class S>
INLINE f32 scales_of_lanes(const S* scales, int64_t i, int count, int64_t block_k) {
    float room[LANES] = {};
    for (int lane = 0; lane < count; ++lane) room[lane] = scale_at(scales, (i + lane) / block_k);
    return load(room);
}

template <class Codes, class S, class T>
void row_of_values(const uint8_t* q, const S* scales, T* y, int64_t columns, int64_t block_k, bool past) {
    int64_t block = 0, end = block_k;
    float scale = scale_at(scales, 0);
    for (int64_t i = 0; i < columns;) {
        while (i >= end) {
            end += block_k;
            scale = scale_at(scales, ++block);
        }
        // Codes of e2m1 are read by pairs: a block that begins within one is met lane by lane.
        const int count = int(std::min<int64_t>(columns - i, LANES));
        if constexpr (std::is_same<T, bf16>::value)
            if (i + 4 * LANES <= std::min(end, columns) &&
                store_exact_values<Codes>(q + i / Codes::EACH, scale, y + i, past)) {
                i += 4 * LANES;
                continue;
            }
        const f32 factor = i + count <= end ? all(scale) : scales_of_lanes(scales, i, count, block_k);
        store(y + i, values_at<Codes>(q, i, count) * factor, count);
        i += count;
    }
}

struct Matrices {
    int64_t rows, columns, scale_rows, scale_columns, block_n, block_k;
};

template <class Codes, class S, class T>
void values_of_rows(int threads, const uint8_t* q, const S* scales, T* y, const Matrices& m, int64_t items) {
    const int64_t bytes = (m.columns + Codes::EACH - 1) / Codes::EACH;
    const bool past = items * m.columns * int64_t(sizeof(T)) > (int64_t(16) << 20) && uintptr_t(y) % 64 == 0 &&
                      m.columns * int64_t(sizeof(T)) % 64 == 0 && m.block_k % (4 * LANES) == 0;
    parallel(threads, items, rows_each(m.columns), [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t matrix = item / m.rows, row = item % m.rows;
            const S* scale = scales + (matrix * m.scale_rows + row / m.block_n) * m.scale_columns;
            row_of_values<Codes>(q + item * bytes, scale, y + item * m.columns, m.columns, m.block_k, past);
        }
#ifdef AVX512
        if (past) _mm_sfence();
#endif
    });
}

template <class F>
void with_codes(int kind, F f) {
    if (kind == 0) f(E4m3Codes{});
    if (kind == 1) f(Int8Codes{});
    if (kind == 2) f(E2m1Codes{});
}

}  // namespace

EXPORT void act_quant_fp8(int threads, const void* x, int type, void* q, void* scales, int64_t rows, int64_t columns,
                          int64_t group, double floor, int power_of_two) {
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        const int64_t groups = (columns + group - 1) / group;
        parallel(threads, rows, rows_each(columns), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const T* in = (const T*)x + row * columns;
                uint8_t* out = (uint8_t*)q + row * columns;
                if (power_of_two)
                    quantise_e4m3<T, true>(in, out, (uint8_t*)scales + row * groups, columns, group, float(floor));
                else
                    quantise_e4m3<T, false>(in, out, (float*)scales + row * groups, columns, group, float(floor));
            }
        });
    });
}

EXPORT void act_quant_fp4(int threads, const void* x, int type, void* q, void* scales, int64_t rows, int64_t columns,
                          int64_t group, double floor) {
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        parallel(threads, rows, rows_each(columns), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row)
                quantise_e2m1((const T*)x + row * columns, (uint8_t*)q + row * columns / 2,
                              (uint8_t*)scales + row * (columns / group), columns, group, float(floor));
        });
    });
}

EXPORT void act_quant_int8(int threads, const void* x, int type, const void* smooth, int smooth_type, void* q,
                           float* scales, int64_t rows, int64_t columns, double floor) {
    with_type(type, [&](auto zero) {
        with_type(smooth_type, [&](auto zero_of_smooth) {
            using T = decltype(zero);
            using S = decltype(zero_of_smooth);
            parallel(threads, rows, rows_each(columns), [&](int64_t begin, int64_t end) {
                for (int64_t row = begin; row < end; ++row)
                    quantise_int8((const T*)x + row * columns, (const S*)smooth, (uint8_t*)q + row * columns,
                                  scales + row, columns, float(floor));
            });
        });
    });
}

// kind: 0 e4m3, 1 int8, 2 packed e2m1; the scales are ue8m0 or float32.
EXPORT void block_dequant(int threads, const void* q, int kind, const void* scales, int ue8m0, void* y, int type,
                          int64_t items, int64_t rows, int64_t columns, int64_t scale_rows, int64_t scale_columns,
                          int64_t block_n, int64_t block_k) {
    const Matrices m = {rows, columns, scale_rows, scale_columns, block_n, block_k};
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        with_codes(kind, [&](auto codes) {
            using Codes = decltype(codes);
            if (ue8m0)
                values_of_rows<Codes>(threads, (const uint8_t*)q, (const uint8_t*)scales, (T*)y, m, items);
            else
                values_of_rows<Codes>(threads, (const uint8_t*)q, (const float*)scales, (T*)y, m, items);
        });
    });
}
