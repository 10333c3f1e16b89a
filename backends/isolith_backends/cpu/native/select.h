// The k largest of a row by (-value, index): integers that rank as the values do are halved towards the k-th.
#pragma once

#include "simd.h"

constexpr int32_t OUT = std::numeric_limits<int32_t>::min();  // the key of what does not compete

// Integers in the order of the values; zeros are equal, NaN counts as infinity.
INLINE i32 keys_of(f32 x) {
    const i32 bits = as_int(select(x != x, all(INFINITE), x + 0.0f));
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

INLINE i32 load_keys(const int32_t* p) {
    i32 x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
INLINE void store_keys(int32_t* p, i32 x) { std::memcpy(p, &x, sizeof x); }

INLINE int64_t whole_vectors(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// Write the lanes of x that `where` names (-1, else 0) from p on, and anything up to p + LANES; how many there are.
INLINE int64_t compress(int32_t* p, i32 x, i32 where) {
#ifdef AVX512
    const __mmask16 mask = _mm512_movepi32_mask((__m512i)where);
    _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(mask, (__m512i)x));
    return __builtin_popcount(mask);
#else
    int64_t count = 0;
    for (int i = 0; i < LANES; ++i)
        if (where[i]) p[count++] = x[i];
    return count;
#endif
}

INLINE bool some(i32 where) {
#ifdef AVX512
    return _mm512_movepi32_mask((__m512i)where) != 0;
#else
    int32_t any = 0;
    for (int i = 0; i < LANES; ++i) any |= where[i];
    return any != 0;
#endif
}

// Lengths below are those of whole vectors; OUT fills the last.
inline int64_t count_from(const int32_t* keys, int64_t length, int32_t least) {
    i32 counts[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= length; i += 4 * LANES)
        for (int part = 0; part < 4; ++part) counts[part] -= load_keys(keys + i + part * LANES) >= least;
    for (; i < length; i += LANES) counts[0] -= load_keys(keys + i) >= least;
    const i32 total = counts[0] + counts[1] + counts[2] + counts[3];
    int64_t count = 0;
    for (int lane = 0; lane < LANES; ++lane) count += total[lane];
    return count;
}

inline int32_t largest_key(const int32_t* keys, int64_t length) {
    i32 most = all_int(OUT);
    for (int64_t i = 0; i < length; i += LANES) {
        const i32 key = load_keys(keys + i);
        most = key > most ? key : most;
    }
    int32_t result = OUT;
    for (int lane = 0; lane < LANES; ++lane) result = std::max<int32_t>(result, most[lane]);
    return result;
}

// The k largest are all keys above `key`, and the first `equal` of those that equal it.
struct Bound {
    int32_t key;
    int64_t equal;
};

// Of at least k keys from `least` on.
inline Bound bound_of(const int32_t* keys, int64_t length, int64_t k, int32_t least) {
    int64_t low = least, high = int64_t(largest_key(keys, length)) + 1, above = 0;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2, count = count_from(keys, length, int32_t(middle));
        if (count == k) return {int32_t(middle - 1), 0};
        if (count > k)
            low = middle;
        else {
            high = middle;
            above = count;
        }
    }
    return {int32_t(low), k - above};
}

// What a thread needs beside the keys; three vectors longer than what they hold.
struct Scratch {
    int32_t *maxima, *keys, *places, *chosen;
    static int64_t held(int64_t k) { return 16 * k + 1024; }
    static int64_t words(int64_t k) { return 4 * (held(k) + 3 * LANES); }
    Scratch(int32_t* memory, int64_t k) {
        for (int32_t** part : {&maxima, &keys, &places, &chosen}) {
            *part = memory;
            memory += held(k) + 3 * LANES;
        }
    }
};

// Those of the k largest among `length` keys to `out`, in the order of their places. `places` is null where key i has
// place i. More than k keys compete.
inline void take_largest(const int32_t* keys, const int32_t* places, int64_t length, int64_t k, int32_t least,
                         Scratch& scratch, int32_t* out) {
    const Bound bound = bound_of(keys, length, k, least);
    int64_t equal = bound.equal, count = 0;
    for (int64_t i = 0; i < length; i += LANES) {
        const i32 key = load_keys(keys + i);
        i32 taken = key > bound.key;
        if (equal) {
            i32 same = key == bound.key;
            if (some(same)) {
                for (int lane = 0; lane < LANES; ++lane) {
                    same[lane] = equal && same[lane] ? -1 : 0;
                    equal += same[lane];
                }
                taken |= same;
            }
        }
        if (!some(taken)) continue;
        const i32 place = places ? load_keys(places + i) : lane_numbers() + int32_t(i);
        count += compress(scratch.chosen + count, place, taken);
    }
    std::memcpy(out, scratch.chosen, size_t(4 * k));
}

// As above, where few keys of a long row have to be looked at more than once: the k-th largest of the maxima of many
// groups is at most the k-th largest of all.
inline void select_largest(const int32_t* keys, int64_t length, int64_t k, Scratch& scratch, int32_t* out) {
    const int64_t groups = whole_vectors(4 * k);
    if (length < 4 * groups) return take_largest(keys, nullptr, length, k, OUT + 1, scratch, out);
    std::copy(keys, keys + groups, scratch.maxima);
    for (int64_t first = groups; first < length; first += groups)
        for (int64_t i = first; i < std::min(first + groups, length); i += LANES) {
            const i32 key = load_keys(keys + i), most = load_keys(scratch.maxima + i - first);
            store_keys(scratch.maxima + i - first, key > most ? key : most);
        }
    int32_t least = OUT + 1;
    if (count_from(scratch.maxima, groups, least) >= k) {
        const Bound bound = bound_of(scratch.maxima, groups, k, least);
        least = bound.equal ? bound.key : bound.key + 1;
    }
    int64_t count = 0;
    for (int64_t i = 0; i < length; i += LANES) {
        const i32 key = load_keys(keys + i), kept = key >= least;
        if (!some(kept)) continue;
        if (count > Scratch::held(k)) return take_largest(keys, nullptr, length, k, least, scratch, out);
        compress(scratch.places + count, lane_numbers() + int32_t(i), kept);
        count += compress(scratch.keys + count, key, kept);
    }
    store_keys(scratch.keys + count, all_int(OUT));
    take_largest(scratch.keys, scratch.places, whole_vectors(count), k, least, scratch, out);
}

// The indices of a row: the k first of what competes, in ascending order, then -1. How many there are.
inline int64_t select_row(const int32_t* keys, int64_t length, int64_t k, Scratch& scratch, int32_t* out) {
    const int64_t competing = count_from(keys, length, OUT + 1);
    if (competing > k) {
        select_largest(keys, length, k, scratch, out);
        return k;
    }
    int64_t count = 0;
    for (int64_t i = 0; i < length; ++i)
        if (keys[i] != OUT) out[count++] = int32_t(i);
    std::fill(out + count, out + k, -1);
    return competing;
}
