#include "rope.h"

#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace glm4 {

static const RopeTokens ROPE_TOKENS[SIMD_COUNT] = GLM4_VARIANTS(rope_tokens);

constexpr int64_t MAX_HEAD_DIM = 256;

// Below this many values a thread costs more than it brings.
constexpr int64_t VALUES_PER_THREAD = int64_t(1) << 14;

// An index of int32 or int64 at every value.
static Indices checked_indices(const Checks& checks, const char* name, Buffer buffer,
                               int item_bytes, int64_t count) {
    checks.require(item_bytes == 4 || item_bytes == 8, "indices have 4 or 8 bytes");
    checks.room<1>(name, buffer, {count}, {1}, item_bytes);
    return {reinterpret_cast<const char*>(buffer.first), item_bytes, 1};
}

static bool within(const Indices& indices, int64_t count, int64_t least, int64_t limit) {
    for (int64_t i = 0; i < count; ++i) {
        if (indices[i] < least || indices[i] >= limit) return false;
    }
    return true;
}

// What both ops ask of the table and the sizes; the rest of the problem is left empty.
static Rope checked_rope(const Checks& checks, Buffer positions, Buffer table, int dtype,
                         int table_dtype, int position_bytes, int64_t n_tokens, int64_t n_heads,
                         int64_t n_kv_heads, int64_t head_dim, int64_t n_positions,
                         int64_t rotary_dim, int64_t stride_table) {
    Rope rope = {};
    rope.dtype = checks.dtype(dtype);
    rope.table_dtype = checks.dtype(table_dtype);
    checks.require(rope.table_dtype == rope.dtype || rope.table_dtype == DType::float32,
                   "the table must be of the dtype of q or float32");
    checks.size("n_tokens", n_tokens);
    checks.size("n_heads", n_heads);
    checks.size("n_kv_heads", n_kv_heads);
    checks.size("n_positions", n_positions);
    checks.require(0 < head_dim && head_dim <= MAX_HEAD_DIM && head_dim % 16 == 0,
                   "head_dim must be a multiple of 16, at most 256");
    checks.require(0 < rotary_dim && rotary_dim <= head_dim && rotary_dim % 2 == 0,
                   "rotary_dim must be even and at most head_dim");
    checks.room<2>("table", table, {n_positions, rotary_dim}, {stride_table, 1},
                   size_of(rope.table_dtype));
    rope.n_tokens = n_tokens;
    rope.head_dim = head_dim;
    rope.rotary_dim = rotary_dim;
    rope.positions = checked_indices(checks, "positions", positions, position_bytes, n_tokens);
    rope.table = reinterpret_cast<const char*>(table.first);
    rope.stride_table = stride_table;
    rope.n_heads = n_heads;
    rope.n_kv_heads = n_kv_heads;
    return rope;
}

static void run(const Rope& rope, RopeTokens tokens, int n_threads) {
    const int64_t values = rope.n_tokens * (rope.n_heads + rope.n_kv_heads) * rope.head_dim;
    const int64_t worth = std::min(rope.n_tokens, values / VALUES_PER_THREAD);
    const int n_shares = int(std::max<int64_t>(1, std::min<int64_t>(n_threads, worth)));
    for_each_share(n_shares, rope.n_tokens,
                   [&](int, int64_t begin, int64_t end) { tokens(rope, begin, end); });
}

const char* rope_cpu(Buffer q_out, Buffer k_out, Buffer q, Buffer k, Buffer positions, Buffer table,
                     int dtype, int table_dtype, int index_bytes, int64_t n_tokens, int64_t n_heads,
                     int64_t n_kv_heads, int64_t head_dim, int64_t n_positions, int64_t rotary_dim,
                     int64_t stride_q_token, int64_t stride_q_head, int64_t stride_k_token,
                     int64_t stride_k_head, int64_t stride_table, int n_threads,
                     const std::string& variant) {
    const Checks checks{"rope"};
    Rope rope = checked_rope(checks, positions, table, dtype, table_dtype, index_bytes, n_tokens,
                             n_heads, n_kv_heads, head_dim, n_positions, rotary_dim, stride_table);
    const int64_t item = size_of(rope.dtype), d = head_dim;
    checks.room<3>("q", q, {n_tokens, n_heads, d}, {stride_q_token, stride_q_head, 1}, item);
    checks.room<3>("k", k, {n_tokens, n_kv_heads, d}, {stride_k_token, stride_k_head, 1}, item);
    checks.room<3>("q_out", q_out, {n_tokens, n_heads, d}, {n_heads * d, d, 1}, item);
    checks.room<3>("k_out", k_out, {n_tokens, n_kv_heads, d}, {n_kv_heads * d, d, 1}, item);
    const RopeTokens tokens = ROPE_TOKENS[simd_named(variant)];
    if (!within(rope.positions, n_tokens, 0, n_positions)) return "positions";

    rope.q = {reinterpret_cast<const char*>(q.first), stride_q_token, stride_q_head};
    rope.k = {reinterpret_cast<const char*>(k.first), stride_k_token, stride_k_head};
    rope.q_out = {reinterpret_cast<char*>(q_out.first), n_heads * d, d};
    rope.k_out = {reinterpret_cast<char*>(k_out.first), n_kv_heads * d, d};
    run(rope, tokens, n_threads);
    return nullptr;
}

const char* rope_kv_write_cpu(
    Buffer q_out, Buffer k_cache, Buffer v_cache, Buffer k_scale, Buffer v_scale, Buffer qkv,
    Buffer bias, Buffer positions, Buffer slots, Buffer table, int dtype, int table_dtype,
    int cache_dtype, int position_bytes, int slot_bytes, int64_t n_tokens, int64_t n_heads,
    int64_t stride_qkv, int64_t n_positions, int64_t rotary_dim, int64_t stride_table,
    const std::array<int64_t, 4>& cache_shape, const std::array<int64_t, 4>& cache_stride,
    const std::array<int64_t, 3>& scale_stride, int n_threads, const std::string& variant) {
    const Checks checks{"rope_kv_write"};
    const int64_t n_pages = cache_shape[0], n_kv_heads = cache_shape[1], page_size = cache_shape[2],
                  d = cache_shape[3];
    Rope rope = checked_rope(checks, positions, table, dtype, table_dtype, position_bytes, n_tokens,
                             n_heads, n_kv_heads, d, n_positions, rotary_dim, stride_table);
    const int64_t item = size_of(rope.dtype), width = (n_heads + 2 * n_kv_heads) * d;
    checks.size("n_pages", n_pages);
    checks.size("page_size", page_size);
    checks.require(page_size > 0, "page_size must be at least 1");
    const DType cache_type = DType(cache_dtype);
    const bool quantised = cache_type == DType::int8 || cache_type == DType::float8_e4m3;
    checks.require(quantised || cache_type == rope.dtype,
                   "the cache must be of the dtype of qkv, int8 or float8_e4m3");
    checks.require(cache_stride[3] == 1, "the cache must be contiguous over D");
    checks.room<2>("qkv", qkv, {n_tokens, width}, {stride_qkv, 1}, item);
    checks.room<2>("q_out", q_out, {n_tokens, n_heads * d}, {n_heads * d, 1}, item);
    if (bias.first) checks.room<1>("bias", bias, {width}, {1}, item);
    for (Buffer pages : {k_cache, v_cache}) {
        checks.room<4>("cache", pages, {n_pages, n_kv_heads, page_size, d},
                       {cache_stride[0], cache_stride[1], cache_stride[2], 1},
                       quantised ? 1 : item);
    }
    for (Buffer scale : {k_scale, v_scale}) {
        if (!quantised) break;
        checks.room<3>("scale", scale, {n_pages, n_kv_heads, page_size},
                       {scale_stride[0], scale_stride[1], scale_stride[2]}, 4);
    }
    const RopeTokens tokens = ROPE_TOKENS[simd_named(variant)];
    rope.slots = checked_indices(checks, "slots", slots, slot_bytes, n_tokens);
    if (!within(rope.positions, n_tokens, 0, n_positions)) return "positions";
    if (!within(rope.slots, n_tokens, -1, n_pages * page_size)) return "slots";

    const auto at = [](Buffer buffer) { return reinterpret_cast<char*>(buffer.first); };
    const Cache cache = {
        {at(k_cache), at(v_cache)},
        {reinterpret_cast<float*>(k_scale.first), reinterpret_cast<float*>(v_scale.first)},
        cache_type,
        page_size,
        cache_stride[0],
        cache_stride[1],
        cache_stride[2],
        scale_stride[0],
        scale_stride[1],
        scale_stride[2]};
    rope.q = {at(qkv), stride_qkv, d};
    rope.k = {at(qkv) + n_heads * d * item, stride_qkv, d};
    rope.v = {at(qkv) + (n_heads + n_kv_heads) * d * item, stride_qkv, d};
    rope.q_out = {at(q_out), n_heads * d, d};
    rope.bias = at(bias);
    rope.cache = &cache;
    run(rope, tokens, n_threads);
    return nullptr;
}

}  // namespace glm4
