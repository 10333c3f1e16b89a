// The lightning indexer: scores of a sequence's entries for blocks of its tokens, and the selection of the largest.
//
// Entries stand along lanes: a tile of keys, transposed once, meets every head of every token of the block; products
// stay in registers until heads are summed.
#include "keys.h"
#include "select.h"

namespace {

constexpr int64_t CHUNK = 8;  // tiles that a thread takes at once

// ---- scores ----------------------------------------------------------------------------------------------------------------

// The scores of a tile's entries for one token: rectified products, weighted and summed over heads in their order.
template <class Unit, class Between>
void score_tile(const int32_t* query, const float* factors, const int32_t* keys, int64_t heads, int64_t units,
                f32 (&scores)[2], Between between) {
    constexpr int64_t ROWS = 8;
    scores[0] = scores[1] = f32{};
    for (int64_t head = 0; head < heads; head += ROWS) {
        between(head, std::min(head + ROWS, heads));
        with_size<ROWS>(heads - head, [&](auto height) {
            f32 sums[height()][2] = {};
            multiply<Unit>(sums, query + head * units, units, 1, keys, TILE, units);
            for (int m = 0; m < height(); ++m)
                for (int n = 0; n < 2; ++n) {
                    const f32 dot = most(sums[m][n], f32{});
                    scores[n] = fma(all(factors[head + m]), dot, scores[n]);
                }
        });
    }
}

void score_token(const Indexer& call, const Block& block, const Queries& queries, Tile& tile, int64_t low,
                 int64_t count, int64_t at, bool last, f32 (&scores)[2]) {
    const int64_t units = padded(call.dim);
    const float* factors = queries.factors + at * call.heads;
    // The next keys are asked for bit by bit: a core waits where too much is on its way.
    const int64_t next = low + TILE;
    const auto ask = [&](int64_t begin, int64_t end) {
        if (last) expect_keys(call, block, next + TILE * begin / call.heads, next + TILE * end / call.heads);
    };
    if (tile.exact && queries.exact[at])
        return score_tile<Pairs>(queries.pairs + at * call.heads * units / 2, factors, tile.pairs, call.heads,
                                 units / 2, scores, ask);
    if (!tile.floats_laid) lay_keys<float>(call, block, low, count, tile, tile.floats);
    tile.floats_laid = true;
    for (int64_t head = 0; head < call.heads; ++head)
        query_row(call, (block.first + at) * call.heads + head, (float*)tile.query + head * units);
    score_tile<Floats>(tile.query, factors, tile.floats, call.heads, units, scores, ask);
}

// put(token of the block, first entry, sixteen scores) for all that a block's tokens see, and for some more.
template <class Put>
void score_block(int threads, const Indexer& call, const Block& block, const Queries& queries, int32_t* rooms,
                 Put put) {
    const int64_t words = Tile::words(call.heads, call.dim), chunk = CHUNK * TILE;
    parallel(threads, block.tokens, 4, [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; ++at)
            prepare(call, block, queries, at, (float*)(rooms + omp_get_thread_num() * words));
    });
    parallel_uneven(threads, (block.longest() + chunk - 1) / chunk, [&](int64_t number) {
        Tile tile(rooms + omp_get_thread_num() * words, call.heads, call.dim);
        const int64_t end = std::min((number + 1) * chunk, block.longest());
        for (int64_t low = number * chunk; low < end; low += TILE) {
            const int64_t count = std::min(TILE, end - low);
            tile.exact = some_in_bfloat16(call.pool) && lay_keys<bf16>(call, block, low, count, tile, tile.pairs);
            if (!some_in_bfloat16(call.pool)) std::fill(tile.factors, tile.factors + TILE, 1.0f);
            tile.floats_laid = false;
            for (int64_t at = 0; at < block.tokens; ++at) {
                if (block.counts[at] <= low) continue;
                f32 scores[2];
                score_token(call, block, queries, tile, low, count, at, at + 1 == block.tokens, scores);
                for (int n = 0; n < 2; ++n) put(at, low + n * LANES, scores[n] * load(tile.factors + n * LANES));
            }
        }
    });
}

// f(block) for every run of at most `most` tokens of a sequence.
template <class F>
void for_blocks(const Indexer& call, int64_t most, F f) {
    for (int64_t row = 0; row < call.sequences; ++row)
        for (int64_t first = call.cu_seqlens[row]; first < call.cu_seqlens[row + 1]; first += most) {
            Block block{first, std::min<int64_t>(most, call.cu_seqlens[row + 1] - first),
                        call.table + row * call.table_width, nullptr, {}};
            for (int64_t at = 0; at < block.tokens; ++at) {
                const int64_t position = int64_t(call.start_pos[row]) + first + at - call.cu_seqlens[row];
                block.counts[at] = std::min((position + 1) / call.ratio, call.max_entries);
            }
            f(block);
        }
}

template <class T>
INLINE f32 rounded(f32 x) {
    T room[LANES];
    store(room, x);
    return load(room);
}

// ---- selection -------------------------------------------------------------------------------------------------------------

// The entries of the listed blocks among the first `count`, ascending, each once; `marks` has a byte for every block.
int64_t list_entries(const int64_t* blocks, int64_t columns, int64_t size, int64_t count, uint8_t* marks,
                     int32_t* entries) {
    const int64_t number = (count + size - 1) / size;
    std::fill(marks, marks + number, uint8_t(0));
    for (int64_t i = 0; i < columns; ++i)
        if (blocks[i] >= 0 && blocks[i] < number) marks[blocks[i]] = 1;
    int64_t found = 0;
    for (int64_t block = 0; block < number; ++block)
        if (marks[block])
            for (int64_t entry = block * size; entry < std::min((block + 1) * size, count); ++entry)
                entries[found++] = int32_t(entry);
    return found;
}

template <class T>
void rank_row(const T* scores, int64_t count, const int32_t* entries, int32_t* keys) {
    int64_t i = 0;
    if (!entries)
        for (; i + LANES <= count; i += LANES) store_keys(keys + i, keys_of(load(scores + i)));
    for (; i < count; i += LANES) {
        T room[LANES] = {};
        for (int lane = 0; lane < LANES && i + lane < count; ++lane)
            room[lane] = scores[entries ? entries[i + lane] : i + lane];
        const i32 left = all_int(int32_t(count - i));
        store_keys(keys + i, lane_numbers() < left ? keys_of(load(room)) : all_int(OUT));
    }
}

void named(int32_t* indices, int64_t count, const int32_t* entries) {
    for (int64_t i = 0; i < count; ++i) indices[i] = entries[indices[i]];
}

}  // namespace

// [tokens, max_entries] scores in `type`; `room` has the block's queries, then a tile for every thread.
EXPORT void indexer_score(int threads, const Indexer* call, int type, void* out, int32_t* room) {
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        const int64_t width = call->max_entries;
        const Queries queries(room, call->heads, call->dim);
        for_blocks(*call, BLOCK, [&](const Block& block) {
            T* rows = (T*)out + block.first * width;
            for (int64_t at = 0; at < block.tokens; ++at)
                std::fill(rows + at * width + block.counts[at], rows + (at + 1) * width, from_float<T>(-INFINITE));
            score_block(threads, *call, block, queries, room + Queries::words(call->heads, call->dim),
                        [&](int64_t at, int64_t entry, f32 scores) {
                            const int64_t left = block.counts[at] - entry;
                            if (left > 0)
                                store(rows + at * width + entry, scores, int(std::min<int64_t>(left, LANES)));
                        });
        });
    });
}

// The selection of `k` by given scores; every thread's part of `room` has keys, entries and marks of a row, then a
// Scratch. `blocks` are null where all entries compete.
EXPORT void indexer_topk(int threads, const void* scores, int type, const int64_t* lengths, const int64_t* blocks,
                         int64_t columns, int64_t block_size, int64_t tokens, int64_t entries, int64_t k,
                         int32_t* indices, int32_t* numbers, int32_t* room, int64_t words) {
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        const int64_t most = std::min(k, entries);
        parallel(threads, tokens, std::max<int64_t>(1, 16384 / std::max<int64_t>(entries, 1)),
                 [&](int64_t begin, int64_t end) {
                     int32_t* keys = room + omp_get_thread_num() * words;
                     int32_t* listed = keys + whole_vectors(entries);
                     Scratch scratch(keys + words - Scratch::words(most), most);
                     for (int64_t token = begin; token < end; ++token) {
                         int64_t count = std::max<int64_t>(0, std::min(lengths[token], entries));
                         if (blocks)
                             count = list_entries(blocks + token * columns, columns, block_size, count,
                                                  (uint8_t*)(listed + whole_vectors(entries)), listed);
                         rank_row((const T*)scores + token * entries, count, blocks ? listed : nullptr, keys);
                         int32_t* row = indices + token * k;
                         numbers[token] = int32_t(select_row(keys, whole_vectors(count), k, scratch, row));
                         if (blocks) named(row, numbers[token], listed);
                     }
                 });
    });
}

// Both, on scores rounded to `type`. `room`: queries, a tile and a Scratch for every thread, entries and marks of a row
// where there are `blocks`, then keys of `held` tokens.
EXPORT void lightning_indexer(int threads, const Indexer* call, int type, const int64_t* blocks, int64_t columns,
                              int64_t block_size, int64_t k, int32_t* indices, int32_t* numbers, int32_t* room,
                              int64_t held) {
    const int64_t width = (call->max_entries + TILE - 1) / TILE * TILE, most = std::min(k, call->max_entries);
    int32_t* tiles = room + Queries::words(call->heads, call->dim);
    int32_t* scratches = tiles + threads * Tile::words(call->heads, call->dim);
    int32_t* listed = scratches + threads * Scratch::words(most);
    int32_t* keys = listed + (blocks ? 2 * width : 0);
    const Queries queries(room, call->heads, call->dim);
    for_blocks(*call, blocks ? 1 : std::min(held, BLOCK), [&](Block& block) {
        if (blocks) {
            block.counts[0] = list_entries(blocks + block.first * columns, columns, block_size, block.counts[0],
                                           (uint8_t*)(listed + width), listed);
            block.listed = listed;
        }
        const bool scored = block.longest() > k;
        if (scored)
            with_type(type, [&](auto zero) {
                using T = decltype(zero);
                score_block(threads, *call, block, queries, tiles, [&](int64_t at, int64_t entry, f32 scores) {
                    const i32 left = all_int(int32_t(block.counts[at] - entry));
                    const i32 ranked = keys_of(rounded<T>(scores));
                    store_keys(keys + at * width + entry, lane_numbers() < left ? ranked : all_int(OUT));
                });
            });
        parallel(threads, block.tokens, 1, [&](int64_t begin, int64_t end) {
            Scratch scratch(scratches + omp_get_thread_num() * Scratch::words(most), most);
            for (int64_t at = begin; at < end; ++at) {
                const int64_t count = block.counts[at], token = block.first + at;
                int32_t* row = indices + token * k;
                numbers[token] = int32_t(std::min(count, k));
                if (count > k)
                    select_row(keys + at * width, whole_vectors(count), k, scratch, row);
                else
                    for (int64_t i = 0; i < k; ++i) row[i] = i < count ? int32_t(i) : -1;
                if (blocks) named(row, numbers[token], listed);
            }
        });
    });
}
