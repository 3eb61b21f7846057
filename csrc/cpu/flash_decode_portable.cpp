// flash_decode for any processor.
#define GLM4_LANES 4
#include "flash_decode_loops.h"

namespace glm4 {

static const FlashDecodeLoops& select(const FlashDecode&) { return FP32_LOOPS; }

const FlashDecodeVariant FLASH_DECODE_PORTABLE = {"portable", select};

}  // namespace glm4
