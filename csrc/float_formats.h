// Number formats that cross from Python, and their conversion to and from fp32.
//
// One implementation for host and device, so that the CPU tests cover what the GPU computes.
// `static`: a file compiled for a newer instruction set must not lend its copy to the others.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define GLM4_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define GLM4_HOST_DEVICE static inline
#endif

namespace glm4 {

// The numbers are known to glm4_kernels/extension.py.
enum class DType : int {
    float32 = 0,
    bfloat16 = 1,
    float16 = 2,
    uint8 = 3,
    int8 = 4,
    float8_e4m3 = 5,
    int32 = 6,
    int64 = 7
};

GLM4_HOST_DEVICE int64_t size_of(DType dtype) {
    switch (dtype) {
        case DType::uint8:
        case DType::int8:
        case DType::float8_e4m3:
            return 1;
        case DType::bfloat16:
        case DType::float16:
            return 2;
        case DType::int64:
            return 8;
        default:
            return 4;
    }
}

GLM4_HOST_DEVICE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

GLM4_HOST_DEVICE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

GLM4_HOST_DEVICE float bfloat16_to_float(uint16_t value) {
    return from_bits(uint32_t(value) << 16);
}

// Round to nearest, ties to even; every NaN becomes the quiet one.
GLM4_HOST_DEVICE uint16_t float_to_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

GLM4_HOST_DEVICE float float16_to_float(uint16_t value) {
    const uint32_t sign = uint32_t(value & 0x8000u) << 16;
    const uint32_t rest = uint32_t(value & 0x7fffu) << 13;
    if (rest >= 0x0f800000u) return from_bits(sign | 0x7f800000u | rest);  // infinity, NaN
    const float rebias = from_bits(0x77800000u);                           // 2^(127-15)
    return from_bits(sign | bits_of(from_bits(rest) * rebias));            // subnormals: exact too
}

// Round to nearest, ties to even; beyond the range: infinity; every NaN becomes the quiet one.
GLM4_HOST_DEVICE uint16_t float_to_float16(float value) {
    const uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
    uint32_t rest = bits_of(value) & 0x7fffffffu;
    if (rest > 0x7f800000u) {
        rest = 0x7e00;
    } else if (rest >= 0x47800000u) {  // 65536
        rest = 0x7c00;
    } else if (rest < 0x38800000u) {  // below 2^-14: adding 1/2 leaves the subnormal, rounded
        rest = bits_of(from_bits(rest) + 0.5f) - bits_of(0.5f);
    } else {
        const uint32_t odd = (rest >> 13) & 1;
        rest = (rest - (uint32_t(127 - 15) << 23) + 0xfffu + odd) >> 13;
    }
    return uint16_t(sign | rest);
}

GLM4_HOST_DEVICE float load_float(const void* data, DType dtype, int64_t i) {
    switch (dtype) {
        case DType::bfloat16:
            return bfloat16_to_float(static_cast<const uint16_t*>(data)[i]);
        case DType::float16:
            return float16_to_float(static_cast<const uint16_t*>(data)[i]);
        case DType::uint8:
            return float(static_cast<const uint8_t*>(data)[i]);
        default:
            return static_cast<const float*>(data)[i];
    }
}

GLM4_HOST_DEVICE void store_float(void* data, DType dtype, int64_t i, float value) {
    switch (dtype) {
        case DType::bfloat16:
            static_cast<uint16_t*>(data)[i] = float_to_bfloat16(value);
            break;
        case DType::float16:
            static_cast<uint16_t*>(data)[i] = float_to_float16(value);
            break;
        default:
            static_cast<float*>(data)[i] = value;
    }
}

}  // namespace glm4
