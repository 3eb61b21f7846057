// The packed weight of quantized_matmul: w[n][k] = scale[n][g] * (u[n][k] - zero_point[n][g]).
//
// Packed by glm4_kernels/quantize.py (`pack`), read by the CPU and CUDA kernels as it is.
//
//   packed       uint8 [N][K * bits / 8], a row after the other; in a row, pieces of 16 bytes:
//
//                bits 4, 32 weights a piece    byte j  |  low nibble: k = j    high: k = j + 16
//                bits 8, 16 weights a piece    byte j  |  k = j
//
//   scale        fp32, bf16 or fp16 [N][G], G = K / group_size
//   zero_point   uint8 [N][G]; absent: 2^(bits - 1) throughout
//
// K is a multiple of 32 and a group a multiple of 32 (or the whole row): no piece straddles a
// group.
#pragma once

#include "float_formats.h"

namespace glm4 {

constexpr int PIECE_BYTES = 16;

struct QuantizedWeight {
    const uint8_t* packed;
    const void* scale;
    DType scale_dtype;
    const uint8_t* zero_point;  // or null
    int bits;
    int64_t group_size;  // K where per channel
    int64_t n, k;
};

GLM4_HOST_DEVICE int64_t row_bytes(const QuantizedWeight& w) { return w.k * w.bits / 8; }

// Index into scale and zero_point. The division is in 32 bits: a GPU has none in 64.
GLM4_HOST_DEVICE int64_t group_index(const QuantizedWeight& w, int64_t row, int64_t k) {
    const uint32_t size = uint32_t(w.group_size);
    return row * (uint32_t(w.k) / size) + uint32_t(k) / size;
}

GLM4_HOST_DEVICE float scale_at(const QuantizedWeight& w, int64_t group) {
    return load_float(w.scale, w.scale_dtype, group);
}

GLM4_HOST_DEVICE int zero_point_at(const QuantizedWeight& w, int64_t group) {
    return w.zero_point ? w.zero_point[group] : 1 << (w.bits - 1);
}

// Weight half * 16 + j of a piece, unsigned.
template <int BITS>
GLM4_HOST_DEVICE int weight_in_piece(const uint8_t* piece, int half, int j) {
    static_assert(BITS == 4 || BITS == 8, "");
    return BITS == 8 ? piece[j] : (piece[j] >> (4 * half)) & 15;
}

}  // namespace glm4
