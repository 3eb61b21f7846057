// The 16 lanes of quantized_matmul_loops.h as two 256-bit registers: what AVX2, AVX-VNNI and the
// 256-bit form of AVX512-VNNI share. A block of 64 bytes is taken in halves, 8 rows each.
#pragma once

#include <immintrin.h>

#include "quantized_matmul.h"

namespace glm4 {
namespace {

struct Lanes256 {
    struct Int {
        __m256i half[2];
    };
    struct Float {
        __m256 half[2];
    };
    static constexpr int M_TILE = 2, N_TILES = 1, FEW_ROWS = 1, FEW_ROWS_TILES = 2;
    static constexpr bool by_hand(int, int) { return false; }
    template <int BITS, int MT>
    static void add_chunks(...);  // not by hand
    template <int BITS, int MT>
    static void add_groups(...);
    template <int BITS>
    static constexpr int32_t BIAS = 0;

    static Int set(int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
    static Float set(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
    static Float load(const float* x) { return {{_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}}; }
    static void store(float* out, const Float& x) {
        _mm256_storeu_ps(out, x.half[0]);
        _mm256_storeu_ps(out + 8, x.half[1]);
    }
    static Float to_float(const Int& x) {
        return {{_mm256_cvtepi32_ps(x.half[0]), _mm256_cvtepi32_ps(x.half[1])}};
    }
    static Float add(const Float& a, const Float& b) {
        return {{_mm256_add_ps(a.half[0], b.half[0]), _mm256_add_ps(a.half[1], b.half[1])}};
    }
    static Float sub(const Float& a, const Float& b) {
        return {{_mm256_sub_ps(a.half[0], b.half[0]), _mm256_sub_ps(a.half[1], b.half[1])}};
    }
    static Float mul(const Float& a, const Float& b) {
        return {{_mm256_mul_ps(a.half[0], b.half[0]), _mm256_mul_ps(a.half[1], b.half[1])}};
    }
    static Int add(const Int& a, const Int& b) {
        return {{_mm256_add_epi32(a.half[0], b.half[0]), _mm256_add_epi32(a.half[1], b.half[1])}};
    }
    static Int larger_magnitude(const Int& a, const Float& x) {
        const auto one = [](__m256i largest, __m256 value) {
            const __m256i mask = _mm256_set1_epi32(0x7fffffff);
            return _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(value), mask));
        };
        return {{one(a.half[0], x.half[0]), one(a.half[1], x.half[1])}};
    }
    static Int nearest(const Float& x) {
        return {{_mm256_cvtps_epi32(x.half[0]), _mm256_cvtps_epi32(x.half[1])}};
    }
    static Int clamp_and_store(int8_t* out, Int x) {
        for (__m256i& half : x.half) {
            half = _mm256_max_epi32(half, _mm256_set1_epi32(-127));
            half = _mm256_min_epi32(half, _mm256_set1_epi32(127));
        }
        // Packing works within 128 bits: lanes 0-3, 8-11, 4-7, 12-15 come out.
        const __m256i words = _mm256_packs_epi32(x.half[0], x.half[1]);
        const __m256i in_order = _mm256_permute4x64_epi64(words, 0xd8);
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(in_order),
                                              _mm256_extracti128_si256(in_order, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
        return x;
    }
    static int32_t largest(const Int& x) {
        alignas(32) int32_t lane[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lane),
                           _mm256_max_epi32(x.half[0], x.half[1]));
        int32_t y = lane[0];
        for (int32_t one : lane) y = one > y ? one : y;
        return y;
    }
    static int32_t total(const Int& x) {
        alignas(32) int32_t lane[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lane),
                           _mm256_add_epi32(x.half[0], x.half[1]));
        int32_t y = 0;
        for (int32_t one : lane) y += one;
        return y;
    }

    static Float load_as_float(const void* data, DType dtype, int64_t i) {
        const auto eight = [&](int64_t at) {
            const uint16_t* from = static_cast<const uint16_t*>(data) + at;
            switch (dtype) {
                case DType::bfloat16:
                    return _mm256_castsi256_ps(_mm256_slli_epi32(
                        _mm256_cvtepu16_epi32(
                            _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))),
                        16));
                case DType::float16:
                    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
                case DType::uint8:
                    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(
                        reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(data) + at))));
                default:
                    return _mm256_loadu_ps(static_cast<const float*>(data) + at);
            }
        };
        return {{eight(i), eight(i + 8)}};
    }

    static void store_as(void* data, DType dtype, int64_t i, const Float& x) {
        if (dtype == DType::float32) return store(static_cast<float*>(data) + i, x);
        const auto eight = [&](__m256 value) {
            const __m256i bits = _mm256_castps_si256(value);
            const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
            __m256i words, quiet;  // 16 bits in each 32
            if (dtype == DType::bfloat16) {
                const __m256i odd =
                    _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
                const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
                words = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
                quiet = _mm256_set1_epi32(0x7fc0);
            } else {
                words = _mm256_cvtepu16_epi32(
                    _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
                const __m256i sign = _mm256_and_si256(words, _mm256_set1_epi32(0x8000));
                quiet = _mm256_or_si256(sign, _mm256_set1_epi32(0x7e00));
            }
            return _mm256_blendv_epi8(words, quiet, nan);
        };
        // Packing works within 128 bits: see clamp_and_store.
        const __m256i words = _mm256_packus_epi32(eight(x.half[0]), eight(x.half[1]));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(data) + i),
                            _mm256_permute4x64_epi64(words, 0xd8));
    }

    static __m256i bytes(const uint8_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
    static __m256i quad(const int8_t* x) {
        int32_t four;
        memcpy(&four, x, sizeof(four));
        return _mm256_set1_epi32(four);
    }
    // The codes of quad 0 or 1 of half a block.
    template <int BITS>
    static __m256i codes(__m256i block, int quad) {
        if (BITS == 8) return block;
        return _mm256_and_si256(quad ? _mm256_srli_epi16(block, 4) : block, _mm256_set1_epi8(15));
    }

    template <int BITS>
    static void unpack32(const uint8_t* w, const Float& z, float* out) {
        constexpr int QUADS = 8 / BITS;
        const __m256i mask = _mm256_set1_epi32(BITS == 8 ? 255 : 15);
        for (int block = 0; block < 8 / QUADS; ++block) {
            for (int half = 0; half < 2; ++half) {
                const __m256i u = bytes(w + block * BLOCK_BYTES + half * 32);
                for (int i = 0; i < 4 * QUADS; ++i) {
                    const int shift = i % 4 * 8 + i / 4 * 4;
                    const __m256i code = _mm256_and_si256(_mm256_srli_epi32(u, shift), mask);
                    const int k = block * QUADS * 4 + i;
                    _mm256_storeu_ps(out + k * TILE_ROWS + half * 8,
                                     _mm256_sub_ps(_mm256_cvtepi32_ps(code), z.half[half]));
                }
            }
        }
    }

    static constexpr int AHEAD = 2048;
};

// For processors with vpdpbusd, whose intrinsic is `dpbusd`: it has one encoding in AVX-VNNI and
// another in AVX-512.
template <__m256i (*dpbusd)(__m256i sum, __m256i u, __m256i four)>
struct VnniLanes : Lanes256 {
    template <int BITS, bool STREAMS, int MT, int NT>
    static void dot32(Int (&acc)[NT][MT], const uint8_t* const (&w)[NT], const int8_t* x) {
        constexpr int QUADS = 8 / BITS;
#pragma GCC unroll 8
        for (int block = 0; block < 8 / QUADS; ++block) {
#pragma GCC unroll 2
            for (int n = 0; n < NT; ++n) {
                const uint8_t* from = w[n] + block * BLOCK_BYTES;
                __builtin_prefetch(from + AHEAD, 0, STREAMS ? 0 : 3);
                const __m256i packed[2] = {bytes(from), bytes(from + 32)};
#pragma GCC unroll 2
                for (int i = 0; i < QUADS; ++i) {
                    const __m256i u[2] = {codes<BITS>(packed[0], i), codes<BITS>(packed[1], i)};
#pragma GCC unroll 2
                    for (int m = 0; m < MT; ++m) {
                        const __m256i four = quad(x + ((block * QUADS + i) * MT + m) * 4);
                        acc[n][m].half[0] = dpbusd(acc[n][m].half[0], u[0], four);
                        acc[n][m].half[1] = dpbusd(acc[n][m].half[1], u[1], four);
                    }
                }
            }
        }
    }
};

}  // namespace
}  // namespace glm4
