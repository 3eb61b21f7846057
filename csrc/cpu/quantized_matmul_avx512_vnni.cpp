// quantized_matmul for AVX512-VNNI: a tile's 16 rows are the 16 lanes of a register.
#include <immintrin.h>

#include "quantized_matmul.h"

namespace glm4 {
namespace {

struct Lanes {
    using Int = __m512i;
    using Float = __m512;
    // 6 rows x 2 tiles: 12 integer and 12 float sums of the 32 registers, and 4 + 12 loads feed 24
    // vpdpbusd where int4 is unpacked on the way. Up to 5 rows wait for memory, and one tile is one
    // stream of it.
    static constexpr int M_TILE = 6, N_TILES = 2, FEW_ROWS = 5, FEW_ROWS_TILES = 1;
    static constexpr bool by_hand(int m_tile, int n_tiles) { return n_tiles == 2 && m_tile >= 4; }
    template <int BITS>
    static constexpr int32_t BIAS = 0;

    static Int set(int32_t x) { return _mm512_set1_epi32(x); }
    static Float set(float x) { return _mm512_set1_ps(x); }
    static Float load(const float* x) { return _mm512_loadu_ps(x); }
    static void store(float* out, Float x) { _mm512_storeu_ps(out, x); }
    static Float to_float(Int x) { return _mm512_cvtepi32_ps(x); }
    static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
    static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
    static Int larger_magnitude(Int a, Float x) {
        const Int bits = _mm512_and_si512(_mm512_castps_si512(x), set(0x7fffffff));
        return _mm512_max_epi32(a, bits);
    }
    static Int nearest(Float x) { return _mm512_cvtps_epi32(x); }
    static Int clamp_and_store(int8_t* out, Int x) {
        x = _mm512_min_epi32(_mm512_max_epi32(x, set(-127)), set(127));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(x));
        return x;
    }
    static int32_t largest(Int x) { return _mm512_reduce_max_epi32(x); }
    static int32_t total(Int x) { return _mm512_reduce_add_epi32(x); }

    static Float load_as_float(const void* data, DType dtype, int64_t i) {
        const auto half = [&] {
            return _mm256_loadu_si256(
                reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(data) + i));
        };
        switch (dtype) {
            case DType::bfloat16:
                return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half()), 16));
            case DType::float16:
                return _mm512_cvtph_ps(half());
            case DType::uint8:
                return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(
                    reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(data) + i))));
            default:
                return _mm512_loadu_ps(static_cast<const float*>(data) + i);
        }
    }

    static void store_as(void* data, DType dtype, int64_t i, Float x) {
        if (dtype == DType::float32) return _mm512_storeu_ps(static_cast<float*>(data) + i, x);
        __m256i halves;
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        if (dtype == DType::bfloat16) {
            const Int bits = _mm512_castps_si512(x);
            const Int odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), set(1));
            const Int rounded = add(bits, add(odd, set(0x7fff)));
            halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
            halves = _mm256_mask_mov_epi16(halves, nan, _mm256_set1_epi16(0x7fc0));
        } else {
            halves = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            const __m256i sign = _mm256_and_si256(halves, _mm256_set1_epi16(short(0x8000)));
            const __m256i quiet = _mm256_or_si256(sign, _mm256_set1_epi16(0x7e00));
            halves = _mm256_mask_mov_epi16(halves, nan, quiet);
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(data) + i), halves);
    }

    static Int quad(const int8_t* x) {
        int32_t bytes;
        memcpy(&bytes, x, sizeof(bytes));
        return _mm512_set1_epi32(bytes);
    }

    // Few rows and one tile: a row's sum would be one chain of instructions that wait for each
    // other, so odd quads get a chain of their own. In int4 those are the high nibbles, left where
    // they are, 16 times too large.
    template <int BITS, bool STREAMS, int MT>
    static void dot32(Int (&acc)[1][MT], const uint8_t* const (&w)[1], const int8_t* x) {
        const Int low = _mm512_set1_epi8(15);
        Int odd[MT];
        for (int m = 0; m < MT; ++m) odd[m] = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int block = 0; block < BITS; ++block) {
            const uint8_t* from = w[0] + block * BLOCK_BYTES;
            __builtin_prefetch(from + AHEAD, 0, STREAMS ? 0 : 3);
            Int u = _mm512_loadu_si512(from), high{};
            if (BITS == 4) {
                asm("" : "+v"(u));  // else GCC loads it twice
                high = _mm512_andnot_si512(low, u), u = _mm512_and_si512(low, u);
            }
#pragma GCC unroll 6
            for (int m = 0; m < MT; ++m) {
                if (BITS == 4) {
                    const int8_t* quads = x + (2 * block * MT + m) * 4;
                    acc[0][m] = _mm512_dpbusd_epi32(acc[0][m], u, quad(quads));
                    odd[m] = _mm512_dpbusd_epi32(odd[m], high, quad(quads + MT * 4));
                } else {
                    Int& sum = block % 2 ? odd[m] : acc[0][m];
                    sum = _mm512_dpbusd_epi32(sum, u, quad(x + (block * MT + m) * 4));
                }
            }
        }
        for (int m = 0; m < MT; ++m) {
            acc[0][m] = add(acc[0][m], BITS == 4 ? _mm512_srai_epi32(odd[m], 4) : odd[m]);
        }
    }

    template <int BITS, bool STREAMS, int MT, int NT>
    static void dot32(Int (&acc)[NT][MT], const uint8_t* const (&w)[NT], const int8_t* x) {
        constexpr int QUADS = 8 / BITS;  // in a block
        const Int low = _mm512_set1_epi8(15);
#pragma GCC unroll 8
        for (int block = 0; block < 8 / QUADS; ++block) {
            Int u[NT][QUADS];
#pragma GCC unroll 4
            for (int n = 0; n < NT; ++n) {
                const uint8_t* from = w[n] + block * BLOCK_BYTES;
                __builtin_prefetch(from + AHEAD);
                u[n][0] = _mm512_loadu_si512(from);
                if (BITS == 4) {
                    u[n][QUADS - 1] = _mm512_and_si512(_mm512_srli_epi16(u[n][0], 4), low);
                    u[n][0] = _mm512_and_si512(u[n][0], low);
                }
            }
#pragma GCC unroll 2
            for (int half = 0; half < QUADS; ++half) {
#pragma GCC unroll 6
                for (int m = 0; m < MT; ++m) {
                    const Int four = quad(x + ((block * QUADS + half) * MT + m) * 4);
#pragma GCC unroll 4
                    for (int n = 0; n < NT; ++n) {
                        acc[n][m] = _mm512_dpbusd_epi32(acc[n][m], u[n][half], four);
                    }
                }
            }
        }
    }

    // clang-format off
    // add_chunks of 4 to 6 rows and 2 tiles, in assembly: compilers keep these 24 sums on the stack
    // and lose a third of the speed. zmm0-11 hold the integer sums, rows of the first tile in 0-5 and
    // of the second in 6-11; zmm12-23 the float sums likewise; 24-27 codes of W; 28 a broadcast; 29
    // the mask.
    //
    // A row of a quad: one broadcast, two vpdpbusd.
#define GLM4_ROW(quad, rows, m, sum0, sum1, u0, u1)                                                \
    "vpbroadcastd 4*(" #quad "*" #rows "+" #m ")(%[x]), %%zmm28\n"                                 \
    "vpdpbusd %%zmm28, %%" #u0 ", %%" #sum0 "\n"                                                   \
    "vpdpbusd %%zmm28, %%" #u1 ", %%" #sum1 "\n"
#define GLM4_ROWS4(quad, rows, u0, u1)                                                             \
    GLM4_ROW(quad, rows, 0, zmm0, zmm6, u0, u1)                                                    \
    GLM4_ROW(quad, rows, 1, zmm1, zmm7, u0, u1)                                                    \
    GLM4_ROW(quad, rows, 2, zmm2, zmm8, u0, u1)                                                    \
    GLM4_ROW(quad, rows, 3, zmm3, zmm9, u0, u1)
#define GLM4_ROWS5(quad, rows, u0, u1)                                                             \
    GLM4_ROWS4(quad, rows, u0, u1)                                                                 \
    GLM4_ROW(quad, rows, 4, zmm4, zmm10, u0, u1)
#define GLM4_ROWS6(quad, rows, u0, u1)                                                             \
    GLM4_ROWS5(quad, rows, u0, u1)                                                                 \
    GLM4_ROW(quad, rows, 5, zmm5, zmm11, u0, u1)

    // A block of 64 bytes of both tiles: a quad of columns in int8, two in int4.
#define GLM4_LOAD(block)                                                                           \
    "prefetcht0 4096+64*" #block "(%[w0])\n"                                                       \
    "prefetcht0 4096+64*" #block "(%[w1])\n"                                                       \
    "vmovdqu64 64*" #block "(%[w0]), %%zmm24\n"                                                    \
    "vmovdqu64 64*" #block "(%[w1]), %%zmm25\n"
#define GLM4_BLOCK8(block, rows) GLM4_LOAD(block) GLM4_ROWS##rows(block, rows, zmm24, zmm25)
#define GLM4_BLOCK4(block, rows)                                                                   \
    GLM4_LOAD(block)                                                                               \
    "vpandd %%zmm29, %%zmm24, %%zmm26\n"                                                           \
    "vpandd %%zmm29, %%zmm25, %%zmm27\n"                                                           \
    "vpsrlw $4, %%zmm24, %%zmm24\n"                                                                \
    "vpsrlw $4, %%zmm25, %%zmm25\n"                                                                \
    GLM4_ROWS##rows((2 * block), rows, zmm26, zmm27)                                               \
    "vpandd %%zmm29, %%zmm24, %%zmm24\n"                                                           \
    "vpandd %%zmm29, %%zmm25, %%zmm25\n"                                                           \
    GLM4_ROWS##rows((2 * block + 1), rows, zmm24, zmm25)
#define GLM4_COLUMNS8(rows)                                                                        \
    GLM4_BLOCK8(0, rows) GLM4_BLOCK8(1, rows) GLM4_BLOCK8(2, rows)                                 \
    GLM4_BLOCK8(3, rows) GLM4_BLOCK8(4, rows) GLM4_BLOCK8(5, rows)                                 \
    GLM4_BLOCK8(6, rows) GLM4_BLOCK8(7, rows)
#define GLM4_COLUMNS4(rows)                                                                        \
    GLM4_BLOCK4(0, rows) GLM4_BLOCK4(1, rows) GLM4_BLOCK4(2, rows) GLM4_BLOCK4(3, rows)

    // A row at the start and at the end of a chunk, and in memory.
#define GLM4_START(m, sum0, sum1)                                                                  \
    "vpbroadcastd 4*" #m "(%[offset]), %%" #sum0 "\n"                                              \
    "vmovdqa64 %%" #sum0 ", %%" #sum1 "\n"
#define GLM4_FINISH(m, sum0, sum1, float0, float1)                                                 \
    "vbroadcastss 4*" #m "(%[step]), %%zmm28\n"                                                    \
    "vcvtdq2ps %%" #sum0 ", %%" #sum0 "\n"                                                         \
    "vcvtdq2ps %%" #sum1 ", %%" #sum1 "\n"                                                         \
    "vmulps %%zmm28, %%" #sum0 ", %%" #sum0 "\n"                                                   \
    "vmulps %%zmm28, %%" #sum1 ", %%" #sum1 "\n"                                                   \
    "vaddps %%" #sum0 ", %%" #float0 ", %%" #float0 "\n"                                           \
    "vaddps %%" #sum1 ", %%" #float1 ", %%" #float1 "\n"
#define GLM4_LOAD_SUMS(m, float0, float1)                                                          \
    "vmovups 128*" #m "(%[sums]), %%" #float0 "\n"                                                 \
    "vmovups 128*" #m "+64(%[sums]), %%" #float1 "\n"
#define GLM4_STORE_SUMS(m, float0, float1)                                                         \
    "vmovups %%" #float0 ", 128*" #m "(%[sums])\n"                                                 \
    "vmovups %%" #float1 ", 128*" #m "+64(%[sums])\n"
#define GLM4_EACH4_SUM(what) what(0, zmm0, zmm6) what(1, zmm1, zmm7)                               \
    what(2, zmm2, zmm8) what(3, zmm3, zmm9)
#define GLM4_EACH5_SUM(what) GLM4_EACH4_SUM(what) what(4, zmm4, zmm10)
#define GLM4_EACH6_SUM(what) GLM4_EACH5_SUM(what) what(5, zmm5, zmm11)
#define GLM4_EACH4_BOTH(what) what(0, zmm0, zmm6, zmm12, zmm18) what(1, zmm1, zmm7, zmm13, zmm19)  \
    what(2, zmm2, zmm8, zmm14, zmm20) what(3, zmm3, zmm9, zmm15, zmm21)
#define GLM4_EACH5_BOTH(what) GLM4_EACH4_BOTH(what) what(4, zmm4, zmm10, zmm16, zmm22)
#define GLM4_EACH6_BOTH(what) GLM4_EACH5_BOTH(what) what(5, zmm5, zmm11, zmm17, zmm23)
#define GLM4_EACH4_FLOAT(what) what(0, zmm12, zmm18) what(1, zmm13, zmm19)                         \
    what(2, zmm14, zmm20) what(3, zmm15, zmm21)
#define GLM4_EACH5_FLOAT(what) GLM4_EACH4_FLOAT(what) what(4, zmm16, zmm22)
#define GLM4_EACH6_FLOAT(what) GLM4_EACH5_FLOAT(what) what(5, zmm17, zmm23)

    // The end of a group: c += scale * (sum - zero point * total), scales in zmm24 and 25, zero points
    // in 26 and 27.
#define GLM4_ZERO_SUMS(m, float0, float1)                                                          \
    "vpxord %%" #float0 ", %%" #float0 ", %%" #float0 "\n"                                         \
    "vpxord %%" #float1 ", %%" #float1 ", %%" #float1 "\n"
#define GLM4_TAKE_OFF_ZERO(m, sum0, sum1, float0, float1)                                          \
    "vbroadcastss 4*" #m "(%[total]), %%zmm28\n"                                                   \
    "vmulps %%zmm28, %%zmm26, %%" #sum0 "\n"                                                       \
    "vmulps %%zmm28, %%zmm27, %%" #sum1 "\n"                                                       \
    "vsubps %%" #sum0 ", %%" #float0 ", %%" #float0 "\n"                                           \
    "vsubps %%" #sum1 ", %%" #float1 ", %%" #float1 "\n"
#define GLM4_ADD_SCALED(m, sum0, sum1, float0, float1)                                             \
    "vmulps %%" #float0 ", %%zmm24, %%" #sum0 "\n"                                                 \
    "vmulps %%" #float1 ", %%zmm25, %%" #sum1 "\n"                                                 \
    "vaddps 128*" #m "(%[c]), %%" #sum0 ", %%" #sum0 "\n"                                          \
    "vaddps 128*" #m "+64(%[c]), %%" #sum1 ", %%" #sum1 "\n"                                       \
    "vmovups %%" #sum0 ", 128*" #m "(%[c])\n"                                                      \
    "vmovups %%" #sum1 ", 128*" #m "+64(%[c])\n"
#define GLM4_FINISH_GROUP(rows)                                                                    \
    "vmovups (%[factors]), %%zmm24\n"                                                              \
    "vmovups 64(%[factors]), %%zmm25\n"                                                            \
    "add $128, %[factors]\n"                                                                       \
    GLM4_EACH##rows##_BOTH(GLM4_ADD_SCALED)
#define GLM4_FINISH_GROUP_WITH_ZERO(rows)                                                          \
    "vmovups 128(%[factors]), %%zmm26\n"                                                           \
    "vmovups 192(%[factors]), %%zmm27\n"                                                           \
    GLM4_EACH##rows##_BOTH(GLM4_TAKE_OFF_ZERO)                                                     \
    "add $4*" #rows ", %[total]\n"                                                                 \
    GLM4_FINISH_GROUP(rows)                                                                        \
    "add $128, %[factors]\n"

    // `chunks` chunks of `blocks` times 32 columns; at each 32, `lines` lines of the next panel are
    // asked for, so that it is in L2 when its turn comes.
#define GLM4_CHUNKS(bits, rows)                                                                    \
    "1:\n"                                                                                         \
    GLM4_EACH##rows##_SUM(GLM4_START)                                                              \
    "mov %[blocks], %[left]\n"                                                                     \
    "2:\n"                                                                                         \
    "mov %[lines], %[left_lines]\n"                                                                \
    "4:\n"                                                                                         \
    "prefetcht1 (%[next])\n"                                                                       \
    "add $64, %[next]\n"                                                                           \
    "dec %[left_lines]\n"                                                                          \
    "jnz 4b\n"                                                                                     \
    GLM4_COLUMNS##bits(rows)                                                                       \
    "add $64*" #bits ", %[w0]\n"                                                                   \
    "add $64*" #bits ", %[w1]\n"                                                                   \
    "add $32*" #rows ", %[x]\n"                                                                    \
    "dec %[left]\n"                                                                                \
    "jnz 2b\n"                                                                                     \
    GLM4_EACH##rows##_BOTH(GLM4_FINISH)                                                            \
    "add $4*" #rows ", %[offset]\n"                                                                \
    "add $4*" #rows ", %[step]\n"                                                                  \
    "dec %[chunks]\n"                                                                              \
    "jnz 1b\n"
#define GLM4_MASK "vpbroadcastd %[mask], %%zmm29\n"
#define GLM4_MOVING                                                                                \
    [w0] "+r"(w0), [w1] "+r"(w1), [x] "+r"(x), [offset] "+r"(offset), [step] "+r"(step),           \
        [chunks] "+r"(chunks), [left] "=&r"(left), [next] "+r"(next), [left_lines] "=&r"(left_lines)
#define GLM4_CLOBBERED                                                                             \
    "memory", "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8",        \
        "zmm9", "zmm10", "zmm11", "zmm12", "zmm13", "zmm14", "zmm15", "zmm16", "zmm17",            \
        "zmm18", "zmm19", "zmm20", "zmm21", "zmm22", "zmm23", "zmm24", "zmm25", "zmm26",           \
        "zmm27", "zmm28", "zmm29"
#define GLM4_ADD_CHUNKS(bits, rows)                                                                \
    asm volatile(GLM4_MASK GLM4_EACH##rows##_FLOAT(GLM4_LOAD_SUMS) GLM4_CHUNKS(bits, rows)         \
                     GLM4_EACH##rows##_FLOAT(GLM4_STORE_SUMS)                                      \
                 : GLM4_MOVING                                                                     \
                 : [sums] "r"(sums), [blocks] "m"(blocks), [lines] "m"(lines), [mask] "m"(mask)                        \
                 : GLM4_CLOBBERED)
#define GLM4_ADD_GROUPS(bits, rows, finish)                                                        \
    asm volatile(GLM4_MASK                                                                         \
                 "3:\n" GLM4_EACH##rows##_FLOAT(GLM4_ZERO_SUMS) "mov %[each], %[chunks]\n"         \
                 GLM4_CHUNKS(bits, rows) finish(rows) "dec %[groups]\n"                            \
                 "jnz 3b\n"                                                                        \
                 : GLM4_MOVING, [groups] "+r"(groups), [factors] "+r"(factors),                    \
                   [total] "+r"(total)                                                             \
                 : [c] "r"(c), [blocks] "m"(blocks), [lines] "m"(lines), [each] "m"(each), [mask] "m"(mask)            \
                 : GLM4_CLOBBERED)
    // clang-format on

    template <int BITS, int MT>
    static void add_chunks(const uint8_t* const (&w)[2], const int8_t* x, const int32_t* offset,
                           const float* step, int64_t columns, int64_t chunk, float* sums,
                           Prefetch& prefetch) {
        const uint8_t *w0 = w[0], *w1 = w[1];
        const int32_t mask = 0x0f0f0f0f;
        const uint8_t*& next = prefetch.next;
        const int64_t lines = prefetch.lines;
        const auto some = [&](int64_t chunks, int64_t blocks) {
            int64_t left, left_lines;
            if constexpr (BITS == 4 && MT == 4) GLM4_ADD_CHUNKS(4, 4);
            if constexpr (BITS == 4 && MT == 5) GLM4_ADD_CHUNKS(4, 5);
            if constexpr (BITS == 4 && MT == 6) GLM4_ADD_CHUNKS(4, 6);
            if constexpr (BITS == 8 && MT == 4) GLM4_ADD_CHUNKS(8, 4);
            if constexpr (BITS == 8 && MT == 5) GLM4_ADD_CHUNKS(8, 5);
            if constexpr (BITS == 8 && MT == 6) GLM4_ADD_CHUNKS(8, 6);
        };
        if (columns >= chunk) some(columns / chunk, chunk / 32);
        if (columns % chunk) some(1, columns % chunk / 32);
    }

    template <int BITS, int MT>
    static void add_groups(const uint8_t* const (&w)[2], const int8_t* x, const int32_t* offset,
                           const float* step, const float* total, const float* factors,
                           bool zero_points, int64_t groups, int64_t each, int64_t chunk, float* c,
                           Prefetch& prefetch) {
        const uint8_t *w0 = w[0], *w1 = w[1];
        const int32_t mask = 0x0f0f0f0f;
        const uint8_t*& next = prefetch.next;
        const int64_t lines = prefetch.lines;
        const int64_t blocks = chunk / 32;
        int64_t chunks, left, left_lines;
        if (zero_points) {
            if constexpr (BITS == 4 && MT == 4) GLM4_ADD_GROUPS(4, 4, GLM4_FINISH_GROUP_WITH_ZERO);
            if constexpr (BITS == 4 && MT == 5) GLM4_ADD_GROUPS(4, 5, GLM4_FINISH_GROUP_WITH_ZERO);
            if constexpr (BITS == 4 && MT == 6) GLM4_ADD_GROUPS(4, 6, GLM4_FINISH_GROUP_WITH_ZERO);
            if constexpr (BITS == 8 && MT == 4) GLM4_ADD_GROUPS(8, 4, GLM4_FINISH_GROUP_WITH_ZERO);
            if constexpr (BITS == 8 && MT == 5) GLM4_ADD_GROUPS(8, 5, GLM4_FINISH_GROUP_WITH_ZERO);
            if constexpr (BITS == 8 && MT == 6) GLM4_ADD_GROUPS(8, 6, GLM4_FINISH_GROUP_WITH_ZERO);
        } else {
            if constexpr (BITS == 4 && MT == 4) GLM4_ADD_GROUPS(4, 4, GLM4_FINISH_GROUP);
            if constexpr (BITS == 4 && MT == 5) GLM4_ADD_GROUPS(4, 5, GLM4_FINISH_GROUP);
            if constexpr (BITS == 4 && MT == 6) GLM4_ADD_GROUPS(4, 6, GLM4_FINISH_GROUP);
            if constexpr (BITS == 8 && MT == 4) GLM4_ADD_GROUPS(8, 4, GLM4_FINISH_GROUP);
            if constexpr (BITS == 8 && MT == 5) GLM4_ADD_GROUPS(8, 5, GLM4_FINISH_GROUP);
            if constexpr (BITS == 8 && MT == 6) GLM4_ADD_GROUPS(8, 6, GLM4_FINISH_GROUP);
        }
    }

    template <int BITS>
    static void unpack32(const uint8_t* w, Float z, float* out) {
        constexpr int QUADS = 8 / BITS;
        const Int mask = _mm512_set1_epi32(BITS == 8 ? 255 : 15);
        for (int block = 0; block < 8 / QUADS; ++block) {
            const Int u = _mm512_loadu_si512(w + block * BLOCK_BYTES);
            for (int i = 0; i < 4; ++i) {
                for (int half = 0; half < QUADS; ++half) {
                    const Int code =
                        _mm512_and_si512(_mm512_srli_epi32(u, unsigned(8 * i + 4 * half)), mask);
                    const int k = (block * QUADS + half) * 4 + i;
                    store(out + k * TILE_ROWS, _mm512_sub_ps(_mm512_cvtepi32_ps(code), z));
                }
            }
        }
    }

    static constexpr int AHEAD = 4096;
};

}  // namespace
}  // namespace glm4

#include "quantized_matmul_loops.h"

namespace glm4 {

const MultiplyVariant MULTIPLY_AVX512_VNNI = GLM4_MULTIPLY_VARIANT("avx512_vnni");

}  // namespace glm4
