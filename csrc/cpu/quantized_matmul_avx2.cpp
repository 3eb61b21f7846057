// quantized_matmul for AVX2, which multiplies bytes into int16 that saturate (vpmaddubsw):
//
//   int4    u <= 15: 8 pairs of products, 8 * 2 * 15 * 127 = 30480, fit, so 32 columns are summed
//           before they are widened
//   int8    w = u - 128 instead of u, as |w| times x with the sign of w: 2 * 128 * 127 = 32512 fit
#include "quantized_matmul_256.h"

namespace glm4 {
namespace {

struct Lanes : Lanes256 {
    template <int BITS>
    static constexpr int32_t BIAS = BITS == 8 ? 128 : 0;

    static __m256i widened(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

    template <int BITS, bool, int MT, int NT>
    static void dot32(Int (&acc)[NT][MT], const uint8_t* const (&w)[NT], const int8_t* x) {
        for (int n = 0; n < NT; ++n) {
            for (int half = 0; half < 2; ++half) {
                if (BITS == 4) {
                    __m256i sum[MT];
                    for (__m256i& pairs : sum) pairs = _mm256_setzero_si256();
#pragma GCC unroll 4
                    for (int block = 0; block < 4; ++block) {
                        const __m256i packed = bytes(w[n] + block * BLOCK_BYTES + half * 32);
#pragma GCC unroll 2
                        for (int i = 0; i < 2; ++i) {
                            const __m256i u = codes<4>(packed, i);
                            for (int m = 0; m < MT; ++m) {
                                const __m256i four = quad(x + ((block * 2 + i) * MT + m) * 4);
                                sum[m] = _mm256_add_epi16(sum[m], _mm256_maddubs_epi16(u, four));
                            }
                        }
                    }
                    for (int m = 0; m < MT; ++m) {
                        __m256i& total = acc[n][m].half[half];
                        total = _mm256_add_epi32(total, widened(sum[m]));
                    }
                } else {
#pragma GCC unroll 8
                    for (int block = 0; block < 8; ++block) {
                        const __m256i signed_w = _mm256_xor_si256(
                            bytes(w[n] + block * BLOCK_BYTES + half * 32), _mm256_set1_epi8(-128));
                        const __m256i magnitude = _mm256_abs_epi8(signed_w);
                        for (int m = 0; m < MT; ++m) {
                            const __m256i four =
                                _mm256_sign_epi8(quad(x + (block * MT + m) * 4), signed_w);
                            __m256i& total = acc[n][m].half[half];
                            total = _mm256_add_epi32(
                                total, widened(_mm256_maddubs_epi16(magnitude, four)));
                        }
                    }
                }
            }
        }
    }
};

}  // namespace
}  // namespace glm4

#include "quantized_matmul_loops.h"

namespace glm4 {

const MultiplyVariant MULTIPLY_AVX2 = GLM4_MULTIPLY_VARIANT("avx2");

}  // namespace glm4
