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

static inline __m256i line_at(const uint8_t* p, int64_t line) {
    const __m256i* halves = reinterpret_cast<const __m256i*>(p + 64 * line);
    return _mm256_or_si256(_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1));
}

static uint64_t read_lines(const uint8_t* p, int64_t n_lines) {
    const int64_t half = n_lines / 2;
    const uint8_t* q = p + 64 * half;
    __m256i sums[8] = {};
    int64_t line = 0;
    for (; line + 4 <= half; line += 4) {
        for (int i = 0; i < 4; i++) {
            sums[i] = _mm256_or_si256(sums[i], line_at(p, line + i));
            sums[i + 4] = _mm256_or_si256(sums[i + 4], line_at(q, line + i));
        }
    }
    for (; line < half; line++) {
        sums[0] = _mm256_or_si256(sums[0], line_at(p, line));
        sums[4] = _mm256_or_si256(sums[4], line_at(q, line));
    }
    if (n_lines % 2) sums[0] = _mm256_or_si256(sums[0], line_at(p, n_lines - 1));
    return folded(sums);
}

}  // namespace glm4
