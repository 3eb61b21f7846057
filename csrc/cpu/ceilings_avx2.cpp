#include <immintrin.h>

#include "ceilings.h"
#include "ceilings_loops.h"

namespace glm4 {

// Independent sums; more would spill.
constexpr int CHAINS = 6;

// vpmaddubsw and vpaddw: pairs of products summed in int16, which wrap.
static uint64_t multiply_add(int64_t n_rounds) {
    const __m256i q = opaque(_mm256_set1_epi8(3));
    __m256i u = opaque(_mm256_set1_epi8(5));
    __m256i sums[CHAINS];
    for (__m256i& sum : sums) sum = opaque(_mm256_setzero_si256());  // else all would be one
    for (int64_t round = 0; round < n_rounds; round++) {
        for (int i = 0; i < CHAINS; i++) {
            u = opaque(u);
            sums[i] = _mm256_add_epi16(sums[i], _mm256_maddubs_epi16(u, q));
        }
    }
    return folded(sums);
}

CeilingLoops ceiling_loops_avx2() { return {read_lines, multiply_add, CHAINS * 32 * 2}; }

}  // namespace glm4
