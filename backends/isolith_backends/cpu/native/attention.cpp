// Attention of each token over listed entries, in tiles of entries with a running maximum.
//
// Heads stand along lanes in the logits, channels in the result. A thread takes a token with all its heads, or where
// there are fewer tokens than threads, with some of them: it reads the entries for itself, since to share them between
// cores takes as long.
#include "heads.h"
#include "pages.h"
#include "tiles.h"

// What Python's Listed says: one pool, and which of its entries each token sees.
struct Listed {
    Pool pool;
    const void* indices;
    int64_t wide, stride, columns;  // whether they have 64 bits; how far tokens lie apart; -1: a range, no indices
    const int64_t* lengths;
    const int32_t* table;
    int64_t table_width;
    int64_t window;  // of a range: how many positions up to the token's own; 0: from the first on
    int64_t ratio;   // entries that begin behind the token are not seen: one for so many positions; 0: all are
};

namespace {

constexpr int64_t TILE = 128;
constexpr int64_t AHEAD = 4;  // entries that are asked for before they are read

int64_t rounded_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

template <class T>
struct Call {
    const T* q;
    const Listed* lists;
    int64_t number;
    const int32_t *cu_seqlens, *start_pos;
    int64_t sequences;
    float scale;
    const float* sink;
    T* out;
    float* lse;
    int64_t tokens, heads, dim, width;
    int64_t lanes, units, channels;  // heads, dim and width, rounded up to whole vectors
    bool pairs;                      // whether q and the pools may be multiplied as bfloat16
};

struct Slot {
    const Pool* pool;
    int64_t slot;
};

// A thread's memory.
struct Room {
    Slot slots[2 * TILE];  // of this tile and the next
    int32_t *query, *query_floats, *keys, *values;
    float *logits, *out, *maxima, *totals, *factors;

    template <class T>
    Room(const Call<T>& call, char* memory) {
        const auto take = [&](auto*& part, int64_t count) {
            part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(memory);
            memory += rounded_up(count * int64_t(sizeof *part), 64);
        };
        take(query, call.units / 2 * call.lanes);
        take(query_floats, call.units * call.lanes);
        take(keys, TILE * call.units);
        take(values, TILE / 2 * call.channels);
        take(logits, TILE * call.lanes);
        take(out, call.lanes * call.channels);
        take(maxima, call.lanes);
        take(totals, call.lanes);
        take(factors, call.lanes);
    }
};

// ---- lists -------------------------------------------------------------------------------------------------------------

int64_t slot_of(const Listed& list, int64_t index, const int32_t* table) {
    if (table) {
        const int64_t column = list.pool.block(index);
        if (column >= list.table_width || table[column] < 0) return -1;
        index = table[column] * list.pool.block_size + list.pool.within(index);
    }
    return index < list.pool.slots() ? index : -1;
}

// The slots of a token's valid columns, list by list.
template <class T>
struct Columns {
    const Call<T>& call;
    int64_t token, sequence = 0, position = 0, list = -1, at = 0, end = 0, seen = 0;
    const int32_t* table = nullptr;

    Columns(const Call<T>& call, int64_t token) : call(call), token(token) {
        if (call.cu_seqlens)
            sequence = std::upper_bound(call.cu_seqlens + 1, call.cu_seqlens + 1 + call.sequences, token) -
                       (call.cu_seqlens + 1);
        if (call.start_pos) position = int64_t(call.start_pos[sequence]) + token - call.cu_seqlens[sequence];
    }

    void open() {
        const Listed& now = call.lists[++list];
        constexpr int64_t ALL = std::numeric_limits<int64_t>::max();
        seen = now.ratio ? (position + 1) / now.ratio : ALL;
        at = !now.window ? 0 : std::max<int64_t>(0, position - now.window + 1);
        end = now.columns >= 0 ? now.columns : now.window ? position + 1 : seen;
        if (now.lengths) end = std::min(end, at + now.lengths[token]);
        if (!now.pool.slots()) end = at;
        if (now.columns < 0 && now.table) end = std::min(end, now.table_width * now.pool.block_size);
        table = now.table ? now.table + sequence * now.table_width : nullptr;
    }

    // Up to TILE of them; how many there are, 0 at the end.
    int64_t next(Slot* slots) {
        int64_t count = 0;
        while (count < TILE) {
            if (at >= end) {
                if (list + 1 == call.number) break;
                open();
                continue;
            }
            const Listed& now = call.lists[list];
            const int64_t column = at++, place = token * now.stride + column;
            const int64_t index = now.columns < 0 ? column
                                  : now.wide      ? ((const int64_t*)now.indices)[place]
                                                  : ((const int32_t*)now.indices)[place];
            if (index < 0 || index >= seen) continue;
            const int64_t slot = slot_of(now, index, table);
            if (slot >= 0) slots[count++] = {&now.pool, slot};
        }
        return count;
    }
};

// ---- operands ----------------------------------------------------------------------------------------------------------

// The queries of heads begin .. end-1 of a token, heads along lanes: [units, lanes].
template <class Unit, class T>
void lay_query(const Call<T>& call, int64_t token, int64_t begin, int64_t end, int32_t* query) {
    const int64_t units = std::is_same<Unit, Pairs>::value ? call.units / 2 : call.units;
    for (int64_t head = begin; head < end; head += LANES)
        for (int64_t unit = 0; unit < units; unit += LANES) {
            i32 block[LANES] = {};
            for (int i = 0; i < LANES && head + i < end; ++i)
                block[i] = units_of(call.q + (token * call.heads + head + i) * call.dim, unit, call.dim, Unit{});
            transpose(block);
            for (int i = 0; i < LANES; ++i) store_units(query + (unit + i) * call.lanes + head, block[i]);
        }
}

// A tile's entries into keys and, two entries to a unit, values. Whether all were exact.
template <class T>
bool read_pairs(const Call<T>& call, const Room& room, const Slot* slots, int64_t entries, int64_t behind) {
    bool exact = true;
    for (int64_t i = 0; i < entries + entries % 2; ++i) {
        bf16* row = (bf16*)room.keys + i * call.units;
        if (i + AHEAD < entries + behind) expect(*slots[i + AHEAD].pool, slots[i + AHEAD].slot);
        const int64_t dim = i < entries ? call.dim : 0;
        if (dim) exact &= read_entry(*slots[i].pool, slots[i].slot, row);
        std::memset(row + dim, 0, size_t(2 * (call.units - dim)));
        if (i % 2 == 0) continue;
        int32_t* values = room.values + i / 2 * call.channels;
        for (int64_t c = 0; c < call.channels; c += 2 * LANES) {
            bf16x32 low, high;
            interleave(load_pairs(row - call.units + c), load_pairs(row + c), low, high);
            store_units(values + c, (i32)low);
            if (c + LANES < call.channels) store_units(values + c + LANES, (i32)high);
        }
    }
    return exact;
}

template <class T>
void read_floats(const Call<T>& call, const Room& room, const Slot* slots, int64_t entries, int64_t behind) {
    for (int64_t i = 0; i < entries; ++i) {
        float* row = (float*)room.keys + i * call.units;
        if (i + AHEAD < entries + behind) expect(*slots[i + AHEAD].pool, slots[i + AHEAD].slot);
        read_entry(*slots[i].pool, slots[i].slot, row);
        std::fill(row + call.dim, row + call.units, 0.0f);
    }
}

// ---- one tile ------------------------------------------------------------------------------------------------------------

INLINE i32 paired(f32 low, f32 high) {  // rounded to bfloat16
    const auto rounded = [](f32 x) {
        const u32 bits = (u32)x, result = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        return x != x ? (i32)((bits >> 16) | 0x40) : (i32)result;
    };
    return rounded(low) | (rounded(high) << 16);
}

// Logits of sixteen heads become weights, in units of the product with the values; the running figures follow.
template <class Unit>
void soften(float* logits, int64_t lanes, int64_t entries, f32 scale, float* maximum, float* total, float* factor) {
    const f32 before = load(maximum);
    f32 most_yet = before;
    for (int64_t j = 0; j < entries; ++j) {
        const f32 logit = load(logits + j * lanes) * scale;
        store(logits + j * lanes, logit);
        most_yet = most(logit, most_yet);
    }
    const f32 base = select(most_yet == -INFINITE, f32{}, most_yet), keep = exponential(before - base);
    f32 sum = load(total) * keep;
    const auto weight = [&](int64_t j) { return exponential(load(logits + j * lanes) - base); };
    if constexpr (std::is_same<Unit, Floats>::value) {
        for (int64_t j = 0; j < entries; ++j) {
            const f32 each = weight(j);
            store(logits + j * lanes, each);
            sum += each;
        }
    } else {  // a pair takes the place of an entry that has been read
        for (int64_t j = 0; j < entries; j += 2) {
            const f32 low = weight(j), high = j + 1 < entries ? weight(j + 1) : f32{};
            store_units((int32_t*)logits + j / 2 * lanes, paired(low, high));
            sum = (sum + low) + high;
        }
    }
    store(maximum, most_yet);
    store(total, sum);
    store(factor, keep);
}

// A tile's entries into the result of heads begin .. end-1; begin is a multiple of sixteen.
template <class Unit, class T>
void add_tile(const Call<T>& call, const Room& room, const int32_t* query, int64_t entries, int64_t begin,
              int64_t end) {
    constexpr bool FLOATS = std::is_same<Unit, Floats>::value;
    const int64_t units = FLOATS ? call.units : call.units / 2, vectors = rounded_up(end - begin, LANES) / LANES;
    float *logits = room.logits + begin, *out = room.out + begin * call.channels;
    product<Unit>({room.keys, units, 1, query + begin, call.lanes, logits, call.lanes}, entries, vectors, units, false);
    for (int64_t at = begin; at < end; at += LANES)
        soften<Unit>(room.logits + at, call.lanes, entries, all(call.scale), room.maxima + at, room.totals + at,
                     room.factors + at);
    for (int64_t head = begin; head < end; ++head) {
        float* row = room.out + head * call.channels;
        if (const float factor = room.factors[head]; factor != 1.0f)
            for (int64_t c = 0; c < call.channels; c += LANES) store(row + c, load(row + c) * factor);
    }
    const int32_t* values = FLOATS ? room.keys : room.values;
    const int64_t step = FLOATS ? call.units : call.channels, steps = FLOATS ? entries : (entries + 1) / 2;
    product<Unit>({(const int32_t*)logits, 1, call.lanes, values, step, out, call.channels}, end - begin,
                  call.channels / LANES, steps, true);
}

// ---- one token ------------------------------------------------------------------------------------------------------------

template <class T>
void finish(const Call<T>& call, const Room& room, int64_t token, int64_t head, bool some) {
    const float most_yet = room.maxima[head], total = room.totals[head];
    T* out = call.out + (token * call.heads + head) * call.width;
    f32 denominator = all(total);
    if (call.sink) denominator += exponential(all(call.sink[head] - most_yet));
    const f32 inverse = 1.0f / denominator;
    for (int64_t c = 0; c < call.width; c += LANES) {
        const f32 value = load(room.out + head * call.channels + c) * inverse;
        store(out + c, some ? value : f32{}, int(std::min<int64_t>(call.width - c, LANES)));
    }
    call.lse[token * call.heads + head] =
        !some ? INFINITE : most_yet == -INFINITE ? NOT_A_NUMBER : most_yet + std::log(total);
}

template <class T>
void attend(const Call<T>& call, Room& room, int64_t token, int64_t begin, int64_t end) {
    const int64_t lanes = rounded_up(end, LANES);
    Columns<T> columns(call, token);
    Slot *slots = room.slots;
    int64_t entries = columns.next(slots);
    const bool some = entries > 0;
    bool pairs = call.pairs, floats_laid = false;
    if constexpr (std::is_same<T, bf16>::value)
        pairs = pairs && !some_subnormal(call.q + token * call.heads * call.dim, call.heads * call.dim);
    if (pairs) lay_query<Pairs>(call, token, begin, end, room.query);
    std::fill(room.maxima + begin, room.maxima + lanes, -INFINITE);
    std::fill(room.totals + begin, room.totals + lanes, 0.0f);
    std::fill(room.out + begin * call.channels, room.out + lanes * call.channels, 0.0f);
    while (entries) {
        const int64_t behind = entries == TILE ? columns.next(slots + TILE) : 0;
        if (pairs && read_pairs(call, room, slots, entries, behind)) {
            add_tile<Pairs>(call, room, room.query, entries, begin, end);
        } else {
            if (!floats_laid) lay_query<Floats>(call, token, begin, end, room.query_floats);
            floats_laid = true;
            read_floats(call, room, slots, entries, behind);
            add_tile<Floats>(call, room, room.query_floats, entries, begin, end);
        }
        std::copy(slots + TILE, slots + TILE + behind, slots);
        entries = behind;
    }
    for (int64_t head = begin; head < end; ++head) finish(call, room, token, head, some);
}

// Every token in `parts` parts of its heads, which are vectors of sixteen.
template <class T>
void attend_all(const Call<T>& call, int threads, int64_t parts, char* memory, int64_t bytes_each) {
    const int64_t vectors = call.lanes / LANES;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Room room(call, memory + omp_get_thread_num() * bytes_each);
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < call.tokens * parts; ++item) {
            const int64_t part = item % parts, begin = vectors * part / parts, end = vectors * (part + 1) / parts;
            attend(call, room, item / parts, begin * LANES, std::min(end * LANES, call.heads));
        }
    }
}

}  // namespace

// `room` has bytes_each for every thread; `lists` are one or two; without a sink it is null.
EXPORT void sparse_attn(int threads, const void* q, int type, const Listed* lists, int64_t number,
                        const int32_t* cu_seqlens, const int32_t* start_pos, int64_t sequences, double scale,
                        const float* sink, void* out, float* lse, int64_t tokens, int64_t heads, int64_t dim,
                        int64_t width, int64_t parts, void* room, int64_t bytes_each) {
    bool pairs = type == 1;
    for (int64_t i = 0; i < number; ++i) pairs = pairs && some_in_bfloat16(lists[i].pool);
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        const Call<T> call{(const T*)q, lists, number, cu_seqlens, start_pos, sequences, float(scale), sink, (T*)out,
                           lse, tokens, heads, dim, width, rounded_up(heads, LANES), rounded_up(dim, 2 * LANES),
                           rounded_up(width, LANES), pairs};
        attend_all(call, int(std::min<int64_t>(threads, tokens * parts)), parts, (char*)room, bytes_each);
    });
}

// c[t, h] = a[t, h] . w[h], which is given [inner, outer], or [outer, inner] where `rows`; all of one type. `room` has
// `words` units for every thread.
EXPORT void head_products(int threads, const void* a, int type, const void* w, int rows, void* c, int64_t tokens,
                          int64_t heads, int64_t inner, int64_t outer, int64_t a_token, int64_t a_head, int64_t c_token,
                          int64_t c_head, int32_t* room, int64_t words) {
    const Shape shape{tokens, heads, inner, outer, a_token, a_head, c_token, c_head};
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        using Unit = std::conditional_t<std::is_same<T, bf16>::value, Pairs, Floats>;
        all_heads<Unit>(threads, shape, (const T*)a, (const T*)w, rows != 0, (T*)c, room, words);
    });
}
