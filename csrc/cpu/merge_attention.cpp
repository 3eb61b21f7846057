#include "merge_attention.h"

#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace glm4 {

static const MergeRows MERGE_ROWS[SIMD_COUNT] = GLM4_VARIANTS(merge_rows);

// Below this many values a thread costs more than it brings.
constexpr int64_t VALUES_PER_THREAD = int64_t(1) << 15;

void merge_attention_cpu(Buffer out, Buffer lse, Buffer a, Buffer lse_a, Buffer b, Buffer lse_b,
                         int dtype, int64_t n_rows, int64_t head_dim, int64_t stride_a,
                         int64_t stride_b, int n_threads, const std::string& variant) {
    const Checks checks{"merge_attention"};
    const DType type = checks.dtype(dtype);
    const int64_t item = size_of(type);
    checks.size("n_rows", n_rows);
    checks.size("head_dim", head_dim);
    checks.room<2>("out", out, {n_rows, head_dim}, {head_dim, 1}, item);
    checks.room<2>("a", a, {n_rows, head_dim}, {stride_a, 1}, item);
    checks.room<2>("b", b, {n_rows, head_dim}, {stride_b, 1}, item);
    checks.room<1>("lse", lse, {n_rows}, {1}, 4);
    checks.room<1>("lse_a", lse_a, {n_rows}, {1}, 4);
    checks.room<1>("lse_b", lse_b, {n_rows}, {1}, 4);
    const MergeRows rows = MERGE_ROWS[simd_named(variant)];

    const auto at = [](Buffer buffer) { return reinterpret_cast<char*>(buffer.first); };
    const auto floats = [](Buffer buffer) { return reinterpret_cast<float*>(buffer.first); };
    const MergeAttention merge = {at(out),       floats(lse),   at(a),   at(b),
                                  floats(lse_a), floats(lse_b), type,    n_rows,
                                  head_dim,      stride_a,      stride_b};
    const int64_t worth = std::min(n_rows, n_rows * head_dim / VALUES_PER_THREAD);
    const int n_shares = int(std::max<int64_t>(1, std::min<int64_t>(n_threads, worth)));
    for_each_share(n_shares, n_rows,
                   [&](int, int64_t begin, int64_t end) { rows(merge, begin, end); });
}

}  // namespace glm4
