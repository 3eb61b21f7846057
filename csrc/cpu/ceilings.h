// What this processor can do at most, measured: bytes read from memory per second, and 8-bit
// integer operations per second (a multiply-add is two).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace glm4 {

// The loops of one instruction set.
struct CeilingLoops {
    // Reads lines of 64 bytes, each once, as two streams, which memory serves 5 to 10 % faster than
    // one (or than one with prefetches); returns something that depends on all of them.
    uint64_t (*read)(const uint8_t* p, int64_t n_lines);

    // Rounds of independent u8 x s8 multiply-adds in registers; returns what depends on them.
    uint64_t (*multiply_add)(int64_t n_rounds);
    int64_t operations;  // of a round
};

CeilingLoops ceiling_loops_portable();
CeilingLoops ceiling_loops_avx2();
CeilingLoops ceiling_loops_avx_vnni();
CeilingLoops ceiling_loops_avx512_vnni();

// The loops that this processor can run, widest first.
std::vector<std::string> cpu_ceiling_variants();

// Bytes per second of reading [p, p + bytes) once. For the bandwidth of memory the buffer must be
// several times the last-level cache. `variant`: one of the above; empty for the first.
double cpu_read_bandwidth(const void* p, int64_t bytes, int n_threads, const std::string& variant);

// 8-bit integer operations per second, measured for about `seconds`. AVX2 multiplies and adds pairs
// into int16, which a kernel has to widen besides; portable is what the compiler makes of a loop.
double cpu_multiply_add_peak(double seconds, int n_threads, const std::string& variant);

}  // namespace glm4
