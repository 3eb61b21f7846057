// quantized_matmul on the CPU: the activations first, then panels of W shared out over threads.
//
// A panel is a few tiles of W (csrc/quantized_weight.h), multiplied with all rows of x while it is
// in cache: W is read from memory once. Each output is summed by one thread in the order of K, so
// neither the number of threads nor of rows changes a bit.
#include "quantized_matmul.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#include "features.h"
#include "parallel.h"

namespace glm4 {

// Below this many products a second thread costs more than it brings.
constexpr int64_t PRODUCTS_PER_THREAD = int64_t(1) << 18;
// Panels are claimed in blocks: so many per thread that the last ones even the threads out, but, at
// few rows of x, each a stream of memory long enough for the prefetchers.
constexpr int64_t BLOCKS_PER_THREAD = 32;
constexpr int64_t MIN_BLOCK_BYTES = 64 << 10;
// Rows of x are taken in blocks of about so many bytes, which stay in L2 for a block of panels; of
// at least so many rows, more than any variant multiplies together.
constexpr int64_t ROW_BLOCK_BYTES = 512 << 10;
constexpr int64_t MIN_BLOCK_ROWS = 16;
// Rows of x that a thread rounds at a time, about: those that are multiplied together lie
// interleaved, and two threads in one cache line would take it from each other at every write.
constexpr int64_t ROUNDED_ROWS = 4;

static std::vector<const MultiplyVariant*> runnable_variants() {
    std::vector<const MultiplyVariant*> variants;
#ifdef GLM4_X86
    const bool avx2 = has_feature("avx2") && has_feature("f16c");
    const bool avx512 = avx2 && has_feature("avx512f") && has_feature("avx512bw") &&
                        has_feature("avx512vl") && has_feature("avx512_vnni");
    if (avx512) variants.push_back(&MULTIPLY_AVX512_VNNI);
    if (avx2 && has_feature("avx_vnni")) variants.push_back(&MULTIPLY_AVX_VNNI);
    if (avx512) variants.push_back(&MULTIPLY_AVX512_VNNI_256);
    if (avx2) variants.push_back(&MULTIPLY_AVX2);
#endif
    variants.push_back(&MULTIPLY_PORTABLE);
    return variants;
}

static const MultiplyVariant& variant_named(const std::string& name) {
    static const std::vector<const MultiplyVariant*> variants = runnable_variants();
    for (const MultiplyVariant* variant : variants) {
        if (name.empty() || name == variant->name) return *variant;
    }
    throw std::invalid_argument("quantized_matmul: this processor runs no variant " + name);
}

std::vector<std::string> cpu_variants() {
    std::vector<std::string> names;
    for (const MultiplyVariant* variant : runnable_variants()) names.push_back(variant->name);
    return names;
}

// Memory that a thread keeps between calls, so that its pages need not be mapped again each time.
class Scratch {
  public:
    char* at_least(int64_t bytes) {
        if (size_ < bytes) {
            memory_.reset(new char[std::size_t(bytes)]);  // not zeroed
            size_ = bytes;
        }
        return memory_.get();
    }

  private:
    std::unique_ptr<char[]> memory_;
    int64_t size_ = 0;
};

void quantized_matmul_cpu(const QuantizedMatmul& problem, int64_t activation_group, int n_threads,
                          const std::string& variant_name) {
    const QuantizedWeight& w = problem.w;
    const int64_t m = problem.m, n_groups = w.k / w.group_size;
    if (activation_group < 0 || activation_group > MAX_CHUNK || activation_group % 32 != 0) {
        throw std::invalid_argument(
            "quantized_matmul: activation group must be 0, 32, 64, 96 or "
            "128, got " +
            std::to_string(activation_group));
    }
    if (m == 0) return;
    const bool rounds = activation_group != 0;
    const MultiplyVariant& variant = variant_named(variant_name);
    n_threads = int(
        std::max<int64_t>(1, std::min<int64_t>(n_threads, m * w.n * w.k / PRODUCTS_PER_THREAD)));

    Activations a{};
    a.chunk = std::min<int64_t>(w.group_size, rounds ? activation_group : MAX_CHUNK);
    a.n_chunks = (w.k + a.chunk - 1) / a.chunk;
    thread_local Scratch activations;
    const int64_t q_bytes = (m * w.k + 63) / 64 * 64, step_bytes = m * a.n_chunks * 4;
    if (rounds) {
        char* memory = activations.at_least(q_bytes + 2 * step_bytes + m * n_groups * 4);
        a.q = reinterpret_cast<int8_t*>(memory);
        a.step = reinterpret_cast<float*>(memory + q_bytes);
        a.offset = reinterpret_cast<int32_t*>(memory + q_bytes + step_bytes);
        if (w.zero_point) a.total = reinterpret_cast<float*>(memory + q_bytes + 2 * step_bytes);
    } else {
        a.exact = reinterpret_cast<float*>(activations.at_least(m * w.k * 4));
    }
    const auto prepare = rounds ? variant.quantize_rows : variant.convert_rows;
    const int64_t n_row_blocks = (m + ROUNDED_ROWS - 1) / ROUNDED_ROWS;
    for_each_block(int(std::min<int64_t>(n_threads, n_row_blocks)), n_row_blocks,
                   [&](int64_t block) {
                       prepare(problem, a, variant.row_block(m, ROUNDED_ROWS, block),
                               variant.row_block(m, ROUNDED_ROWS, block + 1));
                   });

    // With swiglu: tile i of gate and tile i of up go together.
    const int64_t tiles = problem.swiglu ? w.n / 2 / TILE_ROWS : n_tiles(w);
    const int64_t panel = variant.panel_tiles(m);
    const int64_t panel_bytes = panel * TILE_ROWS * row_bytes(w);
    const int64_t fewest = m >= TILE_ROWS ? 1 : (MIN_BLOCK_BYTES + panel_bytes - 1) / panel_bytes;
    const int64_t most = tiles / panel / (int64_t(n_threads) * BLOCKS_PER_THREAD);
    const int64_t block_tiles = panel * std::max(fewest, most);
    const int64_t n_blocks = (tiles + block_tiles - 1) / block_tiles;
    const auto multiply = rounds ? variant.multiply : variant.multiply_exact;
    const int64_t row_bytes_of_x = w.k * (rounds ? 1 : int64_t(sizeof(float)));
    const int64_t rows = std::max(MIN_BLOCK_ROWS, ROW_BLOCK_BYTES / row_bytes_of_x);
    // A block is at most one run of rows longer than that.
    const int64_t c_size = std::min(m, 2 * rows) * panel * TILE_ROWS;

    for_each_block(n_threads, n_blocks, [&](int64_t block) {
        thread_local Scratch sums;
        float* c = reinterpret_cast<float*>(sums.at_least(2 * c_size * 4));
        const int64_t end = std::min((block + 1) * block_tiles, tiles);
        int64_t m0 = 0;
        for (int64_t row_block = 1; m0 < m; ++row_block) {
            const int64_t m1 = variant.row_block(m, rows, row_block);
            for (int64_t tile = block * block_tiles; tile < end;) {
                const int64_t left = std::min(panel, end - tile);
                const Part part{m0, m1, tile, int(left)};
                multiply(problem, a, part, c);
                if (problem.swiglu) {
                    multiply(problem, a, {m0, m1, tiles + tile, part.tiles}, c + c_size);
                    variant.write_swiglu(problem, part, c, c + c_size);
                } else {
                    variant.write_result(problem, part, c);
                }
                tile += part.tiles;
            }
            m0 = m1;
        }
    });
}

}  // namespace glm4
