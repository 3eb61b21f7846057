// Next tokens from logits; formula, ties and rounding in glm4_kernels/sample.py. Nothing is sorted:
// columns go in blocks of 64, whose maxima tell which of them can hold a token that is kept.
#pragma once

#include "../buffer.h"

namespace glm4 {

constexpr int SAMPLE_BLOCK = 64;
constexpr int32_t KEY_OF_MINUS_INF = -2139095041, KEY_OF_INF = 2139095040;

struct Sample {
    const char* logits;  // [n_rows][n_cols], a row every `stride` values
    DType dtype;
    int64_t n_rows, n_cols, stride;
    uint8_t* seen;  // [n_rows][n_cols], a row every `stride_seen`; or null
    int64_t stride_seen;
    float penalty;
    const double* uniform;  // [n_rows]; or null: the first of the largest
    float scale;            // log2(e) / temperature
    int64_t top_k;          // 0: all
    float reach;            // below the largest score, of what top-p can keep
    int64_t share;          // 1 - top_p in units of 2^-30; 0: all

    int64_t n_blocks() const { return (n_cols + SAMPLE_BLOCK - 1) / SAMPLE_BLOCK; }
};

// chosen [n_rows] int64. top_k and share are 0 where there is neither.
void sample_cpu(Buffer chosen, Buffer logits, Buffer uniform, Buffer seen, int dtype,
                int64_t n_rows, int64_t n_cols, int64_t stride, int64_t stride_seen, float penalty,
                float scale, int64_t top_k, float reach, int64_t share, int n_threads,
                const std::string& variant);

// The loops, for each instruction set.
struct SampleLoops {
    // Keys of SAMPLE_BLOCK columns: integers in the order of the penalised scores, NaN the largest;
    // that of -inf beyond the last column.
    void (*keys)(const Sample& sample, int64_t row, int64_t block, int32_t* keys);
    // The largest key of each of blocks [begin, end), counted over the rows.
    void (*maxima)(const Sample& sample, int64_t begin, int64_t end, int32_t* maxima);
    // Masses of n keys, a multiple of SAMPLE_BLOCK; the largest score has 2^44.
    void (*masses)(const int32_t* keys, int64_t n, float largest, float scale, int64_t* masses);
};

SampleLoops sample_loops_portable();
SampleLoops sample_loops_avx2();
SampleLoops sample_loops_avx512();

static inline float score_of(int32_t key) {
    const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
    float score;
    memcpy(&score, &bits, sizeof(score));
    return score;
}

}  // namespace glm4
