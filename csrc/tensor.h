// A torch tensor as C++ sees it without torch: through the DLPack exchange table that the class
// torch.Tensor carries (DLPack 1.3, dlpack.h). 50 ns a tensor; its address and bytes, asked for
// from Python and converted, are 300. For what is called so often that this shows.
#pragma once

#include <Python.h>

#include "buffer.h"

namespace glm4 {

struct Tensor {
    Buffer buffer;  // from the first value to the last; (0, 0) if absent
    DType dtype;
    int dims;
    const int64_t* shape;
    const int64_t* strides;  // in values

    bool is_contiguous() const {
        int64_t count = 1;
        for (int i = dims - 1; i >= 0; --i) {
            if (shape[i] != 1 && strides[i] != count) return false;
            count *= shape[i];
        }
        return true;
    }

    template <typename... Sizes>
    bool has_shape(Sizes... sizes) const {
        const int64_t expected[] = {int64_t(sizes)...};
        bool same = dims == int(sizeof...(sizes));
        for (int i = 0; same && i < dims; ++i) same = shape[i] == expected[i];
        return same;
    }
};

// What is called of torch.
struct Torch {
    PyObject *empty_like, *get_num_threads, *is_grad_enabled, *float32, *forward_ad;
};

// Takes these, and the table out of torch.Tensor, once. Where there is no table, or one of a later
// major version, every tensor stays unread.
void learn_torch(PyObject* torch);
const Torch& torch();

// False, with no error set, for what is not a CPU tensor of some DType. What `tensor` points to
// lives as long as the object; the GIL is held.
bool read_tensor(PyObject* object, Tensor* tensor);

}  // namespace glm4
