// quantized_matmul on the CPU: activations first, then rows of W shared out over threads.
//
// A row of W is unpacked a chunk at a time into L1 and multiplied with that chunk of every row of
// x. Each output is summed by one thread in the order of K: the thread count changes no bit.
#include "quantized_matmul.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "features.h"
#include "parallel.h"

namespace glm4 {

// Below this many products a thread costs more than it brings.
constexpr int64_t PRODUCTS_PER_THREAD = int64_t(1) << 19;

static std::vector<const MultiplyVariant*> runnable_variants() {
    std::vector<const MultiplyVariant*> variants;
#ifdef GLM4_WITH_AVX2
    if (has_feature("avx2")) variants.push_back(&MULTIPLY_AVX2);
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

// Round to nearest, ties to even, for |value| < 2^22: the sum has no room for a fraction.
static float round_half_even(float value) {
    constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23
    return (value + SHIFT) - SHIFT;
}

struct Integers {
    std::vector<int16_t> values;
    std::vector<float> scale;
    std::vector<int32_t> sum;
};

// scale = max|x| / 127, q = round_half_even(x / scale). A chunk that is zero, or holds a NaN or an
// infinity, has q = 0 throughout, and its scale tells which.
static Integers quantize_activations(const std::vector<float>& x, int64_t m, int64_t k,
                                     int64_t chunk, int64_t n_chunks) {
    Integers integers{std::vector<int16_t>(m * k), std::vector<float>(m * n_chunks),
                      std::vector<int32_t>(m * n_chunks)};
    for (int64_t i = 0; i < m * n_chunks; ++i) {
        const int64_t first = i / n_chunks * k + i % n_chunks * chunk;
        const int64_t count = std::min(chunk, k - i % n_chunks * chunk);
        int32_t largest = 0;  // of |x| as an integer: its order is the numbers' and puts NaN last
        for (int64_t j = 0; j < count; ++j) {
            largest = std::max(largest, int32_t(bits_of(x[first + j]) & 0x7fffffffu));
        }
        const float scale = from_bits(uint32_t(largest)) / 127.0f;
        integers.scale[i] = scale;
        if (largest >= 0x7f800000 || scale == 0.0f) continue;
        int32_t sum = 0;
        for (int64_t j = 0; j < count; ++j) {
            const float q = std::min(std::max(x[first + j] / scale, -127.0f), 127.0f);
            integers.values[first + j] = int16_t(round_half_even(q));
            sum += integers.values[first + j];
        }
        integers.sum[i] = sum;
    }
    return integers;
}

void quantized_matmul_cpu(const QuantizedMatmul& problem, bool int8_activations, int n_threads,
                          const std::string& variant_name) {
    const int64_t m = problem.m, n = problem.w.n, k = problem.w.k;
    if (m == 0) return;
    const int64_t chunk = std::min<int64_t>(problem.w.group_size, MAX_CHUNK);
    const int64_t n_chunks = (k + chunk - 1) / chunk;

    std::vector<float> x(m * k);
    for (int64_t i = 0; i < m * k; ++i) x[i] = load_float(problem.x, problem.dtype, i);
    Integers integers;
    if (int8_activations) {
        integers = quantize_activations(x, m, k, chunk, n_chunks);
    }
    const Activations activations = {
        int8_activations ? static_cast<const void*>(integers.values.data()) : x.data(),
        integers.scale.data(), integers.sum.data(), chunk, n_chunks};

    const MultiplyVariant& variant = variant_named(variant_name);
    const MultiplyBlocks multiply_blocks = int8_activations ? variant.int8 : variant.exact;
    const int64_t n_blocks = (n + ROWS_PER_BLOCK - 1) / ROWS_PER_BLOCK;
    const int64_t worth = std::min(m * n * k / PRODUCTS_PER_THREAD, n_blocks);
    const int n_shares = int(std::max<int64_t>(1, std::min<int64_t>(n_threads, worth)));
    const int64_t acc_size = m * ROWS_PER_BLOCK;
    std::vector<float> acc(n_shares * acc_size);
    for_each_share(n_shares, n_blocks, [&](int share, int64_t begin, int64_t end) {
        multiply_blocks(problem, activations, begin, end, acc.data() + share * acc_size);
    });
}

}  // namespace glm4
