// Products of rows with the weights of their experts, bfloat16 or quantised, and the rows' codes as bfloat16.
#include "products.h"

namespace {

constexpr int64_t ROWS = 16;          // weights of an item of work
constexpr int64_t FEW = 4;            // rows up to which weights are decoded in registers
constexpr int64_t MOST_INPUTS = 32768;
constexpr int64_t MOST_GROUPS = 1024;
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
                const Scales of_rows{call.of_rows.values ? call.of_rows.values + row * call.of_rows.stride : nullptr,
                                     call.of_rows.stride, call.of_rows.group};
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

template <bool GROUPED, int M>
void tiles(const Call& call, const bf16* weights, const Scales& of_weights, int64_t group, int64_t count, int64_t row,
           int64_t rows, float* out) {
    for (int64_t m = 0; m < rows; m += M)
        with_size<M>(rows - m, [&](auto height) {
            const Scales of_rows{call.of_rows.values ? call.of_rows.values + (row + m) * call.of_rows.stride : nullptr,
                                 call.of_rows.stride, call.of_rows.group};
            for (int64_t n = 0; n < count; n += 4)
                with_size<4>(count - n, [&](auto width) {
                    const Scales part{of_weights.values ? of_weights.values + n * of_weights.stride : nullptr,
                                      of_weights.stride, of_weights.group};
                    tile<GROUPED, width(), height()>(weights + n * call.inputs, call.x + (row + m) * call.inputs,
                                                     call.inputs, group, part, of_rows, out + m * ROWS + n, ROWS);
                });
        });
}

template <int KIND>
void many_rows(const Call& call, int64_t expert, int64_t first, int64_t count, int64_t row, int64_t rows, bf16* room,
               float* scales, float* out) {
    const int64_t row_bytes = bytes_of(KIND, call.inputs), groups = (call.inputs + call.block_k - 1) / call.block_k;
    const uint8_t* weights = call.weights + (expert * call.outputs + first) * row_bytes;
    const bf16* decoded = (const bf16*)weights;
    bool folded = false;
    if (KIND != BF16) {
        folded = call.scale_kind && scales_of(call, expert, first, count, scales);
        for (int64_t n = 0; n < count; ++n) {
            decode_row<KIND>(weights + n * row_bytes, call.inputs, room + n * call.inputs);
            if (folded) fold(room + n * call.inputs, call.inputs, scales + n * groups, call.block_k);
        }
        decoded = room;
    }
    const Scales of_weights{call.scale_kind && !folded ? scales : nullptr, groups, call.block_k};
    if (!of_weights.values && !call.of_rows.values)
        return tiles<false, 6>(call, decoded, of_weights, call.inputs, count, row, rows, out);
    int64_t group = call.inputs;
    if (of_weights.values) group = std::min(group, of_weights.group);
    if (call.of_rows.values) group = std::min(group, call.of_rows.group);
    tiles<true, 3>(call, decoded, of_weights, group, count, row, rows, out);
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

// Weights first .. first+count-1 of an expert with its rows, at most MOST_AT_ONCE of them at a time.
constexpr int64_t MOST_AT_ONCE = 252;  // a multiple of 6 and of 3

template <int KIND>
void item(const Call& call, int64_t expert, int64_t first, int64_t row, int64_t rows, bool few, bf16* room,
          float* scales) {
    const int64_t count = std::min(ROWS, call.outputs - first);
    float out[MOST_AT_ONCE * ROWS];
    if (few)
        few_rows<KIND>(call, expert, first, count, row, rows, out);
    else
        many_rows<KIND>(call, expert, first, count, row, rows, room, scales, out);
    with_type(call.type, [&](auto zero) { write<decltype(zero)>(call, out, first, count, row, rows); });
}

}  // namespace

// out [rows, outputs] of x [rows, inputs] in bfloat16; expert e has rows begins[e] .. ends[e]-1 and the weights
// [outputs, inputs] behind those of expert e-1. `turned` is null or has room for x. `room` has, for each thread, inputs * 16 bfloat16 and then as many floats
// of scales as 16 weights have.
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
        char* own = (char*)room + omp_get_thread_num() * room_bytes;
        bf16* decoded = (bf16*)own;
        float* of_weights = (float*)(own + 2 * ROWS * inputs);
#pragma omp for schedule(dynamic, 2)
        for (int64_t work = 0; work < experts * blocks; ++work) {
            const int64_t expert = work / blocks, first = work % blocks * ROWS;
            const bool few = ends[expert] - begins[expert] <= FEW;
            for (int64_t row = begins[expert]; row < ends[expert]; row += MOST_AT_ONCE) {
                const int64_t rows = std::min(MOST_AT_ONCE, ends[expert] - row);
                if (kind == BF16) item<BF16>(call, expert, first, row, rows, few, decoded, of_weights);
                if (kind == E4M3) item<E4M3>(call, expert, first, row, rows, few, decoded, of_weights);
                if (kind == E2M1) item<E2M1>(call, expert, first, row, rows, few, decoded, of_weights);
                if (kind == INT8) item<INT8>(call, expert, first, row, rows, few, decoded, of_weights);
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
            kind == E4M3 ? decode_row<E4M3>(from, inputs, to) : decode_row<INT8>(from, inputs, to);
            if (safe) fold(to, inputs, scales + row * groups, group);
        }
    });
}
