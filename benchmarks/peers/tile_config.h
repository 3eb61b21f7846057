// Forced into llama.cpp's C++ files where GCC builds them for a processor with AMX (README.md).
//
// GCC 12.2's _tile_loadconfig tells the compiler that `ldtilecfg` reads 8 bytes, a pointer's; it
// reads 64. So stores to the rest of a tile configuration on the stack are deleted as dead, and the
// instruction faults on what happens to lie there (or tile products on tiles of no size).
#pragma once

#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(config) \
    __asm__ volatile("ldtilecfg\t%X0" ::"m"(*(const char(*)[64])(const void*)(config)))
#endif
