// The last look at sizes before raw memory is touched. Python has already checked and explained;
// what fails here was called around it.
#include "quantized_matmul.h"

#include <stdexcept>
#include <string>

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

static void require_pieces(const char* name, Buffer buffer) {
    require(buffer.first % PIECE_BYTES == 0, std::string(name) + " must be aligned to 16 bytes");
}

static DType checked_dtype(int code) {
    require(0 <= code && code <= 2, "unknown dtype code " + std::to_string(code));
    return DType(code);
}

QuantizedMatmul checked_quantized_matmul(Buffer y, Buffer x, Buffer packed, Buffer scale,
                                         Buffer zero_point, Buffer bias, int dtype, int scale_dtype,
                                         int64_t m, int64_t n, int64_t k, int bits,
                                         int64_t group_size) {
    constexpr int64_t LIMIT = int64_t(1) << 31;  // of each size, so that no product overflows
    require(0 <= m && m < LIMIT && 0 < n && n < LIMIT && 0 < k && k < LIMIT && k % 32 == 0,
            "impossible sizes M " + std::to_string(m) + ", N " + std::to_string(n) + ", K " +
                std::to_string(k));
    require(bits == 4 || bits == 8, "bits must be 4 or 8, got " + std::to_string(bits));
    require(group_size > 0 && group_size % 32 == 0 && k % group_size == 0,
            "group size " + std::to_string(group_size) + " does not divide K " + std::to_string(k));
    const DType value = checked_dtype(dtype), factor = checked_dtype(scale_dtype);
    const int64_t n_groups = n * (k / group_size);
    require_bytes("y", y, m * n, size_of(value));
    require_bytes("x", x, m * k, size_of(value));
    require_bytes("packed", packed, n * (k * bits / 8), 1);
    require_bytes("scale", scale, n_groups, size_of(factor));
    if (zero_point.first) require_bytes("zero_point", zero_point, n_groups, 1);
    if (bias.first) require_bytes("bias", bias, n, size_of(value));
    require_pieces("x", x);
    require_pieces("packed", packed);

    const auto at = [](Buffer buffer) { return reinterpret_cast<void*>(buffer.first); };
    return {at(y),
            at(x),
            at(bias),
            value,
            m,
            {static_cast<const uint8_t*>(at(packed)), at(scale), factor,
             static_cast<const uint8_t*>(at(zero_point)), bits, group_size, n, k}};
}

}  // namespace glm4
