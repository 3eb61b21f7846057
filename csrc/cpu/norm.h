// rms_norm, add_rms_norm and sandwich_norm: one formula, whose parts may be absent. Rounding points
// are in glm4_kernels/{rms_norm,add_rms_norm,sandwich_norm}.py.
//
//   residual' = residual + (post_weight ? norm(x, post_weight) : x)       where there is a residual
//   y         = norm(residual' or x, weight), or its groups of columns, each with a scale, as
//               glm4_kernels/quantize_rows.py rounds them
//
//   norm(x, w) = w * round(x * rsqrt(mean(x^2) + eps))
#pragma once

#include "../buffer.h"

namespace glm4 {

struct Norm {
    char* y;                  // [n_rows][n_cols]
    float* scale;             // [n_rows][n_cols / group]; or null
    char* residual_out;       // [n_rows][n_cols]; or null
    const char* x;            // [n_rows][n_cols], a row every stride_x values
    const char* residual;     // likewise; null with residual_out
    const char* post_weight;  // [n_cols]; or null
    const char* weight;       // [n_cols]
    DType dtype;              // of all of them but y and scale
    DType y_dtype;            // the same; or, with scales, int8 or float8_e4m3
    bool rounds_as_hf;        // at every point where transformers does; else the results only
    int64_t n_rows, n_cols, group, stride_x, stride_residual;
    float eps;
};

// As Python passes it; `scale`, `residual` with `residual_out`, and `post_weight` may be absent.
struct NormArguments {
    Buffer y, scale, residual_out, x, residual, post_weight, weight;
    int dtype, y_dtype;  // codes of DType
    bool rounds_as_hf;
    int64_t n_rows, n_cols, group, stride_x, stride_residual;
    double eps;
};

void norm_cpu(const NormArguments& arguments, int n_threads, const std::string& variant);

// Rows [begin, end); `scratch`, with scales: float [n_cols].
using NormRows = void (*)(const Norm& norm, int64_t begin, int64_t end, float* scratch);

void norm_rows_portable(const Norm& norm, int64_t begin, int64_t end, float* scratch);
void norm_rows_avx2(const Norm& norm, int64_t begin, int64_t end, float* scratch);
void norm_rows_avx512(const Norm& norm, int64_t begin, int64_t end, float* scratch);

}  // namespace glm4
