// flash_decode for AVX512-BF16 and AVX512-VNNI: bf16 queries over a bf16 or int8 cache; the rest in
// fp32, with AVX512.
//
// What there is to do: a key and value of D = 128 in bf16 are 512 bytes, and 16 rows make of them
// 2 * 16 * 128 products, 128 instructions of 32 products each. At two a clock (measured: Zen 5,
// also with one operand broadcast from memory) they take 64 clocks: 33 GB/s a core at 4.2 GHz.
//
//   scores     lanes are rows    s[t]    += (q[2i], q[2i+1])  * (k[t][2i], k[t][2i+1])   k
//   broadcast out        lanes are dims    acc[r]  += (v[t], v[t+1])    * (p[t][r], p[t+1][r]) p
//   broadcast
//
// p is rounded to bf16 for the second product; sums are in fp32. An int8 cache takes integer
// products of four (vpdpbusd: unsigned by signed), so that its bytes need no conversion:
//
//   scores     q as an integer of 16 bits, q = step * (256 high + low), step the power of two that
//              just holds the row's largest: exact down to a 128th of that; k + 128 unsigned; the
//              surplus 128 * sum(high), 128 * sum(low) is taken off at the start
//   out        w = p * v_scale as an unsigned integer of 8 bits of the tile's largest w of that
//              row, or of 16 in two products, where 8 are too few (`needs_two_parts`)
#define GLM4_LANES 16
#include <immintrin.h>

#include "flash_decode_loops.h"

namespace glm4 {

static inline __m512i load_512(const void* from) { return _mm512_loadu_si512(from); }

static inline __m512i broadcast_32(const void* from) {
    int32_t value;
    memcpy(&value, from, sizeof(value));
    return _mm512_set1_epi32(value);
}

static inline __m512 dot_bf16(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// dot_bf16(sum, a, broadcast_32(b)) in one instruction, which GCC 12 makes of no intrinsic.
static inline __m512 dot_bf16_broadcast(__m512 sum, __m512i a, const void* b) {
#if GLM4_SANITIZE
    return dot_bf16(sum, a, broadcast_32(b));
#else
    typedef uint32_t __attribute__((may_alias)) Pair;
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0"
            : "+v"(sum)
            : "v"(a), "m"(*static_cast<const Pair*>(b)));
    return sum;
#endif
}

// Not the intrinsic: around it GCC 12 copies sixteen sums from register to register, and to memory.
static inline __m512i dot_int8(__m512i sum, __m512i unsigned_a, __m512i signed_b) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_a), "v"(signed_b));
    return sum;
}

static inline void prefetch(const char* line) { _mm_prefetch(line, _MM_HINT_T0); }

// The keys and values of a tile where they lie: runs of RUN tokens.
template <int KEYS>
struct Runs {
    const char* k[KEYS / RUN];
    const char* v[KEYS / RUN];
};

// Past the sequence's end: no keys of its own, but something to fetch without harm.
template <int KEYS>
static inline Runs<KEYS> find_runs(const FlashDecode& p, const Split& split, int64_t first) {
    const int shift = __builtin_ctzll(uint64_t(p.page_size));
    const int64_t last = p.seq_lens[split.batch] - 1;
    Runs<KEYS> runs;
    for (int i = 0; i < KEYS / RUN; ++i) {
        const int64_t key = first + i * RUN <= last ? first + i * RUN : last / RUN * RUN;
        const int64_t page = p.block_table[split.batch * p.stride_block_table + (key >> shift)];
        const int64_t token = key & (p.page_size - 1);
        runs.k[i] = cache_row(p, p.k, p.stride_k, page, split.kv_head, token);
        runs.v[i] = cache_row(p, p.v, p.stride_v, page, split.kv_head, token);
    }
    return runs;
}

// Copies runs that the loops cannot read in place: those with fewer than RUN tokens, filled up with
// zeros, and those whose tokens are not next to each other.
template <int KEYS, int ROW_BYTES>
struct Copies {
    alignas(64) char k[KEYS * ROW_BYTES];
    alignas(64) char v[KEYS * ROW_BYTES];

    void replace(const FlashDecode& p, int n_keys, Runs<KEYS>& runs) {
        for (int i = 0; i < KEYS / RUN; ++i) {
            const int live = n_keys - i * RUN;
            replace_run(runs.k[i], p.stride_k[2] * cache_item_bytes(p), live,
                        k + i * RUN * ROW_BYTES);
            replace_run(runs.v[i], p.stride_v[2] * cache_item_bytes(p), live,
                        v + i * RUN * ROW_BYTES);
        }
    }
    static void replace_run(const char*& run, int64_t stride, int live, char* copy) {
        if (live >= RUN && stride == ROW_BYTES) return;
        for (int t = 0; t < RUN; ++t) {
            char* to = copy + t * ROW_BYTES;
            if (t < live) {
                memcpy(to, run + t * stride, ROW_BYTES);
            } else {
                memset(to, 0, ROW_BYTES);
            }
        }
        run = copy;
    }
};

// Packed queries: factor [padded rows], then for each tile of ROWS rows [D / 2][ROWS] pairs.
static int64_t packed_bytes_bf16(const FlashDecode& p) {
    return padded_rows(p) * (int64_t(sizeof(float)) + p.head_dim * 2);
}

static void pack_bf16(const FlashDecode& p, int64_t batch, int64_t kv_head, void* packed) {
    const int64_t rows = count_rows(p), padded = padded_rows(p), pairs = p.head_dim / 2;
    float* factor = static_cast<float*>(packed);
    uint32_t* to = reinterpret_cast<uint32_t*>(factor + padded);
    const uint16_t* q = static_cast<const uint16_t*>(p.q);
    memset(to, 0, padded * pairs * sizeof(uint32_t));
    for (int64_t r = 0; r < padded; ++r) factor[r] = p.scale;
    for (int64_t r = 0; r < rows; ++r) {
        const uint16_t* row = q + q_start(p, batch, kv_head, r);
        uint32_t* lane = to + r / ROWS * pairs * ROWS + r % ROWS;
        for (int64_t i = 0; i < pairs; ++i) memcpy(lane + i * ROWS, row + 2 * i, sizeof(uint32_t));
    }
}

// s[t] of one run and one tile of rows, fetching another run meanwhile.
template <int D>
static inline void score_run(const char* q_pairs, const char* k, const char* fetch, Lanes* s) {
    constexpr int PAIRS = D / 2, ROW_BYTES = D * 2, LINES = RUN * ROW_BYTES / 64;
    static_assert(LINES == PAIRS, "one line is fetched for each pair");
    __m512 sum[RUN] = {};
    for (int i = 0; i < PAIRS; ++i) {
        const __m512i q_pair = load_512(q_pairs + i * 64);
        prefetch(fetch + i * 64);
        for (int t = 0; t < RUN; ++t) {
            sum[t] = dot_bf16_broadcast(sum[t], q_pair, k + t * ROW_BYTES + i * 4);
        }
    }
    for (int t = 0; t < RUN; ++t) s[t] = (Lanes)sum[t];
}

constexpr int ROW_BLOCK = 8, DIM_BLOCK = 32;

// acc += p v over one run, for ROW_BLOCK rows and DIM_BLOCK dims; `weights`: (p[t], p[t + 1]).
// FETCH lines of the next tile are fetched for each two tokens: all, or one by each row block.
template <int D, int FETCH>
static inline void accumulate_run(const uint32_t* weights, const char* v, const char* fetch,
                                  __m512 (*sum)[2]) {
    constexpr int ROW_BYTES = D * 2;
    for (int t = 0; t < RUN; t += 2, weights += ROWS, v += 2 * ROW_BYTES) {
        const __m512i v0 = load_512(v), v1 = load_512(v + ROW_BYTES);
        const __m512i low = _mm512_unpacklo_epi16(v0, v1), high = _mm512_unpackhi_epi16(v0, v1);
        for (int i = 0; i < FETCH; ++i) prefetch(fetch + (t + i) * 64);
        for (int r = 0; r < ROW_BLOCK; ++r) {
            const __m512i w = broadcast_32(weights + r);
            sum[r][0] = dot_bf16(sum[r][0], w, low);
            sum[r][1] = dot_bf16(sum[r][1], w, high);
        }
    }
}

template <int D, int KEYS, int FETCH>
static inline void accumulate_tile(const uint32_t* weights, const Runs<KEYS>& runs,
                                   const Runs<KEYS>& next, int next_line, const float* decay,
                                   bool aged, float* acc) {
    for (int d0 = 0; d0 < D; d0 += DIM_BLOCK) {
        __m512 sum[ROW_BLOCK][2];
        for (int r = 0; r < ROW_BLOCK; ++r) {
            sum[r][0] = _mm512_loadu_ps(acc + r * D + d0);
            sum[r][1] = _mm512_loadu_ps(acc + r * D + d0 + 16);
        }
        for (int r = 0; aged && r < ROW_BLOCK; ++r) {
            const __m512 factor = _mm512_set1_ps(decay[r]);
            sum[r][0] = sum[r][0] * factor;
            sum[r][1] = sum[r][1] * factor;
        }
        for (int i = 0; i < KEYS / RUN; ++i) {
            accumulate_run<D, FETCH>(weights + i * RUN / 2 * ROWS, runs.v[i] + d0 * 2,
                                     next.v[i] + (d0 / DIM_BLOCK * RUN + next_line) * 64, sum);
        }
        for (int r = 0; r < ROW_BLOCK; ++r) {
            _mm512_storeu_ps(acc + r * D + d0, sum[r][0]);
            _mm512_storeu_ps(acc + r * D + d0 + 16, sum[r][1]);
        }
    }
}

// Interleaving two rows within 128 bits left dims 0-3, 8-11, .. of a block in its first vector.
static void restore_order(float* acc, int64_t count) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int64_t i = 0; i < count; i += DIM_BLOCK) {
        const __m512 low = _mm512_loadu_ps(acc + i), high = _mm512_loadu_ps(acc + i + 16);
        _mm512_storeu_ps(acc + i, _mm512_permutex2var_ps(low, first, high));
        _mm512_storeu_ps(acc + i + 16, _mm512_permutex2var_ps(low, second, high));
    }
}

template <int D>
static void attend_bf16(const FlashDecode& p, const void* packed, const Split& split,
                        Partial partial) {
    constexpr int KEYS = 16, ROW_BYTES = D * 2;
    const int64_t rows = count_rows(p);
    const float* factor = static_cast<const float*>(packed);
    const char* q = reinterpret_cast<const char*>(factor + padded_rows(p));
    Copies<KEYS, ROW_BYTES> copies;
    Lanes s[KEYS];
    alignas(64) uint32_t weights[KEYS / 2 * ROWS];  // (p[t], p[t + 1]) in bf16, a row after another
    alignas(64) float decay[ROWS];
    alignas(64) uint16_t order[32];  // takes the lanes of two vectors in turn
    for (int i = 0; i < 32; ++i) order[i] = uint16_t(i / 2 + i % 2 * 16);

    const auto round_weights = [&] {
        for (int t = 0; t < KEYS; t += 2) {
            const __m512bh both = _mm512_cvtne2ps_pbh((__m512)s[t + 1], (__m512)s[t]);
            _mm512_store_si512(weights + t / 2 * ROWS,
                               _mm512_permutexvar_epi16(load_512(order), (__m512i)both));
        }
    };

    clear_partial(p, partial);
    const int64_t all_see = p.seq_lens[split.batch] - p.n_queries + 1;
    Runs<KEYS> next = find_runs<KEYS>(p, split, split.first);
    for (int64_t first = split.first; first < split.end; first += KEYS) {
        Runs<KEYS> runs = next;
        next = find_runs<KEYS>(p, split, first + KEYS);
        copies.replace(p, int(split.end - first < KEYS ? split.end - first : KEYS), runs);
        for (int64_t row = 0; row < rows; row += ROWS) {
            for (int i = 0; i < KEYS / RUN; ++i) {
                score_run<D>(q + row * ROW_BYTES, runs.k[i], next.k[i], s + i * RUN);
            }
            if (first + KEYS > all_see) hide_keys(p, split.batch, first, row, s, KEYS);
            const Lanes aging = softmax_tile<false>(s, KEYS, load_lanes(factor + row),
                                                    partial.max + row, partial.total + row);
            store_lanes(decay, aging);
            const bool aged =
                _mm512_cmp_ps_mask((__m512)aging, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ) != 0;
            round_weights();
            float* acc = partial.acc + row * D;
            if (rows - row <= ROW_BLOCK) {
                accumulate_tile<D, KEYS, 2>(weights, runs, next, 0, decay, aged, acc);
                continue;
            }
            for (int r = 0; r < ROWS; r += ROW_BLOCK) {
                accumulate_tile<D, KEYS, 1>(weights + r, runs, next, r / ROW_BLOCK, decay + r, aged,
                                            acc + r * D);
            }
        }
    }
    restore_order(partial.acc, rows * D);
}

static void attend_bf16_any_dim(const FlashDecode& p, const void* packed, const Split& split,
                                Partial partial) {
    if (p.head_dim == 128) {
        attend_bf16<128>(p, packed, split, partial);
    } else {
        attend_bf16<64>(p, packed, split, partial);
    }
}

// Packed queries for an int8 cache, q = step * (256 high + low): factor, float [padded rows];
// -128 * sum(high) and -128 * sum(low), int32 [padded rows / ROWS][2][ROWS]; then the bytes of high
// and of low by turns, [padded rows / ROWS][D / 4][2][ROWS][4].
constexpr float LARGEST_Q = 256 * 127 + 127;

static int64_t packed_bytes_int8(const FlashDecode& p) {
    return padded_rows(p) * (3 * int64_t(sizeof(float)) + p.head_dim * 2);
}

template <int D>
static void pack_row_int8(const float* q, float step, int32_t* surplus, char* bytes) {
    alignas(64) int8_t high[D], low[D];
    const float inverse = 1.0f / step;
    int32_t high_sum = 0, low_sum = 0;
    for (int d = 0; d < D; ++d) {
        constexpr float ROUND = 12582912.0f;  // as in exp2_product
        const int32_t value = int32_t((q[d] * inverse + ROUND) - ROUND);
        const int32_t upper = (value + 128) >> 8, lower = value - 256 * upper;
        high[d] = int8_t(upper), low[d] = int8_t(lower);
        high_sum += upper, low_sum += lower;
    }
    surplus[0] = -128 * high_sum;
    surplus[ROWS] = -128 * low_sum;
    for (int d = 0; d < D; d += 4, bytes += 8 * ROWS) {
        memcpy(bytes, high + d, 4);
        memcpy(bytes + 4 * ROWS, low + d, 4);
    }
}

static void pack_int8(const FlashDecode& p, int64_t batch, int64_t kv_head, void* packed) {
    const int64_t rows = count_rows(p), padded = padded_rows(p), n_dims = p.head_dim;
    float* factor = static_cast<float*>(packed);
    int32_t* surplus = reinterpret_cast<int32_t*>(factor + padded);
    char* bytes = reinterpret_cast<char*>(surplus + 2 * padded);
    memset(surplus, 0, padded * (2 * sizeof(int32_t) + n_dims * 2));
    for (int64_t r = 0; r < padded; ++r) {
        factor[r] = p.scale;
        if (r >= rows) continue;
        alignas(64) float q[MAX_HEAD_DIM];
        const char* from = static_cast<const char*>(p.q) + 2 * q_start(p, batch, kv_head, r);
        const auto convert = n_dims == 128 ? convert_row<128> : convert_row<64>;
        convert(from, p.dtype, CacheFormat::as_q, q);
        Lanes most = {}, poison = {};
        for (int64_t d = 0; d < n_dims; d += LANES) {
            const Lanes x = load_lanes(q + d);
            most = larger(x < 0 ? -x : x, most);
            poison += x * 0.0f;  // NaN, if anything here is not finite
        }
        float largest = 0.0f, not_finite = 0.0f;
        for (int i = 0; i < LANES; ++i) {
            largest = most[i] > largest ? most[i] : largest;
            not_finite += poison[i];
        }
        float step = from_bits(bits_of(largest) & 0x7f800000u) * 0x1p-14f;
        if (largest > step * LARGEST_Q) step *= 2.0f;
        if (not_finite != 0.0f) {
            factor[r] = not_finite;
        } else if (step >
                   1e-37f) {  // of smaller ones 1 / step is infinite, and so small is no score
            factor[r] = p.scale * step;
            const auto pack_row = n_dims == 128 ? pack_row_int8<128> : pack_row_int8<64>;
            pack_row(q, step, surplus + r / ROWS * 2 * ROWS + r % ROWS,
                     bytes + r / ROWS * ROWS * n_dims * 2 + r % ROWS * 4);
        }
    }
}

// s[t] of one run and one tile of rows, before k_scale; fetching another run meanwhile.
template <int D>
static inline void score_run_int8(const char* q, const int32_t* surplus, const char* k,
                                  const char* fetch, const float* k_scale, Lanes* s) {
    constexpr int BLOCK = 8;
    const __m512i flip = _mm512_set1_epi8(char(-128));
    for (int t0 = 0; t0 < RUN; t0 += BLOCK, k += BLOCK * D) {
        __m512i high[BLOCK], low[BLOCK];
        for (int t = 0; t < BLOCK; ++t) {
            high[t] = load_512(surplus);
            low[t] = load_512(surplus + ROWS);
        }
        for (int i = 0; i < D / 4; ++i) {
            const __m512i q_high = load_512(q + i * 128), q_low = load_512(q + i * 128 + 64);
            if (i % 2 == 0) prefetch(fetch + (i + t0 / BLOCK) * 64);
            for (int t = 0; t < BLOCK; ++t) {
                const __m512i quad = _mm512_xor_si512(flip, broadcast_32(k + t * D + i * 4));
                high[t] = dot_int8(high[t], quad, q_high);
                low[t] = dot_int8(low[t], quad, q_low);
            }
        }
        for (int t = 0; t < BLOCK; ++t) {
            const __m512i dot = _mm512_add_epi32(_mm512_slli_epi32(high[t], 8), low[t]);
            s[t0 + t] = (Lanes)_mm512_cvtepi32_ps(dot) * k_scale[t0 + t];
        }
    }
}

// sum += w v over one run, for INT8_ROWS rows and 64 dims; `weights`: bytes of four tokens. Vector
// j of a row holds dims 4 j to 4 j + 3 of each 16.
constexpr int INT8_ROWS = 4;
template <int D, int FETCH>
static inline void accumulate_run_int8(const uint32_t* weights, const char* v, const char* fetch,
                                       __m512i (*sum)[4]) {
    for (int t = 0; t < RUN; t += 4, weights += ROWS, v += 4 * D) {
        const __m512i v0 = load_512(v), v1 = load_512(v + D);
        const __m512i v2 = load_512(v + 2 * D), v3 = load_512(v + 3 * D);
        const __m512i low01 = _mm512_unpacklo_epi8(v0, v1), high01 = _mm512_unpackhi_epi8(v0, v1);
        const __m512i low23 = _mm512_unpacklo_epi8(v2, v3), high23 = _mm512_unpackhi_epi8(v2, v3);
        const __m512i quads[4] = {
            _mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
            _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
        for (int i = 0; i < FETCH; ++i) prefetch(fetch + (t + i) * 64);
        for (int r = 0; r < INT8_ROWS; ++r) {
            const __m512i w = broadcast_32(weights + r);
            for (int j = 0; j < 4; ++j) sum[r][j] = dot_int8(sum[r][j], w, quads[j]);
        }
    }
}

// The weights of a tile as integers: w ~ step * (high), or step * (256 high + low).
template <int KEYS>
struct IntegerWeights {
    alignas(64) uint32_t high[KEYS / 4 * ROWS];  // bytes of four tokens, a row after another
    alignas(64) uint32_t low[KEYS / 4 * ROWS];
    alignas(64) float step[ROWS];
    bool two_parts;
};

template <int D, int KEYS, int FETCH>
static inline void accumulate_tile_int8(const IntegerWeights<KEYS>& weights, int r0,
                                        const Runs<KEYS>& runs, const Runs<KEYS>& next,
                                        int next_line, const float* decay, float* acc) {
    for (int d0 = 0; d0 < D; d0 += 64) {
        __m512i sum[INT8_ROWS][4] = {};
        for (int i = 0; i < KEYS / RUN; ++i) {
            accumulate_run_int8<D, FETCH>(weights.high + i * RUN / 4 * ROWS + r0, runs.v[i] + d0,
                                          next.v[i] + (d0 / 64 * RUN + next_line) * 64, sum);
        }
        if (weights.two_parts) {
            for (auto& row : sum) {
                for (__m512i& x : row) x = _mm512_slli_epi32(x, 8);
            }
            for (int i = 0; i < KEYS / RUN; ++i) {
                accumulate_run_int8<D, 0>(weights.low + i * RUN / 4 * ROWS + r0, runs.v[i] + d0,
                                          nullptr, sum);
            }
        }
        for (int r = 0; r < INT8_ROWS; ++r) {
            const __m512 age = _mm512_set1_ps(decay[r0 + r]);
            const __m512 step = _mm512_set1_ps(weights.step[r0 + r]);
            for (int j = 0; j < 4; ++j) {
                float* to = acc + (r0 + r) * D + d0 + j * 16;
                const __m512 added = _mm512_cvtepi32_ps(sum[r][j]) * step;
                _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(to), age, added));
            }
        }
    }
}

// Undoes the order that accumulate_run_int8 leaves.
static void restore_order_int8(float* acc, int64_t count) {
    for (int64_t i = 0; i < count; i += 64) {
        __m512 x[4];
        for (int j = 0; j < 4; ++j) x[j] = _mm512_loadu_ps(acc + i + j * 16);
        const __m512 low01 = _mm512_shuffle_f32x4(x[0], x[1], 0x44);
        const __m512 high01 = _mm512_shuffle_f32x4(x[0], x[1], 0xee);
        const __m512 low23 = _mm512_shuffle_f32x4(x[2], x[3], 0x44);
        const __m512 high23 = _mm512_shuffle_f32x4(x[2], x[3], 0xee);
        _mm512_storeu_ps(acc + i, _mm512_shuffle_f32x4(low01, low23, 0x88));
        _mm512_storeu_ps(acc + i + 16, _mm512_shuffle_f32x4(low01, low23, 0xdd));
        _mm512_storeu_ps(acc + i + 32, _mm512_shuffle_f32x4(high01, high23, 0x88));
        _mm512_storeu_ps(acc + i + 48, _mm512_shuffle_f32x4(high01, high23, 0xdd));
    }
}

// p -> w = p * v_scale -> integers. Eight bits err by at most n_keys * max w / 510 in units of sum
// w: two parts, unless that is at most 1/32 of the sum, or of a 64th of all earlier tiles'
// (`seen`).
template <int KEYS>
static inline void round_weights_int8(Lanes* w, const float* v_scale, int n_keys, Lanes decay,
                                      float* seen, IntegerWeights<KEYS>& weights) {
    Lanes most[2] = {}, sums[2] = {};
    for (int t = 0; t < KEYS; ++t) {
        w[t] *= v_scale[t];
        most[t % 2] = larger(w[t], most[t % 2]);
        sums[t % 2] += w[t];
    }
    const Lanes largest = larger(most[0], most[1]), sum = sums[0] + sums[1];
    const Lanes before = load_lanes(seen) * decay;
    store_lanes(seen, before + sum);
    const Lanes enough = larger(sum, before * (1.0f / 64.0f)) * 16.0f;
    weights.two_parts =
        _mm512_cmp_ps_mask((__m512)(largest * float(n_keys)), (__m512)enough, _CMP_NLE_UQ) != 0;
    const float range = weights.two_parts ? 65535.0f : 255.0f;
    store_lanes(weights.step, largest * (1.0f / range));
    const Lanes scale = largest < 1e-33f ? Lanes{} : range / largest;
    for (int t = 0; t < KEYS; t += 4) {
        __m512i u[4];
        for (int i = 0; i < 4; ++i) u[i] = _mm512_cvtps_epi32((__m512)(w[t + i] * scale));
        const auto join = [](__m512i a, __m512i b, __m512i c, __m512i d) {
            return (a | _mm512_slli_epi32(b, 8)) |
                   (_mm512_slli_epi32(c, 16) | _mm512_slli_epi32(d, 24));
        };
        uint32_t* const high = weights.high + t / 4 * ROWS;
        if (!weights.two_parts) {
            _mm512_store_si512(high, join(u[0], u[1], u[2], u[3]));
            continue;
        }
        const __m512i byte = _mm512_set1_epi32(255);
        _mm512_store_si512(high, join(_mm512_srli_epi32(u[0], 8), _mm512_srli_epi32(u[1], 8),
                                      _mm512_srli_epi32(u[2], 8), _mm512_srli_epi32(u[3], 8)));
        _mm512_store_si512(weights.low + t / 4 * ROWS,
                           join(u[0] & byte, u[1] & byte, u[2] & byte, u[3] & byte));
    }
}

template <int D>
static void attend_int8(const FlashDecode& p, const void* packed, const Split& split,
                        Partial partial) {
    constexpr int KEYS = 32, MAX_ROWS = 256;
    const int64_t rows = count_rows(p), padded = padded_rows(p);
    const float* factor = static_cast<const float*>(packed);
    const int32_t* surplus = reinterpret_cast<const int32_t*>(factor + padded);
    const char* q = reinterpret_cast<const char*>(surplus + 2 * padded);
    Copies<KEYS, D> copies;
    Lanes s[KEYS];
    IntegerWeights<KEYS> weights;
    alignas(64) float decay[ROWS], seen[MAX_ROWS] = {};
    alignas(64) float k_scale[KEYS], v_scale[KEYS];

    const auto load_scales = [&](int64_t first, int n_keys) {
        const int shift = __builtin_ctzll(uint64_t(p.page_size));
        for (int t = 0; t < KEYS; t += RUN) {
            const int live = n_keys - t < 0 ? 0 : n_keys - t < RUN ? n_keys - t : RUN;
            for (int i = live; i < RUN; ++i) k_scale[t + i] = v_scale[t + i] = 0.0f;
            if (live == 0) continue;
            const int64_t key = first + t, token = key & (p.page_size - 1);
            const int64_t page = p.block_table[split.batch * p.stride_block_table + (key >> shift)];
            const float* k = scale_row(p.k_scale, p.stride_k_scale, page, split.kv_head, token);
            const float* v = scale_row(p.v_scale, p.stride_v_scale, page, split.kv_head, token);
            memcpy(k_scale + t, k, live * sizeof(float));
            memcpy(v_scale + t, v, live * sizeof(float));
        }
    };

    clear_partial(p, partial);
    const int64_t all_see = p.seq_lens[split.batch] - p.n_queries + 1;
    Runs<KEYS> next = find_runs<KEYS>(p, split, split.first);
    for (int64_t first = split.first; first < split.end; first += KEYS) {
        const int n_keys = int(split.end - first < KEYS ? split.end - first : KEYS);
        Runs<KEYS> runs = next;
        next = find_runs<KEYS>(p, split, first + KEYS);
        copies.replace(p, n_keys, runs);
        load_scales(first, n_keys);
        for (int64_t row = 0; row < rows; row += ROWS) {
            for (int i = 0; i < KEYS / RUN; ++i) {
                score_run_int8<D>(q + row * D * 2, surplus + row * 2, runs.k[i], next.k[i],
                                  k_scale + i * RUN, s + i * RUN);
            }
            if (first + KEYS > all_see) hide_keys(p, split.batch, first, row, s, KEYS);
            const Lanes aging = softmax_tile<false>(s, KEYS, load_lanes(factor + row),
                                                    partial.max + row, partial.total + row);
            store_lanes(decay, aging);
            round_weights_int8<KEYS>(s, v_scale, n_keys, aging, seen + row, weights);
            float* acc = partial.acc + row * D;
            if (rows - row <= ROWS - INT8_ROWS) {
                for (int r = 0; r < rows - row; r += INT8_ROWS) {
                    accumulate_tile_int8<D, KEYS, 4>(weights, r, runs, next, 0, decay, acc);
                }
                continue;
            }
            for (int r = 0; r < ROWS; r += INT8_ROWS) {
                accumulate_tile_int8<D, KEYS, 1>(weights, r, runs, next, r / INT8_ROWS, decay, acc);
            }
        }
    }
    restore_order_int8(partial.acc, rows * D);
}

static void attend_int8_any_dim(const FlashDecode& p, const void* packed, const Split& split,
                                Partial partial) {
    if (p.head_dim == 128) {
        attend_int8<128>(p, packed, split, partial);
    } else {
        attend_int8<64>(p, packed, split, partial);
    }
}

static const FlashDecodeLoops BF16_LOOPS = {packed_bytes_bf16, pack_bf16, attend_bf16_any_dim,
                                            merge_rows};
static const FlashDecodeLoops INT8_LOOPS = {packed_bytes_int8, pack_int8, attend_int8_any_dim,
                                            merge_rows};

static const FlashDecodeLoops& select(const FlashDecode& p) {
    if (p.dtype == DType::bfloat16 && p.format == CacheFormat::as_q) return BF16_LOOPS;
    if (p.dtype == DType::bfloat16 && p.format == CacheFormat::int8) return INT8_LOOPS;
    return FP32_LOOPS;
}

const FlashDecodeVariant FLASH_DECODE_AVX512_BF16 = {"avx512_bf16", select};

}  // namespace glm4
