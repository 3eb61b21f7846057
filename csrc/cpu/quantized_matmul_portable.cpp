// quantized_matmul for any processor.
#include "quantized_matmul_loops.h"

namespace glm4 {

const MultiplyVariant MULTIPLY_PORTABLE = {"portable", multiply_any_bits<int16_t, int32_t>,
                                           multiply_any_bits<float, float>};

}  // namespace glm4
