// Between quantized_matmul.cpp, which shares the work out, and the files that hold its inner loops,
// one for each instruction set.
#pragma once

#include "../quantized_matmul.h"

namespace glm4 {

constexpr int MAX_PANEL_TILES = 4;  // tiles of W that are multiplied together

// x rounded to int8. Each row is cut into chunks of `chunk` columns (the last may be shorter), each
// within one group of W.
struct Activations {
    int8_t* q;        // [M][stride]
    float* step;      // [M][n_chunks]
    int32_t* offset;  // [M][n_chunks]: where the integer sum of a chunk starts, see `quantize_row`
    float* total;     // [M][G]: sum of step * q over a group; with zero points only
    float* exact;     // [M][K]: x in fp32, in place of all these, where activations are not rounded
    int64_t stride, chunk, n_chunks;
};

// All variants give the same bits.
struct MultiplyVariant {
    const char* name;
    // Tiles of W that `multiply` likes to take at once for M rows of x.
    int (*panel_tiles)(int64_t m);
    // Fills row m of `activations`.
    void (*quantize_row)(const QuantizedMatmul& problem, const Activations& activations, int64_t m);
    void (*convert_row)(const QuantizedMatmul& problem, const Activations& activations, int64_t m);
    // c [M][tiles * 16] = x W^T for `tiles` tiles of W from `tile` on; without bias, in fp32.
    void (*multiply)(const QuantizedMatmul& problem, const Activations& activations, int64_t tile,
                     int tiles, float* c);
    void (*multiply_exact)(const QuantizedMatmul& problem, const Activations& activations,
                           int64_t tile, int tiles, float* c);
    // y = c + bias, rounded, for those tiles.
    void (*write_result)(const QuantizedMatmul& problem, int64_t tile, int tiles, const float* c);
    // y = silu(gate) * up, each rounded as if it stood alone; `up` is the c of the other half.
    void (*write_swiglu)(const QuantizedMatmul& problem, int64_t tile, int tiles, float* gate,
                         float* up);
};

extern const MultiplyVariant MULTIPLY_PORTABLE;
#ifdef GLM4_X86
extern const MultiplyVariant MULTIPLY_AVX2, MULTIPLY_AVX_VNNI, MULTIPLY_AVX512_VNNI_256,
    MULTIPLY_AVX512_VNNI;
#endif

}  // namespace glm4
