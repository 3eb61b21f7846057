#include <immintrin.h>

#include "ceilings.h"
#include "ceilings_loops.h"

namespace glm4 {

// Independent sums: latency (up to five) times instructions a clock (two); more would spill.
constexpr int CHAINS = 10;

static uint64_t multiply_add(int64_t n_rounds) {
    const __m256i u = opaque(_mm256_set1_epi8(5)), q = opaque(_mm256_set1_epi8(3));
    __m256i sums[CHAINS];
    for (__m256i& sum : sums) sum = opaque(_mm256_setzero_si256());  // else all would be one
    for (int64_t round = 0; round < n_rounds; round++) {
        for (int i = 0; i < CHAINS; i++) sums[i] = _mm256_dpbusd_avx_epi32(sums[i], u, q);
    }
    return folded(sums);
}

CeilingLoops ceiling_loops_avx_vnni() { return {read_lines, multiply_add, CHAINS * 32 * 2}; }

}  // namespace glm4
