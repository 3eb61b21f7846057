// y = round(silu(gate)) * up, silu(g) = g / (1 + exp(-g)); rounding points in
// glm4_kernels/swiglu.py.
#pragma once

#include "../buffer.h"

namespace glm4 {

struct Swiglu {
    char* y;              // [n_rows][n_cols]
    const char* gate_up;  // [n_rows][2 * n_cols], gate first; a row every `stride` values
    DType dtype;
    bool rounds_as_hf;  // silu too; else y only
    int64_t n_rows, n_cols, stride;
};

void swiglu_cpu(Buffer y, Buffer gate_up, int dtype, bool rounds_as_hf, int64_t n_rows,
                int64_t n_cols, int64_t stride, int n_threads, const std::string& variant);

// Values [begin, end) of y, counted over its rows.
using SwigluValues = void (*)(const Swiglu& swiglu, int64_t begin, int64_t end);

void swiglu_values_portable(const Swiglu& swiglu, int64_t begin, int64_t end);
void swiglu_values_avx2(const Swiglu& swiglu, int64_t begin, int64_t end);
void swiglu_values_avx512(const Swiglu& swiglu, int64_t begin, int64_t end);

}  // namespace glm4
