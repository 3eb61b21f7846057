// y = x W^T + bias; the formula and its rounding points are in glm4_kernels/quantized_matmul.py.
#pragma once

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "quantized_weight.h"

namespace glm4 {

struct QuantizedMatmul {
    void* y;           // [M][N], dtype
    const void* x;     // [M][K], dtype
    const void* bias;  // [N], dtype; or null
    DType dtype;
    int64_t m;
    QuantizedWeight w;
};

// Address and length in bytes of a tensor's memory; address 0 for an absent one.
using Buffer = std::pair<std::uintptr_t, std::size_t>;

// The problem, if every buffer has exactly the bytes its sizes call for; else throws.
QuantizedMatmul checked_quantized_matmul(Buffer y, Buffer x, Buffer packed, Buffer scale,
                                         Buffer zero_point, Buffer bias, int dtype, int scale_dtype,
                                         int64_t m, int64_t n, int64_t k, int bits,
                                         int64_t group_size);

// The inner loops that this processor can run, best first.
std::vector<std::string> cpu_variants();

// `variant`: one of those; empty for the best. All give the same bits.
void quantized_matmul_cpu(const QuantizedMatmul& problem, bool int8_activations, int n_threads,
                          const std::string& variant);

// Enqueues on `stream` of `device`; throws on a launch error.
void quantized_matmul_cuda(const QuantizedMatmul& problem, int device, std::uintptr_t stream);

}  // namespace glm4
