#include "swiglu.h"

#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace glm4 {

static const SwigluValues SWIGLU_VALUES[SIMD_COUNT] = GLM4_VARIANTS(swiglu_values);

// Below this many values a thread costs more than it brings.
constexpr int64_t VALUES_PER_THREAD = int64_t(1) << 13;

void swiglu_cpu(Buffer y, Buffer gate_up, int dtype, bool rounds_as_hf, int64_t n_rows,
                int64_t n_cols, int64_t stride, int n_threads, const std::string& variant) {
    const Checks checks{"swiglu"};
    const DType type = checks.dtype(dtype);
    checks.size("n_rows", n_rows);
    checks.size("n_cols", n_cols);
    checks.room<2>("y", y, {n_rows, n_cols}, {n_cols, 1}, size_of(type));
    checks.room<2>("gate_up", gate_up, {n_rows, 2 * n_cols}, {stride, 1}, size_of(type));
    const SwigluValues values = SWIGLU_VALUES[simd_named(variant)];

    const Swiglu swiglu = {reinterpret_cast<char*>(y.first),
                           reinterpret_cast<const char*>(gate_up.first),
                           type,
                           rounds_as_hf,
                           n_rows,
                           n_cols,
                           stride};
    const int64_t worth = n_rows * n_cols / VALUES_PER_THREAD;
    const int n_shares = int(std::max<int64_t>(1, std::min<int64_t>(n_threads, worth)));
    for_each_share(n_shares, n_rows * n_cols,
                   [&](int, int64_t begin, int64_t end) { values(swiglu, begin, end); });
}

}  // namespace glm4
