#include "norm.h"

#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace glm4 {

static const NormRows NORM_ROWS[SIMD_COUNT] = GLM4_VARIANTS(norm_rows);

// Below this many values a thread costs more than it brings.
constexpr int64_t VALUES_PER_THREAD = int64_t(1) << 15;

void norm_cpu(Buffer y, Buffer residual_out, Buffer x, Buffer residual, Buffer post_weight,
              Buffer weight, int dtype, int64_t n_rows, int64_t n_cols, int64_t stride_x,
              int64_t stride_residual, double eps, int n_threads, const std::string& variant) {
    const Checks checks{"norm"};
    const DType type = checks.dtype(dtype);
    const int64_t item = size_of(type);
    checks.size("n_rows", n_rows);
    checks.size("n_cols", n_cols);
    if (n_rows == 0) return;  // and no tensor has memory
    checks.room<2>("y", y, {n_rows, n_cols}, {n_cols, 1}, item);
    checks.room<2>("x", x, {n_rows, n_cols}, {stride_x, 1}, item);
    checks.room<1>("weight", weight, {n_cols}, {1}, item);
    if (residual.first) {
        checks.room<2>("residual", residual, {n_rows, n_cols}, {stride_residual, 1}, item);
        checks.room<2>("residual_out", residual_out, {n_rows, n_cols}, {n_cols, 1}, item);
    }
    if (post_weight.first) {
        checks.room<1>("post_weight", post_weight, {n_cols}, {1}, item);
        checks.require(residual.first != 0, "post_weight is for a norm with a residual");
    }
    const NormRows rows = NORM_ROWS[simd_named(variant)];

    const auto at = [](Buffer buffer) { return reinterpret_cast<char*>(buffer.first); };
    const Norm norm = {at(y), at(residual_out), at(x),  at(residual), at(post_weight), at(weight),
                       type,  n_rows,           n_cols, stride_x,     stride_residual, float(eps)};
    const int64_t worth = std::min(n_rows, n_rows * n_cols / VALUES_PER_THREAD);
    const int n_shares = int(std::max<int64_t>(1, std::min<int64_t>(n_threads, worth)));
    for_each_share(n_shares, n_rows,
                   [&](int, int64_t begin, int64_t end) { rows(norm, begin, end); });
}

}  // namespace glm4
