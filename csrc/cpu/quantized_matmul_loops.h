// The loops of quantized_matmul, over 16 lanes = the 16 rows of a tile of W. Each instruction set's
// file defines `Lanes`, its 16 lanes, and includes this under its own flags. Everything is `static`
// and nothing of the standard library is used, so that no code of one file can end up in another.
//
// Lanes has
//   Int, Float                          16 x int32, 16 x fp32; + and * on Float by add, mul
//   load(int32*, float*), set(one)      all lanes from memory, or from one value
//   load_as_float(data, dtype, i)       16 values of any DType
//   dot32<BITS>(acc, w, x)              acc[n][m] += 32 columns of tile n times row m of x
//   unpack32<BITS>(w, out)              32 columns of a tile as floats, [32][16]
//   BIAS<BITS>                          what dot32 takes off every u
//   M_TILE                              rows of x that dot32 likes to take at once, at most
#pragma once

#include "quantized_matmul.h"

namespace glm4 {

using Int = Lanes::Int;
using Float = Lanes::Float;

// Bytes of W per panel that are read again for every M_TILE rows of x: they stay in L1.
constexpr int64_t PANEL_BYTES = 32 << 10;

// Integer sums are of q * (u - middle), exact; a zero point adds (middle - z) * total in fp32. The
// middle is the symmetric zero point, and close to most others: little cancels.
static Float zero_point_from_middle(const QuantizedWeight& w, int64_t at) {
    const Float z = Lanes::load_as_float(w.zero_point, w.zero_point_dtype, at);
    return Lanes::sub(z, Lanes::set(float(1 << (w.bits - 1))));
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- activations

struct Bfloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};
static inline float to_float(float x) { return x; }
static inline float to_float(Bfloat16 x) { return bfloat16_to_float(x.bits); }
static inline float to_float(Float16 x) { return float16_to_float(x.bits); }
static inline void from_float(float x, float* out) { *out = x; }
static inline void from_float(float x, Bfloat16* out) { out->bits = float_to_bfloat16(x); }
static inline void from_float(float x, Float16* out) { out->bits = float_to_float16(x); }

template <typename Value>
static void quantize_row_of(const QuantizedMatmul& problem, const Activations& a, int64_t m) {
    const QuantizedWeight& w = problem.w;
    const Value* x = static_cast<const Value*>(problem.x) + m * w.k;
    int8_t* q = a.q + m * a.stride;
    const int32_t bias = w.bits == 4 ? Lanes::BIAS<4> : Lanes::BIAS<8>;
    const int32_t middle = 1 << (w.bits - 1);
    float total = 0.0f;
    int64_t left_in_group = w.group_size, group = 0;
    for (int64_t c = 0, k = 0; c < a.n_chunks; ++c, k += a.chunk) {
        const int64_t count = smaller(a.chunk, w.k - k);
        float value[MAX_CHUNK];
        int32_t largest = 0;  // of |x| as an integer: its order is the numbers' and puts NaN last
        for (int64_t j = 0; j < count; ++j) {
            value[j] = to_float(x[k + j]);
            const int32_t magnitude = int32_t(bits_of(value[j]) & 0x7fffffffu);
            largest = magnitude > largest ? magnitude : largest;
        }
        const float step = from_bits(uint32_t(largest)) / 127.0f;
        const bool usable = largest < 0x7f800000 && step != 0.0f;
        const float divisor = usable ? step : 1.0f;
        int32_t sum = 0;
        for (int64_t j = 0; j < count; ++j) {
            // Nearest, ties to even: the sum has no room for a fraction.
            constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23
            const float shifted = value[j] / divisor + SHIFT;
            int32_t rounded = int32_t(bits_of(shifted)) - int32_t(0x4b400000);
            rounded = rounded > 127 ? 127 : rounded < -127 ? -127 : rounded;
            rounded = usable ? rounded : 0;
            q[k + j] = int8_t(rounded);
            sum += rounded;
        }
        a.step[m * a.n_chunks + c] = step;
        a.offset[m * a.n_chunks + c] = (bias - middle) * sum;
        total += step * float(sum);
        left_in_group -= count;
        if (left_in_group == 0) {
            if (a.total) a.total[m * (w.k / w.group_size) + group] = total;
            total = 0.0f, left_in_group = w.group_size, ++group;
        }
    }
}

static void quantize_row(const QuantizedMatmul& problem, const Activations& a, int64_t m) {
    switch (problem.dtype) {
        case DType::bfloat16:
            return quantize_row_of<Bfloat16>(problem, a, m);
        case DType::float16:
            return quantize_row_of<Float16>(problem, a, m);
        default:
            return quantize_row_of<float>(problem, a, m);
    }
}

template <typename Value>
static void convert_row_of(const QuantizedMatmul& problem, const Activations& a, int64_t m) {
    const int64_t k = problem.w.k;
    const Value* x = static_cast<const Value*>(problem.x) + m * k;
    for (int64_t j = 0; j < k; ++j) a.exact[m * k + j] = to_float(x[j]);
}

static void convert_row(const QuantizedMatmul& problem, const Activations& a, int64_t m) {
    switch (problem.dtype) {
        case DType::bfloat16:
            return convert_row_of<Bfloat16>(problem, a, m);
        case DType::float16:
            return convert_row_of<Float16>(problem, a, m);
        default:
            return convert_row_of<float>(problem, a, m);
    }
}

// ---- int8 activations

// c [MT][NT * 16] += columns k0 .. k1 of MT rows of x times NT tiles of W. GROUPED: the scale of W
// is applied group by group; else there is one per row, for `finish_rows` to apply.
template <int BITS, bool GROUPED, int MT, int NT>
static void multiply_tiles(const QuantizedWeight& w, const Activations& a, int64_t m0, int64_t tile,
                           int64_t k0, int64_t k1, float* c, int64_t c_stride) {
    const uint8_t* packed[NT];
    const int8_t* x[MT];
    const float* step[MT];
    const int32_t* offset[MT];
    for (int n = 0; n < NT; ++n) {
        packed[n] = w.packed + ((tile + n) * w.k + k0) * (TILE_ROWS * BITS / 8);
    }
    for (int m = 0; m < MT; ++m) {
        x[m] = a.q + (m0 + m) * a.stride + k0;
        step[m] = a.step + (m0 + m) * a.n_chunks + k0 / a.chunk;
        offset[m] = a.offset + (m0 + m) * a.n_chunks + k0 / a.chunk;
    }
    const int64_t n_groups = w.k / w.group_size;
    const int64_t group_columns = GROUPED ? w.group_size : k1 - k0;
    int64_t group = k0 / w.group_size;

    for (int64_t k = k0; k < k1; k += group_columns, ++group) {
        Float sum[NT][MT];
        for (int n = 0; n < NT; ++n) {
            for (int m = 0; m < MT; ++m) {
                sum[n][m] =
                    GROUPED ? Lanes::set(0.0f) : Lanes::load(c + m * c_stride + n * TILE_ROWS);
            }
        }
        for (int64_t left = group_columns; left > 0; left -= a.chunk) {
            Int acc[NT][MT];
            for (int m = 0; m < MT; ++m) {
                const Int start = Lanes::set(*offset[m]++);
                for (int n = 0; n < NT; ++n) acc[n][m] = start;
            }
            for (int64_t i = smaller(left, a.chunk); i > 0; i -= 32) {
                Lanes::dot32<BITS>(acc, packed, x);
                for (int n = 0; n < NT; ++n) packed[n] += 32 * TILE_ROWS * BITS / 8;
                for (int m = 0; m < MT; ++m) x[m] += 32;
            }
            for (int m = 0; m < MT; ++m) {
                const Float one_step = Lanes::set(*step[m]++);
                for (int n = 0; n < NT; ++n) {
                    sum[n][m] =
                        Lanes::add(sum[n][m], Lanes::mul(Lanes::to_float(acc[n][m]), one_step));
                }
            }
        }
        for (int n = 0; n < NT; ++n) {
            const int64_t at = ((tile + n) * n_groups + group) * TILE_ROWS;
            Float scale = Lanes::set(0.0f), zero_point = scale;
            if (GROUPED) scale = Lanes::load_as_float(w.scale, w.scale_dtype, at);
            if (GROUPED && w.zero_point) {
                zero_point = zero_point_from_middle(w, at);
            }
            for (int m = 0; m < MT; ++m) {
                float* out = c + m * c_stride + n * TILE_ROWS;
                if (!GROUPED) {
                    Lanes::store(out, sum[n][m]);
                    continue;
                }
                if (w.zero_point) {
                    const Float total = Lanes::set(a.total[(m0 + m) * n_groups + group]);
                    sum[n][m] = Lanes::sub(sum[n][m], Lanes::mul(zero_point, total));
                }
                Lanes::store(out, Lanes::add(Lanes::load(out), Lanes::mul(scale, sum[n][m])));
            }
        }
    }
}

// Per channel: c = scale * (c - zero point from the middle * total).
template <typename Total>
static void finish_rows(const QuantizedWeight& w, int64_t m, int64_t tile, int tiles, float* c,
                        const Total& total) {
    for (int n = 0; n < tiles; ++n) {
        const int64_t at = (tile + n) * TILE_ROWS;
        const Float scale = Lanes::load_as_float(w.scale, w.scale_dtype, at);
        for (int64_t row = 0; row < m; ++row) {
            float* out = c + row * tiles * TILE_ROWS + n * TILE_ROWS;
            Float sum = Lanes::load(out);
            if (w.zero_point) {
                const Float z = zero_point_from_middle(w, at);
                sum = Lanes::sub(sum, Lanes::mul(z, Lanes::set(total(row))));
            }
            Lanes::store(out, Lanes::mul(scale, sum));
        }
    }
}

template <int BITS, bool GROUPED, int NT>
static void multiply_rows(const QuantizedWeight& w, const Activations& a, int64_t m0, int64_t count,
                          int64_t tile, int64_t k0, int64_t k1, float* c, int64_t c_stride) {
    static_assert(Lanes::M_TILE <= 6, "");
    const auto rows = [&](auto multiply) { multiply(w, a, m0, tile, k0, k1, c, c_stride); };
    switch (count) {
        case 1:
            return rows(multiply_tiles<BITS, GROUPED, 1, NT>);
        case 2:
            return rows(multiply_tiles < BITS, GROUPED, (NT < 4 && Lanes::M_TILE >= 2) ? 2 : 1,
                        NT >);
        case 3:
            return rows(multiply_tiles < BITS, GROUPED, (NT < 4 && Lanes::M_TILE >= 3) ? 3 : 1,
                        NT >);
        case 4:
            return rows(multiply_tiles < BITS, GROUPED, (NT < 4 && Lanes::M_TILE >= 4) ? 4 : 1,
                        NT >);
        case 5:
            return rows(multiply_tiles < BITS, GROUPED, (NT < 4 && Lanes::M_TILE >= 5) ? 5 : 1,
                        NT >);
        default:
            return rows(multiply_tiles < BITS, GROUPED, (NT < 4 && Lanes::M_TILE >= 6) ? 6 : 1,
                        NT >);
    }
}

template <int BITS, bool GROUPED, int NT>
static void multiply_panel(const QuantizedMatmul& problem, const Activations& a, int64_t tile,
                           float* c) {
    const QuantizedWeight& w = problem.w;
    const int64_t c_stride = NT * TILE_ROWS, m = problem.m;
    for (int64_t i = 0; i < m * c_stride; ++i) c[i] = 0.0f;
    const int64_t m_tiles = (m + Lanes::M_TILE - 1) / Lanes::M_TILE;
    // Whole groups, or whole chunks; all of K where W is read only once.
    const int64_t columns = PANEL_BYTES * 8 / (NT * TILE_ROWS * BITS) / MAX_CHUNK * MAX_CHUNK;
    const int64_t k_step = m_tiles == 1 ? w.k : columns;
    for (int64_t k = 0; k < w.k; k += k_step) {
        const int64_t k1 = smaller(k + k_step, w.k);
        for (int64_t i = 0; i < m_tiles; ++i) {  // evenly: 8 rows are 4 and 4, not 6 and 2
            const int64_t m0 = m * i / m_tiles, m1 = m * (i + 1) / m_tiles;
            multiply_rows<BITS, GROUPED, NT>(w, a, m0, m1 - m0, tile, k, k1, c + m0 * c_stride,
                                             c_stride);
        }
    }
    if (!GROUPED) finish_rows(w, m, tile, NT, c, [&](int64_t row) { return a.total[row]; });
}

template <int BITS, bool GROUPED>
static void multiply_some(const QuantizedMatmul& problem, const Activations& a, int64_t tile,
                          int tiles, float* c) {
    if (tiles == 4) return multiply_panel<BITS, GROUPED, 4>(problem, a, tile, c);
    if (tiles == 2) return multiply_panel<BITS, GROUPED, 2>(problem, a, tile, c);
    return multiply_panel<BITS, GROUPED, 1>(problem, a, tile, c);
}

static void multiply(const QuantizedMatmul& problem, const Activations& a, int64_t tile, int tiles,
                     float* c) {
    const QuantizedWeight& w = problem.w;
    const bool grouped = w.group_size < w.k;
    if (w.bits == 4) {
        grouped ? multiply_some<4, true>(problem, a, tile, tiles, c)
                : multiply_some<4, false>(problem, a, tile, tiles, c);
    } else {
        grouped ? multiply_some<8, true>(problem, a, tile, tiles, c)
                : multiply_some<8, false>(problem, a, tile, tiles, c);
    }
}

// ---- exact activations

// c [count][16] += scale * (x times `columns` columns of one tile, as floats).
template <int MT>
static void multiply_floats(const float* x, int64_t stride, const float* panel, int64_t columns,
                            Float scale, float* c, int64_t c_stride) {
    Float sum[MT];
    for (int m = 0; m < MT; ++m) sum[m] = Lanes::set(0.0f);
    for (int64_t start = 0; start < columns; start += 16) {  // sums of sums round less
        Float part[MT];
        for (int m = 0; m < MT; ++m) part[m] = Lanes::set(0.0f);
        for (int64_t k = start; k < start + 16; ++k) {
            const Float weight = Lanes::load(panel + k * TILE_ROWS);
            for (int m = 0; m < MT; ++m) {
                part[m] = Lanes::add(part[m], Lanes::mul(weight, Lanes::set(x[m * stride + k])));
            }
        }
        for (int m = 0; m < MT; ++m) sum[m] = Lanes::add(sum[m], part[m]);
    }
    for (int m = 0; m < MT; ++m) {
        float* out = c + m * c_stride;
        Lanes::store(out, Lanes::add(Lanes::load(out), Lanes::mul(scale, sum[m])));
    }
}

template <int BITS>
static void multiply_exact_of(const QuantizedMatmul& problem, const Activations& a, int64_t tile,
                              int tiles, float* c) {
    const QuantizedWeight& w = problem.w;
    const int64_t m = problem.m, c_stride = tiles * TILE_ROWS, n_groups = w.k / w.group_size;
    for (int64_t i = 0; i < m * c_stride; ++i) c[i] = 0.0f;
    alignas(64) float panel[MAX_CHUNK * TILE_ROWS];
    for (int n = 0; n < tiles; ++n) {
        for (int64_t k = 0; k < w.k; k += a.chunk) {
            const int64_t columns = smaller(a.chunk, w.k - k);
            const int64_t at = ((tile + n) * n_groups + k / w.group_size) * TILE_ROWS;
            const Float scale = Lanes::load_as_float(w.scale, w.scale_dtype, at);
            const Float z = w.zero_point
                                ? Lanes::load_as_float(w.zero_point, w.zero_point_dtype, at)
                                : Lanes::set(float(1 << (BITS - 1)));
            const uint8_t* packed = w.packed + ((tile + n) * w.k + k) * (TILE_ROWS * BITS / 8);
            for (int64_t j = 0; j < columns; j += 32) {
                Lanes::unpack32<BITS>(packed + j * (TILE_ROWS * BITS / 8), z,
                                      panel + j * TILE_ROWS);
            }
            int64_t row = 0;
            float* out = c + n * TILE_ROWS;
            const float* x = a.exact + k;
            for (; row + 8 <= m; row += 8) {
                multiply_floats<8>(x + row * w.k, w.k, panel, columns, scale, out + row * c_stride,
                                   c_stride);
            }
            for (; row < m; ++row) {
                multiply_floats<1>(x + row * w.k, w.k, panel, columns, scale, out + row * c_stride,
                                   c_stride);
            }
        }
    }
}

static void multiply_exact(const QuantizedMatmul& problem, const Activations& a, int64_t tile,
                           int tiles, float* c) {
    problem.w.bits == 4 ? multiply_exact_of<4>(problem, a, tile, tiles, c)
                        : multiply_exact_of<8>(problem, a, tile, tiles, c);
}

// ---- results

template <typename Value>
static void write_result_of(const QuantizedMatmul& problem, int64_t tile, int tiles,
                            const float* c) {
    const int64_t n0 = tile * TILE_ROWS, n = problem.w.n;
    const int64_t c_stride = tiles * TILE_ROWS, count = smaller(c_stride, n - n0);
    const Value* bias = static_cast<const Value*>(problem.bias);
    for (int64_t m = 0; m < problem.m; ++m, c += c_stride) {
        Value* y = static_cast<Value*>(problem.y) + m * n + n0;
        if (bias) {
            for (int64_t i = 0; i < count; ++i) from_float(c[i] + to_float(bias[n0 + i]), y + i);
        } else {
            for (int64_t i = 0; i < count; ++i) from_float(c[i], y + i);
        }
    }
}

static void write_result(const QuantizedMatmul& problem, int64_t tile, int tiles, const float* c) {
    switch (problem.dtype) {
        case DType::bfloat16:
            return write_result_of<Bfloat16>(problem, tile, tiles, c);
        case DType::float16:
            return write_result_of<Float16>(problem, tile, tiles, c);
        default:
            return write_result_of<float>(problem, tile, tiles, c);
    }
}

// e^x for x <= 0, within 2 units in the last place; 0 below the range. By Cody and Waite: x = n ln2
// + r, |r| <= ln2 / 2, and the Taylor series of e^r to r^7.
static inline float exp_of_negative(float x) {
    constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23
    const float clamped = x < -87.0f ? -87.0f : x;
    const float shifted = clamped * 1.44269504f + SHIFT;
    const float n = shifted - SHIFT;
    const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.98412698e-4f;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    const float power = from_bits((bits_of(shifted) - 0x4b400000u + 127u) << 23);
    return x < -87.0f ? 0.0f : p * power;
}

static inline float silu(float x) {
    const float e = exp_of_negative(x < 0.0f ? x : -x);
    const float y = x / (1.0f + e);
    return x < 0.0f ? e * y : y;
}

template <typename Value>
static void write_swiglu_of(const QuantizedMatmul& problem, int64_t tile, int tiles, float* gate,
                            float* up) {
    const int64_t n0 = tile * TILE_ROWS, half = problem.w.n / 2, count = tiles * TILE_ROWS;
    const Value* bias = static_cast<const Value*>(problem.bias);
    const auto rounded = [](float x) {
        Value value;
        from_float(x, &value);
        return to_float(value);
    };
    for (int64_t m = 0; m < problem.m; ++m, gate += count, up += count) {
        Value* y = static_cast<Value*>(problem.y) + m * half + n0;
        if (bias) {
            for (int64_t i = 0; i < count; ++i) gate[i] += to_float(bias[n0 + i]);
            for (int64_t i = 0; i < count; ++i) up[i] += to_float(bias[half + n0 + i]);
        }
        for (int64_t i = 0; i < count; ++i) {
            from_float(rounded(silu(rounded(gate[i]))) * rounded(up[i]), y + i);
        }
    }
}

static void write_swiglu(const QuantizedMatmul& problem, int64_t tile, int tiles, float* gate,
                         float* up) {
    switch (problem.dtype) {
        case DType::bfloat16:
            return write_swiglu_of<Bfloat16>(problem, tile, tiles, gate, up);
        case DType::float16:
            return write_swiglu_of<Float16>(problem, tile, tiles, gate, up);
        default:
            return write_swiglu_of<float>(problem, tile, tiles, gate, up);
    }
}

static int panel_tiles(int64_t m) { return m == 1 ? Lanes::ONE_ROW_TILES : Lanes::N_TILES; }

#define GLM4_MULTIPLY_VARIANT(name)                                                           \
    {                                                                                         \
        name, panel_tiles, quantize_row, convert_row, multiply, multiply_exact, write_result, \
            write_swiglu                                                                      \
    }

}  // namespace glm4
