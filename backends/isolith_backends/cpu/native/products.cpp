// Products of rows with the weights of their experts, bfloat16 or quantised, and the rows' codes as bfloat16.
#include "products.h"

namespace {

constexpr int64_t ROWS = 16;          // weights of an item of work
constexpr int64_t FEW = 4;            // rows up to which weights are decoded in registers
constexpr int64_t MOST_GROUPS = 1024; // of a weight's scales
constexpr int64_t MOST_AT_ONCE = 252; // rows that meet the same weights; a multiple of 6 and of 3
constexpr int64_t CHUNK = 512;        // inputs of sixteen weights and six rows that a first-level cache holds
constexpr float SAFE = 1.2089258e24f;  // 2^80: scales between its inverse and it leave bfloat16 its range

struct Call {
    const bf16* x;
    const bf16* turned;  // the same in another order, or null
    Scales of_rows;
    const uint8_t* weights;
    const void* scales;
    int64_t kind, scale_kind;  // scales: 0 none, 1 ue8m0, 2 float32
    int64_t block_n, block_k;
    int64_t outputs, inputs;
    void* out;
    int type;
};

// The scales of rows first .. first+count-1 of an expert, in float32; whether all are powers of two within the safe range.
bool scales_of(const Call& call, int64_t expert, int64_t first, int64_t count, float* to) {
    const int64_t groups = (call.inputs + call.block_k - 1) / call.block_k;
    const int64_t blocks = (call.outputs + call.block_n - 1) / call.block_n;
    bool safe = call.scale_kind == 1;
    for (int64_t n = 0; n < count; ++n) {
        const int64_t at = (expert * blocks + (first + n) / call.block_n) * groups;
        for (int64_t g = 0; g < groups; ++g) {
            const float scale = call.scale_kind == 1 ? from_ue8m0(((const uint8_t*)call.scales)[at + g])
                                                     : ((const float*)call.scales)[at + g];
            to[n * groups + g] = scale;
            safe = safe && scale >= 1.0f / SAFE && scale <= SAFE;
        }
    }
    return safe;
}

template <int KIND>
void few_rows(const Call& call, int64_t expert, int64_t first, int64_t count, int64_t row, int64_t rows, float* out) {
    const int64_t row_bytes = bytes_of(KIND, call.inputs), groups = (call.inputs + call.block_k - 1) / call.block_k;
    float scales[FEW * MOST_GROUPS];
    with_size<FEW>(rows, [&](auto height) {
        constexpr int M = height(), N = M <= 2 ? 4 : 2;
        for (int64_t n = 0; n < count; n += N)
            with_size<N>(count - n, [&](auto width) {
                if (call.scale_kind) scales_of(call, expert, first + n, width(), scales);
                const Scales of_weights{call.scale_kind ? scales : nullptr, groups, call.block_k};
                const Scales of_rows = call.of_rows.from(row);
                const uint8_t* weights = call.weights + (expert * call.outputs + first + n) * row_bytes;
#ifdef TURNED
                if constexpr (KIND == E4M3 || KIND == E2M1)
                    if (call.turned)
                        return stream_turned<KIND, width(), M>(weights, row_bytes, call.turned + row * call.inputs,
                                                               call.inputs, of_weights, of_rows, out + n, ROWS);
#endif
                stream<KIND, width(), M>(weights, row_bytes, call.x + row * call.inputs, call.inputs, of_weights, of_rows,
                                         out + n, ROWS);
            });
    });
}

// Scaled in groups: three rows by four weights at a time.
void tiles(const Call& call, const bf16* weights, const Scales& of_weights, int64_t group, int64_t count, int64_t row,
           int64_t rows, float* out) {
    for (int64_t m = 0; m < rows; m += 3)
        with_size<3>(rows - m, [&](auto height) {
            const Scales of_rows = call.of_rows.from(row + m);
            for (int64_t n = 0; n < count; n += 4)
                with_size<4>(count - n, [&](auto width) {
                    tile_of_groups<width(), height()>(weights + n * call.inputs, call.x + (row + m) * call.inputs,
                                                      call.inputs, group, of_weights.from(n), of_rows,
                                                      out + m * ROWS + n, ROWS);
                });
        });
}

// Not scaled, or by one scale a row: six rows by four weights at a time, in chunks of inputs that stay in cache.
void chunks(const Call& call, const bf16* weights, const Scales& of_weights, int64_t count, int64_t row, int64_t rows,
            f32* sums, float* out) {
    for (int64_t first = 0; first < call.inputs; first += CHUNK) {
        const int64_t last = std::min(first + CHUNK, call.inputs);
        for (int64_t m = 0; m < rows; m += 6)
            with_size<6>(rows - m, [&](auto height) {
                for (int64_t n = 0; n < count; n += 4)
                    with_size<4>(count - n, [&](auto width) {
                        tile_part<width(), height()>(weights + n * call.inputs, call.x + (row + m) * call.inputs,
                                                     call.inputs, first, last, sums + m * ROWS + n, ROWS);
                    });
            });
    }
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < count; ++n) {
            float total = sum(load((const float*)(sums + m * ROWS + n)));
            if (of_weights.values) total *= of_weights.at(n, 0);
            if (call.of_rows.values) total *= call.of_rows.at(row + m, 0);
            out[m * ROWS + n] = total;
        }
}

// A thread's memory: decoded weights, their scales, and sums.
struct Room {
    bf16* decoded;
    float* scales;
    f32* sums;
};

template <int KIND>
void many_rows(const Call& call, int64_t expert, int64_t first, int64_t count, int64_t row, int64_t rows,
               const Room& room, float* out) {
    const int64_t row_bytes = bytes_of(KIND, call.inputs), groups = (call.inputs + call.block_k - 1) / call.block_k;
    const uint8_t* weights = call.weights + (expert * call.outputs + first) * row_bytes;
    const bf16* decoded = (const bf16*)weights;
    bool folded = false;
    if (KIND != BF16) {
        folded = call.scale_kind && scales_of(call, expert, first, count, room.scales);
        for (int64_t n = 0; n < count; ++n) {
            const float* scales = folded ? room.scales + n * groups : nullptr;
            decode_row<KIND>(weights + n * row_bytes, call.inputs, room.decoded + n * call.inputs, scales, call.block_k);
        }
        decoded = room.decoded;
    }
    const Scales of_weights{call.scale_kind && !folded ? room.scales : nullptr, groups, call.block_k};
    int64_t group = call.inputs;
    if (of_weights.values) group = std::min(group, of_weights.group);
    if (call.of_rows.values) group = std::min(group, call.of_rows.group);
    if (group == call.inputs)
        chunks(call, decoded, of_weights, count, row, rows, room.sums, out);
    else
        tiles(call, decoded, of_weights, group, count, row, rows, out);
}

// Turns the rows of experts that have few; whether the weights' codes are decoded so.
bool turn(int threads, const Call& call, const int64_t* begins, const int64_t* ends, int64_t experts, bf16* to) {
#ifdef TURNED
    const int64_t block = call.kind == E2M1 ? 128 : 64;
    const bool fits = (call.kind == E4M3 && call.block_k % block == 0) || (call.kind == E2M1 && call.inputs % block == 0);
    if (!fits || (call.of_rows.values && call.of_rows.group % block)) return false;
    parallel(threads, experts, 8, [&](int64_t begin, int64_t end) {
        for (int64_t expert = begin; expert < end; ++expert)
            for (int64_t row = begins[expert]; row < ends[expert] && ends[expert] - begins[expert] <= FEW; ++row) {
                const bf16* from = call.x + row * call.inputs;
                bf16* into = to + row * call.inputs;
                call.kind == E4M3 ? turn_row<E4M3>(from, into, call.inputs) : turn_row<E2M1>(from, into, call.inputs);
            }
    });
    return true;
#else
    return false;
#endif
}

template <class T>
void write(const Call& call, const float* out, int64_t first, int64_t count, int64_t row, int64_t rows) {
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < count; ++n)
            ((T*)call.out)[(row + m) * call.outputs + first + n] = from_float<T>(out[m * ROWS + n]);
}

// Weights from `first` on of an expert, as many as an item has, with some of its rows.
template <int KIND>
void item(const Call& call, int64_t expert, int64_t first, int64_t row, int64_t rows, bool few,
          const Room& room) {
    const int64_t count = std::min(ROWS, call.outputs - first);
    float out[MOST_AT_ONCE * ROWS];
    if (few)
        few_rows<KIND>(call, expert, first, count, row, rows, out);
    else
        many_rows<KIND>(call, expert, first, count, row, rows, room, out);
    with_type(call.type, [&](auto zero) { write<decltype(zero)>(call, out, first, count, row, rows); });
}

}  // namespace

// out [rows, outputs] of x [rows, inputs] in bfloat16; expert e has rows begins[e] .. ends[e]-1 and the weights
// [outputs, inputs] behind those of expert e-1. `turned` is null or has room for x. `room` has, for each thread, 252 * 16 vectors of sums,
// then inputs * 16 bfloat16, then as many floats of scales as 16 weights have.
EXPORT void grouped_product(int threads, const void* x, void* turned, const float* x_scale, int64_t x_groups, int64_t x_group,
                            const void* weights, int64_t kind, const void* scales, int64_t scale_kind, int64_t block_n,
                            int64_t block_k, const int64_t* begins, const int64_t* ends, int64_t experts, int64_t outputs, int64_t inputs,
                            void* out, int type, void* room, int64_t room_bytes) {
    Call call{(const bf16*)x, nullptr, {x_scale, x_groups, x_group}, (const uint8_t*)weights, scales, kind, scale_kind,
                    block_n, block_k, outputs, inputs, out, type};
    if (turned && turn(threads, call, begins, ends, experts, (bf16*)turned)) call.turned = (const bf16*)turned;
    const int64_t blocks = (outputs + ROWS - 1) / ROWS;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char* memory = (char*)room + omp_get_thread_num() * room_bytes;
        char* behind = memory + int64_t(sizeof(f32)) * MOST_AT_ONCE * ROWS;
        const Room own{(bf16*)behind, (float*)(behind + 2 * ROWS * inputs), (f32*)memory};
#pragma omp for schedule(dynamic, 2)
        for (int64_t work = 0; work < experts * blocks; ++work) {
            const int64_t expert = work / blocks, first = work % blocks * ROWS;
            const bool few = ends[expert] - begins[expert] <= FEW;
            for (int64_t row = begins[expert]; row < ends[expert]; row += MOST_AT_ONCE) {
                const int64_t rows = std::min(MOST_AT_ONCE, ends[expert] - row);
                if (kind == BF16) item<BF16>(call, expert, first, row, rows, few, own);
                if (kind == E4M3) item<E4M3>(call, expert, first, row, rows, few, own);
                if (kind == E2M1) item<E2M1>(call, expert, first, row, rows, few, own);
                if (kind == INT8) item<INT8>(call, expert, first, row, rows, few, own);
            }
        }
    }
}

// The values of codes in bfloat16: times their scales where all of these are powers of two in the safe range, which
// `folded` tells; else without them, and the scales in float32 [rows, groups].
EXPORT void widen_codes(int threads, const void* codes, int64_t kind, const void* scale, int64_t scale_kind,
                        int64_t groups, int64_t group, void* values, float* scales, int64_t* folded, int64_t rows,
                        int64_t inputs) {
    bool safe = scale_kind == 1;
    for (int64_t i = 0; i < rows * groups; ++i) {
        scales[i] = scale_kind == 1 ? from_ue8m0(((const uint8_t*)scale)[i]) : ((const float*)scale)[i];
        safe = safe && scales[i] >= 1.0f / SAFE && scales[i] <= SAFE;
    }
    *folded = safe;
    parallel(threads, rows, std::max<int64_t>(1, 16384 / inputs), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            bf16* to = (bf16*)values + row * inputs;
            const uint8_t* from = (const uint8_t*)codes + row * inputs;
            const float* factors = safe ? scales + row * groups : nullptr;
            kind == E4M3 ? decode_row<E4M3>(from, inputs, to, factors, group)
                         : decode_row<INT8>(from, inputs, to, factors, group);
        }
    });
}
