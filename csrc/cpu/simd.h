// The instruction sets that the `*_loops.cpp` files are compiled for, each once for every set, with
// the flags in CMakeLists.txt. They all give the same bits.
#pragma once

#include <string>
#include <vector>

namespace glm4 {

enum Simd { PORTABLE, AVX2, AVX512, SIMD_COUNT };

// Names of those that this processor can run, best first.
std::vector<std::string> simd_variants();

// The named one; the best for the empty name. Throws if this processor cannot run it.
Simd simd_named(const std::string& name);

}  // namespace glm4

// NAME_portable, NAME_avx2, NAME_avx512: what a loops file defines, by its own compilation.
#define GLM4_JOIN_NAMES(name, variant) name##_##variant
#define GLM4_JOIN(name, variant) GLM4_JOIN_NAMES(name, variant)
#define GLM4_VARIANT_NAME(name) GLM4_JOIN(name, GLM4_SIMD)

// A table of them, indexed by Simd.
#ifdef GLM4_X86
#define GLM4_VARIANTS(name) \
    { name##_portable, name##_avx2, name##_avx512 }
#else
#define GLM4_VARIANTS(name) \
    { name##_portable, nullptr, nullptr }
#endif
