// What the 256-bit files of ceilings share.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace glm4 {

// The same value, of which the compiler knows nothing. No memory clobber: that would spill.
static inline __m256i opaque(__m256i value) {
    __asm__("" : "+x"(value));
    return value;
}

template <int N>
static inline uint64_t folded(const __m256i (&values)[N]) {
    __m256i all = values[0];
    for (int i = 1; i < N; i++) all = _mm256_or_si256(all, values[i]);
    return uint64_t(_mm256_extract_epi64(all, 0)) | uint64_t(_mm256_extract_epi64(all, 1)) |
           uint64_t(_mm256_extract_epi64(all, 2)) | uint64_t(_mm256_extract_epi64(all, 3));
}

static inline __m256i half_line(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

static uint64_t read_lines(const uint8_t* p, int64_t n_lines) {
    __m256i sums[8] = {};
    int64_t line = 0;
    for (; line + 4 <= n_lines; line += 4, p += 256) {
        for (int i = 0; i < 8; i++) sums[i] = _mm256_or_si256(sums[i], half_line(p + 32 * i));
    }
    for (; line < n_lines; line++, p += 64) {
        sums[0] = _mm256_or_si256(sums[0], half_line(p));
        sums[1] = _mm256_or_si256(sums[1], half_line(p + 32));
    }
    return folded(sums);
}

}  // namespace glm4
