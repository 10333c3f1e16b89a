// Root-mean-square norms: a row's squares are summed, then the row, still in cache, is scaled.
#include "simd.h"

namespace {

template <class T>
float inverse_root(const T* x, int64_t dim, float eps) {
    f32 parts[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= dim; i += 4 * LANES)
        for (int part = 0; part < 4; ++part) {
            const f32 value = load(x + i + part * LANES);
            parts[part] = fma(value, value, parts[part]);
        }
    for (; i < dim; i += LANES) {
        const f32 value = load(x + i, int(std::min<int64_t>(dim - i, LANES)));
        parts[0] = fma(value, value, parts[0]);
    }
    return 1.0f / std::sqrt(sum((parts[0] + parts[1]) + (parts[2] + parts[3])) / float(dim) + eps);
}

template <class T>
INLINE f32 rounded(f32 x) {
    T room[LANES];
    store(room, x);
    return load(room);
}

template <class T, class W>
void rms_norm_rows(int threads, const T* x, const W* weight, T* y, int64_t rows, int64_t dim, float eps, bool twice) {
    parallel(threads, rows, std::max<int64_t>(1, 16384 / dim), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const T* in = x + row * dim;
            T* out = y + row * dim;
            const f32 factor = all(inverse_root(in, dim, eps));
            for (int64_t i = 0; i < dim; i += LANES) {
                const int count = int(std::min<int64_t>(dim - i, LANES));
                f32 normed = load(in + i, count) * factor;
                if (twice) normed = rounded<T>(normed);
                if (weight) normed *= load(weight + i, count);
                store(out + i, normed, count);
            }
        }
    });
}

template <class T>
void rms_norm_weight(int threads, const void* x, const void* weight, int weight_type, void* y, int64_t rows, int64_t dim,
                     float eps, bool twice) {
    with_type(weight_type, [&](auto zero) {
        using W = decltype(zero);
        rms_norm_rows(threads, (const T*)x, (const W*)weight, (T*)y, rows, dim, eps, twice);
    });
}

}  // namespace

// y = weight * x / rms(x) over rows of `dim`; without a weight where it is null.
EXPORT void rms_norm(int threads, const void* x, int type, const void* weight, int weight_type, void* y, int64_t rows,
                     int64_t dim, double eps, int twice) {
    with_type(type, [&](auto zero) {
        rms_norm_weight<decltype(zero)>(threads, x, weight, weight_type, y, rows, dim, float(eps), twice);
    });
}
