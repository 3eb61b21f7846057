// Between flash_decode.cpp, which cuts the keys into splits, and the files that hold the inner
// loops, one for each instruction set.
#pragma once

#include "../flash_decode.h"

namespace glm4 {

// The query rows of one sequence and KV head, row = query * group + head, come in tiles of ROWS.
constexpr int ROWS = 16;
constexpr int MAX_HEAD_DIM = 128;
constexpr int MAX_SPLITS = 64;
// Splits begin at multiples of this; the loops' tiles of keys divide it.
constexpr int64_t SPLIT_UNIT = 256;
// Tokens that surely lie in one page: its smallest size.
constexpr int RUN = 16;

GLM4_HOST_DEVICE int64_t count_rows(const FlashDecode& p) { return p.n_queries * group_of(p); }
GLM4_HOST_DEVICE int64_t padded_rows(const FlashDecode& p) {
    return (count_rows(p) + ROWS - 1) / ROWS * ROWS;
}

// What a split leaves, in floats [padded rows], [padded rows], [padded rows][D]:
//   max = max s    total = sum p    acc = sum p v    p = exp(factor * (s - max))
// A row that sees no key has max = -inf, total = 0, acc = 0.
struct Partial {
    float* max;
    float* total;
    float* acc;
};
GLM4_HOST_DEVICE int64_t partial_floats(const FlashDecode& p) {
    return padded_rows(p) * (2 + p.head_dim);
}
GLM4_HOST_DEVICE Partial partial_at(const FlashDecode& p, float* memory) {
    return {memory, memory + padded_rows(p), memory + 2 * padded_rows(p)};
}

// Keys [first, end) of one KV head of one sequence.
struct Split {
    int64_t batch, kv_head, first, end;
};

struct FlashDecodeLoops {
    // Bytes of the packed queries of one sequence and KV head. They begin with the rows' `factor`,
    // float [padded rows].
    int64_t (*packed_bytes)(const FlashDecode& problem);
    void (*pack)(const FlashDecode& problem, int64_t batch, int64_t kv_head, void* packed);
    void (*attend)(const FlashDecode& problem, const void* packed, const Split& split,
                   Partial partial);
    // out and lse of the ROWS rows from first_row on, from the partials of all splits in order.
    void (*merge)(const FlashDecode& problem, const void* packed, int64_t batch, int64_t kv_head,
                  int64_t first_row, const float* partials, int64_t n_splits);
};

struct FlashDecodeVariant {
    const char* name;
    // The loops for this problem's dtype and format.
    const FlashDecodeLoops& (*select)(const FlashDecode& problem);
};

extern const FlashDecodeVariant FLASH_DECODE_PORTABLE;
#ifdef GLM4_X86
extern const FlashDecodeVariant FLASH_DECODE_AVX2;
extern const FlashDecodeVariant FLASH_DECODE_AVX512;
extern const FlashDecodeVariant FLASH_DECODE_AVX512_BF16;
#endif

}  // namespace glm4
