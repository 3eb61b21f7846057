// The values of swiglu.h, compiled once for every instruction set.
#include "lanes.h"
#include "simd.h"
#include "swiglu.h"

namespace glm4 {

// Vectors that are computed side by side: by itself, a processor overlaps too little of a chain of
// operations as long as this one.
constexpr int ABREAST = 4;

// e^x within 2 units in the last place: x = n ln2 + r, |r| <= ln2 / 2, and e^r by a polynomial
// (interpolated at Chebyshev nodes; 1e-8 of itself). Infinity from 88.38 on (where fp32 could still
// go to 88.72), 1e-38 below -87; NaN stays.
static inline void exponential(Floats (&x)[ABREAST]) {
    const Floats zero = {};
    const Floats shift = zero + 12582912.0f;  // 1.5 * 2^23: the sum has no room for a fraction
    Floats shifted[ABREAST], r[ABREAST], p[ABREAST];
    for (int a = 0; a < ABREAST; ++a) x[a] = smaller(zero + 88.8f, larger(zero - 87.3f, x[a]));
    for (int a = 0; a < ABREAST; ++a) shifted[a] = x[a] * 1.44269504f + shift;
    for (int a = 0; a < ABREAST; ++a) r[a] = x[a] - (shifted[a] - shift) * 0.693359375f;  // exact
    for (int a = 0; a < ABREAST; ++a) r[a] = r[a] + (shifted[a] - shift) * 2.12194440e-4f;
    for (int a = 0; a < ABREAST; ++a) p[a] = r[a] * 1.39262131e-3f + 8.36320315e-3f;
    for (int a = 0; a < ABREAST; ++a) p[a] = p[a] * r[a] + 4.16665561e-2f;
    for (int a = 0; a < ABREAST; ++a) p[a] = p[a] * r[a] + 1.66665763e-1f;
    for (int a = 0; a < ABREAST; ++a) p[a] = p[a] * r[a] + 0.5f;
    for (int a = 0; a < ABREAST; ++a) p[a] = p[a] * (r[a] * r[a]) + (r[a] + 1.0f);
    for (int a = 0; a < ABREAST; ++a) {
        x[a] = p[a] * Floats((Words(shifted[a]) - Words(shift) + 127u) << 23);  // 2^n
    }
}

template <DType TYPE, bool HF>
static inline void swiglu_piece(char* y, const char* gate, const char* up, int64_t count) {
    constexpr int64_t STEP = LANES * ITEM<TYPE>;
    Floats g[ABREAST], e[ABREAST], silu[ABREAST];
    const auto lanes = [&](int a) {
        const int64_t left = count - a * LANES;
        return left < 0 ? 0 : left < LANES ? int(left) : LANES;
    };
    for (int a = 0; a < ABREAST; ++a) g[a] = load<TYPE>(gate + a * STEP, lanes(a));
    for (int a = 0; a < ABREAST; ++a) e[a] = -g[a];
    exponential(e);
    for (int a = 0; a < ABREAST; ++a) silu[a] = g[a] / (e[a] + 1.0f);
    for (int a = 0; a < ABREAST; ++a) silu[a] = HF ? rounded<TYPE>(silu[a]) : silu[a];
    for (int a = 0; a < ABREAST; ++a) {
        store<TYPE>(y + a * STEP, silu[a] * load<TYPE>(up + a * STEP, lanes(a)), lanes(a));
    }
}

template <DType TYPE, bool HF>
static void swiglu_values(const Swiglu& swiglu, int64_t begin, int64_t end) {
    constexpr int64_t I = ITEM<TYPE>, PIECE = ABREAST * LANES;
    const int64_t n = swiglu.n_cols;
    while (begin < end) {
        const int64_t row = begin / n, col = begin % n;
        const int64_t in_row = n - col < end - begin ? n - col : end - begin;
        const char* gate = swiglu.gate_up + (row * swiglu.stride + col) * I;
        const char* up = gate + n * I;
        char* y = swiglu.y + begin * I;
        int64_t i = 0;
        for (; i + PIECE <= in_row; i += PIECE) {
            swiglu_piece<TYPE, HF>(y + i * I, gate + i * I, up + i * I, PIECE);
        }
        if (i < in_row) swiglu_piece<TYPE, HF>(y + i * I, gate + i * I, up + i * I, in_row - i);
        begin += in_row;
    }
}

void GLM4_VARIANT_NAME(swiglu_values)(const Swiglu& swiglu, int64_t begin, int64_t end) {
    constexpr DType FP32 = DType::float32, BF16 = DType::bfloat16, FP16 = DType::float16;
    const bool hf = swiglu.rounds_as_hf;
    const auto run =
        swiglu.dtype == BF16   ? hf ? swiglu_values<BF16, true> : swiglu_values<BF16, false>
          : swiglu.dtype == FP16 ? hf ? swiglu_values<FP16, true> : swiglu_values<FP16, false>
                                 : swiglu_values<FP32, true>;  // where nothing is rounded
    run(swiglu, begin, end);
}

}  // namespace glm4
