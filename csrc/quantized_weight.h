// The packed weight of quantized_matmul: w[n][k] = scale[n][g] * (u[n][k] - zero_point[n][g]).
//
// Packed by glm4_kernels/quantized_weight.py. Two layouts, by the device that reads them.
//
// tiles (CPU), 16 rows n0 .. n0 + 15 at a time, T = ceil(N / 16); rows past N are zero:
//
//   packed       uint8 [T][blocks of 64 bytes]; in a block, 4 bytes of row n0, 4 of n0 + 1, ...
//
//                bits 8, K / 4 blocks    byte j of a row  |  k = 4 * block + j
//                bits 4, K / 8 blocks    byte j of a row  |  low nibble: k = 8 * block + j
//                                                         |  high:       k = 8 * block + 4 + j
//
//   scale        fp32, bf16 or fp16 [T][G][16], G = K / group_size
//   zero_point   uint8 or a float type, [T][G][16]; absent: 2^(bits - 1) throughout
//
//   A block, seen as 16 lanes of 4 bytes, is what vpdpbusd multiplies with 4 activations that are
//   broadcast to all lanes: lane = row, no sum across lanes. An 8-lane processor takes it in
//   halves.
//
// rows (CUDA):
//
//   packed       uint8 [N][K * bits / 8], a row after the other; in a row, pieces of 16 bytes:
//
//                bits 4, 32 weights a piece    byte j  |  low nibble: k = j    high: k = j + 16
//                bits 8, 16 weights a piece    byte j  |  k = j
//
//   scale, zero_point   as above, [N][G]
//
// K is a multiple of 32 and a group a multiple of 32 (or the whole row): no block and no piece
// straddles a group.
#pragma once

#include "float_formats.h"

namespace glm4 {

constexpr int TILE_ROWS = 16;
constexpr int BLOCK_BYTES = 64;
constexpr int PIECE_BYTES = 16;

struct QuantizedWeight {
    const uint8_t* packed;
    const void* scale;
    DType scale_dtype;
    const void* zero_point;  // or null
    DType zero_point_dtype;
    int bits;
    int64_t group_size;  // K where per channel
    int64_t n, k;
};

GLM4_HOST_DEVICE int64_t row_bytes(const QuantizedWeight& w) { return w.k * w.bits / 8; }

GLM4_HOST_DEVICE int64_t n_tiles(const QuantizedWeight& w) {
    return (w.n + TILE_ROWS - 1) / TILE_ROWS;
}

// Of the layout `rows`: index into scale and zero_point. The division is in 32 bits: a GPU has none
// in 64.
GLM4_HOST_DEVICE int64_t group_index(const QuantizedWeight& w, int64_t row, int64_t k) {
    const uint32_t size = uint32_t(w.group_size);
    return row * (uint32_t(w.k) / size) + uint32_t(k) / size;
}

GLM4_HOST_DEVICE float scale_at(const QuantizedWeight& w, int64_t group) {
    return load_float(w.scale, w.scale_dtype, group);
}

GLM4_HOST_DEVICE float zero_point_at(const QuantizedWeight& w, int64_t group) {
    if (!w.zero_point) return float(1 << (w.bits - 1));
    return load_float(w.zero_point, w.zero_point_dtype, group);
}

// Of the layout `rows`: weight half * 16 + j of a piece, unsigned.
template <int BITS>
GLM4_HOST_DEVICE int weight_in_piece(const uint8_t* piece, int half, int j) {
    static_assert(BITS == 4 || BITS == 8, "");
    return BITS == 8 ? piece[j] : (piece[j] >> (4 * half)) & 15;
}

}  // namespace glm4
