// flash_decode for AVX512-BF16 and AVX512-VNNI: bf16 queries over a bf16 or int8 cache; the rest in
// fp32, with AVX512.
//
// What there is to do: a key and value of D = 128 in bf16 are 512 bytes, and 16 rows make of them
// 2 * 16 * 128 products, 128 instructions of 32 products each. At two a clock (measured: Zen 5,
// also with one operand broadcast from memory) they take 64 clocks: 33 GB/s a core at 4.2 GHz.
//
//   scores  lanes are rows  s[t]   += (q[2i], q[2i+1]) * (k[t][2i], k[t][2i+1])  k broadcast
//   out     lanes are dims  acc[r] += (v[t], v[t+1]) * (p[t][r], p[t+1][r])      p broadcast
//
// p is rounded to bf16 for the second product; sums are in fp32. An int8 cache, 264 bytes with its
// scales, takes integer products of four (vpdpbusd: unsigned by signed), so that its bytes need no
// conversion: 64 instructions for the scores and 32 for out, 48 clocks.
//
//   scores     q as an integer of 16 bits, q = step * (256 high + low), step the power of two that
//              just holds the row's largest: exact down to a 128th of that; k + 128 unsigned; the
//              surplus 128 * sum(high), 128 * sum(low) is taken off at the start
//   out        w = p * v_scale as an unsigned integer of 8 bits of the tile's largest p of that row
//              and its largest v_scale; where 8 bits are too few, of more (`requantise`)
//
// All else must fit beside the products. Per tile of keys and ROWS rows there are three steps,
// scores, weights and sums; each turn of the loop takes the scores of one tile, the weights of the
// tile before and the sums of the one before that, so that none waits for another, and the
// exponentials run between the products of the scores, on the units that those leave free.
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

// KEYS keys and values where they lie, in runs of RUN tokens, or their copies; the same for the
// scales of an int8 cache.
template <int KEYS, int ROW_BYTES>
struct Tile {
    const char* k[KEYS / RUN];
    const char* v[KEYS / RUN];
    const float* k_scale[KEYS / RUN];
    const float* v_scale[KEYS / RUN];
    alignas(64) char k_copies[KEYS / RUN][RUN * ROW_BYTES];
    alignas(64) char v_copies[KEYS / RUN][RUN * ROW_BYTES];
    alignas(64) float k_scale_copies[KEYS / RUN][RUN];
    alignas(64) float v_scale_copies[KEYS / RUN][RUN];

    // Past the sequence's end: no keys of its own, but something to fetch without harm.
    void find(const FlashDecode& p, const Split& split, int64_t first) {
        const int shift = __builtin_ctzll(uint64_t(p.page_size));
        const int64_t last = p.seq_lens[split.batch] - 1;
        for (int i = 0; i < KEYS / RUN; ++i) {
            const int64_t key = first + i * RUN <= last ? first + i * RUN : last / RUN * RUN;
            const int64_t page = p.block_table[split.batch * p.stride_block_table + (key >> shift)];
            const int64_t token = key & (p.page_size - 1);
            k[i] = cache_row(p, p.k, p.stride_k, page, split.kv_head, token);
            v[i] = cache_row(p, p.v, p.stride_v, page, split.kv_head, token);
            if (p.format == CacheFormat::as_q) continue;
            k_scale[i] = scale_row(p.k_scale, p.stride_k_scale, page, split.kv_head, token);
            v_scale[i] = scale_row(p.v_scale, p.stride_v_scale, page, split.kv_head, token);
            prefetch(reinterpret_cast<const char*>(k_scale[i]));
            prefetch(reinterpret_cast<const char*>(v_scale[i]));
        }
    }

    void fetch() const {
        for (int i = 0; i < KEYS / RUN; ++i) {
            for (int line = 0; line < RUN * ROW_BYTES; line += 64) {
                prefetch(k[i] + line), prefetch(v[i] + line);
            }
        }
    }

    // Copies runs that the loops cannot read in place: those with fewer than RUN tokens, filled up
    // with zeros, and those whose tokens are not next to each other.
    void copy_what_must_be(const FlashDecode& p, int64_t n_keys) {
        for (int i = 0; i < KEYS / RUN; ++i) {
            const int64_t live = n_keys - i * RUN;
            copy_rows(k[i], p.stride_k[2] * cache_item_bytes(p), live, k_copies[i]);
            copy_rows(v[i], p.stride_v[2] * cache_item_bytes(p), live, v_copies[i]);
            if (p.format == CacheFormat::as_q || live >= RUN) continue;
            copy_scales(k_scale[i], live, k_scale_copies[i]);
            copy_scales(v_scale[i], live, v_scale_copies[i]);
        }
    }
    static void copy_rows(const char*& rows, int64_t stride, int64_t live, char* copies) {
        if (live >= RUN && stride == ROW_BYTES) return;
        for (int t = 0; t < RUN; ++t) {
            char* to = copies + t * ROW_BYTES;
            if (t < live) {
                memcpy(to, rows + t * stride, ROW_BYTES);
            } else {
                memset(to, 0, ROW_BYTES);
            }
        }
        rows = copies;
    }
    static void copy_scales(const float*& scales, int64_t live, float* copies) {
        for (int t = 0; t < RUN; ++t) copies[t] = t < live ? scales[t] : 0.0f;
        scales = copies;
    }
};

// Scores of a tile of keys with ROWS rows.
template <int KEYS>
struct Scores {
    Lanes s[KEYS] = {};
    Lanes max = {};
    int64_t tile = 0, row = 0;
};

// p is relative to a reference, which follows the largest score only where p would pass 2^LAG: so
// it hardly ever changes, and acc hardly ever has to be aged.
constexpr float LAG = 8.0f;

struct Aging {
    alignas(64) float decay[ROWS];
    bool needed;

    // Takes the largest score of a tile into account. Returns the reference, 0 for -inf.
    Lanes follow(Lanes tile_max, Lanes log2_factor, float* max) {
        const Lanes old = load_lanes(max);
        const Lanes m = (tile_max - old) * log2_factor > LAG ? tile_max : old;
        const Lanes reference = m == MINUS_INFINITY ? Lanes{} : m;
        store_lanes(max, m);
        store_lanes(decay, exp2_product<false>(old - reference, log2_factor));
        needed = _mm512_cmp_ps_mask((__m512)m, (__m512)old, _CMP_NEQ_UQ) != 0;
        return reference;
    }
    void age(float* acc, int head_dim) const {
        for (int r = 0; needed && r < ROWS; ++r) {
            const Lanes factor = all_lanes(decay[r]);
            for (int d = 0; d < head_dim; d += LANES, acc += LANES) {
                store_lanes(acc, load_lanes(acc) * factor);
            }
        }
    }
};

// As `larger`, of which GCC makes a comparison and a selection that take the products' place.
static inline Lanes larger_beside(Lanes a, Lanes b) {
    return (Lanes)_mm512_max_ps((__m512)a, (__m512)b);
}

// exp2_product<false> likewise, for a b <= 125; below 2^-126 it gives something from 0 to 2^-126.
static inline Lanes exp2_beside(Lanes a, Lanes b) {
    constexpr float ROUND = 12582912.0f;                       // as in exp2_product
    const Lanes x = larger_beside(all_lanes(-126.0f), a * b);  // NaN stays
    const Lanes shifted = x + ROUND;
    const Lanes f = x - (shifted - ROUND);
    Lanes y = all_lanes(1.3276472e-3f);
    y = y * f + 9.6755413e-3f;
    y = y * f + 5.5507133e-2f;
    y = y * f + 2.4022120e-1f;
    y = y * f + 6.9314697e-1f;
    y = y * f + 1.0000001f;
    return (Lanes)_mm512_add_epi32((__m512i)y, _mm512_slli_epi32((__m512i)shifted, 23));
}

// Keys and values are fetched two tiles ahead, keys while scores are computed, values while sums
// are.
constexpr int AHEAD = 2;
constexpr int TILES = 8;  // a power of two, and enough for AHEAD, the tile itself and two behind

// The loop over the steps, which are Cache's. Measured, Zen 5, clocks a key and KV head with 16
// rows of D = 128: 78-81 from L2 and 98-110 from memory for bf16, 70-72 and 80-85 for int8.
template <typename Cache>
static void attend(const FlashDecode& p, const void* packed, const Split& split, Partial partial) {
    constexpr int KEYS = Cache::KEYS;
    const int64_t padded = padded_rows(p), all_see = p.seq_lens[split.batch] - p.n_queries + 1;
    const int64_t n_steps = (split.end - split.first + KEYS - 1) / KEYS * (padded / ROWS);
    Cache cache(p, packed, partial);
    typename Cache::Tile tiles[TILES];
    typename Cache::Weights weights[2];
    Scores<KEYS> scores[2];
    const auto tile_at = [&](int64_t i) -> typename Cache::Tile& { return tiles[i & (TILES - 1)]; };

    clear_partial(p, partial);
    for (int i = 0; i < AHEAD; ++i) {
        tiles[i].find(p, split, split.first + i * KEYS);
        tiles[i].fetch();
    }
    int64_t tile = 0, row = 0;
    for (int64_t i = 0; i < n_steps + 2; ++i) {
        Scores<KEYS>& now = scores[i & 1];
        Scores<KEYS>& before = scores[~i & 1];
        typename Cache::Weights& made = weights[~i & 1];
        const typename Cache::Weights& used = weights[i & 1];
        const bool scoring = i < n_steps;
        const bool weighing = i > 0 && i <= n_steps;
        // In the first turn of nothing, to no use: a condition here slows all the others.
        const auto weigh = [&](int t) { cache.weigh(before, tile_at(before.tile), made, t); };

        if (weighing) cache.begin_weights(before, made);
        if (scoring) {
            const int64_t first = split.first + tile * KEYS;
            if (row == 0) {
                tile_at(tile + AHEAD).find(p, split, first + AHEAD * KEYS);
                tile_at(tile).copy_what_must_be(p, split.end - first);
                cache.prepare(tile_at(tile));
            }
            now.tile = tile, now.row = row;
            cache.score(tile_at(tile), tile_at(tile + AHEAD), now, weigh);
            if (first + KEYS > all_see) {
                hide_keys(p, split.batch, first, row, now.s, KEYS);
                now.max = now.s[0];
                for (int t = 1; t < KEYS; ++t) now.max = larger_beside(now.s[t], now.max);
            }
            row += ROWS;
            if (row == padded) row = 0, ++tile;
        } else if (weighing) {
            for (int t = 0; t < KEYS; t += 4) weigh(t);
        }
        if (weighing) cache.finish_weights(before, tile_at(before.tile), made);
        if (i >= 2) cache.accumulate(used, tile_at(used.tile), tile_at(used.tile + AHEAD));
    }
    Cache::restore_order(partial.acc, count_rows(p) * p.head_dim);
}

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

// acc += p v over one run, for ROW_BLOCK rows and DIM_BLOCK dims; `weights`: (p[t], p[t + 1]).
constexpr int ROW_BLOCK = 8, DIM_BLOCK = 32;
template <int D>
static inline void accumulate_run(const uint32_t* weights, const char* v, const char*& fetch,
                                  int n_fetch, __m512 (*sum)[2]) {
    constexpr int ROW_BYTES = D * 2;
    for (int t = 0; t < RUN; t += 2, weights += ROWS, v += 2 * ROW_BYTES) {
        const __m512i v0 = load_512(v), v1 = load_512(v + ROW_BYTES);
        const __m512i low = _mm512_unpacklo_epi16(v0, v1), high = _mm512_unpackhi_epi16(v0, v1);
        for (int i = 0; i < n_fetch; ++i, fetch += 64) prefetch(fetch);
        for (int r = 0; r < ROW_BLOCK; ++r) {
            const __m512i w = broadcast_32(weights + r);
            sum[r][0] = dot_bf16(sum[r][0], w, low);
            sum[r][1] = dot_bf16(sum[r][1], w, high);
        }
    }
}

// Interleaving two rows within 128 bits left dims 0-3, 8-11, .. of a block in its first vector.
static void restore_order_bf16(float* acc, int64_t count) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int64_t i = 0; i < count; i += DIM_BLOCK) {
        const __m512 low = _mm512_loadu_ps(acc + i), high = _mm512_loadu_ps(acc + i + 16);
        _mm512_storeu_ps(acc + i, _mm512_permutex2var_ps(low, first, high));
        _mm512_storeu_ps(acc + i + 16, _mm512_permutex2var_ps(low, second, high));
    }
}

template <int D>
struct Bf16Cache {
    static constexpr int KEYS = 16, ROW_BYTES = D * 2, PAIRS = D / 2;
    using Tile = glm4::Tile<KEYS, ROW_BYTES>;
    struct Weights {
        alignas(64) uint32_t pairs[KEYS / 2 * ROWS];  // (p[t], p[t + 1]), a row after another
        Aging aging;
        int64_t tile, row;
    };

    const float* factor;
    const char* q;
    Partial partial;
    int64_t rows;
    Lanes log2_factor = {}, reference = {}, total = {};  // of the weights being made
    __m512i order;                                       // takes the lanes of two vectors in turn

    Bf16Cache(const FlashDecode& p, const void* packed, Partial partial)
        : factor(static_cast<const float*>(packed)),
          q(reinterpret_cast<const char*>(factor + padded_rows(p))),
          partial(partial),
          rows(count_rows(p)) {
        alignas(64) uint16_t turns[32];
        for (int i = 0; i < 32; ++i) turns[i] = uint16_t(i / 2 + i % 2 * 16);
        order = load_512(turns);
    }

    void prepare(Tile&) {}

    // The scores of a tile; meanwhile weights, four at a time, and a line for each pair to fetch.
    template <typename Weigh>
    void score(const Tile& tile, const Tile& next, Scores<KEYS>& now, const Weigh& weigh) const {
        const char* pairs = q + now.row * ROW_BYTES;
        const char *k = tile.k[0], *fetch = next.k[0];
        __m512 sum[KEYS] = {};
#pragma GCC unroll 1
        for (int part = 0; part < KEYS; part += 4) {
#pragma GCC unroll 1
            for (int i = 0; i < PAIRS / 4; ++i, pairs += 64, k += 4, fetch += 64) {
                const __m512i q_pair = load_512(pairs);
                prefetch(fetch);
#pragma GCC unroll 16
                for (int t = 0; t < KEYS; ++t) {
                    sum[t] = dot_bf16_broadcast(sum[t], q_pair, k + t * ROW_BYTES);
                }
            }
            weigh(part);
        }
        now.max = (Lanes)sum[0];
        for (int t = 0; t < KEYS; ++t) {
            now.s[t] = (Lanes)sum[t];
            now.max = larger_beside(now.s[t], now.max);
        }
    }

    void begin_weights(const Scores<KEYS>& scores, Weights& weights) {
        log2_factor = load_lanes(factor + scores.row) * LOG2E;
        reference = weights.aging.follow(scores.max, log2_factor, partial.max + scores.row);
        total = Lanes{};
    }
    void weigh(Scores<KEYS>& scores, const Tile&, Weights& weights, int t) {
        Lanes p[4];
        for (int i = 0; i < 4; ++i) p[i] = exp2_beside(scores.s[t + i] - reference, log2_factor);
        total += (p[0] + p[1]) + (p[2] + p[3]);
        for (int i = 0; i < 4; i += 2) {
            const __m512bh both = _mm512_cvtne2ps_pbh((__m512)p[i + 1], (__m512)p[i]);
            _mm512_store_si512(weights.pairs + (t + i) / 2 * ROWS,
                               _mm512_permutexvar_epi16(order, (__m512i)both));
        }
    }
    void finish_weights(const Scores<KEYS>& scores, const Tile&, Weights& weights) {
        float* const sum = partial.total + scores.row;
        store_lanes(sum, load_lanes(sum) * load_lanes(weights.aging.decay) + total);
        weights.tile = scores.tile, weights.row = scores.row;
    }

    void accumulate(const Weights& weights, const Tile& tile, const Tile& next) const {
        const int n_fetch = rows > ROW_BLOCK ? 1 : 2;
        const char* fetch = next.v[0];
        float* const acc = partial.acc + weights.row * D;
        weights.aging.age(acc, D);
        for (int r0 = 0; r0 < ROWS && weights.row + r0 < rows; r0 += ROW_BLOCK) {
            for (int d0 = 0; d0 < D; d0 += DIM_BLOCK) {
                float* const to = acc + r0 * D + d0;
                __m512 sum[ROW_BLOCK][2];
                for (int r = 0; r < ROW_BLOCK; ++r) {
                    sum[r][0] = _mm512_loadu_ps(to + r * D);
                    sum[r][1] = _mm512_loadu_ps(to + r * D + 16);
                }
                for (int i = 0; i < KEYS / RUN; ++i) {
                    accumulate_run<D>(weights.pairs + i * RUN / 2 * ROWS + r0, tile.v[i] + d0 * 2,
                                      fetch, n_fetch, sum);
                }
                for (int r = 0; r < ROW_BLOCK; ++r) {
                    _mm512_storeu_ps(to + r * D, sum[r][0]);
                    _mm512_storeu_ps(to + r * D + 16, sum[r][1]);
                }
            }
        }
    }

    static void restore_order(float* acc, int64_t count) { restore_order_bf16(acc, count); }
};

static void attend_bf16(const FlashDecode& p, const void* packed, const Split& split,
                        Partial partial) {
    if (p.head_dim == 128) {
        attend<Bf16Cache<128>>(p, packed, split, partial);
    } else {
        attend<Bf16Cache<64>>(p, packed, split, partial);
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

// Bytes of four tokens, a row after another, from their integers of 0..255.
static inline __m512i join_bytes(const __m512i* u) {
    const __m512i transpose =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i low = _mm512_packus_epi32(u[0], u[1]), high = _mm512_packus_epi32(u[2], u[3]);
    return _mm512_shuffle_epi8(_mm512_packus_epi16(low, high), transpose);
}

// sum += w v over four tokens, for INT8_ROWS rows and half of 64 dims; `weights`: their bytes.
// Vector j of a row holds dims 4 j to 4 j + 3 of each 16.
constexpr int INT8_ROWS = 8;
template <int D, bool HIGH>
static inline void accumulate_four(const uint32_t* weights, const char* v, __m512i (*sum)[2]) {
    const auto mix = [](__m512i a, __m512i b) {
        return HIGH ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b);
    };
    const __m512i v01 = mix(load_512(v), load_512(v + D));
    const __m512i v23 = mix(load_512(v + 2 * D), load_512(v + 3 * D));
    const __m512i low = _mm512_unpacklo_epi16(v01, v23), high = _mm512_unpackhi_epi16(v01, v23);
    for (int r = 0; r < INT8_ROWS; ++r) {
        const __m512i w = broadcast_32(weights + r);
        sum[r][0] = dot_int8(sum[r][0], w, low);
        sum[r][1] = dot_int8(sum[r][1], w, high);
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

template <int D>
struct Int8Cache {
    static constexpr int KEYS = 32, ROW_BYTES = D, FOURS = KEYS / 4, MAX_ROWS = 256;
    struct Tile : glm4::Tile<KEYS, ROW_BYTES> {
        alignas(64) float value_scale[KEYS];  // v_scale times 255 / the largest
        float largest_scale;                  // NaN where one is not finite
    };
    // Bytes of four tokens, a row after another: w ~ step * (256 high + low).
    struct Weights {
        alignas(64) uint32_t low[FOURS * ROWS];
        alignas(64) uint32_t high[FOURS * ROWS];
        alignas(64) float step[ROWS];
        uint32_t has_high[ROWS / INT8_ROWS];  // a bit for each four tokens, where any is not zero
        Aging aging;
        int64_t tile, row;
    };

    const float* factor;
    const int32_t* surplus;
    const char* q;
    Partial partial;
    int64_t rows;
    Lanes log2_factor = {}, max = {}, total = {}, weight = {};  // of the weights being made
    alignas(64) float seen[MAX_ROWS] = {};                      // sum w of all tiles so far

    Int8Cache(const FlashDecode& p, const void* packed, Partial partial)
        : factor(static_cast<const float*>(packed)),
          surplus(reinterpret_cast<const int32_t*>(factor + padded_rows(p))),
          q(reinterpret_cast<const char*>(surplus + 2 * padded_rows(p))),
          partial(partial),
          rows(count_rows(p)) {}

    void prepare(Tile& tile) {
        Lanes most = {}, poison = {};
        for (int i = 0; i < KEYS / RUN; ++i) {
            const Lanes scale = load_lanes(tile.v_scale[i]);
            most = larger_beside(most, scale);
            poison += scale * 0.0f;
        }
        const float largest = _mm512_reduce_max_ps((__m512)most);
        const float inverse = largest < 1e-33f ? 0.0f : 255.0f / largest;
        tile.largest_scale = largest + _mm512_reduce_add_ps((__m512)poison);
        for (int i = 0; i < KEYS / RUN; ++i) {
            store_lanes(tile.value_scale + i * RUN, load_lanes(tile.v_scale[i]) * inverse);
        }
    }

    // The scores of a tile; meanwhile weights, four at a time, and lines to fetch.
    template <typename Weigh>
    void score(const Tile& tile, const Tile& next, Scores<KEYS>& now, const Weigh& weigh) const {
        constexpr int BLOCK = 8;
        const __m512i flip = _mm512_set1_epi8(char(-128));
        const int32_t* const start = surplus + now.row * 2;
        now.max = all_lanes(MINUS_INFINITY);
#pragma GCC unroll 1
        for (int t0 = 0; t0 < KEYS; t0 += BLOCK) {
            const int run = t0 / RUN;
            const char* quads = q + now.row * D * 2;
            const char* k = tile.k[run] + t0 % RUN * D;
            const char* fetch = next.k[run] + t0 % RUN * D;
            __m512i high[BLOCK], low[BLOCK];
            for (int t = 0; t < BLOCK; ++t) {
                high[t] = load_512(start);
                low[t] = load_512(start + ROWS);
            }
#pragma GCC unroll 1
            for (int part = 0; part < BLOCK; part += 4) {
#pragma GCC unroll 2
                for (int i = 0; i < D / 8; ++i, quads += 128, k += 4) {
                    const __m512i q_high = load_512(quads), q_low = load_512(quads + 64);
                    if (i % 2 == 0) prefetch(fetch), fetch += 64;
#pragma GCC unroll 8
                    for (int t = 0; t < BLOCK; ++t) {
                        const __m512i quad = _mm512_xor_si512(flip, broadcast_32(k + t * D));
                        high[t] = dot_int8(high[t], quad, q_high);
                        low[t] = dot_int8(low[t], quad, q_low);
                    }
                }
                weigh(t0 + part);
            }
            for (int t = 0; t < BLOCK; ++t) {
                const __m512i dot = _mm512_add_epi32(_mm512_slli_epi32(high[t], 8), low[t]);
                now.s[t0 + t] = (Lanes)_mm512_cvtepi32_ps(dot) * tile.k_scale[run][t0 % RUN + t];
                now.max = larger_beside(now.s[t0 + t], now.max);
            }
        }
    }

    // p relative to the tile's largest; w = p * v_scale in units of 1 / 255 of the largest v_scale.
    void begin_weights(const Scores<KEYS>& scores, Weights&) {
        log2_factor = load_lanes(factor + scores.row) * LOG2E;
        max = scores.max == MINUS_INFINITY ? Lanes{} : scores.max;
        total = weight = Lanes{};
    }
    // Leaves w in the place of s.
    void weigh(Scores<KEYS>& scores, const Tile& tile, Weights& weights, int t) {
        __m512i u[4];
        for (int i = 0; i < 4; ++i) {
            const Lanes p = exp2_beside(scores.s[t + i] - max, log2_factor);
            const Lanes w = p * tile.value_scale[t + i];
            total += p;
            weight += w;
            u[i] = _mm512_cvtps_epi32((__m512)w);
            scores.s[t + i] = w;
        }
        _mm512_store_si512(weights.low + t / 4 * ROWS, join_bytes(u));
    }
    // Eight bits err by at most KEYS / 2 steps: too much if that is more than 1/32 of the sum of w,
    // and of a 64th of all earlier tiles'.
    void finish_weights(const Scores<KEYS>& scores, const Tile& tile, Weights& weights) {
        const int64_t row = scores.row;
        weights.tile = scores.tile, weights.row = row;
        const Lanes reference = weights.aging.follow(scores.max, log2_factor, partial.max + row);
        const Lanes decay = load_lanes(weights.aging.decay);
        const Lanes scale = exp2_product<false>(scores.max - reference, log2_factor);
        float* const sum = partial.total + row;
        store_lanes(sum, load_lanes(sum) * decay + total * scale);

        const Lanes step = scale * (tile.largest_scale * (1.0f / 255.0f));
        const Lanes earlier = load_lanes(seen + row) * decay;
        const Lanes enough =
            larger_beside(weight * step, earlier * (1.0f / 64.0f)) * (1.0f / (16 * KEYS));
        store_lanes(seen + row, earlier + weight * step);
        store_lanes(weights.step, step);
        weights.has_high[0] = weights.has_high[1] = 0;
        const __mmask16 coarse = _mm512_cmp_ps_mask((__m512)step, (__m512)enough, _CMP_GT_OQ);
        if (coarse) requantise(scores, weights, coarse, step, enough * 0.25f);
    }
    // For the rows of `coarse`, finer steps and two bytes.
    static void requantise(const Scores<KEYS>& scores, Weights& weights, __mmask16 coarse,
                           Lanes step, Lanes enough) {
        const __m512i byte = _mm512_set1_epi32(255);
        const Lanes finer = larger_beside(step * (1.0f / 257.0f), enough);
        const Lanes one = all_lanes(1.0f);
        const Lanes ratio =
            (Lanes)_mm512_mask_div_ps((__m512)one, coarse, (__m512)step, (__m512)finer);
        store_lanes(weights.step, (Lanes)_mm512_mask_mov_ps((__m512)step, coarse, (__m512)finer));
        for (int t = 0; t < KEYS; t += 4) {
            __m512i low[4], high[4];
            for (int i = 0; i < 4; ++i) {
                const __m512i u = _mm512_cvtps_epi32((__m512)(scores.s[t + i] * ratio));
                low[i] = _mm512_and_si512(u, byte);
                high[i] = _mm512_srli_epi32(u, 8);
            }
            const __m512i upper = join_bytes(high);
            _mm512_store_si512(weights.low + t / 4 * ROWS, join_bytes(low));
            _mm512_store_si512(weights.high + t / 4 * ROWS, upper);
            const uint32_t there = _mm512_test_epi32_mask(upper, upper);
            weights.has_high[0] |= uint32_t((there & 0xff) != 0) << (t / 4);
            weights.has_high[1] |= uint32_t((there >> 8) != 0) << (t / 4);
        }
    }

    void accumulate(const Weights& weights, const Tile& tile, const Tile& next) const {
        const char* fetch[2] = {next.v[0], next.v[1]};
        const int n_fetch = rows > INT8_ROWS ? 1 : 2;
        weights.aging.age(partial.acc + weights.row * D, D);
        for (int r0 = 0; r0 < ROWS && weights.row + r0 < rows; r0 += INT8_ROWS) {
            for (int d0 = 0; d0 < D; d0 += 64) {
                accumulate_block<false>(weights, tile, r0, d0, fetch, n_fetch);
                accumulate_block<true>(weights, tile, r0, d0, fetch, n_fetch);
            }
        }
    }
    template <bool HIGH>
    void accumulate_block(const Weights& weights, const Tile& tile, int r0, int d0,
                          const char** fetch, int n_fetch) const {
        __m512i sum[INT8_ROWS][2] = {};
        if (weights.has_high[r0 / INT8_ROWS] != 0) {
            for (uint32_t left = weights.has_high[r0 / INT8_ROWS]; left != 0; left &= left - 1) {
                const int four = __builtin_ctz(left);
                accumulate_four<D, HIGH>(weights.high + four * ROWS + r0,
                                         tile.v[four / (RUN / 4)] + four % (RUN / 4) * 4 * D + d0,
                                         sum);
            }
            for (auto& row : sum) {
                for (__m512i& x : row) x = _mm512_slli_epi32(x, 8);
            }
        }
#pragma GCC unroll 1
        for (int i = 0; i < KEYS / RUN; ++i) {
            const uint32_t* bytes = weights.low + i * RUN / 4 * ROWS + r0;
            const char* v = tile.v[i] + d0;
#pragma GCC unroll 1
            for (int t = 0; t < RUN; t += 4, bytes += ROWS, v += 4 * D) {
                for (int j = 0; j < n_fetch; ++j, fetch[i] += 64) prefetch(fetch[i]);
                accumulate_four<D, HIGH>(bytes, v, sum);
            }
        }
        for (int r = 0; r < INT8_ROWS; ++r) {
            const __m512 step = _mm512_set1_ps(weights.step[r0 + r]);
            for (int j = 0; j < 2; ++j) {
                float* to = partial.acc + (weights.row + r0 + r) * D + d0 + (2 * HIGH + j) * 16;
                const __m512 added = _mm512_cvtepi32_ps(sum[r][j]);
                _mm512_storeu_ps(to, _mm512_fmadd_ps(added, step, _mm512_loadu_ps(to)));
            }
        }
    }

    static void restore_order(float* acc, int64_t count) { restore_order_int8(acc, count); }
};

static void attend_int8(const FlashDecode& p, const void* packed, const Split& split,
                        Partial partial) {
    if (p.head_dim == 128) {
        attend<Int8Cache<128>>(p, packed, split, partial);
    } else {
        attend<Int8Cache<64>>(p, packed, split, partial);
    }
}

static const FlashDecodeLoops BF16_LOOPS = {packed_bytes_bf16, pack_bf16, attend_bf16, merge_rows};
static const FlashDecodeLoops INT8_LOOPS = {packed_bytes_int8, pack_int8, attend_int8, merge_rows};

static const FlashDecodeLoops& select(const FlashDecode& p) {
    if (p.dtype == DType::bfloat16 && p.format == CacheFormat::as_q) return BF16_LOOPS;
    if (p.dtype == DType::bfloat16 && p.format == CacheFormat::int8) return INT8_LOOPS;
    return FP32_LOOPS;
}

const FlashDecodeVariant FLASH_DECODE_AVX512_BF16 = {"avx512_bf16", select};

}  // namespace glm4
