// flash_decode for AVX512 F, BW, VL and DQ.
#define GLM4_LANES 16
#include "flash_decode_loops.h"

namespace glm4 {

static const FlashDecodeLoops& select(const FlashDecode&) { return FP32_LOOPS; }

const FlashDecodeVariant FLASH_DECODE_AVX512 = {"avx512", select};

}  // namespace glm4
