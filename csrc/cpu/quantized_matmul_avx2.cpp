// quantized_matmul for AVX2: the portable loops, compiled with -mavx2 (CMakeLists.txt).
#include "quantized_matmul_loops.h"

namespace glm4 {

const MultiplyVariant MULTIPLY_AVX2 = {"avx2", multiply_any_bits<int16_t, int32_t>,
                                       multiply_any_bits<float, float>};

}  // namespace glm4
