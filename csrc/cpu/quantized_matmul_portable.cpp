// quantized_matmul for any processor: lanes are plain arrays.
#include "quantized_matmul.h"

namespace glm4 {
namespace {

struct Lanes {
    struct Int {
        int32_t lane[TILE_ROWS];
    };
    struct Float {
        float lane[TILE_ROWS];
    };
    static constexpr int M_TILE = 2, N_TILES = 1, FEW_ROWS = 1, FEW_ROWS_TILES = 1;
    static constexpr bool by_hand(int, int) { return false; }
    template <int BITS, int MT>
    static void add_chunks(...);  // not by hand
    template <int BITS, int MT>
    static void add_groups(...);
    template <int BITS>
    static constexpr int32_t BIAS = 0;

    static Int set(int32_t x) {
        Int y;
        for (int32_t& lane : y.lane) lane = x;
        return y;
    }
    static Float set(float x) {
        Float y;
        for (float& lane : y.lane) lane = x;
        return y;
    }
    static Float load(const float* x) {
        Float y;
        memcpy(&y, x, sizeof(y));
        return y;
    }
    static void store(float* out, const Float& x) { memcpy(out, &x, sizeof(x)); }
    static Float load_as_float(const void* data, DType dtype, int64_t i) {
        Float y;
        for (int j = 0; j < TILE_ROWS; ++j) y.lane[j] = load_float(data, dtype, i + j);
        return y;
    }
    static void store_as(void* data, DType dtype, int64_t i, const Float& x) {
        for (int j = 0; j < TILE_ROWS; ++j) store_float(data, dtype, i + j, x.lane[j]);
    }
    static Float to_float(const Int& x) {
        Float y;
        for (int j = 0; j < TILE_ROWS; ++j) y.lane[j] = float(x.lane[j]);
        return y;
    }
    static Float add(Float a, const Float& b) {
        for (int j = 0; j < TILE_ROWS; ++j) a.lane[j] += b.lane[j];
        return a;
    }
    static Float sub(Float a, const Float& b) {
        for (int j = 0; j < TILE_ROWS; ++j) a.lane[j] -= b.lane[j];
        return a;
    }
    static Float mul(Float a, const Float& b) {
        for (int j = 0; j < TILE_ROWS; ++j) a.lane[j] *= b.lane[j];
        return a;
    }
    static Int add(Int a, const Int& b) {
        for (int j = 0; j < TILE_ROWS; ++j) a.lane[j] += b.lane[j];
        return a;
    }
    static Int larger_magnitude(Int a, const Float& x) {
        for (int j = 0; j < TILE_ROWS; ++j) {
            const int32_t magnitude = int32_t(bits_of(x.lane[j]) & 0x7fffffffu);
            a.lane[j] = magnitude > a.lane[j] ? magnitude : a.lane[j];
        }
        return a;
    }
    static Int nearest(const Float& x) {
        Int y;
        for (int j = 0; j < TILE_ROWS; ++j) {
            const float shifted = x.lane[j] + 12582912.0f;  // 1.5 * 2^23: no room for a fraction
            y.lane[j] = int32_t(bits_of(shifted)) - 0x4b400000;
        }
        return y;
    }
    static Int clamp_and_store(int8_t* out, Int x) {
        for (int j = 0; j < TILE_ROWS; ++j) {
            x.lane[j] = x.lane[j] > 127 ? 127 : x.lane[j] < -127 ? -127 : x.lane[j];
            out[j] = int8_t(x.lane[j]);
        }
        return x;
    }
    static int32_t largest(const Int& x) {
        int32_t y = x.lane[0];
        for (int32_t lane : x.lane) y = lane > y ? lane : y;
        return y;
    }
    static int32_t total(const Int& x) {
        int32_t y = 0;
        for (int32_t lane : x.lane) y += lane;
        return y;
    }

    template <int BITS, bool, int MT, int NT>
    static void dot32(Int (&acc)[NT][MT], const uint8_t* const (&w)[NT], const int8_t* x) {
        constexpr int QUADS = 8 / BITS;  // in a block
        for (int n = 0; n < NT; ++n) {
            for (int quad = 0; quad < 8; ++quad) {
                const uint8_t* block = w[n] + quad / QUADS * BLOCK_BYTES;
                const int shift = quad % QUADS * 4;
                for (int m = 0; m < MT; ++m) {
                    const int8_t* from = x + (quad * MT + m) * 4;
                    for (int j = 0; j < TILE_ROWS; ++j) {
                        int32_t sum = 0;
                        for (int i = 0; i < 4; ++i) {
                            const int u =
                                BITS == 8 ? block[4 * j + i] : block[4 * j + i] >> shift & 15;
                            sum += u * from[i];
                        }
                        acc[n][m].lane[j] += sum;
                    }
                }
            }
        }
    }

    template <int BITS>
    static void unpack32(const uint8_t* w, const Float& z, float* out) {
        constexpr int QUADS = 8 / BITS;
        for (int k = 0; k < 32; ++k) {
            const uint8_t* block = w + k / 4 / QUADS * BLOCK_BYTES;
            const int shift = k / 4 % QUADS * 4;
            for (int j = 0; j < TILE_ROWS; ++j) {
                const uint8_t byte = block[4 * j + k % 4];
                const int u = BITS == 8 ? byte : byte >> shift & 15;
                out[k * TILE_ROWS + j] = float(u) - z.lane[j];
            }
        }
    }
};

}  // namespace
}  // namespace glm4

#include "quantized_matmul_loops.h"

namespace glm4 {

const MultiplyVariant MULTIPLY_PORTABLE = GLM4_MULTIPLY_VARIANT("portable");

}  // namespace glm4
