// The rows of a decode step made ready for the next; more in glm4_kernels/decode_advance.py.
#pragma once

#include "../buffer.h"

namespace glm4 {

// tokens, positions, slots, n_drawn, chosen [n_rows] int64; seq_lens [n_rows], flags [n_flags]
// int32; uniform [n_rows] double; results [n_flags + n_rows] int64; block_table [n_rows][n_pages]
// int32, uniforms [n_rows][n_uniforms] double, their rows `table_stride`, `uniforms_stride` apart.
void decode_advance_cpu(Buffer tokens, Buffer positions, Buffer seq_lens, Buffer slots,
                        Buffer n_drawn, Buffer uniform, Buffer results, Buffer chosen, Buffer flags,
                        Buffer block_table, Buffer uniforms, int64_t n_rows, int64_t n_flags,
                        int64_t n_pages, int64_t table_stride, int64_t n_uniforms,
                        int64_t uniforms_stride, int64_t page_size);

}  // namespace glm4
