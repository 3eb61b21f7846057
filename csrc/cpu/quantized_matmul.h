// Between quantized_matmul.cpp, which shares the work out, and the files that hold its inner loops,
// one for each instruction set.
#pragma once

#include "../quantized_matmul.h"

namespace glm4 {

// x rounded to int8. Each row is cut into chunks of `chunk` columns (the last may be shorter), each
// within one group of W. The rows that are multiplied together, R of them from row r on, are
// interleaved, from r * K (or r * n_chunks, r * G) on.
struct Activations {
    int8_t* q;        // [K / 4][R][4]
    float* step;      // [n_chunks][R]
    int32_t* offset;  // [n_chunks][R]: where the integer sum of a chunk starts, see `quantize_run`
    float* total;     // [G][R]: sum of step * q over a group; with zero points only
    float* exact;     // [M][K]: x in fp32, in place of all these, where activations are not rounded
    int64_t chunk, n_chunks;
};

// What to bring into L2 meanwhile: `lines` cache lines, at least one, for each 32 columns of a run.
struct Prefetch {
    const uint8_t* next;
    int64_t lines;
};

// The part of y [M][N] that is computed in one go: rows m0 .. m1, columns of `tiles` tiles of W
// from `tile` on. m0 and m1 are row_block boundaries.
struct Part {
    int64_t m0, m1;
    int64_t tile;
    int tiles;  // 1 or 2
};

// All variants give the same bits.
struct MultiplyVariant {
    const char* name;
    // Tiles of W that `multiply` likes to take at once for M rows of x.
    int (*panel_tiles)(int64_t m);
    // The row where block `block` of about `rows` rows of M starts; M past the last.
    int64_t (*row_block)(int64_t m, int64_t rows, int64_t block);
    // Fills rows m0 .. m1 of `activations`; both are row_block boundaries.
    void (*quantize_rows)(const QuantizedMatmul& problem, const Activations& activations,
                          int64_t m0, int64_t m1);
    void (*convert_rows)(const QuantizedMatmul& problem, const Activations& activations, int64_t m0,
                         int64_t m1);
    // c [m1 - m0][tiles * 16] = x W^T; without bias, in fp32.
    void (*multiply)(const QuantizedMatmul& problem, const Activations& activations,
                     const Part& part, float* c);
    void (*multiply_exact)(const QuantizedMatmul& problem, const Activations& activations,
                           const Part& part, float* c);
    // y = c + bias, rounded.
    void (*write_result)(const QuantizedMatmul& problem, const Part& part, const float* c);
    // y = silu(gate) * up, each rounded as if it stood alone; `up` is the c of the other half.
    void (*write_swiglu)(const QuantizedMatmul& problem, const Part& part, float* gate, float* up);
};

extern const MultiplyVariant MULTIPLY_PORTABLE;
#ifdef GLM4_X86
extern const MultiplyVariant MULTIPLY_AVX2, MULTIPLY_AVX_VNNI, MULTIPLY_AVX512_VNNI_256,
    MULTIPLY_AVX512_VNNI;
#endif

}  // namespace glm4
