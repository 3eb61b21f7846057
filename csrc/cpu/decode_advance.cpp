#include "decode_advance.h"

#include <algorithm>

namespace glm4 {

void decode_advance_cpu(Buffer tokens, Buffer positions, Buffer seq_lens, Buffer slots,
                        Buffer n_drawn, Buffer uniform, Buffer results, Buffer chosen, Buffer flags,
                        Buffer block_table, Buffer uniforms, int64_t n_rows, int64_t n_flags,
                        int64_t n_pages, int64_t table_stride, int64_t n_uniforms,
                        int64_t uniforms_stride, int64_t page_size) {
    const Checks checks{"decode_advance"};
    checks.size("n_rows", n_rows);
    checks.size("n_flags", n_flags);
    checks.require(page_size >= 1, "page_size must be at least 1");
    checks.size("page_size", page_size);
    for (const Buffer& numbers : {tokens, positions, slots, n_drawn, chosen, uniform}) {
        checks.room<1>("a tensor of rows", numbers, {n_rows}, {1}, 8);
    }
    checks.room<1>("seq_lens", seq_lens, {n_rows}, {1}, 4);
    checks.room<1>("flags", flags, {n_flags}, {1}, 4);
    checks.room<1>("results", results, {n_flags + n_rows}, {1}, 8);
    checks.room<2>("block_table", block_table, {n_rows, n_pages}, {table_stride, 1}, 4);
    checks.room<2>("uniforms", uniforms, {n_rows, n_uniforms}, {uniforms_stride, 1}, 8);

    const auto longs = [](Buffer buffer) { return reinterpret_cast<int64_t*>(buffer.first); };
    const auto ints = [](Buffer buffer) { return reinterpret_cast<int32_t*>(buffer.first); };
    const auto doubles = [](Buffer buffer) { return reinterpret_cast<double*>(buffer.first); };
    const auto next = [](int64_t count, bool running) {  // the largest wraps round
        return int64_t(uint64_t(count) + running);
    };
    std::copy_n(ints(flags), n_flags, longs(results));
    std::copy_n(longs(chosen), n_rows, longs(results) + n_flags);
    for (int64_t row = 0; row < n_rows; ++row) {
        int64_t &position = longs(positions)[row], &drawn = longs(n_drawn)[row];
        const bool running = ints(seq_lens)[row] > 0;
        longs(tokens)[row] = std::max<int64_t>(longs(chosen)[row], 0);
        position = next(position, running);
        drawn = next(drawn, running);
        ints(seq_lens)[row] = int32_t(next(ints(seq_lens)[row], running));

        const int64_t column = position / page_size;
        int64_t page = -1;
        if (position >= 0 && column < n_pages) {
            page = ints(block_table)[row * table_stride + column];
        }
        const int64_t slot = page < 0 ? -2 : page * page_size + position % page_size;
        longs(slots)[row] = running ? slot : -1;
        const bool numbered = drawn >= 0 && drawn < n_uniforms;
        doubles(uniform)[row] = numbered ? doubles(uniforms)[row * uniforms_stride + drawn] : 0.0;
    }
}

}  // namespace glm4
