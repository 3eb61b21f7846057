// How a tensor crosses from Python, and the last look at its size before raw memory is touched.
// Python has already checked and explained; what fails here was called around it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "float_formats.h"

namespace glm4 {

// Address of a tensor's first value, and bytes from there to the end of its memory; address 0 for
// an absent one.
using Buffer = std::pair<std::uintptr_t, std::size_t>;

// The checks of one op's arguments; each throws std::invalid_argument.
struct Checks {
    const char* op;

    void require(bool condition, const char* message) const {
        if (!condition) fail(message);
    }

    [[noreturn]] void fail(const std::string& message) const {
        throw std::invalid_argument(std::string(op) + ": " + message);
    }

    DType dtype(int code) const {
        if (code < 0 || code > 2) fail("unknown dtype code " + std::to_string(code));
        return DType(code);
    }

    // A number of rows, columns, heads...: none whose product with another overflows.
    void size(const char* name, int64_t value) const {
        if (value < 0 || value >= int64_t(1) << 31) {
            fail(std::string("impossible ") + name + " " + std::to_string(value));
        }
    }

    // Room for count[0] * count[1] * ... values, those of dimension i at multiples of stride[i]
    // (in values).
    template <int DIMS>
    void room(const char* name, Buffer buffer, const int64_t (&count)[DIMS],
              const int64_t (&stride)[DIMS], int64_t item_bytes) const {
        unsigned __int128 last = 0;
        bool empty = false;
        for (int i = 0; i < DIMS; ++i) {
            if (stride[i] < 0) fail(std::string(name) + " has a negative stride");
            empty = empty || count[i] <= 0;
            if (!empty) last += (unsigned __int128)(count[i] - 1) * uint64_t(stride[i]);
        }
        if (empty) return;
        if (buffer.first == 0) fail(std::string(name) + " has no memory");
        if (buffer.first % item_bytes) fail(std::string(name) + " is not aligned to its items");
        if (last >= buffer.second / item_bytes) {
            fail(std::string(name) + " must have more than " + std::to_string(uint64_t(last)) +
                 " * " + std::to_string(item_bytes) + " bytes, got " +
                 std::to_string(buffer.second));
        }
    }
};

}  // namespace glm4
