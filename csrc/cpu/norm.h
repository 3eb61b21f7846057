// rms_norm, add_rms_norm and sandwich_norm: one formula, whose parts may be absent. Rounding points
// are in glm4_kernels/{rms_norm,add_rms_norm,sandwich_norm}.py.
//
//   residual' = residual + (post_weight ? norm(x, post_weight) : x)       where there is a residual
//   y         = norm(residual' or x, weight)
//
//   norm(x, w) = w * round(x * rsqrt(mean(x^2) + eps))
#pragma once

#include "../buffer.h"

namespace glm4 {

struct Norm {
    char* y;                  // [n_rows][n_cols]
    char* residual_out;       // [n_rows][n_cols]; or null
    const char* x;            // [n_rows][n_cols], a row every stride_x values
    const char* residual;     // likewise; null with residual_out
    const char* post_weight;  // [n_cols]; or null
    const char* weight;       // [n_cols]
    DType dtype;              // of all of them
    int64_t n_rows, n_cols, stride_x, stride_residual;
    float eps;
};

void norm_cpu(Buffer y, Buffer residual_out, Buffer x, Buffer residual, Buffer post_weight,
              Buffer weight, int dtype, int64_t n_rows, int64_t n_cols, int64_t stride_x,
              int64_t stride_residual, double eps, int n_threads, const std::string& variant);

// Rows [begin, end).
using NormRows = void (*)(const Norm& norm, int64_t begin, int64_t end);

void norm_rows_portable(const Norm& norm, int64_t begin, int64_t end);
void norm_rows_avx2(const Norm& norm, int64_t begin, int64_t end);
void norm_rows_avx512(const Norm& norm, int64_t begin, int64_t end);

}  // namespace glm4
