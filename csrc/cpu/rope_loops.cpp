// The tokens of rope.h, compiled once for every instruction set.
#include "lanes.h"
#include "rope.h"
#include "simd.h"

namespace glm4 {

constexpr int64_t MAX_HEAD_DIM = 256;

// x[2i] and x[2i + 1] of `count` pairs, widened; and back, rounded.
template <DType TYPE>
struct Pairs {
    Floats even, odd;

    static Pairs load(const char* x, int count) {
        Pairs pairs = {};
        if (TYPE == DType::float32) {
            float values[2 * LANES] = {};
            memcpy(values, x, 8 * count);
            for (int i = 0; i < LANES; ++i) {
                pairs.even[i] = values[2 * i];
                pairs.odd[i] = values[2 * i + 1];
            }
            return pairs;
        }
        Words words = {};  // a pair each: the even one below
        memcpy(&words, x, 4 * count);
        if (TYPE == DType::bfloat16) return {Floats(words << 16), Floats(words & 0xffff0000u)};
        return {widen_float16(narrow(words)), widen_float16(narrow(words >> 16))};
    }

    void store(char* y, int count) const {
        if (TYPE == DType::float32) {
            float values[2 * LANES];
            for (int i = 0; i < LANES; ++i) {
                values[2 * i] = even[i];
                values[2 * i + 1] = odd[i];
            }
            memcpy(y, values, 8 * count);
            return;
        }
        const Words words =
            TYPE == DType::bfloat16
                ? bfloat16_in_upper_half(even) >> 16 | (bfloat16_in_upper_half(odd) & 0xffff0000u)
                : widen(narrow_to_float16(even)) | widen(narrow_to_float16(odd)) << 16;
        memcpy(y, &words, 4 * count);
    }
};

// Rotates one head from x to y, which may be the same.
template <DType TYPE, DType TABLE>
static void rotate_head(const Rope& rope, const char* table_row, const char* x, char* y) {
    const int64_t n_pairs = rope.rotary_dim / 2;
    const char* sines = table_row + n_pairs * ITEM<TABLE>;
    for_each_piece(n_pairs, [&](int64_t i, int count) {
        const Pairs<TYPE> pairs = Pairs<TYPE>::load(x + 2 * i * ITEM<TYPE>, count);
        const Floats a = pairs.even, b = pairs.odd;
        const Floats c = load<TABLE>(table_row + i * ITEM<TABLE>, count);
        const Floats s = load<TABLE>(sines + i * ITEM<TABLE>, count);
        const Pairs<TYPE> turned = {rounded<TABLE>(a * c) - rounded<TABLE>(b * s),
                                    rounded<TABLE>(b * c) + rounded<TABLE>(a * s)};
        turned.store(y + 2 * i * ITEM<TYPE>, count);
    });
    const int64_t rotated = rope.rotary_dim * ITEM<TYPE>;
    if (x != y) memcpy(y + rotated, x + rotated, rope.head_dim * ITEM<TYPE> - rotated);
}

// The head at x, or, where there is a bias, round(x + bias) in `scratch`.
template <DType TYPE>
static const char* with_bias(int64_t head_dim, const char* x, const char* bias, char* scratch) {
    if (!bias) return x;
    for_each_piece(head_dim, [&](int64_t i, int count) {
        const int64_t at = i * ITEM<TYPE>;
        store<TYPE>(scratch + at, load<TYPE>(x + at, count) + load<TYPE>(bias + at, count), count);
    });
    return scratch;
}

// x, quantised with one scale: scale = max|x| / limit, then x / scale, rounded.
template <DType TYPE>
static void quantise_head(DType to, int64_t n, const char* x, char* y, float* scale) {
    Ints largest = {};
    for_each_piece(n, [&](int64_t i, int count) {
        largest = larger_magnitude(largest, load<TYPE>(x + i * ITEM<TYPE>, count));
    });
    *scale = from_bits(largest_lane(largest)) / limit_of(to);
    const float divisor = *scale > 0.0f ? *scale : 1.0f;
    for_each_piece(n, [&](int64_t i, int count) {
        store_quantised(to, y + i, load<TYPE>(x + i * ITEM<TYPE>, count) / divisor, count);
    });
}

template <DType TYPE>
static void write_head(const Rope& rope, int which, int64_t slot, int64_t head, const char* x) {
    const Cache& cache = *rope.cache;
    const int64_t page = slot / cache.page_size, offset = slot % cache.page_size;
    const int64_t at =
        page * cache.stride_page + head * cache.stride_head + offset * cache.stride_offset;
    if (cache.type == TYPE) {
        memcpy(cache.data[which] + at * ITEM<TYPE>, x, rope.head_dim * ITEM<TYPE>);
        return;
    }
    float* scale = cache.scale[which] + page * cache.scale_stride_page +
                   head * cache.scale_stride_head + offset * cache.scale_stride_offset;
    quantise_head<TYPE>(cache.type, rope.head_dim, x, cache.data[which] + at, scale);
}

template <DType TYPE, DType TABLE>
static void rope_tokens(const Rope& rope, int64_t begin, int64_t end) {
    constexpr int64_t I = ITEM<TYPE>;
    const int64_t d = rope.head_dim;
    alignas(64) char biased[MAX_HEAD_DIM * I];
    alignas(64) char turned[MAX_HEAD_DIM * I];
    const auto head_of = [](auto heads, int64_t token, int64_t head) {
        return heads.data + (token * heads.stride_token + head * heads.stride_head) * I;
    };
    const auto bias_of = [&](int64_t head) {
        return rope.bias ? rope.bias + head * d * I : nullptr;
    };

    for (int64_t token = begin; token < end; ++token) {
        const char* table_row =
            rope.table + rope.positions[token] * rope.stride_table * ITEM<TABLE>;
        for (int64_t h = 0; h < rope.n_heads; ++h) {
            const char* q = with_bias<TYPE>(d, head_of(rope.q, token, h), bias_of(h), biased);
            rotate_head<TYPE, TABLE>(rope, table_row, q, head_of(rope.q_out, token, h));
        }
        const int64_t slot = rope.cache ? rope.slots[token] : 0;
        for (int64_t g = 0; g < rope.n_kv_heads && slot >= 0; ++g) {
            const int64_t h = rope.n_heads + g;
            const char* k = with_bias<TYPE>(d, head_of(rope.k, token, g), bias_of(h), biased);
            if (!rope.cache) {
                rotate_head<TYPE, TABLE>(rope, table_row, k, head_of(rope.k_out, token, g));
                continue;
            }
            rotate_head<TYPE, TABLE>(rope, table_row, k, turned);
            write_head<TYPE>(rope, 0, slot, g, turned);
            const char* v =
                with_bias<TYPE>(d, head_of(rope.v, token, g), bias_of(h + rope.n_kv_heads), biased);
            write_head<TYPE>(rope, 1, slot, g, v);
        }
    }
}

void GLM4_VARIANT_NAME(rope_tokens)(const Rope& rope, int64_t begin, int64_t end) {
    constexpr DType FP32 = DType::float32, BF16 = DType::bfloat16, FP16 = DType::float16;
    const bool wide = rope.table_dtype == FP32;
    if (rope.dtype == FP32) return rope_tokens<FP32, FP32>(rope, begin, end);
    if (rope.dtype == BF16) {
        return wide ? rope_tokens<BF16, FP32>(rope, begin, end)
                    : rope_tokens<BF16, BF16>(rope, begin, end);
    }
    return wide ? rope_tokens<FP16, FP32>(rope, begin, end)
                : rope_tokens<FP16, FP16>(rope, begin, end);
}

}  // namespace glm4
