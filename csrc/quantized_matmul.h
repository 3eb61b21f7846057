// y = x W^T + bias; the formula and its rounding points are in glm4_kernels/quantized_matmul.py.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "buffer.h"
#include "quantized_weight.h"

namespace glm4 {

struct QuantizedMatmul {
    void* y;           // [M][N], dtype; [M][N / 2] with swiglu
    const void* x;     // [M][K], dtype
    const void* bias;  // [N], dtype; or null
    DType dtype;
    int64_t m;
    QuantizedWeight w;
    bool swiglu;
};

// Activations that may share a scale, and that do so by default (the constant of
// glm4_kernels/quantized_matmul.py).
constexpr int MAX_CHUNK = 128, ACTIVATION_GROUP = 64;

enum class Layout { tiles, rows };

// As Python passes it; `zero_point` and `bias` may be absent. Codes of DType.
struct Arguments {
    Buffer y, x, packed, scale, zero_point, bias;
    int dtype, scale_dtype, zero_point_dtype;
    int64_t m, n, k;
    int bits;
    int64_t group_size;
};

struct Tensor;

// Most dimensions of an x that `arguments_of` takes.
constexpr int MAX_DIMS = 8;

// Of contiguous tensors that fit each other, all but y; false for others. No group size: per
// channel.
bool arguments_of(const Tensor& x, const Tensor& packed, const Tensor& scale,
                  const Tensor* zero_point, const Tensor* bias, int64_t n, int64_t bits,
                  std::optional<int64_t> group_size, bool swiglu, Arguments* arguments);

// The problem, if every buffer has exactly the bytes its sizes call for; else throws.
QuantizedMatmul checked_quantized_matmul(const Arguments& arguments, Layout layout, bool swiglu);

// The inner loops that this processor can run, best first.
std::vector<std::string> cpu_variants();

// `activation_group`: activations that share a scale, a multiple of 32; 0: not rounded. `variant`:
// one of those above; empty for the best. All give the same bits.
void quantized_matmul_cpu(const QuantizedMatmul& problem, int64_t activation_group, int n_threads,
                          const std::string& variant);

// Enqueues on `stream` of `device`; throws on a launch error.
void quantized_matmul_cuda(const QuantizedMatmul& problem, int device, std::uintptr_t stream);

}  // namespace glm4
