// The loops of quantized_matmul, over 16 lanes = the 16 rows of a tile of W. Each instruction set's
// file defines `Lanes`, its 16 lanes, and includes this under its own flags. Everything is `static`
// and nothing of the standard library is used, so that no code of one file can end up in another.
//
// Lanes has
//   Int, Float                          16 x int32, 16 x fp32; add, sub, mul, to_float
//   load(int32*, float*), set(one)      all lanes from memory, or from one value
//   load_as_float(data, dtype, i)       16 values of any DType
//   store_as(data, dtype, i, x)         the reverse, for float types: float_formats.h's rounding
//   larger_magnitude(a, x)              max(a, bits of |x|): NaN is the largest
//   nearest(x)                          to the nearest integer, ties to even
//   clamp_and_store(q, x)               -127 .. 127 as int8; returns them
//   largest(x), total(x)                across lanes
//   dot32<BITS, STREAMS>(acc, w, x)     acc[n][m] += 32 columns of tile n times row m of x, from
//                                       x [8][MT][4]; if W streams, what it prefetches of it takes
//                                       no room in L2 and L3
//   unpack32<BITS>(w, z, out)           u - z of 32 columns of a tile, [32][16]
//   BIAS<BITS>                          what dot32 takes off every u
//   M_TILE                              rows of x that dot32 likes to take at once, at most
//   N_TILES, FEW_ROWS_TILES             tiles of W it likes to; for M up to FEW_ROWS
//   by_hand(MT, NT)                     whether it has its own add_chunks and add_groups for those
#pragma once

#include "quantized_matmul.h"

namespace glm4 {

using Int = Lanes::Int;
using Float = Lanes::Float;

// Columns of W that are read again for every M_TILE rows of x, at most: two tiles of them stay in
// L2.
constexpr int64_t PANEL_COLUMNS = 4096;

// Integer sums are of q * (u - middle), exact; a zero point adds (middle - z) * total in fp32. The
// middle is the symmetric zero point, and close to most others: little cancels.
static Float zero_point_from_middle(const QuantizedWeight& w, int64_t at) {
    const Float z = Lanes::load_as_float(w.zero_point, w.zero_point_dtype, at);
    return Lanes::sub(z, Lanes::set(float(1 << (w.bits - 1))));
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The rows of x, in runs of at most M_TILE that are multiplied together; evenly: 8 rows are 4 and
// 4, not 6 and 2.
struct Runs {
    int64_t m, count;
    explicit Runs(int64_t rows) : m(rows), count((rows + Lanes::M_TILE - 1) / Lanes::M_TILE) {}
    int64_t start(int64_t run) const { return m * run / count; }
    int64_t of_row(int64_t row) const { return ((row + 1) * count - 1) / m; }
};

// ---- activations

// Below it (and it is below what any activation is) 1 / step may overflow: such a chunk is zero.
constexpr float SMALLEST_STEP = 1.17549435e-38f;

// Rounds the `n_rows` rows of x from m0 on, which are one run, chunk by chunk.
static void quantize_run(const QuantizedMatmul& problem, const Activations& a, int64_t m0,
                         int64_t n_rows) {
    const QuantizedWeight& w = problem.w;
    int8_t* q = a.q + m0 * w.k;
    float* step = a.step + m0 * a.n_chunks;
    int32_t* offset = a.offset + m0 * a.n_chunks;
    float* total = a.total ? a.total + m0 * (w.k / w.group_size) : nullptr;
    const int32_t bias = w.bits == 4 ? Lanes::BIAS<4> : Lanes::BIAS<8>;
    const int32_t middle = 1 << (w.bits - 1);
    const auto load = [&](int64_t row, int64_t k) {
        return Lanes::load_as_float(problem.x, problem.dtype, (m0 + row) * w.k + k);
    };
    Float value[Lanes::M_TILE][MAX_CHUNK / TILE_ROWS];
    alignas(64) int8_t rounded[Lanes::M_TILE][MAX_CHUNK];
    float steps_in_one[Lanes::M_TILE], totals[Lanes::M_TILE] = {};
    int64_t left_in_group = w.group_size;
    for (int64_t k = 0; k < w.k; k += a.chunk, step += n_rows, offset += n_rows) {
        const int64_t count = smaller(a.chunk, w.k - k);
        for (int64_t row = 0; row < n_rows; ++row) {
            Int magnitude = Lanes::set(int32_t(0));
            for (int64_t j = 0; j < count; j += TILE_ROWS) {
                value[row][j / TILE_ROWS] = load(row, k + j);
                magnitude = Lanes::larger_magnitude(magnitude, value[row][j / TILE_ROWS]);
            }
            const int32_t largest = Lanes::largest(magnitude);
            step[row] = from_bits(uint32_t(largest)) / 127.0f;
            const bool usable = largest < 0x7f800000 && step[row] >= SMALLEST_STEP;
            steps_in_one[row] = usable ? 1.0f / step[row] : 0.0f;
        }
        for (int64_t row = 0; row < n_rows; ++row) {
            int32_t sum = 0;
            if (steps_in_one[row] != 0.0f) {
                const Float factor = Lanes::set(steps_in_one[row]);
                Int sums = Lanes::set(int32_t(0));
                for (int64_t j = 0; j < count; j += TILE_ROWS) {
                    const Int nearest =
                        Lanes::nearest(Lanes::mul(value[row][j / TILE_ROWS], factor));
                    sums = Lanes::add(sums, Lanes::clamp_and_store(rounded[row] + j, nearest));
                }
                sum = Lanes::total(sums);
            } else {
                memset(rounded[row], 0, sizeof(rounded[row]));
            }
            offset[row] = (bias - middle) * sum;
            totals[row] += step[row] * float(sum);
        }
        if (n_rows == 1) memcpy(q, rounded, size_t(count)), q += count;
        for (int64_t j = 0; n_rows > 1 && j < count; j += 4) {
            for (int64_t row = 0; row < n_rows; ++row, q += 4) memcpy(q, rounded[row] + j, 4);
        }
        left_in_group -= count;
        if (left_in_group > 0) continue;
        left_in_group = w.group_size;
        for (int64_t row = 0; row < n_rows; ++row) {
            if (a.total) *total++ = totals[row];
            totals[row] = 0.0f;
        }
    }
}

static void quantize_rows(const QuantizedMatmul& problem, const Activations& a, int64_t m0,
                          int64_t m1) {
    const Runs runs(problem.m);
    for (int64_t run = runs.of_row(m0); m0 < m1; m0 = runs.start(++run)) {
        quantize_run(problem, a, m0, runs.start(run + 1) - m0);
    }
}

static void convert_rows(const QuantizedMatmul& problem, const Activations& a, int64_t m0,
                         int64_t m1) {
    for (int64_t i = m0 * problem.w.k; i < m1 * problem.w.k; i += TILE_ROWS) {
        Lanes::store(a.exact + i, Lanes::load_as_float(problem.x, problem.dtype, i));
    }
}

// ---- int8 activations

// sums [MT][NT * 16] += chunks of x times NT tiles of W: for each chunk, step * its integer sum.
template <int BITS, bool STREAMS, int MT, int NT>
__attribute__((always_inline)) static inline void add_chunks_here(
    const uint8_t* const (&w)[NT], const int8_t* x, const int32_t* offset, const float* step,
    int64_t columns, int64_t chunk, float* sums, Prefetch& prefetch) {
    if constexpr (Lanes::by_hand(MT, NT)) {
        return Lanes::template add_chunks<BITS, MT>(w, x, offset, step, columns, chunk, sums,
                                                    prefetch);
    }
    const uint8_t* packed[NT];
    Float sum[NT][MT];
    for (int n = 0; n < NT; ++n) {
        packed[n] = w[n];
        for (int m = 0; m < MT; ++m) sum[n][m] = Lanes::load(sums + (m * NT + n) * TILE_ROWS);
    }
    for (int64_t left = columns; left > 0; left -= chunk) {
        Int acc[NT][MT];
        for (int m = 0; m < MT; ++m) {
            const Int start = Lanes::set(*offset++);
            for (int n = 0; n < NT; ++n) acc[n][m] = start;
        }
        for (int64_t i = smaller(left, chunk); i > 0; i -= 32) {
            Lanes::dot32<BITS, STREAMS>(acc, packed, x);
            for (int n = 0; n < NT; ++n) packed[n] += 32 * TILE_ROWS * BITS / 8;
            x += 32 * MT;
        }
        for (int m = 0; m < MT; ++m) {
            const Float one_step = Lanes::set(*step++);
            for (int n = 0; n < NT; ++n) {
                const Float product = Lanes::mul(Lanes::to_float(acc[n][m]), one_step);
                sum[n][m] = Lanes::add(sum[n][m], product);
            }
        }
    }
    for (int n = 0; n < NT; ++n) {
        for (int m = 0; m < MT; ++m) Lanes::store(sums + (m * NT + n) * TILE_ROWS, sum[n][m]);
    }
}

// A single row's sums of a group stay in registers; for more it would be the wrong ones that do.
template <int BITS, bool STREAMS, int MT, int NT>
static void add_chunks(const uint8_t* const (&w)[NT], const int8_t* x, const int32_t* offset,
                       const float* step, int64_t columns, int64_t chunk, float* sums,
                       Prefetch& prefetch) {
    add_chunks_here<BITS, STREAMS, MT, NT>(w, x, offset, step, columns, chunk, sums, prefetch);
}

// c [MT][NT * 16] += columns k0 .. k1 of MT rows of x times NT tiles of W. GROUPED: the scale of W
// is applied group by group; else there is one per row, for `finish_rows` to apply. `factors`: see
// `load_factors`; for Lanes that work by hand.
//
// Not inlined: its loop needs the registers that callers would take.
template <int BITS, bool GROUPED, bool STREAMS, int MT, int NT>
__attribute__((noinline)) static void multiply_tiles(const QuantizedWeight& w, const Activations& a,
                                                     int64_t m0, int64_t tile, int64_t k0,
                                                     int64_t k1, const float* factors, float* c,
                                                     Prefetch& prefetch) {
    const uint8_t* packed[NT];
    for (int n = 0; n < NT; ++n) {
        packed[n] = w.packed + ((tile + n) * w.k + k0) * (TILE_ROWS * BITS / 8);
    }
    const int8_t* x = a.q + m0 * w.k + k0 * MT;
    const float* step = a.step + m0 * a.n_chunks + k0 / a.chunk * MT;
    const int32_t* offset = a.offset + m0 * a.n_chunks + k0 / a.chunk * MT;
    if (!GROUPED) {
        return add_chunks<BITS, STREAMS, MT, NT>(packed, x, offset, step, k1 - k0, a.chunk, c,
                                                 prefetch);
    }
    const int64_t n_groups = w.k / w.group_size, chunks = w.group_size / a.chunk;
    const float* total = a.total + m0 * n_groups + k0 / w.group_size * MT;
    if constexpr (Lanes::by_hand(MT, NT)) {
        return Lanes::template add_groups<BITS, MT>(
            packed, x, offset, step, total, factors, w.zero_point != nullptr,
            (k1 - k0) / w.group_size, chunks, a.chunk, c, prefetch);
    }
    for (int64_t group = k0 / w.group_size; group < k1 / w.group_size; ++group, total += MT) {
        alignas(64) float sums[MT * NT * TILE_ROWS];
        for (float& sum : sums) sum = 0.0f;
        constexpr auto add = MT * NT == 1 ? add_chunks_here<BITS, STREAMS, MT, NT>
                                          : add_chunks<BITS, STREAMS, MT, NT>;
        add(packed, x, offset, step, w.group_size, a.chunk, sums, prefetch);
        for (int n = 0; n < NT; ++n) packed[n] += w.group_size * TILE_ROWS * BITS / 8;
        x += w.group_size * MT, step += chunks * MT, offset += chunks * MT;

        for (int n = 0; n < NT; ++n) {
            const int64_t at = ((tile + n) * n_groups + group) * TILE_ROWS;
            if (w.zero_point) {
                const Float zero_point = zero_point_from_middle(w, at);
                for (int m = 0; m < MT; ++m) {
                    float* sum = sums + (m * NT + n) * TILE_ROWS;
                    const Float taken = Lanes::mul(zero_point, Lanes::set(total[m]));
                    Lanes::store(sum, Lanes::sub(Lanes::load(sum), taken));
                }
            }
            const Float scale = Lanes::load_as_float(w.scale, w.scale_dtype, at);
            for (int m = 0; m < MT; ++m) {
                float* out = c + (m * NT + n) * TILE_ROWS;
                const Float sum = Lanes::load(sums + (m * NT + n) * TILE_ROWS);
                Lanes::store(out, Lanes::add(Lanes::load(out), Lanes::mul(scale, sum)));
            }
        }
    }
}

// Per channel: c = scale * (c - zero point from the middle * total).
static void finish_rows(const QuantizedWeight& w, const Part& part, float* c, const float* total) {
    for (int n = 0; n < part.tiles; ++n) {
        const int64_t at = (part.tile + n) * TILE_ROWS;
        const Float scale = Lanes::load_as_float(w.scale, w.scale_dtype, at);
        for (int64_t row = part.m0; row < part.m1; ++row) {
            float* out = c + ((row - part.m0) * part.tiles + n) * TILE_ROWS;
            Float sum = Lanes::load(out);
            if (w.zero_point) {
                const Float z = zero_point_from_middle(w, at);
                sum = Lanes::sub(sum, Lanes::mul(z, Lanes::set(total[row])));
            }
            Lanes::store(out, Lanes::mul(scale, sum));
        }
    }
}

// For each group of columns k0 .. k1: the scales of NT tiles, then, where there are any, their zero
// points from the middle; as floats, so that they are converted once for all rows of x.
template <int NT>
static void load_factors(const QuantizedWeight& w, int64_t tile, int64_t k0, int64_t k1,
                         float* factors) {
    const int64_t n_groups = w.k / w.group_size;
    for (int64_t group = k0 / w.group_size; group < k1 / w.group_size; ++group) {
        for (int n = 0; n < NT; ++n, factors += TILE_ROWS) {
            const int64_t at = ((tile + n) * n_groups + group) * TILE_ROWS;
            Lanes::store(factors, Lanes::load_as_float(w.scale, w.scale_dtype, at));
        }
        if (!w.zero_point) continue;
        for (int n = 0; n < NT; ++n, factors += TILE_ROWS) {
            const int64_t at = ((tile + n) * n_groups + group) * TILE_ROWS;
            Lanes::store(factors, zero_point_from_middle(w, at));
        }
    }
}

template <int BITS, bool GROUPED, bool STREAMS, int NT>
static void multiply_rows(const QuantizedWeight& w, const Activations& a, int64_t m0, int64_t count,
                          int64_t tile, int64_t k0, int64_t k1, const float* factors, float* c,
                          Prefetch& prefetch) {
    static_assert(Lanes::M_TILE <= 6, "");
    const auto rows = [&](auto multiply) {
        multiply(w, a, m0, tile, k0, k1, factors, c, prefetch);
    };
    constexpr int MOST = Lanes::M_TILE;  // others are not compiled
    switch (count) {
        case 1:
            return rows(multiply_tiles<BITS, GROUPED, STREAMS, 1, NT>);
        case 2:
            return rows(multiply_tiles<BITS, GROUPED, STREAMS, (MOST < 2 ? 1 : 2), NT>);
        case 3:
            return rows(multiply_tiles<BITS, GROUPED, STREAMS, (MOST < 3 ? 1 : 3), NT>);
        case 4:
            return rows(multiply_tiles<BITS, GROUPED, STREAMS, (MOST < 4 ? 1 : 4), NT>);
        case 5:
            return rows(multiply_tiles<BITS, GROUPED, STREAMS, (MOST < 5 ? 1 : 5), NT>);
        default:
            return rows(multiply_tiles<BITS, GROUPED, STREAMS, (MOST < 6 ? 1 : 6), NT>);
    }
}

// Brings the lines of y in that a panel's result will go to: a row is a line, far from the next.
static void ask_for_result(const QuantizedMatmul& problem, int64_t m0, int64_t rows, int64_t tile) {
    const int64_t columns = problem.swiglu ? problem.w.n / 2 : problem.w.n;
    if (tile * TILE_ROWS >= columns) return;  // up: its gate has asked
    const int64_t item = size_of(problem.dtype);
    const char* line =
        static_cast<const char*>(problem.y) + (m0 * columns + tile * TILE_ROWS) * item;
    for (int64_t row = 0; row < rows; ++row, line += columns * item) __builtin_prefetch(line, 1);
}

template <int BITS, bool GROUPED, bool STREAMS, int NT>
static void multiply_panel(const QuantizedMatmul& problem, const Activations& a, const Part& part,
                           float* c) {
    const QuantizedWeight& w = problem.w;
    const int64_t c_stride = NT * TILE_ROWS;
    for (int64_t i = 0; i < (part.m1 - part.m0) * c_stride; ++i) c[i] = 0.0f;
    const Runs runs(problem.m);
    const int64_t first = runs.of_row(part.m0), last = runs.of_row(part.m1 - 1);
    // Whole groups, or whole chunks; all of K where W is read only once.
    const bool again = first != last || Lanes::by_hand(int(problem.m), NT);
    const int64_t k_step = again ? PANEL_COLUMNS : w.k;
    alignas(64) float factors[GROUPED && NT == 2 ? PANEL_COLUMNS / 32 * 2 * NT * TILE_ROWS : 1];
    constexpr int64_t LINES = NT * TILE_ROWS * 32 * BITS / 8 / 64;  // of 32 columns of a panel
    const int64_t n_runs = last - first + 1;
    Prefetch prefetch{w.packed + (part.tile + NT) * w.k * (TILE_ROWS * BITS / 8),
                      n_runs == 1 ? 1 : (LINES + n_runs - 1) / n_runs};
    for (int64_t k = 0; k < w.k; k += k_step) {
        const int64_t k1 = smaller(k + k_step, w.k);
        if (GROUPED && again && NT == 2) load_factors<NT>(w, part.tile, k, k1, factors);
        for (int64_t run = first; run <= last; ++run) {
            const int64_t m0 = runs.start(run), rows = runs.start(run + 1) - m0;
            if (again && k1 == w.k) ask_for_result(problem, m0, rows, part.tile);
            multiply_rows<BITS, GROUPED, STREAMS, NT>(w, a, m0, rows, part.tile, k, k1, factors,
                                                      c + (m0 - part.m0) * c_stride, prefetch);
        }
    }
    if (!GROUPED) finish_rows(w, part, c, a.total);
}

// A weight of so many bytes that is read once a call is not in cache at the next one: a model has
// some hundred like it. Left in L2 and L3 it would only push out what the ops between two matrices
// need.
constexpr int64_t STREAMED_BYTES = 6 << 20;

template <int BITS, bool GROUPED>
static void multiply_some(const QuantizedMatmul& problem, const Activations& a, const Part& part,
                          float* c) {
    const QuantizedWeight& w = problem.w;
    if (part.tiles == 2) return multiply_panel<BITS, GROUPED, false, 2>(problem, a, part, c);
    if (problem.m <= Lanes::FEW_ROWS && w.n * row_bytes(w) >= STREAMED_BYTES) {
        return multiply_panel<BITS, GROUPED, true, 1>(problem, a, part, c);
    }
    multiply_panel<BITS, GROUPED, false, 1>(problem, a, part, c);
}

static void multiply(const QuantizedMatmul& problem, const Activations& a, const Part& part,
                     float* c) {
    const QuantizedWeight& w = problem.w;
    const bool grouped = w.group_size < w.k;
    if (w.bits == 4) {
        grouped ? multiply_some<4, true>(problem, a, part, c)
                : multiply_some<4, false>(problem, a, part, c);
    } else {
        grouped ? multiply_some<8, true>(problem, a, part, c)
                : multiply_some<8, false>(problem, a, part, c);
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
static void multiply_exact_of(const QuantizedMatmul& problem, const Activations& a,
                              const Part& part, float* c) {
    const QuantizedWeight& w = problem.w;
    const int64_t m = part.m1 - part.m0, n_groups = w.k / w.group_size;
    const int64_t tile = part.tile, c_stride = part.tiles * TILE_ROWS;
    for (int64_t i = 0; i < m * c_stride; ++i) c[i] = 0.0f;
    alignas(64) float panel[MAX_CHUNK * TILE_ROWS];
    for (int n = 0; n < part.tiles; ++n) {
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
            const float* x = a.exact + part.m0 * w.k + k;
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

static void multiply_exact(const QuantizedMatmul& problem, const Activations& a, const Part& part,
                           float* c) {
    problem.w.bits == 4 ? multiply_exact_of<4>(problem, a, part, c)
                        : multiply_exact_of<8>(problem, a, part, c);
}

// ---- results

// y[i] .. y[i + 15] = x; only the first `count` where there are fewer.
static void write_lanes(const QuantizedMatmul& problem, int64_t i, int64_t count, const Float& x) {
    if (count >= TILE_ROWS) return Lanes::store_as(problem.y, problem.dtype, i, x);
    float lanes[TILE_ROWS];
    Lanes::store(lanes, x);
    for (int64_t j = 0; j < count; ++j) store_float(problem.y, problem.dtype, i + j, lanes[j]);
}

// bias[n] .. bias[n + 15], zeros past the last.
static Float bias_lanes(const QuantizedMatmul& problem, int64_t n) {
    const int64_t count = problem.w.n - n;
    if (count >= TILE_ROWS) return Lanes::load_as_float(problem.bias, problem.dtype, n);
    float lanes[TILE_ROWS] = {};
    for (int64_t j = 0; j < count; ++j) lanes[j] = load_float(problem.bias, problem.dtype, n + j);
    return Lanes::load(lanes);
}

static void write_result(const QuantizedMatmul& problem, const Part& part, const float* c) {
    for (int64_t m = part.m0; m < part.m1; ++m) {
        for (int tile = 0; tile < part.tiles; ++tile, c += TILE_ROWS) {
            const int64_t n = (part.tile + tile) * TILE_ROWS;
            Float y = Lanes::load(c);
            if (problem.bias) y = Lanes::add(y, bias_lanes(problem, n));
            write_lanes(problem, m * problem.w.n + n, problem.w.n - n, y);
        }
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

// Rounds to `dtype` and back.
static void round_lanes(DType dtype, Float* x) {
    if (dtype == DType::float32) return;
    float rounded[TILE_ROWS] = {};  // room for any dtype
    Lanes::store_as(rounded, dtype, 0, *x);
    *x = Lanes::load_as_float(rounded, dtype, 0);
}

static void write_swiglu(const QuantizedMatmul& problem, const Part& part, float* gate, float* up) {
    const int64_t half = problem.w.n / 2;
    for (int64_t m = part.m0; m < part.m1; ++m) {
        for (int tile = 0; tile < part.tiles; ++tile, gate += TILE_ROWS, up += TILE_ROWS) {
            const int64_t n = (part.tile + tile) * TILE_ROWS;
            Float g = Lanes::load(gate), u = Lanes::load(up);
            if (problem.bias) {
                g = Lanes::add(g, bias_lanes(problem, n));
                u = Lanes::add(u, bias_lanes(problem, half + n));
            }
            round_lanes(problem.dtype, &g);
            round_lanes(problem.dtype, &u);
            Lanes::store(gate, g);
            for (int i = 0; i < TILE_ROWS; ++i) gate[i] = silu(gate[i]);
            g = Lanes::load(gate);
            round_lanes(problem.dtype, &g);
            write_lanes(problem, m * half + n, TILE_ROWS, Lanes::mul(g, u));
        }
    }
}

static int panel_tiles(int64_t m) {
    return m <= Lanes::FEW_ROWS ? Lanes::FEW_ROWS_TILES : Lanes::N_TILES;
}

static int64_t row_block(int64_t m, int64_t rows, int64_t block) {
    const Runs runs(m);
    const int64_t blocks = (m + rows - 1) / rows;  // even ones
    return runs.start(smaller(runs.count * block / blocks, runs.count));
}

#define GLM4_MULTIPLY_VARIANT(name)                                                          \
    {                                                                                        \
        name, panel_tiles, row_block, quantize_rows, convert_rows, multiply, multiply_exact, \
            write_result, write_swiglu                                                       \
    }

}  // namespace glm4
