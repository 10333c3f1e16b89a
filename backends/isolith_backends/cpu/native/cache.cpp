// Entries of a paged pool, written and read, and the lists of positions and entries that a token sees.
#include "codes.h"
#include "pages.h"

namespace {

constexpr int64_t GRAIN = 16384;  // elements that a thread is worth starting for

int64_t rows_each(int64_t width) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(width, 1)); }

template <class To, class From>
INLINE void convert(const From* from, To* to, int64_t count) {
    if constexpr (std::is_same<To, From>::value) {
        std::memcpy(to, from, size_t(count) * sizeof(To));
    } else {
        for (int64_t i = 0; i < count; i += LANES) {
            const int part = int(std::min<int64_t>(count - i, LANES));
            store(to + i, load(from + i, part), part);
        }
    }
}

// ---- entries -----------------------------------------------------------------------------------------------------------

template <class T>
void write_bytes(const Layout& layout, const Place<uint8_t>& place, const T* x, float floor, bool power_of_two) {
    for (int64_t group = 0; group < layout.quantised / layout.group; ++group) {
        const T* values = x + group * layout.group;
        const bool four = layout.entry == 68;
        const Scale scale = scale_of_group(amax_bits(values, layout.group), floor, four ? 6.0f : 448.0f, power_of_two);
        if (four)
            store_group_e2m1(values, layout.group, scale, place.codes + group * layout.group / 2);
        else if (power_of_two)
            store_group_e4m3<T, true>(values, layout.group, scale, place.codes + group * layout.group);
        else
            store_group_e4m3<T, false>(values, layout.group, scale, place.codes + group * layout.group);
        if (layout.entry == 584 || four)
            place.scales[group] = scale.ue8m0();
        else
            std::memcpy(place.scales + 4 * group, &scale.value, 4);
    }
    convert(x + layout.quantised, (bf16*)place.rope, layout.dim - layout.quantised);
}

template <class To, class From>
void write_floats(uint8_t* row, int64_t element_bytes, const From* x, int64_t dim) {
    if (element_bytes == int64_t(sizeof(To))) return convert(x, (To*)row, dim);
    for (int64_t i = 0; i < dim; ++i) {
        To value;
        convert(x + i, &value, 1);
        std::memcpy(row + i * element_bytes, &value, sizeof value);
    }
}

template <class T>
void write_entry(const Pool& pool, int64_t slot, const T* x, float floor, bool power_of_two) {
    if (pool.kind < 3) {
        with_type(int(pool.kind), [&](auto zero) {
            write_floats<decltype(zero)>((uint8_t*)pool.row(slot), pool.element_bytes, x, pool.dim);
        });
        return;
    }
    with_layout(pool.kind, [&](auto layout) {
        const auto place = place_of(*layout(), (uint8_t*)pool.page(slot), pool.block_size, pool.within(slot));
        write_bytes(*layout(), place, x, floor, power_of_two);
    });
}

template <class From, class To>
void read_floats(const uint8_t* row, int64_t element_bytes, To* y, int64_t dim) {
    if (element_bytes == int64_t(sizeof(From))) return convert((const From*)row, y, dim);
    for (int64_t i = 0; i < dim; ++i) {
        From value;
        std::memcpy(&value, row + i * element_bytes, sizeof value);
        convert(&value, y + i, 1);
    }
}

template <class T>
void read_values(const Pool& pool, int64_t slot, T* y) {
    if (pool.kind < 3) {
        with_type(int(pool.kind), [&](auto zero) {
            read_floats<decltype(zero)>(pool.row(slot), pool.element_bytes, y, pool.dim);
        });
        return;
    }
    if constexpr (std::is_same<T, bf16>::value)
        if (read_entry(pool, slot, y)) return;
    with_layout(pool.kind, [&](auto layout) {
        const auto place = place_of(*layout(), pool.page(slot), pool.block_size, pool.within(slot));
        values_of(*layout(), place, [&](int64_t at, f32 value) { store(y + at, value); });
    });
}

int64_t slot_at(const void* slots, bool wide, int64_t i) {
    return wide ? ((const int64_t*)slots)[i] : ((const int32_t*)slots)[i];
}

// ---- lists -------------------------------------------------------------------------------------------------------------

// first, first + 1, .. in the first `count` places, -1 in the others.
void ascending(int32_t* list, int64_t width, int64_t first, int64_t count) {
    const i32 start = lane_numbers() + int32_t(first);
    int64_t j = 0;
    for (; j + LANES <= width; j += LANES) {
        const i32 place = lane_numbers() + int32_t(j);
        const i32 listed = place < int32_t(count) ? start + int32_t(j) : all_int(-1);
        std::memcpy(list + j, &listed, sizeof listed);
    }
    for (; j < width; ++j) list[j] = j < count ? int32_t(first + j) : -1;
}

}  // namespace

// Rows x [rows, dim] into slots; those below 0, and beyond the pool, are skipped.
EXPORT void kv_cache_write(int threads, const void* pool_of_cache, const void* x, int type, const void* slots,
                           int wide_slots, int64_t rows, double floor, int power_of_two) {
    const Pool& pool = *(const Pool*)pool_of_cache;
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        parallel(threads, rows, rows_each(pool.dim), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const int64_t slot = slot_at(slots, wide_slots, row);
                if (slot >= 0 && slot < pool.slots())
                    write_entry(pool, slot, (const T*)x + row * pool.dim, float(floor), power_of_two);
            }
        });
    });
}

EXPORT void kv_cache_read(int threads, const void* pool_of_cache, const void* slots, int wide_slots, void* y, int type,
                          int64_t rows) {
    const Pool& pool = *(const Pool*)pool_of_cache;
    constexpr int64_t AHEAD = 4;
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        parallel(threads, rows, rows_each(pool.dim), [&](int64_t begin, int64_t end) {
            const auto known = [&](int64_t slot) { return slot >= 0 && slot < pool.slots(); };
            for (int64_t row = begin; row < end; ++row) {
                if (row + AHEAD < end)
                    if (const int64_t later = slot_at(slots, wide_slots, row + AHEAD); known(later)) expect(pool, later);
                const int64_t slot = slot_at(slots, wide_slots, row);
                T* out = (T*)y + row * pool.dim;
                if (known(slot))
                    read_values(pool, slot, out);
                else
                    std::memset(out, 0, size_t(pool.dim) * sizeof(T));
            }
        });
    });
}

EXPORT void window_indices(int threads, const void* positions, int wide, int32_t* lists, int64_t tokens,
                           int64_t window) {
    parallel(threads, tokens, rows_each(window), [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
            const int64_t last = slot_at(positions, wide, token), first = std::max<int64_t>(last - window + 1, 0);
            ascending(lists + token * window, window, first, last - first + 1);
        }
    });
}

EXPORT void compress_indices(int threads, const void* positions, int wide, int32_t* lists, int64_t tokens,
                             int64_t ratio, int64_t width) {
    parallel(threads, tokens, rows_each(width), [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
            const int64_t count = std::min(width, (slot_at(positions, wide, token) + 1) / ratio);
            ascending(lists + token * width, width, 0, count);
        }
    });
}
