// Rotary embedding and Walsh-Hadamard rotation: a row at a time, rounded once.
#include "simd.h"

namespace {

constexpr int64_t MOST_PAIRS = 1024;
constexpr int64_t MOST_WIDTH = 16384;

// ---- rope --------------------------------------------------------------------------------------------------------------------

// The angles of a token as its rows use them: pairs side by side have cosines twice and sines as -sin, sin.
struct Angles {
    float cosines[2 * MOST_PAIRS], sines[2 * MOST_PAIRS];

    void of(const float* cosine, const float* sine, int64_t pairs, bool inverse, bool interleaved) {
        const float sign = inverse ? -1.0f : 1.0f;
        for (int64_t i = 0; i < pairs; ++i) {
            if (interleaved) {
                cosines[2 * i] = cosines[2 * i + 1] = cosine[i];
                sines[2 * i] = -sign * sine[i];
                sines[2 * i + 1] = sign * sine[i];
            } else {
                cosines[i] = cosine[i];
                sines[i] = sign * sine[i];
            }
        }
    }
};

template <class T>
void turn_neighbours(const T* x, T* y, const Angles& angles, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES) {
        const int count = int(std::min<int64_t>(width - i, LANES));
        const f32 value = load(x + i, count);
        const f32 other = exchanged<1>(value) * load(angles.sines + i, count);
        store(y + i, fma(value, load(angles.cosines + i, count), other), count);
    }
}

template <class T>
void turn_halves(const T* x, T* y, const Angles& angles, int64_t pairs) {
    for (int64_t i = 0; i < pairs; i += LANES) {
        const int count = int(std::min<int64_t>(pairs - i, LANES));
        const f32 a = load(x + i, count), b = load(x + pairs + i, count);
        const f32 cosine = load(angles.cosines + i, count), sine = load(angles.sines + i, count);
        store(y + i, fma(a, cosine, -(b * sine)), count);
        store(y + pairs + i, fma(b, cosine, a * sine), count);
    }
}

// ---- hadamard ------------------------------------------------------------------------------------------------------------------

// Sums in the lanes without the bit DISTANCE, differences in those with it.
template <int DISTANCE>
INLINE f32 butterfly(f32 x) {
    const f32 sign = (lane_numbers() & DISTANCE) ? all(-1.0f) : all(1.0f);
    return fma(x, sign, exchanged<DISTANCE>(x));
}

INLINE f32 within(f32 x) { return butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(x)))); }

// Rows of VECTORS * 16, in registers.
template <int VECTORS, class T>
void rotate_row(const T* x, T* y, f32 scale) {
    f32 values[VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < VECTORS; ++i) values[i] = within(load(x + i * LANES));
#pragma GCC unroll 4
    for (int stride = 1; stride < VECTORS; stride *= 2)
#pragma GCC unroll 16
        for (int i = 0; i < VECTORS; ++i)
            if (!(i & stride)) {
                const f32 low = values[i], high = values[i + stride];
                values[i] = low + high;
                values[i + stride] = low - high;
            }
#pragma GCC unroll 16
    for (int i = 0; i < VECTORS; ++i) store(y + i * LANES, values[i] * scale);
}

// Rows of any other power of two.
template <class T>
void rotate_any(const T* x, T* y, float scale, int64_t width) {
    float room[MOST_WIDTH];
    for (int64_t i = 0; i < width; ++i) room[i] = to_float(x[i]);
    for (int64_t stride = 1; stride < width; stride *= 2)
        for (int64_t start = 0; start < width; start += 2 * stride)
            for (int64_t i = start; i < start + stride; ++i) {
                const float low = room[i], high = room[i + stride];
                room[i] = low + high;
                room[i + stride] = low - high;
            }
    for (int64_t i = 0; i < width; ++i) y[i] = from_float<T>(room[i] * scale);
}

}  // namespace

// x [tokens, heads, width]: dimensions first .. first + 2*pairs - 1 are turned, the others copied.
EXPORT void rope(int threads, const void* x, int type, const int64_t* positions, const float* cosines,
                 const float* sines, void* y, int64_t tokens, int64_t heads, int64_t width, int64_t pairs, int64_t first,
                 int inverse, int interleaved) {
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        parallel(threads, tokens * heads, std::max<int64_t>(1, 32768 / width), [&](int64_t begin, int64_t end) {
            Angles angles;
            int64_t known = -1;
            for (int64_t row = begin; row < end; ++row) {
                const T* in = (const T*)x + row * width;
                T* out = (T*)y + row * width;
                if (const int64_t token = row / heads; token != known) {
                    const int64_t at = positions[token] * pairs;
                    angles.of(cosines + at, sines + at, pairs, inverse, interleaved);
                    known = token;
                }
                std::memcpy(out, in, size_t(first) * sizeof(T));
                std::memcpy(out + first + 2 * pairs, in + first + 2 * pairs, size_t(width - first - 2 * pairs) * sizeof(T));
                if (interleaved)
                    turn_neighbours(in + first, out + first, angles, 2 * pairs);
                else
                    turn_halves(in + first, out + first, angles, pairs);
            }
        });
    });
}

EXPORT void hadamard(int threads, const void* x, int type, void* y, int64_t rows, int64_t width, double scale) {
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        parallel(threads, rows, std::max<int64_t>(1, 16384 / width), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin * width; i < end * width; i += width) {
                const T* in = (const T*)x + i;
                T* out = (T*)y + i;
                const f32 factor = all(float(scale));
                if (width == 64)
                    rotate_row<4>(in, out, factor);
                else if (width == 128)
                    rotate_row<8>(in, out, factor);
                else if (width == 256)
                    rotate_row<16>(in, out, factor);
                else
                    rotate_any(in, out, float(scale), width);
            }
        });
    });
}
