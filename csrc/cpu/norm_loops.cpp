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

// x as HF leaves it in the dtype, or as it is.
template <DType TYPE, bool HF>
static inline Floats rounded_as_hf(Floats x) {
    return HF ? rounded<TYPE>(x) : x;
}

template <DType TYPE, bool HF>
static inline Floats normalise(Floats x, float rstd, const char* weight, int count) {
    return load<TYPE>(weight, count) * rounded_as_hf<TYPE, HF>(x * rstd);
}

// One row of y from its values, each asked for once: rounded, or in groups with a scale each.
template <DType TYPE, bool HF, typename Value>
static inline void store_row(const Norm& norm, int64_t row, float* scratch, const Value& value) {
    const int64_t n = norm.n_cols, group = norm.group;
    if (!norm.scale) {
        char* y = norm.y + row * n * ITEM<TYPE>;
        for_each_piece(n, [&](int64_t i, int count) {
            store<TYPE>(y + i * ITEM<TYPE>, value(i, count), count);
        });
        return;
    }
    char* q = norm.y + row * n;
    float* scale = norm.scale + row * (n / group);
    for (int64_t first = 0; first < n; first += group) {
        Ints largest = {};
        for_each_piece(group, [&](int64_t i, int count) {
            const Floats y = rounded_as_hf<TYPE, HF>(value(first + i, count));
            memcpy(scratch + i, &y, 4 * count);
            largest = larger_magnitude(largest, load<DType::float32>(scratch + i, count));
        });
        *scale = from_bits(largest_lane(largest)) / limit_of(norm.y_dtype);
        // q is 0 where the scale is not a normal number.
        const bool usable = *scale >= 0x1p-126f && *scale <= 0x1.fffffep127f;
        const float steps_in_one = usable ? 1.0f / *scale : 0.0f;
        for_each_piece(group, [&](int64_t i, int count) {
            const Floats y = usable ? load<DType::float32>(scratch + i, count) : Floats{};
            store_quantised(norm.y_dtype, q + first + i, y * steps_in_one, count);
        });
        ++scale;
    }
}

template <DType TYPE, bool HF, bool ADDS, bool POST>
static void norm_row(const Norm& norm, int64_t row, float* scratch) {
    constexpr int64_t I = ITEM<TYPE>;
    const int64_t n = norm.n_cols;
    const char* x = norm.x + row * norm.stride_x * I;
    const char* residual = ADDS ? norm.residual + row * norm.stride_residual * I : nullptr;
    char* sum = ADDS ? norm.residual_out + row * n * I : nullptr;

    float post_rstd = 0.0f;
    if (POST) {
        SumOfSquares squares;
        squares.add(n, [&](int64_t i, int count) { return load<TYPE>(x + i * I, count); });
        post_rstd = squares.rstd(n, norm.eps);
    }

    const auto total = [&](int64_t i, int count) {
        Floats value = load<TYPE>(x + i * I, count);
        if (POST) {
            value = rounded_as_hf<TYPE, HF>(
                normalise<TYPE, HF>(value, post_rstd, norm.post_weight + i * I, count));
        }
        if (!ADDS) return value;
        return rounded_as_hf<TYPE, HF>(load<TYPE>(residual + i * I, count) + value);
    };
    SumOfSquares squares;
    squares.add(n, [&](int64_t i, int count) {
        const Floats value = total(i, count);
        if (ADDS && HF) {
            store_exact<TYPE>(sum + i * I, value, count);
        } else if (ADDS) {
            store<TYPE>(sum + i * I, value, count);
        }
        return value;
    });
    const float rstd = squares.rstd(n, norm.eps);

    store_row<TYPE, HF>(norm, row, scratch, [&](int64_t i, int count) {
        const Floats value = ADDS && HF ? load<TYPE>(sum + i * I, count) : total(i, count);
        return normalise<TYPE, HF>(value, rstd, norm.weight + i * I, count);
    });
}

template <DType TYPE, bool HF>
static void norm_rows(const Norm& norm, int64_t begin, int64_t end, float* scratch) {
    for (int64_t row = begin; row < end; ++row) {
        if (!norm.residual) {
            norm_row<TYPE, HF, false, false>(norm, row, scratch);
        } else if (!norm.post_weight) {
            norm_row<TYPE, HF, true, false>(norm, row, scratch);
        } else {
            norm_row<TYPE, HF, true, true>(norm, row, scratch);
        }
    }
}

void GLM4_VARIANT_NAME(norm_rows)(const Norm& norm, int64_t begin, int64_t end, float* scratch) {
    constexpr DType FP32 = DType::float32, BF16 = DType::bfloat16, FP16 = DType::float16;
    const bool hf = norm.rounds_as_hf;
    const auto run = norm.dtype == BF16   ? hf ? norm_rows<BF16, true> : norm_rows<BF16, false>
                       : norm.dtype == FP16 ? hf ? norm_rows<FP16, true> : norm_rows<FP16, false>
                                            : norm_rows<FP32, true>;  // where nothing is rounded
    run(norm, begin, end, scratch);
}

}  // namespace glm4
