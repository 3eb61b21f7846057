// Decode attention over a paged cache; formula and rounding points are in
// glm4_kernels/flash_decode.py.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "buffer.h"

namespace glm4 {

// The numbers are known to glm4_kernels/flash_decode.py.
enum class CacheFormat : int { as_q = 0, int8 = 1, float8_e4m3 = 2 };

// Normal numbers of fp32, and so is their product with log2(e).
constexpr double LEAST_SCALE = 0x1p-126, LARGEST_SCALE = 0x1p127;

// Strides are in elements; the innermost dimension of each tensor is contiguous.
struct FlashDecode {
    void* out;                   // [B][Q][H][D], dtype
    float* lse;                  // [B][Q][H]
    const void* q;               // [B][Q][H][D], dtype
    const void* k;               // [n_pages][G][page_size][D], format
    const void* v;               // the same
    const int32_t* block_table;  // [B][max_pages]
    const int32_t* seq_lens;     // [B]
    const float* k_scale;        // [n_pages][G][page_size]; null for CacheFormat::as_q
    const float* v_scale;
    DType dtype;
    CacheFormat format;
    float scale;
    int64_t batch, n_queries, n_heads, head_dim;
    int64_t n_pages, n_kv_heads, page_size, max_pages;
    int64_t stride_q[3];
    int64_t stride_k[3];
    int64_t stride_v[3];
    int64_t stride_k_scale[2];
    int64_t stride_v_scale[2];
    int64_t stride_block_table;
};

GLM4_HOST_DEVICE int64_t group_of(const FlashDecode& p) { return p.n_heads / p.n_kv_heads; }

GLM4_HOST_DEVICE int64_t cache_item_bytes(const FlashDecode& p) {
    return p.format == CacheFormat::as_q ? size_of(p.dtype) : 1;
}

// The problem, if no buffer is shorter than its sizes and strides call for, and every length and
// page id is in range; else throws.
//   sizes    batch, n_queries, n_heads, head_dim, n_pages, n_kv_heads, page_size, max_pages
//   strides  those of q, k, v, k_scale, v_scale, block_table, in the order of FlashDecode
FlashDecode checked_flash_decode(Buffer out, Buffer lse, Buffer q, Buffer k, Buffer v,
                                 Buffer block_table, Buffer seq_lens, Buffer k_scale,
                                 Buffer v_scale, int dtype, int format, float scale,
                                 const std::array<int64_t, 8>& sizes,
                                 const std::array<int64_t, 14>& strides);

// The inner loops that this processor can run, best first.
std::vector<std::string> flash_decode_variants();

// `variant`: one of those; empty for the best. The number of threads changes no bit.
void flash_decode_cpu(const FlashDecode& problem, int n_threads, const std::string& variant);

}  // namespace glm4
