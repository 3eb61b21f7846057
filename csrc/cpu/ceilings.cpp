#include "ceilings.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <utility>

#include "features.h"
#include "parallel.h"

namespace glm4 {

static const std::vector<std::pair<std::string, CeilingLoops>>& variants() {
    static const auto found = [] {
        std::vector<std::pair<std::string, CeilingLoops>> list;
#ifdef GLM4_X86
        if (has_feature("avx512f") && has_feature("avx512_vnni")) {
            list.emplace_back("avx512_vnni", ceiling_loops_avx512_vnni());
        }
        if (has_feature("avx2") && has_feature("avx_vnni")) {
            list.emplace_back("avx_vnni", ceiling_loops_avx_vnni());
        }
        if (has_feature("avx2")) list.emplace_back("avx2", ceiling_loops_avx2());
#endif
        list.emplace_back("portable", ceiling_loops_portable());
        return list;
    }();
    return found;
}

std::vector<std::string> cpu_ceiling_variants() {
    std::vector<std::string> names;
    for (const auto& variant : variants()) names.push_back(variant.first);
    return names;
}

static const CeilingLoops& loops_of(const std::string& name) {
    for (const auto& variant : variants()) {
        if (name.empty() || variant.first == name) return variant.second;
    }
    throw std::invalid_argument("cpu ceilings: variant must be one this processor runs, got " +
                                name);
}

static std::atomic<uint64_t> sink;  // what was computed must go somewhere

template <typename Run>
static double seconds_of(const Run& run) {
    const auto began = std::chrono::steady_clock::now();
    run();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

double cpu_read_bandwidth(const void* p, int64_t bytes, int n_threads, const std::string& variant) {
    const CeilingLoops& loops = loops_of(variant);
    const int64_t n_lines = bytes / 64;
    if (n_lines <= 0) throw std::invalid_argument("cpu_read_bandwidth: needs 64 bytes at least");
    const double took = seconds_of([&] {
        for_each_share(std::max(n_threads, 1), n_lines, [&](int, int64_t begin, int64_t end) {
            sink += loops.read(static_cast<const uint8_t*>(p) + 64 * begin, end - begin);
        });
    });
    return double(n_lines) * 64 / took;
}

double cpu_multiply_add_peak(double seconds, int n_threads, const std::string& variant) {
    const CeilingLoops& loops = loops_of(variant);
    n_threads = std::max(n_threads, 1);
    seconds = std::min(std::max(seconds, 0.0), 10.0);
    const auto seconds_for = [&](int64_t n_rounds) {
        return seconds_of([&] {
            for_each_share(n_threads, n_rounds, [&](int, int64_t begin, int64_t end) {
                sink += loops.multiply_add(end - begin);
            });
        });
    };
    int64_t n_rounds = int64_t(10000) * n_threads;
    seconds_for(n_rounds);  // wakes the threads and the wide units
    for (;; n_rounds *= 2) {
        const double took = seconds_for(n_rounds);
        if (took >= seconds / 2) return double(n_rounds) * double(loops.operations) / took;
    }
}

}  // namespace glm4
