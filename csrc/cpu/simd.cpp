#include "simd.h"

#include <stdexcept>

#include "features.h"

namespace glm4 {

static const char* const NAMES[SIMD_COUNT] = {"portable", "avx2", "avx512"};

static std::vector<Simd> runnable() {
    std::vector<Simd> found;
#ifdef GLM4_X86
    if (has_feature("avx512f") && has_feature("avx512bw") && has_feature("avx512vl")) {
        found.push_back(AVX512);
    }
    if (has_feature("avx2") && has_feature("f16c")) found.push_back(AVX2);
#endif
    found.push_back(PORTABLE);
    return found;
}

static const std::vector<Simd>& all() {
    static const std::vector<Simd> found = runnable();
    return found;
}

std::vector<std::string> simd_variants() {
    std::vector<std::string> names;
    for (Simd simd : all()) names.push_back(NAMES[simd]);
    return names;
}

Simd simd_named(const std::string& name) {
    if (name.empty()) return all().front();
    for (Simd simd : all()) {
        if (name == NAMES[simd]) return simd;
    }
    throw std::invalid_argument("this processor runs no variant " + name);
}

}  // namespace glm4
