// Between quantized_matmul.cpp, which prepares the activations and the threads, and the files that
// hold its inner loops, one for each instruction set.
#pragma once

#include "../quantized_matmul.h"

namespace glm4 {

constexpr int MAX_CHUNK = 128;     // activations that share a scale, at most
constexpr int ROWS_PER_BLOCK = 4;  // rows of W that are multiplied together

// x as the loops read it: int16 that hold int8 values, or fp32. Row m is cut into chunks of
// `chunk` columns (the last may be shorter), each within one group of W.
struct Activations {
    const void* values;  // [M][K]
    const float* scale;  // [M][n_chunks]; integers only
    const int32_t* sum;  // [M][n_chunks], of the integers of a chunk; integers only
    int64_t chunk;
    int64_t n_chunks;
};

// Blocks [begin, end) of ROWS_PER_BLOCK rows of W, for all M; `acc` is scratch of
// M * ROWS_PER_BLOCK. All variants give the same bits.
using MultiplyBlocks = void (*)(const QuantizedMatmul& problem, const Activations& activations,
                                int64_t begin, int64_t end, float* acc);

struct MultiplyVariant {
    const char* name;
    MultiplyBlocks int8;
    MultiplyBlocks exact;
};

extern const MultiplyVariant MULTIPLY_PORTABLE;
#ifdef GLM4_WITH_AVX2
extern const MultiplyVariant MULTIPLY_AVX2;
#endif

}  // namespace glm4
