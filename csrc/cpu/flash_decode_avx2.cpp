// flash_decode for AVX2, FMA and F16C.
#define GLM4_LANES 8
#include "flash_decode_loops.h"

namespace glm4 {

static const FlashDecodeLoops& select(const FlashDecode&) { return FP32_LOOPS; }

const FlashDecodeVariant FLASH_DECODE_AVX2 = {"avx2", select};

}  // namespace glm4
