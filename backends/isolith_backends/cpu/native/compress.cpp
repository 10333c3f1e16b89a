// Windows of tokens compressed into one entry each: projections of bfloat16, and the pooling over a paged state.
#include "tiles.h"

namespace {

// ---- projections -------------------------------------------------------------------------------------------------------

constexpr int64_t TOKENS = 512;   // that meet the weights at a time
constexpr int64_t CHANNELS = 96;  // whose sums a thread keeps at a time
constexpr int64_t STREAMED = 4;   // rows of weights that are read side by side

// Both weights [channels, hidden], and rows [tokens, 2*channels] of their products.
struct Projection {
    const bf16 *x, *wkv, *wgate;
    float* rows;
    int64_t tokens, channels, hidden;

    const bf16* weight(int64_t channel) const {
        return channel < channels ? wkv + channel * hidden : wgate + (channel - channels) * hidden;
    }
};

// A few tokens with four rows of weights, along which both are read.
template <int TOKENS_NOW>
void few(const Projection& p, int64_t token, int64_t channel) {
    const bf16 *x = p.x + token * p.hidden, *w = p.weight(channel);
    const int64_t width = 2 * p.channels, last = (channel < p.channels ? p.channels : width) - 1;
    const bf16* rows[STREAMED];
    for (int64_t i = 0; i < STREAMED; ++i) rows[i] = w + (std::min(channel + i, last) - channel) * p.hidden;
    f32 sums[STREAMED][TOKENS_NOW] = {};
    const auto step = [&](auto load_at) {
        bf16x32 values[TOKENS_NOW];
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS_NOW; ++t) values[t] = load_at(x + t * p.hidden);
#pragma GCC unroll 4
        for (int64_t i = 0; i < STREAMED; ++i) {
            const bf16x32 weights = load_at(rows[i]);
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS_NOW; ++t) sums[i][t] = dot(sums[i][t], values[t], weights);
        }
    };
    int64_t k = 0;
    for (; k + 2 * LANES <= p.hidden; k += 2 * LANES) step([&](const bf16* row) { return load_pairs(row + k); });
    if (k < p.hidden)
        step([&](const bf16* row) {
            bf16x32 rest = {};
            std::memcpy(&rest, row + k, size_t(p.hidden - k) * sizeof(bf16));
            return rest;
        });
    for (int64_t i = 0; i < STREAMED && channel + i <= last; ++i)
        for (int t = 0; t < TOKENS_NOW; ++t) p.rows[(token + t) * width + channel + i] = sum(sums[i][t]);
}

void stream(int threads, const Projection& p) {
    const int64_t blocks = (p.channels + STREAMED - 1) / STREAMED;
    const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(p.hidden, 1));
    parallel(threads, 2 * blocks, grain, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            const int64_t channel = block < blocks ? block * STREAMED : p.channels + (block - blocks) * STREAMED;
            for (int64_t token = 0; token < p.tokens; token += 4)
                with_size<4>(p.tokens - token, [&](auto size) { few<size()>(p, token, channel); });
        }
    });
}

// Tokens first .. first + count - 1 as units along lanes: [hidden/2, lanes].
void lay_tokens(int threads, const Projection& p, int64_t first, int64_t count, int64_t lanes, int32_t* laid) {
    const int64_t units = p.hidden / 2;
    parallel(threads, (units + LANES - 1) / LANES, 4, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin * LANES; unit < std::min(end * LANES, units); unit += LANES)
            for (int64_t n = 0; n < lanes; n += LANES) {
                i32 block[LANES] = {};
                for (int64_t i = 0; i < LANES && n + i < count; ++i)
                    block[i] = units_of(p.x + (first + n + i) * p.hidden, unit, p.hidden, Pairs{});
                transpose(block);
                for (int64_t i = 0; i < LANES && unit + i < units; ++i)
                    store_units(laid + (unit + i) * lanes + n, block[i]);
            }
    });
}

// Sums of channels by tokens into rows of tokens by channels.
void store_sums(const Projection& p, const float* sums, int64_t lanes, int64_t first, int64_t count, int64_t channel,
                int64_t channels) {
    for (int64_t c = 0; c < channels; c += LANES)
        for (int64_t n = 0; n < count; n += LANES) {
            i32 block[LANES] = {};
            for (int64_t i = 0; i < LANES && c + i < channels; ++i) block[i] = as_int(load(sums + (c + i) * lanes + n));
            transpose(block);
            for (int64_t i = 0; i < LANES && n + i < count; ++i)
                store(p.rows + (first + n + i) * 2 * p.channels + channel + c, as_float(block[i]),
                      int(std::min<int64_t>(channels - c, LANES)));
        }
}

void multiply_all(int threads, const Projection& p, int32_t* laid, float* sums) {
    const int64_t chunks = (p.channels + CHANNELS - 1) / CHANNELS;
    for (int64_t first = 0; first < p.tokens; first += TOKENS) {
        const int64_t count = std::min(TOKENS, p.tokens - first), lanes = (count + LANES - 1) / LANES * LANES;
        lay_tokens(threads, p, first, count, lanes, laid);
        parallel_uneven(threads, 2 * chunks, [&](int64_t chunk) {
            const int64_t within = chunk % chunks * CHANNELS, channel = chunk / chunks * p.channels + within;
            const int64_t channels = std::min(CHANNELS, p.channels - within);
            float* mine = sums + omp_get_thread_num() * CHANNELS * TOKENS;
            const Product product_of_chunk = {(const int32_t*)p.weight(channel), p.hidden / 2, 1, laid, lanes, mine, lanes};
            product<Pairs>(product_of_chunk, channels, lanes / LANES, p.hidden / 2, false);
            store_sums(p, mine, lanes, first, count, channel, channels);
        });
    }
}

// ---- windows -----------------------------------------------------------------------------------------------------------

// A call's sequences and its state, whose rows are [u | z] of `channels` each.
struct Call {
    const int32_t *table, *cu_seqlens, *start_pos;
    int64_t sequences, table_width, tokens;
    float* state;
    int64_t blocks, block_size, block_stride, row_stride;
    int64_t ratio, dim, channels, overlap;

    int64_t windows_until(int64_t length) const { return length / ratio; }
    int64_t length(int64_t b) const { return int64_t(start_pos[b]) + cu_seqlens[b + 1] - cu_seqlens[b]; }
    float* row_of(int64_t b, int64_t position) const {
        const int64_t column = block_size ? position / block_size : table_width;
        if (position < 0 || column >= table_width) return nullptr;
        const int64_t block = table[b * table_width + column];
        return block < 0 || block >= blocks ? nullptr
                                            : state + block * block_stride + position % block_size * row_stride;
    }
    int64_t sequence_of(int64_t token) const {
        return std::upper_bound(cu_seqlens + 1, cu_seqlens + sequences, int32_t(token)) - (cu_seqlens + 1);
    }
    int64_t position_of(int64_t token, int64_t b) const { return int64_t(start_pos[b]) + token - cu_seqlens[b]; }
};

void add_ape(int threads, const Call& call, float* rows, const float* ape) {
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(call.channels, 1));
    parallel(threads, call.tokens, grain, [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
            const int64_t position = call.position_of(token, call.sequence_of(token));
            const float* term = ape + position % call.ratio * call.channels;
            float* z = rows + (2 * token + 1) * call.channels;
            for (int64_t i = 0; i < call.channels; ++i) z[i] += term[i];
        }
    });
}

// Where the u of each token of a window begins, at the columns that it brings; null where there is no token.
void find_sources(const Call& call, const float* rows, int64_t b, int64_t window, const float** sources) {
    const int64_t span = (1 + call.overlap) * call.ratio, oldest = (window - call.overlap) * call.ratio;
    for (int64_t j = 0; j < span; ++j) {
        const int64_t position = oldest + j, earlier = position - call.start_pos[b];
        const float* row = earlier < 0 ? call.row_of(b, position)
                                       : rows + (call.cu_seqlens[b] + earlier) * 2 * call.channels;
        sources[j] = row ? row + (call.overlap && j >= call.ratio ? call.dim : 0) : nullptr;
    }
}

// Sixteen channels of an entry: the softmax of z over the window's tokens, as weights of their u.
INLINE f32 pooled(const float** sources, int64_t span, int64_t channels, int64_t i, int count) {
    f32 top = all(-INFINITE), total = {}, sums = {};
    for (int64_t j = 0; j < span; ++j)
        if (sources[j]) top = most(top, load(sources[j] + channels + i, count));
    for (int64_t j = 0; j < span; ++j) {
        if (!sources[j]) continue;
        const f32 part = exponential(load(sources[j] + channels + i, count) - top);
        total += part;
        sums = fma(part, load(sources[j] + i, count), sums);
    }
    return sums / total;
}

void write_state(int threads, const Call& call, const float* rows) {
    const int64_t width = 2 * call.channels, grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(call.tokens, 1));
    // By columns: tokens that share a row are written in order.
    parallel(threads, width, grain, [&](int64_t begin, int64_t end) {
        for (int64_t token = 0; token < call.tokens; ++token) {
            const int64_t b = call.sequence_of(token);
            float* row = call.row_of(b, call.position_of(token, b));
            if (row) std::memcpy(row + begin, rows + token * width + begin, size_t(end - begin) * sizeof(float));
        }
    });
}

}  // namespace

// rows [tokens, 2*channels] = x.[wkv | wgate]; laid and sums are null where the weights are streamed.
EXPORT void project(int threads, const void* x, const void* wkv, const void* wgate, float* rows, int64_t tokens,
                    int64_t channels, int64_t hidden, int32_t* laid, float* sums) {
    const Projection p = {(const bf16*)x, (const bf16*)wkv, (const bf16*)wgate, rows, tokens, channels, hidden};
    if (laid)
        multiply_all(threads, p, laid, sums);
    else
        stream(threads, p);
}

// entries [most, dim] of the pooled values, their positions, and cu_entries; then the state is written. `sources` has
// room for a window of each entry.
EXPORT void compress(int threads, const void* call_of_python, float* rows, const float* ape, void* sources,
                     void* entries, int type, int64_t most, int64_t* positions, int32_t* cu_entries) {
    const Call& call = *(const Call*)call_of_python;
    if (ape) add_ape(threads, call, rows, ape);
    const int64_t span = (1 + call.overlap) * call.ratio;
    const float** places = (const float**)sources;
    int64_t count = 0;
    cu_entries[0] = 0;
    for (int64_t b = 0; b < call.sequences; ++b) {
        const int64_t behind = call.windows_until(call.length(b));
        for (int64_t window = call.windows_until(call.start_pos[b]); window < behind && count < most; ++window, ++count) {
            find_sources(call, rows, b, window, places + count * span);
            positions[count] = window * call.ratio;
        }
        cu_entries[b + 1] = int32_t(count);
    }
    for (int64_t entry = count; entry < most; ++entry) positions[entry] = 0;
    const int64_t vectors = (call.dim + LANES - 1) / LANES;
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        parallel(threads, most * vectors, std::max<int64_t>(1, 512 / span), [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; ++item) {
                const int64_t entry = item / vectors, i = item % vectors * LANES;
                const int part = int(std::min<int64_t>(call.dim - i, LANES));
                const f32 value = entry < count ? pooled(places + entry * span, span, call.channels, i, part) : f32{};
                store((T*)entries + entry * call.dim + i, value, part);
            }
        });
    });
    write_state(threads, call, rows);
}
