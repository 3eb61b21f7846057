// quantized_matmul on CUDA, x as it is, sums in fp32. First and simple: plain multiply-adds, no
// tensor cores. Weights are read once per tile of M, in the pieces that csrc/quantized_weight.h
// draws, 16 bytes a load.
//
//   M <= 16    a warp per column of y, four rows of x at a time: lane l takes pieces l, l + 32, ...
//   M > 16     a block per 64 x 64 tile of y, weights dequantised into shared memory
//
// Sums run in a fixed order; no atomics.
#include <stdexcept>
#include <string>

#include "../quantized_matmul.h"

namespace glm4 {
namespace {

constexpr int64_t COLUMN_KERNEL_MAX_M = 16;
constexpr int WARPS = 4;          // columns per block of the column kernel
constexpr int BLOCKS_PER_SM = 4;  // of the column kernel: up to 128 registers a thread, no spills

constexpr int TILE = 64;      // rows and columns of y per block of the tile kernel
constexpr int TILE_K = 32;    // columns of x at a time; K is a multiple of it
constexpr int THREADS = 256;  // 16 x 16, each with 4 x 4 of the tile
constexpr int EACH = 4;

template <int BITS>
constexpr int WEIGHTS = PIECE_BYTES * 8 / BITS;  // in a piece

template <DType DTYPE>
__device__ __forceinline__ void load8(const void* x, int64_t i, float (&value)[8]) {
    if constexpr (DTYPE == DType::float32) {
        const float4* source = reinterpret_cast<const float4*>(static_cast<const float*>(x) + i);
        const float4 low = source[0], high = source[1];
        value[0] = low.x, value[1] = low.y, value[2] = low.z, value[3] = low.w;
        value[4] = high.x, value[5] = high.y, value[6] = high.z, value[7] = high.w;
    } else {
        const uint4 raw = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(x) + i);
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const uint16_t bits = uint16_t(words[j / 2] >> (j % 2 * 16));
            value[j] = DTYPE == DType::bfloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
        }
    }
}

struct Piece {
    alignas(PIECE_BYTES) uint8_t bytes[PIECE_BYTES];
};

__device__ __forceinline__ Piece load_piece(const uint8_t* packed) {
    Piece piece;
    *reinterpret_cast<uint4*>(piece.bytes) = __ldg(reinterpret_cast<const uint4*>(packed));
    return piece;
}

template <DType DTYPE>
__device__ __forceinline__ void write_result(const QuantizedMatmul& problem, int64_t m, int64_t n,
                                             float y) {
    if (problem.bias) y += load_float(problem.bias, DTYPE, n);
    store_float(problem.y, DTYPE, m * problem.w.n + n, y);
}

template <DType DTYPE, int BITS, int ROWS>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS_PER_SM)
    column_kernel(QuantizedMatmul problem) {
    const QuantizedWeight& w = problem.w;
    const int lane = threadIdx.x % 32;
    const int64_t n = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
    const int64_t m0 = int64_t(blockIdx.y) * ROWS;
    if (n >= w.n) return;  // the whole warp

    float acc[ROWS] = {};
    const uint8_t* packed = w.packed + n * row_bytes(w);
    for (int64_t k = int64_t(lane) * WEIGHTS<BITS>; k < w.k; k += 32 * WEIGHTS<BITS>) {
        const Piece piece = load_piece(packed + k * BITS / 8);
        const int64_t group = group_index(w, n, k);
        const float scale = scale_at(w, group);
        const float zero_point = zero_point_at(w, group);

#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const int64_t m = m0 + r < problem.m ? m0 + r : problem.m - 1;  // not written
            float part = 0.0f;
#pragma unroll
            for (int i = 0; i < WEIGHTS<BITS>; i += 8) {
                float x[8];
                load8<DTYPE>(problem.x, m * w.k + k + i, x);
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const int u = weight_in_piece<BITS>(piece.bytes, i / 16, i % 16 + j);
                    part += (float(u) - zero_point) * x[j];
                }
            }
            acc[r] += scale * part;
        }
    }

#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        for (int offset = 16; offset > 0; offset /= 2) {
            acc[r] += __shfl_xor_sync(0xffffffffu, acc[r], offset);
        }
        if (lane == 0 && m0 + r < problem.m) write_result<DTYPE>(problem, m0 + r, n, acc[r]);
    }
}

template <DType DTYPE, int BITS>
__global__ void __launch_bounds__(THREADS) tile_kernel(QuantizedMatmul problem, int64_t m_tiles) {
    const QuantizedWeight& w = problem.w;
    const int64_t m0 = blockIdx.x % m_tiles * TILE;
    const int64_t n0 = blockIdx.x / m_tiles * TILE;

    // [k][row]: a thread reads its four rows of each with one load. The padding keeps the
    // transposing writes from meeting in one bank, and rows on 16 bytes.
    __shared__ alignas(16) float x_tile[TILE_K][TILE + 4];
    __shared__ alignas(16) float w_tile[TILE_K][TILE + 4];

    const auto fetch_x = [&](int64_t k) {
        for (int i = threadIdx.x; i < TILE * TILE_K / 8; i += THREADS) {
            const int row = i / (TILE_K / 8), column = i % (TILE_K / 8) * 8;
            float x[8] = {};
            if (m0 + row < problem.m) load8<DTYPE>(problem.x, (m0 + row) * w.k + k + column, x);
#pragma unroll
            for (int j = 0; j < 8; ++j) x_tile[column + j][row] = x[j];
        }
    };
    const auto dequantize = [&](int64_t k) {
        constexpr int PIECES = TILE_K / WEIGHTS<BITS>;  // of a row of the tile
        for (int i = threadIdx.x; i < TILE * PIECES; i += THREADS) {
            const int row = i / PIECES, column = i % PIECES * WEIGHTS<BITS>;
            const int64_t n = n0 + row < w.n ? n0 + row : w.n - 1;  // its results are not written
            const Piece piece = load_piece(w.packed + n * row_bytes(w) + (k + column) * BITS / 8);
            const int64_t group = group_index(w, n, k + column);
            const float scale = scale_at(w, group);
            const float zero_point = zero_point_at(w, group);
#pragma unroll
            for (int j = 0; j < WEIGHTS<BITS>; ++j) {
                const int u = weight_in_piece<BITS>(piece.bytes, j / 16, j % 16);
                w_tile[column + j][row] = scale * (float(u) - zero_point);
            }
        }
    };

    const int thread_m = threadIdx.x / 16 * EACH, thread_n = threadIdx.x % 16 * EACH;
    float acc[EACH][EACH] = {};
    const auto multiply = [&] {
#pragma unroll
        for (int k = 0; k < TILE_K; ++k) {
            const float4 x4 = *reinterpret_cast<const float4*>(&x_tile[k][thread_m]);
            const float4 w4 = *reinterpret_cast<const float4*>(&w_tile[k][thread_n]);
            const float x[EACH] = {x4.x, x4.y, x4.z, x4.w}, v[EACH] = {w4.x, w4.y, w4.z, w4.w};
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
#pragma unroll
                for (int j = 0; j < EACH; ++j) acc[i][j] += x[i] * v[j];
            }
        }
    };

    for (int64_t k = 0; k < w.k; k += TILE_K) {
        fetch_x(k);
        dequantize(k);
        __syncthreads();
        multiply();
        __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < EACH; ++i) {
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const int64_t m = m0 + thread_m + i, n = n0 + thread_n + j;
            if (m < problem.m && n < w.n) write_result<DTYPE>(problem, m, n, acc[i][j]);
        }
    }
}

template <DType DTYPE, int BITS>
void launch(const QuantizedMatmul& problem, cudaStream_t stream) {
    if (problem.m <= COLUMN_KERNEL_MAX_M) {
        const unsigned blocks = unsigned((problem.w.n + WARPS - 1) / WARPS);
        if (problem.m == 1) {
            column_kernel<DTYPE, BITS, 1><<<blocks, WARPS * 32, 0, stream>>>(problem);
        } else {
            const dim3 grid(blocks, unsigned((problem.m + 3) / 4));
            column_kernel<DTYPE, BITS, 4><<<grid, WARPS * 32, 0, stream>>>(problem);
        }
    } else {
        const int64_t m_tiles = (problem.m + TILE - 1) / TILE;
        const int64_t tiles = m_tiles * ((problem.w.n + TILE - 1) / TILE);
        if (tiles > 0x7fffffff) throw std::invalid_argument("quantized_matmul: too many tiles");
        tile_kernel<DTYPE, BITS><<<unsigned(tiles), THREADS, 0, stream>>>(problem, m_tiles);
    }
}

template <DType DTYPE>
void launch(const QuantizedMatmul& problem, cudaStream_t stream) {
    if (problem.w.bits == 4) {
        launch<DTYPE, 4>(problem, stream);
    } else {
        launch<DTYPE, 8>(problem, stream);
    }
}

}  // namespace

void quantized_matmul_cuda(const QuantizedMatmul& problem, int device, std::uintptr_t stream_id) {
    const auto require = [&](cudaError_t error) {
        if (error == cudaSuccess) return;
        throw std::runtime_error(
            std::string("quantized_matmul: ") + cudaGetErrorString(error) + " (M " +
            std::to_string(problem.m) + ", N " + std::to_string(problem.w.n) + ", K " +
            std::to_string(problem.w.k) + ", device " + std::to_string(device) + ")");
    };
    if (problem.m == 0) return;
    // This library's runtime is not torch's, and does not know which device torch made current.
    require(cudaSetDevice(device));
    const auto stream = reinterpret_cast<cudaStream_t>(stream_id);
    switch (problem.dtype) {
        case DType::bfloat16:
            launch<DType::bfloat16>(problem, stream);
            break;
        case DType::float16:
            launch<DType::float16>(problem, stream);
            break;
        default:
            launch<DType::float32>(problem, stream);
    }
    require(cudaGetLastError());
}

}  // namespace glm4
