// out = (w_a a + w_b b) / (w_a + w_b), w = exp(lse - max lse); a side with lse = -inf is ignored,
// whatever it holds. More in glm4_kernels/merge_attention.py.
#pragma once

#include "../buffer.h"

namespace glm4 {

struct MergeAttention {
    char* out;                   // [n_rows][head_dim]
    float* lse;                  // [n_rows]
    const char *a, *b;           // [n_rows][head_dim], a row every stride_a, stride_b values
    const float *lse_a, *lse_b;  // [n_rows]
    DType dtype;
    int64_t n_rows, head_dim, stride_a, stride_b;
};

void merge_attention_cpu(Buffer out, Buffer lse, Buffer a, Buffer lse_a, Buffer b, Buffer lse_b,
                         int dtype, int64_t n_rows, int64_t head_dim, int64_t stride_a,
                         int64_t stride_b, int n_threads, const std::string& variant);

// Rows [begin, end).
using MergeRows = void (*)(const MergeAttention& merge, int64_t begin, int64_t end);

void merge_rows_portable(const MergeAttention& merge, int64_t begin, int64_t end);
void merge_rows_avx2(const MergeAttention& merge, int64_t begin, int64_t end);
void merge_rows_avx512(const MergeAttention& merge, int64_t begin, int64_t end);

}  // namespace glm4
