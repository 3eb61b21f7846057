// The last look at sizes before raw memory is touched. Python has already checked and explained;
// what fails here was called around it.
#include "quantized_matmul.h"

#include <stdexcept>
#include <string>

#include "tensor.h"

namespace glm4 {

static void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument("quantized_matmul: " + message);
}

static void require_bytes(const char* name, Buffer buffer, int64_t count, int64_t item_bytes) {
    require(buffer.second == std::size_t(count) * std::size_t(item_bytes),
            std::string(name) + " must have " + std::to_string(count) + " * " +
                std::to_string(item_bytes) + " bytes, got " + std::to_string(buffer.second));
    require(buffer.first != 0 || count == 0, std::string(name) + " has no memory");
    require(buffer.first % item_bytes == 0, std::string(name) + " is not aligned to its items");
}

static DType checked_dtype(int code, int largest) {
    require(0 <= code && code <= largest, "unknown dtype code " + std::to_string(code));
    return DType(code);
}

constexpr int64_t LIMIT = int64_t(1) << 31;  // of each size, so that no product overflows

bool arguments_of(const Tensor& x, const Tensor& packed, const Tensor& scale,
                  const Tensor* zero_point, const Tensor* bias, int64_t n, int64_t bits,
                  std::optional<int64_t> group_size, bool swiglu, Arguments* arguments) {
    for (const Tensor* tensor : {&x, &packed, &scale, zero_point, bias}) {
        if (tensor && !tensor->is_contiguous()) return false;
    }
    if (x.dims < 1 || x.dims > MAX_DIMS || n < 1 || n >= LIMIT) return false;
    const int64_t k = x.shape[x.dims - 1], group = group_size.value_or(k);
    if (k < 1 || k >= LIMIT || k % 32 || group < 32 || k % group) return false;
    if (group_size && group != 32 && group != 64 && group != 128) return false;
    int64_t m = 1;
    for (int i = 0; i + 1 < x.dims; ++i) m *= x.shape[i];
    const int64_t tiles = (n + TILE_ROWS - 1) / TILE_ROWS, groups = k / group;
    if (m < 1 || (bits != 4 && bits != 8) || (swiglu && n % (2 * TILE_ROWS))) return false;
    if (x.dtype > DType::float16 || scale.dtype > DType::float16) return false;
    if (packed.dtype != DType::uint8) return false;
    if (!packed.has_shape(tiles, TILE_ROWS * k * bits / 8)) return false;
    if (!scale.has_shape(tiles, groups, int64_t(TILE_ROWS))) return false;
    if (zero_point && zero_point->dtype > DType::uint8) return false;
    if (zero_point && !zero_point->has_shape(tiles, groups, int64_t(TILE_ROWS))) return false;
    if (bias && (bias->dtype != x.dtype || !bias->has_shape(n))) return false;
    const Buffer absent{0, 0};
    *arguments = {absent,
                  x.buffer,
                  packed.buffer,
                  scale.buffer,
                  zero_point ? zero_point->buffer : absent,
                  bias ? bias->buffer : absent,
                  int(x.dtype),
                  int(scale.dtype),
                  zero_point ? int(zero_point->dtype) : 0,
                  m,
                  n,
                  k,
                  int(bits),
                  group};
    return true;
}

QuantizedMatmul checked_quantized_matmul(const Arguments& a, Layout layout, bool swiglu) {
    require(0 <= a.m && a.m < LIMIT && 0 < a.n && a.n < LIMIT && 0 < a.k && a.k < LIMIT &&
                a.k % 32 == 0,
            "impossible sizes M " + std::to_string(a.m) + ", N " + std::to_string(a.n) + ", K " +
                std::to_string(a.k));
    require(a.bits == 4 || a.bits == 8, "bits must be 4 or 8, got " + std::to_string(a.bits));
    require(a.group_size > 0 && a.group_size % 32 == 0 && a.k % a.group_size == 0 &&
                (a.group_size <= MAX_CHUNK || a.group_size == a.k),
            "group size " + std::to_string(a.group_size) + " does not divide K " +
                std::to_string(a.k) + " or is larger than 128");
    require(!swiglu || (layout == Layout::tiles && a.n % (2 * TILE_ROWS) == 0),
            "swiglu needs N a multiple of 32, got " + std::to_string(a.n));
    const DType value = checked_dtype(a.dtype, 2), factor = checked_dtype(a.scale_dtype, 2);
    const DType zero = checked_dtype(a.zero_point_dtype, 3);
    const int64_t rows =
        layout == Layout::rows ? a.n : (a.n + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    const int64_t n_scales = rows * (a.k / a.group_size);
    require_bytes("y", a.y, a.m * (swiglu ? a.n / 2 : a.n), size_of(value));
    require_bytes("x", a.x, a.m * a.k, size_of(value));
    require_bytes("packed", a.packed, rows * (a.k * a.bits / 8), 1);
    require_bytes("scale", a.scale, n_scales, size_of(factor));
    if (a.zero_point.first) require_bytes("zero_point", a.zero_point, n_scales, size_of(zero));
    if (a.bias.first) require_bytes("bias", a.bias, a.n, size_of(value));
    if (layout == Layout::rows) {
        require(a.x.first % PIECE_BYTES == 0, "x must be aligned to 16 bytes");
        require(a.packed.first % PIECE_BYTES == 0, "packed must be aligned to 16 bytes");
    }

    const auto at = [](Buffer buffer) { return reinterpret_cast<void*>(buffer.first); };
    const QuantizedWeight w = {static_cast<const uint8_t*>(at(a.packed)),
                               at(a.scale),
                               factor,
                               at(a.zero_point),
                               zero,
                               a.bits,
                               a.group_size,
                               a.n,
                               a.k};
    return {at(a.y), at(a.x), at(a.bias), value, a.m, w, swiglu};
}

}  // namespace glm4
