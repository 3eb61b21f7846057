// rope and rope_kv_write; the formulas and their rounding points are in
// glm4_kernels/{rope,rope_kv_write}.py.
#pragma once

#include <array>

#include "../buffer.h"

namespace glm4 {

// A tensor of int32 or int64, an index every `stride` values.
struct Indices {
    const char* data;
    int64_t item_bytes, stride;

    int64_t operator[](int64_t i) const {
        const char* at = data + i * stride * item_bytes;
        return item_bytes == 4 ? *reinterpret_cast<const int32_t*>(at)
                               : *reinterpret_cast<const int64_t*>(at);
    }
};

// Where heads come from or go to: head h of token t at t * stride_token + h * stride_head values.
template <typename Byte>
struct Heads {
    Byte* data;
    int64_t stride_token, stride_head;
};

// Pages of K and V, which lie alike: strides in values.
struct Cache {
    char* data[2];
    float* scale[2];  // where quantised
    DType type;       // that of qkv, int8 or float8_e4m3
    int64_t page_size;
    int64_t stride_page, stride_head, stride_offset;
    int64_t scale_stride_page, scale_stride_head, scale_stride_offset;
};

struct Rope {
    DType dtype, table_dtype;  // the table's is dtype or float32
    int64_t n_tokens, head_dim, rotary_dim;
    Indices positions;
    const char* table;  // a row every stride_table values
    int64_t stride_table;

    Heads<const char> q, k, v;  // v only for rope_kv_write
    Heads<char> q_out, k_out;   // k_out not for rope_kv_write
    int64_t n_heads, n_kv_heads;

    const char* bias;  // rope_kv_write: [(H + 2G) * D], or null
    const Cache* cache;
    Indices slots;
};

// Positions and slots are checked before anything is written: the argument of the first one that is
// out of range, or null.
const char* rope_cpu(Buffer q_out, Buffer k_out, Buffer q, Buffer k, Buffer positions, Buffer table,
                     int dtype, int table_dtype, int index_bytes, int64_t n_tokens, int64_t n_heads,
                     int64_t n_kv_heads, int64_t head_dim, int64_t n_positions, int64_t rotary_dim,
                     int64_t stride_q_token, int64_t stride_q_head, int64_t stride_k_token,
                     int64_t stride_k_head, int64_t stride_table, int n_threads,
                     const std::string& variant);

const char* rope_kv_write_cpu(
    Buffer q_out, Buffer k_cache, Buffer v_cache, Buffer k_scale, Buffer v_scale, Buffer qkv,
    Buffer bias, Buffer positions, Buffer slots, Buffer table, int dtype, int table_dtype,
    int cache_dtype, int position_bytes, int slot_bytes, int64_t n_tokens, int64_t n_heads,
    int64_t stride_qkv, int64_t n_positions, int64_t rotary_dim, int64_t stride_table,
    const std::array<int64_t, 4>& cache_shape, const std::array<int64_t, 4>& cache_stride,
    const std::array<int64_t, 3>& scale_stride, int n_threads, const std::string& variant);

// Tokens [begin, end).
using RopeTokens = void (*)(const Rope& rope, int64_t begin, int64_t end);

void rope_tokens_portable(const Rope& rope, int64_t begin, int64_t end);
void rope_tokens_avx2(const Rope& rope, int64_t begin, int64_t end);
void rope_tokens_avx512(const Rope& rope, int64_t begin, int64_t end);

}  // namespace glm4
