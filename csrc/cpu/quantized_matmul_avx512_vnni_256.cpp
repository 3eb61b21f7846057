// quantized_matmul for AVX512-VNNI in 256 bits: the loops of AVX-VNNI, on processors that lack its
// encoding.
#include "quantized_matmul_256.h"

namespace glm4 {
namespace {

__m256i dpbusd(__m256i sum, __m256i u, __m256i four) { return _mm256_dpbusd_epi32(sum, u, four); }

using Lanes = VnniLanes<dpbusd>;

}  // namespace
}  // namespace glm4

#include "quantized_matmul_loops.h"

namespace glm4 {

const MultiplyVariant MULTIPLY_AVX512_VNNI_256 = GLM4_MULTIPLY_VARIANT("avx512_vnni_256");

}  // namespace glm4
