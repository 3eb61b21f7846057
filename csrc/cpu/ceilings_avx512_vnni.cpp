#include <immintrin.h>

#include "ceilings.h"

namespace glm4 {

// The same value, of which the compiler knows nothing. No memory clobber: that would spill.
static inline __m512i opaque(__m512i value) {
    __asm__("" : "+v"(value));
    return value;
}

template <int N>
static uint64_t folded(const __m512i (&values)[N]) {
    __m512i all = values[0];
    for (int i = 1; i < N; i++) all = _mm512_or_si512(all, values[i]);
    alignas(64) uint64_t words[8];
    _mm512_store_si512(words, all);
    uint64_t word = 0;
    for (uint64_t w : words) word |= w;
    return word;
}

static inline __m512i line_at(const uint8_t* p, int64_t line) {
    return _mm512_loadu_si512(p + 64 * line);
}

static uint64_t read_lines(const uint8_t* p, int64_t n_lines) {
    const int64_t half = n_lines / 2;
    const uint8_t* q = p + 64 * half;
    __m512i sums[8] = {};
    int64_t line = 0;
    for (; line + 4 <= half; line += 4) {
        for (int i = 0; i < 4; i++) {
            sums[i] = _mm512_or_si512(sums[i], line_at(p, line + i));
            sums[i + 4] = _mm512_or_si512(sums[i + 4], line_at(q, line + i));
        }
    }
    for (; line < half; line++) {
        sums[0] = _mm512_or_si512(sums[0], line_at(p, line));
        sums[4] = _mm512_or_si512(sums[4], line_at(q, line));
    }
    if (n_lines % 2) sums[0] = _mm512_or_si512(sums[0], line_at(p, n_lines - 1));
    return folded(sums);
}

// Independent sums: two instructions a clock times their latency of four or five, and to spare.
constexpr int CHAINS = 16;

static uint64_t multiply_add(int64_t n_rounds) {
    const __m512i u = opaque(_mm512_set1_epi8(5)), q = opaque(_mm512_set1_epi8(3));
    __m512i sums[CHAINS];
    for (__m512i& sum : sums) sum = opaque(_mm512_setzero_si512());  // else all would be one
    for (int64_t round = 0; round < n_rounds; round++) {
        for (int i = 0; i < CHAINS; i++) sums[i] = _mm512_dpbusd_epi32(sums[i], u, q);
    }
    return folded(sums);
}

CeilingLoops ceiling_loops_avx512_vnni() { return {read_lines, multiply_add, CHAINS * 64 * 2}; }

}  // namespace glm4
