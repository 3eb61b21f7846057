#include "features.h"

#include <algorithm>
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace glm4 {

#if defined(__x86_64__)

enum Register { EAX, EBX, ECX, EDX };

struct Feature {
    const char* name;
    unsigned leaf, subleaf;
    Register where;
    int bit;
    uint64_t state;  // bits of XCR0 that the system must have set
};

constexpr uint64_t YMM = 0x6;         // SSE and AVX registers
constexpr uint64_t ZMM = YMM | 0xe0;  // opmask and the upper halves
constexpr uint64_t TILES = 0x60000;

// Intel 64 manual, volume 2A, CPUID. The names are those of /proc/cpuinfo.
constexpr Feature FEATURES[] = {
    {"avx", 1, 0, ECX, 28, YMM},
    {"f16c", 1, 0, ECX, 29, YMM},
    {"fma", 1, 0, ECX, 12, YMM},
    {"avx2", 7, 0, EBX, 5, YMM},
    {"avx_vnni", 7, 1, EAX, 4, YMM},
    {"avx_vnni_int8", 7, 1, EDX, 4, YMM},
    {"avx512f", 7, 0, EBX, 16, ZMM},
    {"avx512bw", 7, 0, EBX, 30, ZMM},
    {"avx512vl", 7, 0, EBX, 31, ZMM},
    {"avx512vbmi", 7, 0, ECX, 1, ZMM},
    {"avx512_vnni", 7, 0, ECX, 11, ZMM},
    {"avx512_bf16", 7, 1, EAX, 5, ZMM},
    {"avx512_fp16", 7, 0, EDX, 23, ZMM},
    {"amx_int8", 7, 0, EDX, 25, ZMM | TILES},
    {"amx_bf16", 7, 0, EDX, 22, ZMM | TILES},
};

static uint64_t saved_state() {
    unsigned r[4];
    if (!__get_cpuid(1, &r[EAX], &r[EBX], &r[ECX], &r[EDX]) || !(r[ECX] >> 27 & 1)) return 0;
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t(high) << 32 | low;
}

static std::vector<std::string> detect() {
    std::vector<std::string> found;
    const uint64_t state = saved_state();
    for (const Feature& feature : FEATURES) {
        unsigned r[4], last_subleaf = 0;
        if (feature.leaf == 7 &&
            !__get_cpuid_count(7, 0, &last_subleaf, &r[EBX], &r[ECX], &r[EDX])) {
            continue;
        }
        if (feature.subleaf > last_subleaf) continue;
        if (__get_cpuid_count(feature.leaf, feature.subleaf, &r[EAX], &r[EBX], &r[ECX], &r[EDX]) &&
            (r[feature.where] >> feature.bit & 1) && (state & feature.state) == feature.state) {
            found.push_back(feature.name);
        }
    }
    return found;
}

#else

static std::vector<std::string> detect() { return {}; }

#endif

const std::vector<std::string>& cpu_features() {
    static const std::vector<std::string> features = detect();
    return features;
}

bool has_feature(const char* name) {
    const std::vector<std::string>& features = cpu_features();
    return std::find(features.begin(), features.end(), name) != features.end();
}

}  // namespace glm4
