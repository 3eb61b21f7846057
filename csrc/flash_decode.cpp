// The last look at sizes, lengths and page ids before raw memory is touched.
#include "flash_decode.h"

namespace glm4 {

static constexpr Checks CHECKS{"flash_decode"};

static void check_values(const FlashDecode& p) {
    for (int64_t b = 0; b < p.batch; ++b) {
        const int64_t length = p.seq_lens[b], capacity = p.max_pages * p.page_size;
        if (length < 0 || length > capacity) {
            CHECKS.fail("seq_lens must be in 0.." + std::to_string(capacity) + ", got " +
                        std::to_string(length));
        }
        const int32_t* pages = p.block_table + b * p.stride_block_table;
        for (int64_t i = 0; i * p.page_size < length; ++i) {
            if (0 <= pages[i] && pages[i] < p.n_pages) continue;
            CHECKS.fail("block_table must be page ids in 0.." + std::to_string(p.n_pages - 1) +
                        " within the lengths, got " + std::to_string(pages[i]));
        }
    }
}

FlashDecode checked_flash_decode(Buffer out, Buffer lse, Buffer q, Buffer k, Buffer v,
                                 Buffer block_table, Buffer seq_lens, Buffer k_scale,
                                 Buffer v_scale, int dtype, int format, float scale,
                                 const std::array<int64_t, 8>& sizes,
                                 const std::array<int64_t, 14>& strides) {
    CHECKS.require(0 <= format && format <= 2, "unknown cache format");
    CHECKS.require(LEAST_SCALE <= scale && scale <= LARGEST_SCALE, "scale out of range");
    FlashDecode p;
    p.dtype = CHECKS.dtype(dtype), p.format = CacheFormat(format), p.scale = scale;
    int64_t* const size_fields[] = {&p.batch,   &p.n_queries,  &p.n_heads,   &p.head_dim,
                                    &p.n_pages, &p.n_kv_heads, &p.page_size, &p.max_pages};
    for (int i = 0; i < 8; ++i) {
        CHECKS.size("size", sizes[i]);
        *size_fields[i] = sizes[i];
    }
    CHECKS.require(1 <= p.n_queries && p.n_queries <= 8 && 1 <= p.n_kv_heads &&
                       p.n_kv_heads <= p.n_heads && p.n_heads % p.n_kv_heads == 0 &&
                       group_of(p) <= 32,
                   "impossible queries or heads");
    CHECKS.require(p.head_dim == 64 || p.head_dim == 128, "head_dim must be 64 or 128");
    CHECKS.require(p.page_size >= 16 && (p.page_size & (p.page_size - 1)) == 0 &&
                       p.max_pages * p.page_size < int64_t(1) << 31,
                   "impossible pages");

    const int64_t* from = strides.data();
    const auto take = [&](int64_t* fields, int count) {
        for (int i = 0; i < count; ++i) fields[i] = *from++;
    };
    take(p.stride_q, 3), take(p.stride_k, 3), take(p.stride_v, 3);
    take(p.stride_k_scale, 2), take(p.stride_v_scale, 2), take(&p.stride_block_table, 1);

    const int64_t item = size_of(p.dtype), cache_item = cache_item_bytes(p);
    const auto room = [&](const char* name, Buffer buffer, const int64_t(&count)[4],
                          const int64_t* stride, int64_t item_bytes) {
        CHECKS.room<4>(name, buffer, count, {stride[0], stride[1], stride[2], 1}, item_bytes);
    };
    const int64_t pages[4] = {p.n_pages, p.n_kv_heads, p.page_size, p.head_dim};
    room("q", q, {p.batch, p.n_queries, p.n_heads, p.head_dim}, p.stride_q, item);
    room("k_cache", k, pages, p.stride_k, cache_item);
    room("v_cache", v, pages, p.stride_v, cache_item);
    if (p.format != CacheFormat::as_q) {
        const auto scale_room = [&](const char* name, Buffer buffer, const int64_t* stride) {
            CHECKS.room<3>(name, buffer, {p.n_pages, p.n_kv_heads, p.page_size},
                           {stride[0], stride[1], 1}, 4);
        };
        scale_room("k_scale", k_scale, p.stride_k_scale);
        scale_room("v_scale", v_scale, p.stride_v_scale);
    }
    CHECKS.room<2>("block_table", block_table, {p.batch, p.max_pages}, {p.stride_block_table, 1},
                   4);
    CHECKS.room<1>("seq_lens", seq_lens, {p.batch}, {1}, 4);
    const int64_t n_rows = p.n_queries * p.n_heads;
    CHECKS.room<3>("out", out, {p.batch, n_rows, p.head_dim}, {n_rows * p.head_dim, p.head_dim, 1},
                   item);
    CHECKS.room<2>("lse", lse, {p.batch, n_rows}, {n_rows, 1}, 4);

    const auto at = [](Buffer buffer) { return reinterpret_cast<void*>(buffer.first); };
    p.out = at(out), p.lse = static_cast<float*>(at(lse)), p.q = at(q), p.k = at(k), p.v = at(v);
    p.block_table = static_cast<const int32_t*>(at(block_table));
    p.seq_lens = static_cast<const int32_t*>(at(seq_lens));
    p.k_scale = static_cast<const float*>(at(k_scale));
    p.v_scale = static_cast<const float*>(at(v_scale));
    check_values(p);
    return p;
}

}  // namespace glm4
