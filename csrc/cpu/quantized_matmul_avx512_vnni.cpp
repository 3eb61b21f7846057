// quantized_matmul for AVX512-VNNI: a tile's 16 rows are the 16 lanes of a register.
#include <immintrin.h>

#include "quantized_matmul.h"

namespace glm4 {
namespace {

struct Lanes {
    using Int = __m512i;
    using Float = __m512;
    // 6 rows x 2 tiles: 12 integer and 12 float sums of the 32 registers, and 4 + 12 loads feed 24
    // vpdpbusd where int4 is unpacked on the way.
    static constexpr int M_TILE = 6, N_TILES = 2, ONE_ROW_TILES = 4;
    template <int BITS>
    static constexpr int32_t BIAS = 0;

    static Int set(int32_t x) { return _mm512_set1_epi32(x); }
    static Float set(float x) { return _mm512_set1_ps(x); }
    static Float load(const float* x) { return _mm512_loadu_ps(x); }
    static void store(float* out, Float x) { _mm512_storeu_ps(out, x); }
    static Float to_float(Int x) { return _mm512_cvtepi32_ps(x); }
    static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
    static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }

    static Float load_as_float(const void* data, DType dtype, int64_t i) {
        const auto half = [&] {
            return _mm256_loadu_si256(
                reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(data) + i));
        };
        switch (dtype) {
            case DType::bfloat16:
                return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half()), 16));
            case DType::float16:
                return _mm512_cvtph_ps(half());
            case DType::uint8:
                return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(
                    reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(data) + i))));
            default:
                return _mm512_loadu_ps(static_cast<const float*>(data) + i);
        }
    }

    static Int quad(const int8_t* x) {
        int32_t bytes;
        memcpy(&bytes, x, sizeof(bytes));
        return _mm512_set1_epi32(bytes);
    }

    template <int BITS, int MT, int NT>
    static void dot32(Int (&acc)[NT][MT], const uint8_t* const (&w)[NT],
                      const int8_t* const (&x)[MT]) {
        constexpr int QUADS = 8 / BITS;  // in a block
        const Int low = _mm512_set1_epi8(15);
#pragma GCC unroll 8
        for (int block = 0; block < 8 / QUADS; ++block) {
            Int u[NT][QUADS];
#pragma GCC unroll 4
            for (int n = 0; n < NT; ++n) {
                const uint8_t* from = w[n] + block * BLOCK_BYTES;
                _mm_prefetch(reinterpret_cast<const char*>(from + PREFETCH_BYTES), _MM_HINT_T0);
                u[n][0] = _mm512_loadu_si512(from);
                if (BITS == 4) {
                    u[n][QUADS - 1] = _mm512_and_si512(_mm512_srli_epi16(u[n][0], 4), low);
                    u[n][0] = _mm512_and_si512(u[n][0], low);
                }
            }
#pragma GCC unroll 2
            for (int half = 0; half < QUADS; ++half) {
#pragma GCC unroll 6
                for (int m = 0; m < MT; ++m) {
                    const Int four = quad(x[m] + (block * QUADS + half) * 4);
#pragma GCC unroll 4
                    for (int n = 0; n < NT; ++n) {
                        acc[n][m] = _mm512_dpbusd_epi32(acc[n][m], u[n][half], four);
                    }
                }
            }
        }
    }

    template <int BITS>
    static void unpack32(const uint8_t* w, Float z, float* out) {
        constexpr int QUADS = 8 / BITS;
        const Int mask = _mm512_set1_epi32(BITS == 8 ? 255 : 15);
        for (int block = 0; block < 8 / QUADS; ++block) {
            const Int u = _mm512_loadu_si512(w + block * BLOCK_BYTES);
            for (int i = 0; i < 4; ++i) {
                for (int half = 0; half < QUADS; ++half) {
                    const Int code =
                        _mm512_and_si512(_mm512_srli_epi32(u, unsigned(8 * i + 4 * half)), mask);
                    const int k = (block * QUADS + half) * 4 + i;
                    store(out + k * TILE_ROWS, _mm512_sub_ps(_mm512_cvtepi32_ps(code), z));
                }
            }
        }
    }

    static constexpr int PREFETCH_BYTES = 2048;
};

}  // namespace
}  // namespace glm4

#include "quantized_matmul_loops.h"

namespace glm4 {

const MultiplyVariant MULTIPLY_AVX512_VNNI = GLM4_MULTIPLY_VARIANT("avx512_vnni");

}  // namespace glm4
