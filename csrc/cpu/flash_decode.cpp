// flash_decode on the CPU: splits of the keys shared out over threads, then merged.
//
// Where a split begins depends on the sequence's length alone, and splits are merged in order: the
// number of threads changes no bit.
#include "flash_decode.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "features.h"
#include "parallel.h"

namespace glm4 {

// Below this many multiplications a thread costs more than it brings.
constexpr int64_t PRODUCTS_PER_THREAD = int64_t(1) << 19;

static std::vector<const FlashDecodeVariant*> runnable_variants() {
    std::vector<const FlashDecodeVariant*> variants;
#ifdef GLM4_X86
    const auto has_all = [](std::initializer_list<const char*> names) {
        return std::all_of(names.begin(), names.end(), has_feature);
    };
    const bool avx2 = has_all({"avx2", "fma", "f16c"});
    const bool avx512 = avx2 && has_all({"avx512f", "avx512bw", "avx512vl"});
    if (avx512 && has_all({"avx512_bf16", "avx512_vnni"})) {
        variants.push_back(&FLASH_DECODE_AVX512_BF16);
    }
    if (avx512) variants.push_back(&FLASH_DECODE_AVX512);
    if (avx2) variants.push_back(&FLASH_DECODE_AVX2);
#endif
    variants.push_back(&FLASH_DECODE_PORTABLE);
    return variants;
}

static const FlashDecodeVariant& variant_named(const std::string& name) {
    static const std::vector<const FlashDecodeVariant*> variants = runnable_variants();
    for (const FlashDecodeVariant* variant : variants) {
        if (name.empty() || name == variant->name) return *variant;
    }
    throw std::invalid_argument("flash_decode: this processor runs no variant " + name);
}

std::vector<std::string> flash_decode_variants() {
    std::vector<std::string> names;
    for (const FlashDecodeVariant* variant : runnable_variants()) names.push_back(variant->name);
    return names;
}

// Keys of a split: as few as keep every thread busy, but so many that there are no more than
// MAX_SPLITS, whose partials stay small beside the keys.
static int64_t split_size(int64_t n_keys) {
    int64_t size = SPLIT_UNIT;
    while (size * MAX_SPLITS < n_keys) size *= 2;
    return size;
}

// Memory of one call, kept by the calling thread for its next.
static char* workspace(int64_t bytes) {
    constexpr int64_t ALIGNMENT = 64;
    thread_local std::unique_ptr<char[]> memory;
    thread_local int64_t size = 0;
    if (size < bytes) {
        memory.reset();
        size = 0;
        memory.reset(new char[bytes + ALIGNMENT]);
        size = bytes;
    }
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(memory.get());
    return memory.get() + (-address % ALIGNMENT);
}

static void attend_all(const FlashDecode& p, const FlashDecodeLoops& loops, int n_threads) {
    std::vector<Split> splits;
    std::vector<int64_t> first_split;  // of each sequence and KV head
    int64_t n_keys = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
        const int64_t length = p.seq_lens[b], size = split_size(length);
        n_keys += length;
        for (int64_t g = 0; g < p.n_kv_heads; ++g) {
            first_split.push_back(splits.size());
            for (int64_t first = 0; first < length; first += size) {
                splits.push_back({b, g, first, std::min(first + size, length)});
            }
        }
    }
    const int64_t n_heads = first_split.size(), n_splits = splits.size();
    first_split.push_back(n_splits);

    const int64_t rows = padded_rows(p);
    const int64_t packed_bytes = (loops.packed_bytes(p) + 63) / 64 * 64;
    const int64_t partial_size = partial_floats(p);
    char* const packed =
        workspace(n_heads * packed_bytes + n_splits * partial_size * int64_t(sizeof(float)));
    float* const partials = reinterpret_cast<float*>(packed + n_heads * packed_bytes);
    const auto packed_of = [&](int64_t b, int64_t g) {
        return packed + (b * p.n_kv_heads + g) * packed_bytes;
    };
    for (int64_t i = 0; i < n_heads; ++i) {
        loops.pack(p, i / p.n_kv_heads, i % p.n_kv_heads, packed + i * packed_bytes);
    }

    const auto share_out = [&](int64_t products, int64_t count, const auto& run) {
        const int64_t worth = std::min(products / PRODUCTS_PER_THREAD, count);
        const int n_shares = int(std::max<int64_t>(1, std::min<int64_t>(n_threads, worth)));
        for_each_share(n_shares, count, [&](int, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) run(i);
        });
    };
    share_out(2 * n_keys * p.n_kv_heads * rows * p.head_dim, n_splits, [&](int64_t i) {
        const Split& split = splits[i];
        loops.attend(p, packed_of(split.batch, split.kv_head), split,
                     partial_at(p, partials + i * partial_size));
    });
    const int64_t row_tiles = rows / ROWS;
    const int64_t merge_products = (n_splits + n_heads) * rows * p.head_dim;
    share_out(merge_products, n_heads * row_tiles, [&](int64_t i) {
        const int64_t head = i / row_tiles;
        const int64_t b = head / p.n_kv_heads, g = head % p.n_kv_heads;
        loops.merge(p, packed_of(b, g), b, g, i % row_tiles * ROWS,
                    partials + first_split[head] * partial_size,
                    first_split[head + 1] - first_split[head]);
    });
}

// Whether `count` values of dtype T have an exponent of ones.
template <typename T>
static bool any_not_finite(const char* values, T exponent, int64_t count) {
    bool found = false;
    for (int64_t i = 0; i < count; ++i) {
        T bits;
        memcpy(&bits, values + i * int64_t(sizeof(T)), sizeof(T));
        found |= (bits & exponent) == exponent;
    }
    return found;
}

static bool any_not_finite(const FlashDecode& p, const char* values, int64_t count) {
    if (p.format == CacheFormat::int8) return false;
    if (p.format == CacheFormat::float8_e4m3) return any_not_finite<uint8_t>(values, 0x7f, count);
    if (p.dtype == DType::float32) return any_not_finite<uint32_t>(values, 0x7f800000, count);
    return any_not_finite<uint16_t>(values, p.dtype == DType::bfloat16 ? 0x7f80 : 0x7c00, count);
}

// Whether a value that one of the sequence's queries must not see could still reach it: its weight
// is 0, but 0 * NaN is NaN.
static bool hides_not_finite(const FlashDecode& p, int64_t batch) {
    const int64_t length = p.seq_lens[batch];
    for (int64_t key = std::max<int64_t>(length - p.n_queries + 1, 0); key < length; ++key) {
        const int64_t token = key % p.page_size;
        const int64_t page = p.block_table[batch * p.stride_block_table + key / p.page_size];
        for (int64_t g = 0; g < p.n_kv_heads; ++g) {
            const int64_t at = page * p.stride_v[0] + g * p.stride_v[1] + token * p.stride_v[2];
            const char* row = static_cast<const char*>(p.v) + at * cache_item_bytes(p);
            if (any_not_finite(p, row, p.head_dim)) return true;
            if (p.format == CacheFormat::as_q) continue;
            const float* scale =
                p.v_scale + page * p.stride_v_scale[0] + g * p.stride_v_scale[1] + token;
            if (any_not_finite<uint32_t>(reinterpret_cast<const char*>(scale), 0x7f800000, 1)) {
                return true;
            }
        }
    }
    return false;
}

// Query `i` of a sequence as a problem of its own: of its `length` keys it sees all.
static FlashDecode one_query(const FlashDecode& p, int64_t batch, int64_t i,
                             const int32_t* length) {
    FlashDecode one = p;
    const int64_t row = (batch * p.n_queries + i) * p.n_heads, item = size_of(p.dtype);
    one.batch = one.n_queries = 1;
    one.out = static_cast<char*>(p.out) + row * p.head_dim * item;
    one.lse = p.lse + row;
    one.q = static_cast<const char*>(p.q) + (batch * p.stride_q[0] + i * p.stride_q[1]) * item;
    one.block_table = p.block_table + batch * p.stride_block_table;
    one.seq_lens = length;
    return one;
}

void flash_decode_cpu(const FlashDecode& p, int n_threads, const std::string& variant) {
    const FlashDecodeLoops& loops = variant_named(variant).select(p);
    if (p.batch == 0) return;
    attend_all(p, loops, n_threads);
    for (int64_t b = 0; p.n_queries > 1 && b < p.batch; ++b) {
        if (!hides_not_finite(p, b)) continue;
        for (int64_t i = 0; i < p.n_queries; ++i) {
            const int32_t length =
                std::max<int32_t>(p.seq_lens[b] - int32_t(p.n_queries - 1 - i), 0);
            attend_all(one_query(p, b, i, &length), loops, n_threads);
        }
    }
}

}  // namespace glm4
