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
enum TypeCode : uint8_t { UNSIGNED = 1, FLOAT = 2, BFLOAT = 4 };

PyTypeObject* tensor_type = nullptr;
const ExchangeTable* table = nullptr;

int dtype_of(const DLTensor& view) {
    if (view.type_lanes != 1) return -1;
    if (view.type_code == FLOAT && view.type_bits == 32) return int(DType::float32);
    if (view.type_code == BFLOAT && view.type_bits == 16) return int(DType::bfloat16);
    if (view.type_code == FLOAT && view.type_bits == 16) return int(DType::float16);
    if (view.type_code == UNSIGNED && view.type_bits == 8) return int(DType::uint8);
    return -1;
}

}  // namespace

void learn_tensors(PyObject* tensor_class) {
    PyObject* capsule = PyObject_GetAttrString(tensor_class, "__dlpack_c_exchange_api__");
    const void* found = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
    Py_XDECREF(capsule);  // the class keeps it
    PyErr_Clear();
    const auto* exchange = static_cast<const ExchangeTable*>(found);
    if (!exchange || exchange->major != 1 || !exchange->view_of_object) return;
    Py_INCREF(tensor_class);
    tensor_type = reinterpret_cast<PyTypeObject*>(tensor_class);
    table = exchange;
}

bool read_tensor(PyObject* object, Tensor* tensor) {
    if (!table || !PyObject_TypeCheck(object, tensor_type)) return false;
    DLTensor view;
    if (table->view_of_object(object, &view) != 0) {
        PyErr_Clear();  // no memory of its own, or not on a device that DLPack knows
        return false;
    }
    const int dtype = dtype_of(view);
    if (view.device_type != CPU || dtype < 0) return false;
    int64_t count = 1;
    for (int i = view.dims - 1; i >= 0; --i) {
        if (view.shape[i] != 1 && view.strides[i] != count) return false;
        count *= view.shape[i];
    }
    const auto first = reinterpret_cast<std::uintptr_t>(view.data) + view.byte_offset;
    const auto bytes = std::size_t(count) * std::size_t(size_of(DType(dtype)));
    *tensor = {{first, bytes}, dtype, view.dims, view.shape};
    return true;
}

}  // namespace glm4
