// quantized_matmul for AVX-VNNI: the dot product of AVX512-VNNI in 256 bits, for processors without
// AVX-512.
#include "quantized_matmul_256.h"

namespace glm4 {
namespace {

__m256i dpbusd(__m256i sum, __m256i u, __m256i four) {
    return _mm256_dpbusd_avx_epi32(sum, u, four);
}

using Lanes = VnniLanes<dpbusd>;

}  // namespace
}  // namespace glm4

#include "quantized_matmul_loops.h"

namespace glm4 {

const MultiplyVariant MULTIPLY_AVX_VNNI = GLM4_MULTIPLY_VARIANT("avx_vnni");

}  // namespace glm4
