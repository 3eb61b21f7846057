// Vectors of the instruction set that a file is compiled for, and the three float formats in them.
//
// Every operation is one IEEE operation a lane, so all instruction sets give the same bits.
// Everything is `static`: a file compiled for a newer instruction set must not lend its copy to the
// others.
#pragma once

#include "../float_formats.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace glm4 {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

template <DType TYPE>
constexpr int64_t ITEM = TYPE == DType::float32 ? 4 : 2;

// fp32 bits whose upper half is the bfloat16: round to nearest, ties to even; NaN: the quiet one.
static inline Words bfloat16_in_upper_half(Floats x) {
    const Words bits = Words(x);
    const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return x == x ? rounded : Words{} + 0x7fc00000u;
}

// What GCC would make several instructions of. `larger` and `smaller` give b where one is NaN.
//
// maskz: of the plain forms GCC 12 warns that they read something uninitialised.
#if defined(__AVX512F__)

static inline Words widen(Halves h) {
    return Words(_mm512_maskz_cvtepu16_epi32(0xffff, __m256i(h)));
}
static inline Halves narrow(Words w) {
    return Halves(_mm512_maskz_cvtepi32_epi16(0xffff, __m512i(w)));
}
static inline Bytes low_bytes(Words w) {
    return Bytes(_mm512_maskz_cvtepi32_epi8(0xffff, __m512i(w)));
}

static inline Floats widen_float16(Halves h) {
    return Floats(_mm512_maskz_cvtph_ps(0xffff, __m256i(h)));
}

static inline Halves narrow_to_float16(Floats x) {
    return Halves(_mm512_maskz_cvtps_ph(0xffff, __m512(x), _MM_FROUND_TO_NEAREST_INT));
}

static inline Floats larger(Floats a, Floats b) {
    return Floats(_mm512_maskz_max_ps(0xffff, __m512(a), __m512(b)));
}
static inline Floats smaller(Floats a, Floats b) {
    return Floats(_mm512_maskz_min_ps(0xffff, __m512(a), __m512(b)));
}

#elif defined(__AVX2__)

static inline Words widen(Halves h) { return Words(_mm256_cvtepu16_epi32(__m128i(h))); }

static inline Halves narrow(Words w) {
    const __m256i low = _mm256_and_si256(__m256i(w), _mm256_set1_epi32(0xffff));
    const __m256i packed = _mm256_packus_epi32(low, low);  // within each half
    return Halves(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}

static inline Bytes low_bytes(Words w) {
    const __m256i low = _mm256_and_si256(__m256i(w), _mm256_set1_epi32(0xff));
    const __m256i halves = _mm256_packus_epi32(low, low);  // within each half, as the next
    const __m256i packed = _mm256_packus_epi16(halves, halves);
    const __m256i order = _mm256_setr_epi32(0, 4, 0, 0, 0, 0, 0, 0);
    Bytes bytes;
    const __m128i first = _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(packed, order));
    memcpy(&bytes, &first, sizeof(bytes));
    return bytes;
}

static inline Floats widen_float16(Halves h) { return Floats(_mm256_cvtph_ps(__m128i(h))); }

static inline Halves narrow_to_float16(Floats x) {
    return Halves(_mm256_cvtps_ph(__m256(x), _MM_FROUND_TO_NEAREST_INT));
}

static inline Floats larger(Floats a, Floats b) {
    return Floats(_mm256_max_ps(__m256(a), __m256(b)));
}
static inline Floats smaller(Floats a, Floats b) {
    return Floats(_mm256_min_ps(__m256(a), __m256(b)));
}

#else

static inline Words widen(Halves h) { return __builtin_convertvector(h, Words); }
static inline Halves narrow(Words w) { return __builtin_convertvector(w, Halves); }
static inline Bytes low_bytes(Words w) { return __builtin_convertvector(w & 0xffu, Bytes); }

static inline Floats widen_float16(Halves h) {
    Floats x;
    for (int lane = 0; lane < LANES; ++lane) x[lane] = float16_to_float(h[lane]);
    return x;
}

static inline Halves narrow_to_float16(Floats x) {
    Halves h;
    for (int lane = 0; lane < LANES; ++lane) h[lane] = float_to_float16(x[lane]);
    return h;
}

static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
static inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

#endif

// x as it is after it was stored in the format and read again.
template <DType TYPE>
static inline Floats rounded(Floats x) {
    if (TYPE == DType::bfloat16) return Floats(bfloat16_in_upper_half(x) & 0xffff0000u);
    if (TYPE == DType::float16) return widen_float16(narrow_to_float16(x));
    return x;
}

// The first `count` values from `data`, which may lie anywhere; 0 in the other lanes.
template <DType TYPE>
static inline Floats load(const void* data, int count = LANES) {
    if (TYPE == DType::float32) {
        Floats x = {};
        memcpy(&x, data, 4 * count);
        return x;
    }
    Halves h = {};
    memcpy(&h, data, 2 * count);
    if (TYPE == DType::float16) return widen_float16(h);
    return Floats(widen(h) << 16);
}

// The first `count` lanes, each of which is a number of the format.
template <DType TYPE>
static inline void store_exact(void* data, Floats x, int count = LANES) {
    if (TYPE == DType::float32) {
        memcpy(data, &x, 4 * count);
        return;
    }
    const Halves h = TYPE == DType::float16 ? narrow_to_float16(x) : narrow(Words(x) >> 16);
    memcpy(data, &h, 2 * count);
}

// The first `count` lanes, rounded.
template <DType TYPE>
static inline void store(void* data, Floats x, int count = LANES) {
    store_exact<TYPE>(data, TYPE == DType::bfloat16 ? rounded<TYPE>(x) : x, count);
}

// Magnitudes are compared as integers, whose order is the numbers' and puts NaN last.
static inline Ints larger_magnitude(Ints a, Floats x) {
    const Ints b = Ints(x) & 0x7fffffff;
    return a > b ? a : b;
}

static inline uint32_t largest_lane(Ints x) {
#if defined(__AVX2__)
    __m256i eight[LANES / 8];
    memcpy(eight, &x, sizeof(eight));
    const __m256i most = _mm256_max_epi32(eight[0], eight[LANES / 8 - 1]);
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return uint32_t(_mm_cvtsi128_si32(four));
#else
    int32_t largest = 0;
    for (int i = 0; i < LANES; ++i) largest = x[i] > largest ? x[i] : largest;
    return uint32_t(largest);
#endif
}

// The low byte of each lane: e4m3, round to nearest, ties to even, for |x| <= 448; NaN stays NaN.
static inline Words to_float8_e4m3(Floats x) {
    const Words sign = Words(x) >> 24 & 0x80u;
    const Words rest = Words(x) & 0x7fffffffu;
    // Below 2^-6 (subnormal) adding 2^14 leaves multiples of 2^-9, rounded, in the last bits.
    const Words tiny = Words(Floats(rest) + 16384.0f) - (Words{} + 0x46800000u);
    const Words normal = (rest - (120u << 23) + 0x7ffffu + (rest >> 20 & 1u)) >> 20;
    const Words magnitude = Floats(rest) < 0.015625f ? tiny : normal;
    return sign | (x == x ? magnitude : Words{} + 0x7fu);
}

// The largest number of int8 or float8_e4m3 that is used.
static inline float limit_of(DType type) { return type == DType::int8 ? 127.0f : 448.0f; }

// The first `count` lanes in one of the two, no further from 0 than the limit; NaN is 0 in int8.
static inline void store_quantised(DType type, void* data, Floats x, int count) {
    const Floats limit = Floats{} + limit_of(type);
    x = larger(-limit, smaller(limit, x));  // NaN stays
    // 1.5 * 2^23: the sum rounds half to even, and ends in the integer
    const Words codes =
        type == DType::int8 ? (x == x ? Words(x + 12582912.0f) : Words{}) : to_float8_e4m3(x);
    const Bytes bytes = low_bytes(codes);
    memcpy(data, &bytes, count);
}

// run(i, count) for 0..n in pieces of LANES, the last one shorter; in the others `count` is a
// constant, which turns `load` and `store` into one instruction.
template <typename Run>
static inline void for_each_piece(int64_t n, const Run& run) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) run(i, LANES);
    if (i < n) run(i, int(n - i));
}

}  // namespace glm4
