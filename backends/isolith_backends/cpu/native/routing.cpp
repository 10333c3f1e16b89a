// The router, the gated activation, and the sum of a token's expert outputs.
#include "simd.h"

namespace {

constexpr int64_t MOST_EXPERTS = 1024, MOST_CHOSEN = 64;
constexpr float SUM_FLOOR = 1e-20f;  // as in numerics/routing.py
constexpr float SOFTPLUS_IDENTITY = 20.0f;
constexpr int64_t CHUNK = 2048;

INLINE f32 sigmoid(f32 x) { return 1.0f / (1.0f + exponential(-x)); }

enum Score { SQRTSOFTPLUS, SIGMOID, SOFTMAX };

INLINE f32 scored(f32 x, int score) {
    if (score == SIGMOID) return sigmoid(x);
    const f32 softplus = most(x, f32{}) + log_one_plus(exponential(-absolute(x)));
    return root(select(x > SOFTPLUS_IDENTITY, x, softplus));
}

// The scores of a row; those behind it, up to a whole vector, are of no meaning.
void score_row(const float* logits, float* scores, int64_t experts, int score) {
    float top = -INFINITE;
    if (score == SOFTMAX)
        for (int64_t e = 0; e < experts; ++e) top = logits[e] > top ? logits[e] : top;
    f32 total = {};
    for (int64_t e = 0; e < experts; e += LANES) {
        const int count = int(std::min<int64_t>(experts - e, LANES));
        const f32 x = load(logits + e, count);
        f32 y = score == SOFTMAX ? exponential(x - top) : scored(x, score);
        if (score == SOFTMAX) {
            y = select(lane_numbers() < count, y, f32{});
            total += y;
        }
        store(scores + e, y);
    }
    if (score != SOFTMAX) return;
    const f32 sum_of_row = all(sum(total));
    for (int64_t e = 0; e < experts; e += LANES) store(scores + e, load(scores + e) / sum_of_row);
}

// A key for each value that orders as the values do: equal zeros, a NaN above all. Taken ones get the lowest.
constexpr int32_t TAKEN = INT32_MIN;
INLINE int32_t key_of(float value) {
    if (value != value) return INT32_MAX;
    const int32_t bits = bits_as<int32_t>(value + 0.0f);
    return bits >= 0 ? bits : bits ^ 0x7fffffff;
}

// The numbers of the `count` largest keys, largest first, of equal ones the lowest; they are taken.
void take_largest(int32_t* keys, int64_t number, int32_t* chosen, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        i32 top = all_int(TAKEN), at = all_int(0);
        for (int64_t e = 0; e < number; e += LANES) {  // behind `number` all are taken
            i32 key;
            std::memcpy(&key, keys + e, sizeof key);
            const i32 higher = key > top;
            top = higher ? key : top;
            at = higher ? lane_numbers() + int32_t(e) : at;
        }
        int32_t best = TAKEN, place = INT32_MAX;
        for (int lane = 0; lane < LANES; ++lane)
            if (top[lane] > best || (top[lane] == best && best != TAKEN && at[lane] < place)) {
                best = top[lane];
                place = at[lane];
            }
        if (place == INT32_MAX) place = 0;
        chosen[i] = place;
        keys[place] = TAKEN;
    }
}

// What the experts are ranked by, as keys; -inf in the groups that lose.
void rank(const float* scores, const float* bias, int64_t experts, int64_t groups, int64_t topk_groups, int32_t* keys) {
    const int64_t padded = (experts + LANES - 1) / LANES * LANES;
    float choice[MOST_EXPERTS + LANES];
    for (int64_t e = 0; e < experts; ++e) {
        choice[e] = bias ? scores[e] + bias[e] : scores[e];
        keys[e] = key_of(choice[e]);
    }
    for (int64_t e = experts; e < padded; ++e) keys[e] = TAKEN;
    if (groups == 1) return;
    const int64_t size = experts / groups;
    int32_t of_groups[MOST_EXPERTS + LANES], winners[MOST_EXPERTS];
    std::fill(of_groups, of_groups + (groups + LANES - 1) / LANES * LANES, TAKEN);
    for (int64_t g = 0; g < groups; ++g) {
        float first = -INFINITE, second = -INFINITE;
        for (int64_t e = g * size; e < (g + 1) * size; ++e) {
            if (!(choice[e] <= first)) {
                second = first;
                first = choice[e];
            } else if (!(choice[e] <= second)) {
                second = choice[e];
            }
        }
        of_groups[g] = key_of(bias && size > 1 ? first + second : first);
    }
    take_largest(of_groups, groups, winners, topk_groups);
    bool wins[MOST_EXPERTS] = {};
    for (int64_t i = 0; i < topk_groups; ++i) wins[winners[i]] = true;
    const int32_t lowest = key_of(-INFINITE);
    for (int64_t e = 0; e < experts; ++e)
        if (!wins[e / size]) keys[e] = lowest;
}

void weigh(const float* chosen_scores, float* weights, int64_t k, bool renormalize, float scale) {
    float total = 0.0f;
    for (int64_t i = 0; i < k; ++i) total += chosen_scores[i];
    for (int64_t i = 0; i < k; ++i)
        weights[i] = (renormalize ? chosen_scores[i] / (total + SUM_FLOOR) : chosen_scores[i]) * scale;
}

void switch_off(int32_t* chosen, float* weights, int64_t k) {
    std::fill(chosen, chosen + k, -1);
    std::fill(weights, weights + k, 0.0f);
}

// ---- the activation ----------------------------------------------------------------------------------------------------------

template <bool CLAMPED, class T>
void gate_row(const T* x, T* y, int64_t half, float limit, float weight) {
    for (int64_t i = 0; i < half; i += LANES) {
        const int count = int(std::min<int64_t>(half - i, LANES));
        f32 gate = load(x + i, count), up = load(x + half + i, count);
        if (CLAMPED) {
            gate = least(gate, all(limit));
            up = most(least(up, all(limit)), all(-limit));
        }
        store(y + i, gate * sigmoid(gate) * up * weight, count);
    }
}

// ---- the sum of slots --------------------------------------------------------------------------------------------------------

template <class T, class R>
void add_slots(const T* rows, const int64_t* places, const float* weights, const R* residual, T* y, int64_t k,
               int64_t hidden, int64_t low, int64_t high) {
    for (int64_t c = low; c < high; c += LANES) {
        const int count = int(std::min<int64_t>(high - c, LANES));
        f32 total = {};
        for (int64_t slot = 0; slot < k; ++slot) {
            if (places[slot] < 0) continue;
            const f32 value = load(rows + places[slot] * hidden + c, count);
            total = weights ? fma(all(weights[slot]), value, total) : total + value;
        }
        if (residual) total += load(residual + c, count);
        store(y + c, total, count);
    }
}

}  // namespace

// `mask` is null or a byte a token.
EXPORT void moe_gate(int threads, const float* logits, const float* bias, const uint8_t* mask, int32_t* topk_idx,
                     float* topk_weights, int64_t tokens, int64_t experts, int64_t k, int score, int64_t groups,
                     int64_t topk_groups, int renormalize, double scale) {
    parallel(threads, tokens, 8, [&](int64_t begin, int64_t end) {
        float scores[MOST_EXPERTS + LANES], of_chosen[MOST_CHOSEN];
        int32_t keys[MOST_EXPERTS + LANES];
        for (int64_t token = begin; token < end; ++token) {
            int32_t* chosen = topk_idx + token * k;
            float* weights = topk_weights + token * k;
            if (mask && !mask[token]) {
                switch_off(chosen, weights, k);
                continue;
            }
            score_row(logits + token * experts, scores, experts, score);
            rank(scores, bias, experts, groups, topk_groups, keys);
            take_largest(keys, experts, chosen, k);
            for (int64_t i = 0; i < k; ++i) of_chosen[i] = scores[chosen[i]];
            weigh(of_chosen, weights, k, renormalize, float(scale));
        }
    });
}

// The table has experts of 32 or, where it is wide, 64 bits.
EXPORT void moe_hash_gate(int threads, const float* logits, const int64_t* ids, const void* table, int wide,
                          const uint8_t* mask, int32_t* topk_idx, float* topk_weights, int64_t tokens, int64_t experts,
                          int64_t k, int score, int renormalize, double scale) {
    parallel(threads, tokens, 64, [&](int64_t begin, int64_t end) {
        float scores[MOST_EXPERTS + LANES], read[MOST_CHOSEN + LANES], of_chosen[MOST_CHOSEN + LANES];
        for (int64_t token = begin; token < end; ++token) {
            const float* row = logits + token * experts;
            int32_t* chosen = topk_idx + token * k;
            float* weights = topk_weights + token * k;
            if (mask && !mask[token]) {
                switch_off(chosen, weights, k);
                continue;
            }
            for (int64_t i = 0; i < k; ++i) {
                const int64_t at = ids[token] * k + i;
                chosen[i] = wide ? int32_t(((const int64_t*)table)[at]) : ((const int32_t*)table)[at];
            }
            if (score == SOFTMAX) {
                score_row(row, scores, experts, score);
                for (int64_t i = 0; i < k; ++i) of_chosen[i] = scores[chosen[i]];
            } else {
                for (int64_t i = 0; i < k; ++i) read[i] = row[chosen[i]];
                score_row(read, of_chosen, k, score);
            }
            weigh(of_chosen, weights, k, renormalize, float(scale));
        }
    });
}

EXPORT void swiglu(int threads, const void* x, int type, const float* row_weight, void* y, int64_t rows, int64_t half,
                   double limit) {
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        parallel(threads, rows, std::max<int64_t>(1, 8192 / std::max<int64_t>(half, 1)), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const auto gate = limit > 0 ? gate_row<true, T> : gate_row<false, T>;
                gate((const T*)x + row * 2 * half, (T*)y + row * half, half, float(limit),
                     row_weight ? row_weight[row] : 1.0f);
            }
        });
    });
}

EXPORT void moe_unpermute(int threads, const void* rows, int type, const int64_t* places, const float* weights,
                          const void* residual, int residual_type, void* y, int64_t tokens, int64_t k, int64_t hidden) {
    const int64_t parts = (hidden + CHUNK - 1) / CHUNK;
    with_type(type, [&](auto zero) {
        with_type(residual_type, [&](auto residual_zero) {
            using T = decltype(zero);
            using R = decltype(residual_zero);
            parallel(threads, tokens * parts, 2, [&](int64_t begin, int64_t end) {
                for (int64_t item = begin; item < end; ++item) {
                    const int64_t token = item / parts, low = item % parts * CHUNK;
                    add_slots((const T*)rows, places + token * k, weights ? weights + token * k : nullptr,
                              residual ? (const R*)residual + token * hidden : nullptr, (T*)y + token * hidden, k, hidden,
                              low, std::min(low + CHUNK, hidden));
                }
            });
        });
    });
}
