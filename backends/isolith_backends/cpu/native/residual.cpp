// Hyper-connections: the projection of a token's streams, the coefficients made of it, and the two mixtures.
#include "tiles.h"

namespace {

constexpr int64_t BLOCK = 32;    // tokens that share one reading of the weights
constexpr int64_t CHUNK = 2048;  // elements of a row at a time
constexpr int64_t ROWS = 6, TOKENS = 4;
constexpr int MOST_STREAMS = 16;

INLINE float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// ---- z = fn v --------------------------------------------------------------------------------------------------------------

// The products of R rows with COUNT tokens over elements low .. high-1, added to z.
template <int R, int COUNT, class T>
void multiply_part(const T* v, const float* fn, float* z, int64_t size, int64_t rows, int64_t low, int64_t high) {
    f32 sums[R][COUNT] = {};
    const auto step = [&](int64_t i, int count) {
        f32 values[COUNT];
        for (int t = 0; t < COUNT; ++t) values[t] = load(v + t * size + i, count);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const f32 weight = load(fn + r * size + i, count);
#pragma GCC unroll 8
            for (int t = 0; t < COUNT; ++t) sums[r][t] = fma(weight, values[t], sums[r][t]);
        }
    };
    int64_t i = low;
    for (; i + LANES <= high; i += LANES) step(i, LANES);
    if (i < high) step(i, int(high - i));
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < COUNT; ++t) z[t * rows + r] += sum(sums[r][t]);
}

// z [tokens, rows] of streams [tokens, size] and fn [rows, size].
template <class T>
void project(int threads, const T* streams, const float* fn, float* z, int64_t tokens, int64_t size, int64_t rows) {
    std::fill(z, z + tokens * rows, 0.0f);
    const int64_t tiles = (rows + ROWS - 1) / ROWS, blocks = (tokens + BLOCK - 1) / BLOCK;
    parallel(threads, blocks * tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t row = item % tiles * ROWS, first = item / tiles * BLOCK;
            const int64_t last = std::min(first + BLOCK, tokens);
            for (int64_t low = 0; low < size; low += CHUNK)
                for (int64_t token = first; token < last; token += TOKENS)
                    with_size<ROWS>(rows - row, [&](auto height) {
                        with_size<TOKENS>(last - token, [&](auto count) {
                            multiply_part<height(), count()>(streams + token * size, fn + row * size,
                                                             z + token * rows + row, size, rows, low,
                                                             std::min(low + CHUNK, size));
                        });
                    });
        }
    });
}

template <class T>
float inverse_root(const T* v, int64_t size, float eps) {
    f32 parts[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES)
        for (int part = 0; part < 4; ++part) {
            const f32 value = load(v + i + part * LANES);
            parts[part] = fma(value, value, parts[part]);
        }
    for (; i < size; i += LANES) {
        const f32 value = load(v + i, int(std::min<int64_t>(size - i, LANES)));
        parts[0] = fma(value, value, parts[0]);
    }
    return 1.0f / std::sqrt(sum((parts[0] + parts[1]) + (parts[2] + parts[3])) / float(size) + eps);
}

// x[c] = sum over j of pre[j] * streams[j, c]
template <class T>
void collapse(const T* streams, const float* pre, T* x, int64_t n, int64_t hidden) {
    for (int64_t c = 0; c < hidden; c += LANES) {
        const int count = int(std::min<int64_t>(hidden - c, LANES));
        f32 total = {};
        for (int64_t j = 0; j < n; ++j) total = fma(all(pre[j]), load(streams + j * hidden + c, count), total);
        store(x + c, total, count);
    }
}

// ---- sinkhorn --------------------------------------------------------------------------------------------------------------

// A matrix of 4 x 4 is one vector: lane 4j + k.
INLINE f32 sum_of_row(f32 x) {
    x += exchanged<1>(x);
    return x + exchanged<2>(x);
}
INLINE f32 sum_of_column(f32 x) {
    x += exchanged<4>(x);
    return x + exchanged<8>(x);
}

INLINE f32 sinkhorn_of_four(f32 logits, int64_t iters, f32 eps) {
    f32 top = most(logits, exchanged<1>(logits));
    top = most(top, exchanged<2>(top));
    f32 comb = exponential(logits - top);
    comb = comb / sum_of_row(comb) + eps;
    comb = comb / (sum_of_column(comb) + eps);
    for (int64_t i = 1; i < iters; ++i) {
        comb = comb / (sum_of_row(comb) + eps);
        comb = comb / (sum_of_column(comb) + eps);
    }
    return comb;
}

// comb /= sums + eps, along rows (step 1 between summands) or columns (step n).
void divide_by_sums(float* comb, int64_t n, int64_t along, int64_t across, float eps) {
    for (int64_t a = 0; a < n; ++a) {
        float total = 0.0f;
        for (int64_t b = 0; b < n; ++b) total += comb[a * across + b * along];
        for (int64_t b = 0; b < n; ++b) comb[a * across + b * along] /= total + eps;
    }
}

void sinkhorn_matrix(const float* logits, float* comb, int64_t n, int64_t iters, float eps) {
    if (n == 4) return store(comb, sinkhorn_of_four(load(logits), iters, all(eps)));
    for (int64_t j = 0; j < n; ++j) {
        float top = -INFINITE, total = 0.0f;
        for (int64_t k = 0; k < n; ++k) top = std::max(top, logits[j * n + k]);
        for (int64_t k = 0; k < n; ++k) total += comb[j * n + k] = std::exp(logits[j * n + k] - top);
        for (int64_t k = 0; k < n; ++k) comb[j * n + k] = comb[j * n + k] / total + eps;
    }
    divide_by_sums(comb, n, n, 1, eps);
    for (int64_t i = 1; i < iters; ++i) {
        divide_by_sums(comb, n, 1, n, eps);
        divide_by_sums(comb, n, n, 1, eps);
    }
}

// ---- putting back ------------------------------------------------------------------------------------------------------------

// y[k] = post[k] x + sum over j of comb[j, k] streams[j], of elements low .. high-1 of one token; N streams, or n.
template <int N, class T, class X>
void put_back(const X* x, const T* streams, const float* post, const float* comb, T* y, int64_t n, int64_t hidden,
              int64_t low, int64_t high) {
    const int64_t count = N ? N : n;
    for (int64_t c = low; c < high; c += LANES) {
        const int lanes = int(std::min<int64_t>(high - c, LANES));
        f32 read[N ? N : MOST_STREAMS];
        for (int64_t j = 0; j < count; ++j) read[j] = load(streams + j * hidden + c, lanes);
        const f32 output = load(x + c, lanes);
        for (int64_t k = 0; k < count; ++k) {
            f32 total = output * post[k];
            for (int64_t j = 0; j < count; ++j) total = fma(all(comb[j * count + k]), read[j], total);
            store(y + k * hidden + c, total, lanes);
        }
    }
}

}  // namespace

// x, post and comb of hc_pre; `room` is [tokens, (2+n)*n]. Without post, x of hc_head, whose room is [tokens, n].
EXPORT void hc_pre(int threads, const void* streams, int type, const float* fn, const float* scale, const float* base,
                   float* room, void* x, float* post, float* comb, int64_t tokens, int64_t n, int64_t hidden,
                   int64_t iters, double norm_eps, double hc_eps) {
    const int64_t rows = post ? (2 + n) * n : n, size = n * hidden;
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        project(threads, (const T*)streams, fn, room, tokens, size, rows);
        parallel(threads, tokens, std::max<int64_t>(1, 16384 / std::max<int64_t>(size, 1)), [&](int64_t begin, int64_t end) {
            for (int64_t token = begin; token < end; ++token) {
                const T* v = (const T*)streams + token * size;
                float *z = room + token * rows, pre[MOST_STREAMS];
                const float factor = inverse_root(v, size, float(norm_eps));
                for (int64_t j = 0; j < n; ++j) pre[j] = sigmoid(scale[0] * (z[j] * factor) + base[j]) + float(hc_eps);
                collapse(v, pre, (T*)x + token * hidden, n, hidden);
                if (!post) continue;
                for (int64_t j = n; j < 2 * n; ++j)
                    post[token * n + j - n] = 2.0f * sigmoid(scale[1] * (z[j] * factor) + base[j]);
                for (int64_t i = 2 * n; i < rows; ++i) z[i] = scale[2] * (z[i] * factor) + base[i];
                sinkhorn_matrix(z + 2 * n, comb + token * n * n, n, iters, float(hc_eps));
            }
        });
    });
}

EXPORT void sinkhorn(int threads, const float* logits, float* comb, int64_t matrices, int64_t n, int64_t iters,
                     double eps) {
    parallel(threads, matrices, 64, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * n * n; i < end * n * n; i += n * n)
            sinkhorn_matrix(logits + i, comb + i, n, iters, float(eps));
    });
}

EXPORT void hc_post(int threads, const void* x, int x_type, const void* streams, int type, const float* post,
                    const float* comb, void* y, int64_t tokens, int64_t n, int64_t hidden) {
    const int64_t parts = (hidden + CHUNK - 1) / CHUNK;
    with_type(type, [&](auto zero) {
        with_type(x_type, [&](auto x_zero) {
            using T = decltype(zero);
            using X = decltype(x_zero);
            parallel(threads, tokens * parts, 4, [&](int64_t begin, int64_t end) {
                for (int64_t item = begin; item < end; ++item) {
                    const int64_t token = item / parts, low = item % parts * CHUNK, at = token * n * hidden;
                    const auto put = n == 4 ? put_back<4, T, X> : put_back<0, T, X>;
                    put((const X*)x + token * hidden, (const T*)streams + at, post + token * n, comb + token * n * n,
                        (T*)y + at, n, hidden, low, std::min(low + CHUNK, hidden));
                }
            });
        });
    });
}
