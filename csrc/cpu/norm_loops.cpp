// The rows of norm.h, compiled once for every instruction set.
//
// A row is read twice, the second time from L1. Squares are summed in 64 lanes, whatever the width
// of a vector, and the lanes in one fixed order.
#include <math.h>

#include "lanes.h"
#include "norm.h"
#include "simd.h"

namespace glm4 {

constexpr int SUM_LANES = 64;

struct SumOfSquares {
    Floats part[SUM_LANES / LANES] = {};

    // part[i] takes the vector at i * LANES of every SUM_LANES values.
    template <typename Value>
    void add(int64_t n, const Value& value) {
        constexpr int PARTS = SUM_LANES / LANES;
        int64_t i = 0;
        for (; i + SUM_LANES <= n; i += SUM_LANES) {
            for (int p = 0; p < PARTS; ++p) add_square(p, value(i + p * LANES, LANES));
        }
        for (int p = 0; i < n; ++p, i += LANES) {
            add_square(p, value(i, n - i < LANES ? int(n - i) : LANES));
        }
    }

    void add_square(int p, Floats x) { part[p] += x * x; }

    // rsqrt(mean + eps)
    float rstd(int64_t n, float eps) const {
        float lane[SUM_LANES];
        memcpy(lane, part, sizeof(lane));
        for (int width = SUM_LANES / 2; width > 0; width /= 2) {
            for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
        }
        return 1.0f / sqrtf(lane[0] / float(n) + eps);
    }
};

template <DType TYPE>
static inline Floats normalise(Floats x, float rstd, const char* weight, int count) {
    return load<TYPE>(weight, count) * rounded<TYPE>(x * rstd);
}

template <DType TYPE, bool ADDS, bool POST>
static void norm_row(const Norm& norm, int64_t row) {
    constexpr int64_t I = ITEM<TYPE>;
    const int64_t n = norm.n_cols;
    const char* x = norm.x + row * norm.stride_x * I;
    const char* residual = ADDS ? norm.residual + row * norm.stride_residual * I : nullptr;
    char* y = norm.y + row * n * I;
    char* sum = ADDS ? norm.residual_out + row * n * I : nullptr;

    float post_rstd = 0.0f;
    if (POST) {
        SumOfSquares squares;
        squares.add(n, [&](int64_t i, int count) { return load<TYPE>(x + i * I, count); });
        post_rstd = squares.rstd(n, norm.eps);
    }

    SumOfSquares squares;
    squares.add(n, [&](int64_t i, int count) {
        Floats value = load<TYPE>(x + i * I, count);
        if (POST) {
            value =
                rounded<TYPE>(normalise<TYPE>(value, post_rstd, norm.post_weight + i * I, count));
        }
        if (ADDS) {
            value = rounded<TYPE>(load<TYPE>(residual + i * I, count) + value);
            store_exact<TYPE>(sum + i * I, value, count);
        }
        return value;
    });
    const float rstd = squares.rstd(n, norm.eps);

    const char* normed = ADDS ? sum : x;
    for_each_piece(n, [&](int64_t i, int count) {
        const Floats value = load<TYPE>(normed + i * I, count);
        store<TYPE>(y + i * I, normalise<TYPE>(value, rstd, norm.weight + i * I, count), count);
    });
}

template <DType TYPE>
static void norm_rows(const Norm& norm, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        if (!norm.residual) {
            norm_row<TYPE, false, false>(norm, row);
        } else if (!norm.post_weight) {
            norm_row<TYPE, true, false>(norm, row);
        } else {
            norm_row<TYPE, true, true>(norm, row);
        }
    }
}

void GLM4_VARIANT_NAME(norm_rows)(const Norm& norm, int64_t begin, int64_t end) {
    if (norm.dtype == DType::bfloat16) return norm_rows<DType::bfloat16>(norm, begin, end);
    if (norm.dtype == DType::float16) return norm_rows<DType::float16>(norm, begin, end);
    norm_rows<DType::float32>(norm, begin, end);
}

}  // namespace glm4
