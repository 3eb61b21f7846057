#include "norm.h"

#include <algorithm>
#include <memory>

#include "parallel.h"
#include "simd.h"

namespace glm4 {

static const NormRows NORM_ROWS[SIMD_COUNT] = GLM4_VARIANTS(norm_rows);

// Below this many values a thread costs more than it brings.
constexpr int64_t VALUES_PER_THREAD = int64_t(1) << 15;

void norm_cpu(const NormArguments& a, int n_threads, const std::string& variant) {
    const Checks checks{"norm"};
    const DType type = checks.dtype(a.dtype), y_type = DType(a.y_dtype);
    const int64_t item = size_of(type), n_rows = a.n_rows, n_cols = a.n_cols;
    const bool quantises = y_type == DType::int8 || y_type == DType::float8_e4m3;
    checks.require(quantises || y_type == type, "y must be of the dtype of x, int8 or float8_e4m3");
    checks.size("n_rows", n_rows);
    checks.size("n_cols", n_cols);
    if (n_rows == 0) return;  // and no tensor has memory
    checks.room<2>("y", a.y, {n_rows, n_cols}, {n_cols, 1}, size_of(y_type));
    checks.room<2>("x", a.x, {n_rows, n_cols}, {a.stride_x, 1}, item);
    checks.room<1>("weight", a.weight, {n_cols}, {1}, item);
    if (quantises) {
        checks.require(a.group > 0 && n_cols % a.group == 0, "group must divide n_cols");
        const int64_t n_groups = n_cols / a.group;
        checks.room<2>("scale", a.scale, {n_rows, n_groups}, {n_groups, 1}, 4);
    }
    if (a.residual.first) {
        checks.room<2>("residual", a.residual, {n_rows, n_cols}, {a.stride_residual, 1}, item);
        checks.room<2>("residual_out", a.residual_out, {n_rows, n_cols}, {n_cols, 1}, item);
    }
    if (a.post_weight.first) {
        checks.room<1>("post_weight", a.post_weight, {n_cols}, {1}, item);
        checks.require(a.residual.first != 0, "post_weight is for a norm with a residual");
    }
    const NormRows rows = NORM_ROWS[simd_named(variant)];

    const auto at = [](Buffer buffer) { return reinterpret_cast<char*>(buffer.first); };
    const Norm norm = {at(a.y),
                       quantises ? reinterpret_cast<float*>(a.scale.first) : nullptr,
                       at(a.residual_out),
                       at(a.x),
                       at(a.residual),
                       at(a.post_weight),
                       at(a.weight),
                       type,
                       y_type,
                       a.rounds_as_hf,
                       n_rows,
                       n_cols,
                       a.group,
                       a.stride_x,
                       a.stride_residual,
                       float(a.eps)};
    const int64_t worth = std::min(n_rows, n_rows * n_cols / VALUES_PER_THREAD);
    const int n_shares = int(std::max<int64_t>(1, std::min<int64_t>(n_threads, worth)));
    std::unique_ptr<float[]> scratch(quantises ? new float[n_shares * n_cols] : nullptr);
    for_each_share(n_shares, n_rows, [&](int share, int64_t begin, int64_t end) {
        rows(norm, begin, end, scratch.get() + share * n_cols);
    });
}

}  // namespace glm4
