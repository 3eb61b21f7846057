#include <cstring>

#include "ceilings.h"

namespace glm4 {

static void add_line(uint64_t (&sums)[8], const uint8_t* p, int64_t line) {
    uint64_t words[8];
    std::memcpy(words, p + 64 * line, 64);
    for (int i = 0; i < 8; i++) sums[i] |= words[i];
}

static uint64_t read_lines(const uint8_t* p, int64_t n_lines) {
    const int64_t half = n_lines / 2;
    uint64_t sums[8] = {};
    for (int64_t line = 0; line < half; line++) {
        add_line(sums, p, line);
        add_line(sums, p + 64 * half, line);
    }
    if (n_lines % 2) add_line(sums, p, n_lines - 1);
    uint64_t sum = 0;
    for (uint64_t s : sums) sum |= s;
    return sum;
}

constexpr int SIZE = 1024;

// The dot product of arrays in the first-level cache.
static uint64_t multiply_add(int64_t n_rounds) {
    static uint8_t u[SIZE];
    static int8_t q[SIZE];
    uint64_t sum = 0;
    for (int64_t round = 0; round < n_rounds; round++) {
        const uint8_t* a = u;
        const int8_t* b = q;
        __asm__("" : "+r"(a), "+r"(b));  // else one product would serve all rounds
        int32_t dot = 0;
        for (int i = 0; i < SIZE; i++) dot += a[i] * b[i];
        sum += uint32_t(dot);
    }
    return sum;
}

CeilingLoops ceiling_loops_portable() { return {read_lines, multiply_add, 2 * SIZE}; }

}  // namespace glm4
