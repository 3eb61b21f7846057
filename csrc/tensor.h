// A torch tensor as C++ sees it without torch: through the DLPack exchange table that the class
// torch.Tensor carries (DLPack 1.3, dlpack.h). 50 ns a tensor; its address and bytes, asked for
// from Python and converted, are 300. For what is called so often that this shows.
#pragma once

#include <Python.h>

#include "buffer.h"

namespace glm4 {

struct Tensor {
    Buffer buffer;  // (0, 0) if absent
    int dtype;      // a code of DType
    int dims;
    const int64_t* shape;

    template <typename... Sizes>
    bool has_shape(Sizes... sizes) const {
        const int64_t expected[] = {sizes...};
        bool same = dims == int(sizeof...(sizes));
        for (int i = 0; same && i < dims; ++i) same = shape[i] == expected[i];
        return same;
    }
};

// Takes the table out of torch.Tensor, once. A torch that has none, or one of a later major
// version, leaves every tensor unread.
void learn_tensors(PyObject* tensor_class);

// False, with no error set, for what is not a contiguous CPU tensor of some DType. What `tensor`
// points to lives as long as the object; the GIL is held.
bool read_tensor(PyObject* object, Tensor* tensor);

}  // namespace glm4
