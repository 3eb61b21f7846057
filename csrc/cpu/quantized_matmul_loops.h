// The inner loops in plain C++ that compilers vectorise; each instruction set's file includes them
// under its own flags. Everything here is `static`, and nothing of the standard library is used,
// so that no code of one file can end up in another.
#pragma once

#include "quantized_matmul.h"

namespace glm4 {

// out[k] = u[k] - offset
template <int BITS, typename Value>
static void unpack(const uint8_t* packed, int64_t count, int offset, Value* out) {
    for (int64_t k = 0; k < count; k += PIECE_BYTES * 8 / BITS, packed += PIECE_BYTES) {
        for (int j = 0; j < 16; ++j) {
            out[k + j] = Value(weight_in_piece<BITS>(packed, 0, j) - offset);
        }
        if (BITS == 8) continue;
        for (int j = 0; j < 16; ++j) {
            out[k + 16 + j] = Value(weight_in_piece<BITS>(packed, 1, j) - offset);
        }
    }
}

// dot[r] = sum of w[r][k] * x[k]; exact: at most 128 * 255 * 127 < 2^24.
static void multiply(const int16_t (*w)[MAX_CHUNK], const int16_t* x, int64_t count, int32_t* dot) {
    int32_t sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
    for (int64_t k = 0; k < count; ++k) {
        sum0 += int32_t(w[0][k]) * x[k];
        sum1 += int32_t(w[1][k]) * x[k];
        sum2 += int32_t(w[2][k]) * x[k];
        sum3 += int32_t(w[3][k]) * x[k];
    }
    dot[0] = sum0, dot[1] = sum1, dot[2] = sum2, dot[3] = sum3;
}

// The same in fp32: eight running sums a row, lane = k mod 8, added in one fixed order.
static void multiply(const float (*w)[MAX_CHUNK], const float* x, int64_t count, float* dot) {
    typedef float Lanes __attribute__((vector_size(32)));
    const auto load = [](Lanes* lanes, const float* from) { memcpy(lanes, from, sizeof(Lanes)); };
    Lanes sum[ROWS_PER_BLOCK] = {};
    for (int64_t k = 0; k < count; k += 8) {
        Lanes xk, wk;
        load(&xk, x + k);
        for (int r = 0; r < ROWS_PER_BLOCK; ++r) {
            load(&wk, w[r] + k);
            sum[r] += wk * xk;
        }
    }
    for (int r = 0; r < ROWS_PER_BLOCK; ++r) {
        const Lanes& s = sum[r];
        dot[r] = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
    }
}

template <typename Value, typename Sum, int BITS>
static void multiply_blocks(const QuantizedMatmul& problem, const Activations& activations,
                            int64_t begin, int64_t end, float* acc) {
    constexpr bool INTEGER = sizeof(Value) == sizeof(int16_t);
    const QuantizedWeight& w = problem.w;
    const Value* x = static_cast<const Value*>(activations.values);

    alignas(64) Value unpacked[ROWS_PER_BLOCK][MAX_CHUNK];
    float scale[ROWS_PER_BLOCK];
    int zero_point[ROWS_PER_BLOCK];

    const auto dequantize = [&](int64_t row0, int64_t k, int64_t count) {
        for (int r = 0; r < ROWS_PER_BLOCK; ++r) {
            const int64_t row = row0 + r < w.n ? row0 + r : w.n - 1;
            const int64_t group = group_index(w, row, k);
            scale[r] = scale_at(w, group);
            zero_point[r] = zero_point_at(w, group);
            const uint8_t* packed = w.packed + row * row_bytes(w) + k * BITS / 8;
            // Integers take the zero point off the whole sum instead.
            unpack<BITS>(packed, count, INTEGER ? 0 : zero_point[r], unpacked[r]);
        }
    };
    const auto accumulate = [&](int64_t m, int64_t chunk, int64_t k, int64_t count) {
        Sum dot[ROWS_PER_BLOCK];
        multiply(unpacked, x + m * w.k + k, count, dot);
        float* sum = acc + m * ROWS_PER_BLOCK;
        if (INTEGER) {
            const float step = activations.scale[m * activations.n_chunks + chunk];
            const int32_t total = activations.sum[m * activations.n_chunks + chunk];
            for (int r = 0; r < ROWS_PER_BLOCK; ++r) {
                sum[r] += (scale[r] * step) * float(int32_t(dot[r]) - zero_point[r] * total);
            }
        } else {
            for (int r = 0; r < ROWS_PER_BLOCK; ++r) sum[r] += scale[r] * float(dot[r]);
        }
    };
    const auto write_result = [&](int64_t m, int64_t row0) {
        for (int64_t r = 0; r < ROWS_PER_BLOCK && row0 + r < w.n; ++r) {
            const int64_t n = row0 + r;
            float y = acc[m * ROWS_PER_BLOCK + r];
            if (problem.bias) y += load_float(problem.bias, problem.dtype, n);
            store_float(problem.y, problem.dtype, m * w.n + n, y);
        }
    };

    for (int64_t block = begin; block < end; ++block) {
        const int64_t row0 = block * ROWS_PER_BLOCK;
        for (int64_t i = 0; i < problem.m * ROWS_PER_BLOCK; ++i) acc[i] = 0.0f;
        for (int64_t chunk = 0; chunk < activations.n_chunks; ++chunk) {
            const int64_t k = chunk * activations.chunk;
            const int64_t count = activations.chunk < w.k - k ? activations.chunk : w.k - k;
            dequantize(row0, k, count);
            for (int64_t m = 0; m < problem.m; ++m) accumulate(m, chunk, k, count);
        }
        for (int64_t m = 0; m < problem.m; ++m) write_result(m, row0);
    }
}

template <typename Value, typename Sum>
static void multiply_any_bits(const QuantizedMatmul& problem, const Activations& activations,
                              int64_t begin, int64_t end, float* acc) {
    if (problem.w.bits == 4) {
        multiply_blocks<Value, Sum, 4>(problem, activations, begin, end, acc);
    } else {
        multiply_blocks<Value, Sum, 8>(problem, activations, begin, end, acc);
    }
}

}  // namespace glm4
