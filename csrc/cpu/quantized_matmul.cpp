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
constexpr int64_t BLOCKS_PER_THREAD = 16;
constexpr int64_t MIN_BLOCK_BYTES = 64 << 10;

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

// Memory that is not zeroed.
template <typename T>
static std::unique_ptr<T[]> uninitialized(int64_t count) {
    return std::unique_ptr<T[]>(new T[std::size_t(count)]);
}

// A thread's scratch, kept between calls.
static float* scratch(int64_t count) {
    thread_local std::unique_ptr<float[]> memory;
    thread_local int64_t size = 0;
    if (size < count) {
        memory = uninitialized<float>(count);
        size = count;
    }
    return memory.get();
}

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
    a.stride = w.k + BLOCK_BYTES;  // rows of 4096 would all meet in the same sets of L1
    std::unique_ptr<int8_t[]> q;
    std::unique_ptr<float[]> step, total, exact;
    std::unique_ptr<int32_t[]> offset;
    if (rounds) {
        a.q = (q = uninitialized<int8_t>(m * a.stride)).get();
        a.step = (step = uninitialized<float>(m * a.n_chunks)).get();
        a.offset = (offset = uninitialized<int32_t>(m * a.n_chunks)).get();
        if (w.zero_point) a.total = (total = uninitialized<float>(m * n_groups)).get();
    } else {
        a.exact = (exact = uninitialized<float>(m * w.k)).get();
    }
    const auto prepare = rounds ? variant.quantize_row : variant.convert_row;
    for_each_block(int(std::min<int64_t>(n_threads, m)), m,
                   [&](int64_t row) { prepare(problem, a, row); });

    // With swiglu: tile i of gate and tile i of up go together.
    const int64_t tiles = problem.swiglu ? w.n / 2 / TILE_ROWS : n_tiles(w);
    const int64_t panel = variant.panel_tiles(m);
    const int64_t panel_bytes = panel * TILE_ROWS * row_bytes(w);
    const int64_t fewest = m >= TILE_ROWS ? 1 : (MIN_BLOCK_BYTES + panel_bytes - 1) / panel_bytes;
    const int64_t most = tiles / panel / (int64_t(n_threads) * BLOCKS_PER_THREAD);
    const int64_t block_tiles = panel * std::max(fewest, most);
    const int64_t n_blocks = (tiles + block_tiles - 1) / block_tiles;
    const auto multiply = rounds ? variant.multiply : variant.multiply_exact;
    const int64_t c_size = m * panel * TILE_ROWS;

    for_each_block(n_threads, n_blocks, [&](int64_t block) {
        float* c = scratch(2 * c_size);
        const int64_t end = std::min((block + 1) * block_tiles, tiles);
        for (int64_t tile = block * block_tiles; tile < end;) {
            const int64_t left = std::min(panel, end - tile);
            const int count = left == 3 ? 2 : int(left);  // 4, 2 or 1
            multiply(problem, a, tile, count, c);
            if (problem.swiglu) {
                multiply(problem, a, tiles + tile, count, c + c_size);
                variant.write_swiglu(problem, tile, count, c, c + c_size);
            } else {
                variant.write_result(problem, tile, count, c);
            }
            tile += count;
        }
    });
}

}  // namespace glm4
