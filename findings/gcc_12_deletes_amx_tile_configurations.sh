#!/usr/bin/env bash
# GCC 12.2.0 (Debian 12's): _tile_loadconfig tells the compiler that ldtilecfg reads 8 bytes, those of a pointer; it reads 64. Inlined,
# the stores to the rest of a configuration on the stack (bytes a row, rows: what makes a tile) are deleted as dead at -O2, and the
# processor gets whatever lay there. Here the code with and without those stores compiles to the same instructions; clang, from the
# pinned ziglang wheel, keeps them. One would expect an intrinsic to read what its instruction reads. Met as ggml 0.25.3, built with this
# GCC for a Xeon with AMX, whose process died wherever its AMX path was taken; an ldtilecfg in inline assembly, with 64 bytes as its
# operand, cures it. Seen: "gcc 12.2.0: deleted", "clang 18.1.6: kept". Needs no AMX: nothing that is compiled runs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
version=$(gcc-12 -dumpfullversion 2>/dev/null) || { echo "needs GCC 12.2.0: apt-get install gcc-12" >&2; exit 2; }
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ziglang==0.13.0
cat > "$folder/configure.c" <<'C'
#include <immintrin.h>
#include <stdint.h>

struct configuration { uint8_t palette, start_row, reserved[14]; uint16_t bytes_a_row[16]; uint8_t rows[16]; };

void configure(void) {
    _Alignas(64) struct configuration c = {0};
    c.palette = 1;
#ifdef SHAPES
    for (int i = 0; i < 8; i++) c.rows[i] = 16, c.bytes_a_row[i] = 64;
#endif
    _tile_loadconfig(&c);
}
C
cd "$folder"
export HOME=$folder ZIG_GLOBAL_CACHE_DIR=$folder/zig
stores() {  # whether the shapes change what "$@" makes
    "$@" -O2 -mamx-tile -S -o without.s configure.c
    "$@" -O2 -mamx-tile -DSHAPES -S -o with.s configure.c
    if cmp -s without.s with.s; then echo deleted; else echo kept; fi
}
by_gcc=$(stores gcc-12)
by_clang=$(stores venv/bin/python -m ziglang cc -target x86_64-linux-gnu)
echo "gcc $version: $by_gcc"
echo "clang $(venv/bin/python -m ziglang cc --version | sed -n 's/^clang version \([0-9.]*\).*/\1/p'): $by_clang"
[ "$by_gcc $by_clang" = "deleted kept" ]
