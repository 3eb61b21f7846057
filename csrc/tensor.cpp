#include "tensor.h"

namespace glm4 {

namespace {

// As dlpack.h lays them out.
struct DLTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t dims;
    uint8_t type_code, type_bits;
    uint16_t type_lanes;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};

struct ExchangeTable {
    uint32_t major, minor;
    void* previous;
    void *allocate, *from_object, *to_object;
    int (*view_of_object)(void* object, DLTensor* view);
    void* current_stream;
};

constexpr int32_t CPU = 1;

struct Code {
    uint8_t type, bits;
    DType dtype;
};
constexpr Code CODES[] = {
    {2, 32, DType::float32}, {4, 16, DType::bfloat16}, {2, 16, DType::float16},
    {1, 8, DType::uint8},    {0, 8, DType::int8},      {10, 8, DType::float8_e4m3},
    {0, 32, DType::int32},   {0, 64, DType::int64},
};

Torch learnt = {};
PyTypeObject* tensor_type = nullptr;
const ExchangeTable* table = nullptr;

bool read_dtype(const DLTensor& view, DType* dtype) {
    for (const Code& code : CODES) {
        if (view.type_code != code.type || view.type_bits != code.bits) continue;
        *dtype = code.dtype;
        return view.type_lanes == 1;
    }
    return false;
}

}  // namespace

void learn_torch(PyObject* torch) {
    PyObject* tensor_class = PyObject_GetAttrString(torch, "Tensor");
    PyObject* capsule = PyObject_GetAttrString(tensor_class, "__dlpack_c_exchange_api__");
    const void* found = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
    Py_XDECREF(capsule);  // the class keeps it
    PyObject* autograd = PyObject_GetAttrString(torch, "autograd");
    PyErr_Clear();  // an older torch has none
    learnt = {PyObject_GetAttrString(torch, "empty_like"),
              PyObject_GetAttrString(torch, "get_num_threads"),
              PyObject_GetAttrString(torch, "is_grad_enabled"),
              PyObject_GetAttrString(torch, "float32"),
              PyObject_GetAttrString(autograd, "forward_ad")};
    Py_XDECREF(autograd);
    tensor_type = reinterpret_cast<PyTypeObject*>(tensor_class);
    const auto* exchange = static_cast<const ExchangeTable*>(found);
    if (exchange && exchange->major == 1 && exchange->view_of_object) table = exchange;
}

const Torch& torch() { return learnt; }

bool read_tensor(PyObject* object, Tensor* tensor) {
    if (!table || !PyObject_TypeCheck(object, tensor_type)) return false;
    DLTensor view;
    if (table->view_of_object(object, &view) != 0) {
        PyErr_Clear();  // no memory of its own, or not on a device that DLPack knows
        return false;
    }
    DType dtype;
    if (view.device_type != CPU || !read_dtype(view, &dtype)) return false;
    int64_t count = 1;
    for (int i = 0; i < view.dims; ++i) {
        count = view.shape[i] && count ? count + (view.shape[i] - 1) * view.strides[i] : 0;
    }
    const auto first = reinterpret_cast<std::uintptr_t>(view.data) + view.byte_offset;
    const auto bytes = std::size_t(count) * std::size_t(size_of(dtype));
    *tensor = {{first, bytes}, dtype, view.dims, view.shape, view.strides};
    return true;
}

}  // namespace glm4
