// The inner loops in fp32, for any dtype and cache; each instruction set's file includes them under
// its own flags, after defining GLM4_LANES, the floats of one of its registers. Everything here is
// `static`, and nothing of the standard library is used, so that no code of one file can end up in
// another.
//
// A tile of keys is converted to fp32 once for all rows. Then, for LANES rows at a time:
//
//   scores     lanes are rows:   s[t]      += q[d] * k[t][d]      k broadcast
//   softmax    lanes are rows:   no reduction across lanes
//   out        lanes are dims:   acc[r][d] += p[t][r] * v[t][d]   p broadcast
#pragma once

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "flash_decode.h"

namespace glm4 {

constexpr int LANES = GLM4_LANES;
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t IntLanes __attribute__((vector_size(LANES * sizeof(int32_t))));

static inline Lanes load_lanes(const float* from) {
    Lanes lanes;
    memcpy(&lanes, from, sizeof(lanes));
    return lanes;
}

static inline void store_lanes(float* to, Lanes lanes) { memcpy(to, &lanes, sizeof(lanes)); }

static inline Lanes all_lanes(float value) { return value - Lanes{}; }

constexpr float LOG2E = 1.44269504f;
constexpr float MINUS_INFINITY = -__builtin_inff();

// a * b - product, exactly. Fused where there is such an instruction (the file's flags then allow
// it), else from halves of 12 bits (Veltkamp, Dekker).
static inline Lanes product_error(Lanes a, Lanes b, Lanes product) {
#ifdef __FMA__
    return a * b - product;
#else
    const Lanes wide_a = a * 4097.0f, wide_b = b * 4097.0f;
    const Lanes a1 = wide_a - (wide_a - a), b1 = wide_b - (wide_b - b);
    const Lanes a2 = a - a1, b2 = b - b1;
    return ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2;
#endif
}

// 2^(a b) for a b <= 0, to 2 ulp; 0 below 2^-125; NaN stays. PRECISE: of the product as it is, not
// rounded to fp32, which near -8 is an error of 4 ulp.
template <bool PRECISE>
static inline Lanes exp2_product(Lanes a, Lanes b) {
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer
    const Lanes x = a * b;
    const Lanes clamped = x < -125.0f ? all_lanes(-125.0f) : x;
    const Lanes shifted = clamped + ROUND;
    Lanes f = clamped - (shifted - ROUND);
    if (PRECISE) f += product_error(a, b, x);
    // Minimax on [-1/2, 1/2], relative error 7.5e-8.
    Lanes y = all_lanes(1.3276472e-3f);
    y = y * f + 9.6755413e-3f;
    y = y * f + 5.5507133e-2f;
    y = y * f + 2.4022120e-1f;
    y = y * f + 6.9314697e-1f;
    y = y * f + 1.0000001f;
    IntLanes bits;
    memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits + 127) << 23;
    Lanes power;
    memcpy(&power, &bits, sizeof(power));
    return x < -125.0f ? Lanes{} : y * power;
}

// How many keys each row sees: lanes are rows from `row` on.
static inline IntLanes visible_keys(const FlashDecode& p, int64_t batch, int64_t row) {
    IntLanes visible;
    for (int i = 0; i < LANES; ++i) {
        visible[i] = int32_t(p.seq_lens[batch] - p.n_queries + 1 + (row + i) / group_of(p));
    }
    return visible;
}

// Keys `first` and on that a row must not see score -inf.
static inline void hide_keys(const FlashDecode& p, int64_t batch, int64_t first, int64_t row,
                             Lanes* s, int n_keys) {
    const IntLanes visible = visible_keys(p, batch, row) - int32_t(first);
    for (int t = 0; t < n_keys; ++t) s[t] = visible > t ? s[t] : all_lanes(MINUS_INFINITY);
}

static inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

// Online softmax over a tile, s[t] becoming p[t]; n_keys is a multiple of four. Returns the factor
// that ages earlier sums.
//   m' = max(m, max s)    p = exp(factor * (s - m'))    decay = exp(factor * (m - m'))
template <bool PRECISE>
static inline Lanes softmax_tile(Lanes* s, int n_keys, Lanes factor, float* max, float* total) {
    Lanes four[4] = {s[0], s[1], s[2], s[3]};  // shorter chains
    for (int t = 4; t < n_keys; ++t) four[t % 4] = larger(s[t], four[t % 4]);
    const Lanes old = load_lanes(max);
    Lanes m = larger(larger(larger(four[0], four[1]), larger(four[2], four[3])), old);
    store_lanes(max, m);
    m = m == MINUS_INFINITY ? Lanes{} : m;
    const Lanes log2_factor = factor * LOG2E;
    for (int i = 0; i < 4; ++i) four[i] = Lanes{};
    for (int t = 0; t < n_keys; ++t) {
        s[t] = exp2_product<PRECISE>(s[t] - m, log2_factor);
        four[t % 4] += s[t];
    }
    const Lanes decay = exp2_product<PRECISE>(old - m, log2_factor);
    store_lanes(total, load_lanes(total) * decay + ((four[0] + four[1]) + (four[2] + four[3])));
    return decay;
}

static float float8_e4m3_to_float(uint8_t value) {
    const uint32_t rest = value & 0x7fu;
    const float magnitude = from_bits(rest << 20) * from_bits(0x7b800000u);  // 2^(127-7): exact
    const uint32_t sign = uint32_t(value & 0x80u) << 24;
    return from_bits(sign | (rest == 0x7f ? 0x7fc00000u : bits_of(magnitude)));
}

template <int D>
static void convert_row(const void* from, DType dtype, CacheFormat format, float* to) {
    if (format == CacheFormat::int8) {
        const int8_t* x = static_cast<const int8_t*>(from);
        for (int d = 0; d < D; ++d) to[d] = float(x[d]);
    } else if (format == CacheFormat::float8_e4m3) {
        const uint8_t* x = static_cast<const uint8_t*>(from);
        for (int d = 0; d < D; ++d) to[d] = float8_e4m3_to_float(x[d]);
    } else if (dtype == DType::float32) {
        memcpy(to, from, D * sizeof(float));
    } else if (dtype == DType::bfloat16) {
        const uint16_t* x = static_cast<const uint16_t*>(from);
        for (int d = 0; d < D; ++d) to[d] = bfloat16_to_float(x[d]);
    } else {
        const uint16_t* x = static_cast<const uint16_t*>(from);
#ifdef __F16C__
        for (int d = 0; d < D; d += 8) {
            const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + d));
            _mm256_storeu_ps(to + d, _mm256_cvtph_ps(bits));
        }
#else
        for (int d = 0; d < D; ++d) to[d] = float16_to_float(x[d]);
#endif
    }
}

static inline int64_t page_of(const FlashDecode& p, int64_t batch, int64_t key) {
    return p.block_table[batch * p.stride_block_table + key / p.page_size];
}

// The row of a key in k or v.
static inline const char* cache_row(const FlashDecode& p, const void* cache, const int64_t* strides,
                                    int64_t page, int64_t kv_head, int64_t token) {
    const int64_t element = page * strides[0] + kv_head * strides[1] + token * strides[2];
    return static_cast<const char*>(cache) + element * cache_item_bytes(p);
}

static inline const float* scale_row(const float* scale, const int64_t* strides, int64_t page,
                                     int64_t kv_head, int64_t token) {
    return scale + page * strides[0] + kv_head * strides[1] + token;
}

// Where row `row` of a sequence and KV head starts in q (elements), and in out and lse (rows).
static inline int64_t q_start(const FlashDecode& p, int64_t batch, int64_t kv_head, int64_t row) {
    const int64_t group = group_of(p);
    return batch * p.stride_q[0] + row / group * p.stride_q[1] +
           (kv_head * group + row % group) * p.stride_q[2];
}
static inline int64_t out_row(const FlashDecode& p, int64_t batch, int64_t kv_head, int64_t row) {
    const int64_t group = group_of(p);
    return (batch * p.n_queries + row / group) * p.n_heads + kv_head * group + row % group;
}

static void clear_partial(const FlashDecode& p, Partial partial) {
    const int64_t rows = padded_rows(p);
    for (int64_t r = 0; r < rows; ++r) partial.max[r] = MINUS_INFINITY, partial.total[r] = 0.0f;
    memset(partial.acc, 0, rows * p.head_dim * sizeof(float));
}

// Packed queries: factor [padded rows], then [padded rows / LANES][D][LANES] in fp32.
static int64_t packed_bytes_fp32(const FlashDecode& p) {
    return padded_rows(p) * (1 + p.head_dim) * int64_t(sizeof(float));
}

static void pack_fp32(const FlashDecode& p, int64_t batch, int64_t kv_head, void* packed) {
    const int64_t rows = count_rows(p), padded = padded_rows(p);
    float* factor = static_cast<float*>(packed);
    float* q = factor + padded;
    for (int64_t r = 0; r < padded; ++r) {
        factor[r] = p.scale;
        float* lane = q + r / LANES * p.head_dim * LANES + r % LANES;
        const int64_t start = r < rows ? q_start(p, batch, kv_head, r) : 0;
        for (int64_t d = 0; d < p.head_dim; ++d) {
            lane[d * LANES] = r < rows ? load_float(p.q, p.dtype, start + d) : 0.0f;
        }
    }
}

template <int D>
struct TileFp32 {
    static constexpr int KEYS = 32;
    int n_keys;
    alignas(64) float k[KEYS][D];
    alignas(64) float v[KEYS][D];
    float k_scale[KEYS];
    float v_scale[KEYS];
};

template <int D>
static void load_tile(const FlashDecode& p, const Split& split, int64_t first, TileFp32<D>& tile) {
    constexpr int KEYS = TileFp32<D>::KEYS;
    tile.n_keys = int(split.end - first < KEYS ? split.end - first : KEYS);
    for (int t = 0; t < KEYS; ++t) {
        if (t >= tile.n_keys) {  // scores of four keys are computed together
            memset(tile.k[t], 0, sizeof(tile.k[t]));
            tile.k_scale[t] = 0.0f;
            continue;
        }
        const int64_t page = page_of(p, split.batch, first + t);
        const int64_t token = (first + t) % p.page_size;
        convert_row<D>(cache_row(p, p.k, p.stride_k, page, split.kv_head, token), p.dtype, p.format,
                       tile.k[t]);
        convert_row<D>(cache_row(p, p.v, p.stride_v, page, split.kv_head, token), p.dtype, p.format,
                       tile.v[t]);
        if (p.format == CacheFormat::as_q) continue;
        tile.k_scale[t] = *scale_row(p.k_scale, p.stride_k_scale, page, split.kv_head, token);
        tile.v_scale[t] = *scale_row(p.v_scale, p.stride_v_scale, page, split.kv_head, token);
    }
}

template <int D>
static void attend_fp32(const FlashDecode& p, const void* packed, const Split& split,
                        Partial partial) {
    constexpr int KEYS = TileFp32<D>::KEYS;
    constexpr int KEY_BLOCK = LANES == 16 ? 16 : 8;  // independent sums that registers hold
    constexpr int ROW_BLOCK = LANES == 16 ? 8 : 4;
    constexpr int DIM_BLOCK = 2 * LANES, SHORT = 16;
    const bool quantised = p.format != CacheFormat::as_q;
    const int64_t rows = count_rows(p);
    const float* factor = static_cast<const float*>(packed);
    const float* q = factor + padded_rows(p);
    TileFp32<D> tile;
    Lanes s[KEYS];
    alignas(64) float weight[KEYS][LANES];
    alignas(64) float decay[LANES];

    // Sums of SHORT products, then of those: the error stays that of short sums.
    const auto score = [&](const float* q_lanes) {
        for (int t0 = 0; t0 < tile.n_keys; t0 += KEY_BLOCK) {
            for (int j = 0; j < KEY_BLOCK; ++j) s[t0 + j] = Lanes{};
            for (int d0 = 0; d0 < D; d0 += SHORT) {
                Lanes sum[KEY_BLOCK] = {};
                for (int d = d0; d < d0 + SHORT; ++d) {
                    const Lanes qd = load_lanes(q_lanes + d * LANES);
                    for (int j = 0; j < KEY_BLOCK; ++j) sum[j] += qd * tile.k[t0 + j][d];
                }
                for (int j = 0; j < KEY_BLOCK; ++j) s[t0 + j] += sum[j];
            }
            for (int j = 0; quantised && j < KEY_BLOCK; ++j) s[t0 + j] *= tile.k_scale[t0 + j];
        }
    };
    const auto accumulate = [&](int64_t row0, int r0) {
        for (int d0 = 0; d0 < D; d0 += DIM_BLOCK) {
            float* acc = partial.acc + (row0 + r0) * D + d0;
            Lanes sum[ROW_BLOCK][2] = {};
            for (int t = 0; t < tile.n_keys; ++t) {
                const Lanes v0 = load_lanes(tile.v[t] + d0);
                const Lanes v1 = load_lanes(tile.v[t] + d0 + LANES);
                for (int r = 0; r < ROW_BLOCK; ++r) {
                    sum[r][0] += v0 * weight[t][r0 + r];
                    sum[r][1] += v1 * weight[t][r0 + r];
                }
            }
            for (int r = 0; r < ROW_BLOCK; ++r) {
                for (int c = 0; c < 2; ++c) {
                    float* to = acc + r * D + c * LANES;
                    store_lanes(to, load_lanes(to) * decay[r0 + r] + sum[r][c]);
                }
            }
        }
    };

    clear_partial(p, partial);
    const int64_t all_see = p.seq_lens[split.batch] - p.n_queries + 1;
    for (int64_t first = split.first; first < split.end; first += KEYS) {
        load_tile(p, split, first, tile);
        for (int64_t row = 0; row < rows; row += LANES) {
            score(q + row * D);
            const int n_scored = (tile.n_keys + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK;
            if (first + n_scored > all_see) hide_keys(p, split.batch, first, row, s, n_scored);
            store_lanes(decay, softmax_tile<true>(s, n_scored, load_lanes(factor + row),
                                                  partial.max + row, partial.total + row));
            for (int t = 0; t < tile.n_keys; ++t) {
                store_lanes(weight[t], quantised ? s[t] * tile.v_scale[t] : s[t]);
            }
            for (int r = 0; r < LANES && row + r < rows; r += ROW_BLOCK) accumulate(row, r);
        }
    }
}

static void attend_any_dim(const FlashDecode& p, const void* packed, const Split& split,
                           Partial partial) {
    if (p.head_dim == 128) {
        attend_fp32<128>(p, packed, split, partial);
    } else {
        attend_fp32<64>(p, packed, split, partial);
    }
}

// w = exp(factor * (max_i - max)), split i    out = sum w acc_i / total    total = sum w total_i
static void merge_rows(const FlashDecode& p, const void* packed, int64_t batch, int64_t kv_head,
                       int64_t first_row, const float* partials, int64_t n_splits) {
    const int64_t rows = count_rows(p), padded = padded_rows(p), size = partial_floats(p);
    const float* factors = static_cast<const float*>(packed);
    alignas(64) float weight[MAX_SPLITS][LANES];
    alignas(64) float total[LANES], max[LANES];
    float row_out[MAX_HEAD_DIM];

    const auto weigh = [&](int64_t row) {
        Lanes m = all_lanes(MINUS_INFINITY), sum = {};
        for (int64_t i = 0; i < n_splits; ++i) {
            const Lanes split_max = load_lanes(partials + i * size + row);
            m = split_max > m ? split_max : m;
        }
        store_lanes(max, m);
        m = m == MINUS_INFINITY ? Lanes{} : m;
        for (int64_t i = 0; i < n_splits; ++i) {
            const Lanes difference = load_lanes(partials + i * size + row) - m;
            const Lanes w = exp2_product<true>(difference, load_lanes(factors + row) * LOG2E);
            store_lanes(weight[i], w);
            sum += w * load_lanes(partials + i * size + padded + row);
        }
        store_lanes(total, sum);
    };
    // Scores that are all -inf have no softmax: NaN. No score at all gives 0.
    const auto inverse_of = [&](int64_t row, float sum) {
        if (sum != 0.0f) return 1.0f / sum;
        const bool sees_keys = p.seq_lens[batch] - p.n_queries + row / group_of(p) >= 0;
        return sees_keys ? __builtin_nanf("") : 0.0f;
    };
    const auto combine = [&](int64_t row, int lane) {
        const float* acc = partials + 2 * padded + (row + lane) * p.head_dim;
        const float inverse = inverse_of(row + lane, total[lane]);
        for (int64_t d = 0; d < p.head_dim; d += 4 * LANES) {
            Lanes sum[4] = {};
            for (int64_t i = 0; i < n_splits; ++i) {
                for (int c = 0; c < 4; ++c) {
                    sum[c] += load_lanes(acc + i * size + d + c * LANES) * weight[i][lane];
                }
            }
            for (int c = 0; c < 4; ++c) store_lanes(row_out + d + c * LANES, sum[c] * inverse);
        }
    };
    const auto write_result = [&](int64_t row, int lane) {
        const int64_t to = out_row(p, batch, kv_head, row + lane);
        p.lse[to] = total[lane] == 0.0f
                        ? MINUS_INFINITY
                        : max[lane] * factors[row + lane] + __builtin_logf(total[lane]);
        const int64_t start = to * p.head_dim;
        if (p.dtype == DType::float32) {
            memcpy(static_cast<float*>(p.out) + start, row_out, p.head_dim * sizeof(float));
        } else if (p.dtype == DType::bfloat16) {
            uint16_t* out = static_cast<uint16_t*>(p.out) + start;
            for (int64_t d = 0; d < p.head_dim; ++d) out[d] = float_to_bfloat16(row_out[d]);
        } else {
            uint16_t* out = static_cast<uint16_t*>(p.out) + start;
            for (int64_t d = 0; d < p.head_dim; ++d) out[d] = float_to_float16(row_out[d]);
        }
    };

    for (int64_t row = first_row; row < first_row + ROWS && row < rows; row += LANES) {
        weigh(row);
        for (int lane = 0; lane < LANES && row + lane < rows; ++lane) {
            combine(row, lane);
            write_result(row, lane);
        }
    }
}

static const FlashDecodeLoops FP32_LOOPS = {packed_bytes_fp32, pack_fp32, attend_any_dim,
                                            merge_rows};

}  // namespace glm4
