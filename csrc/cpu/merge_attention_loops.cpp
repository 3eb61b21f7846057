// The rows of merge_attention.h, compiled once for every instruction set.
#include <math.h>

#include "lanes.h"
#include "merge_attention.h"
#include "simd.h"

namespace glm4 {

template <DType TYPE>
static void merge_rows(const MergeAttention& merge, int64_t begin, int64_t end) {
    constexpr int64_t I = ITEM<TYPE>;
    for (int64_t row = begin; row < end; ++row) {
        const float lse_a = merge.lse_a[row], lse_b = merge.lse_b[row];
        const float largest = lse_a > lse_b || lse_a != lse_a ? lse_a : lse_b;
        const float m = largest == -INFINITY ? 0.0f : largest;
        const float w_a = expf(lse_a - m), w_b = expf(lse_b - m);
        const float total = w_a + w_b;
        merge.lse[row] = m + logf(total);

        const char* a = merge.a + row * merge.stride_a * I;
        const char* b = merge.b + row * merge.stride_b * I;
        char* out = merge.out + row * merge.head_dim * I;
        const float divisor = total == 0.0f ? 1.0f : total;
        for_each_piece(merge.head_dim, [&](int64_t i, int count) {
            Floats sum = {};
            if (w_a != 0.0f) sum += load<TYPE>(a + i * I, count) * w_a;
            if (w_b != 0.0f) sum += load<TYPE>(b + i * I, count) * w_b;
            store<TYPE>(out + i * I, sum / divisor, count);
        });
    }
}

void GLM4_VARIANT_NAME(merge_rows)(const MergeAttention& merge, int64_t begin, int64_t end) {
    if (merge.dtype == DType::bfloat16) return merge_rows<DType::bfloat16>(merge, begin, end);
    if (merge.dtype == DType::float16) return merge_rows<DType::float16>(merge, begin, end);
    merge_rows<DType::float32>(merge, begin, end);
}

}  // namespace glm4
