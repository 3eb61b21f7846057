#include "direct.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <utility>

#include "cpu/norm.h"
#include "cpu/rope.h"
#include "cpu/swiglu.h"
#include "flash_decode.h"
#include "quantized_matmul.h"
#include "tensor.h"

namespace glm4 {

namespace {

// Thrown for arguments that are not for here, and where a Python error is set.
struct Unfit {};
struct PythonError {};

void fits(bool condition) {
    if (!condition) throw Unfit();
}

PyObject* checked(PyObject* result) {
    if (!result) throw PythonError();
    return result;
}

// Owns a reference.
class Object {
  public:
    explicit Object(PyObject* object = nullptr) : object_(object) {}
    Object(Object&& other) : object_(other.release()) {}
    Object& operator=(Object&& other) {
        std::swap(object_, other.object_);
        return *this;
    }
    ~Object() { Py_XDECREF(object_); }
    PyObject* get() const { return object_; }
    PyObject* release() {
        PyObject* object = object_;
        object_ = nullptr;
        return object;
    }

  private:
    PyObject* object_;
};

// ---- arguments

Tensor tensor_of(PyObject* object) {
    Tensor tensor;
    fits(read_tensor(object, &tensor));
    return tensor;
}

std::optional<Tensor> tensor_or_none(PyObject* object) {
    if (object == Py_None) return std::nullopt;
    return tensor_of(object);
}

Buffer buffer_of(const std::optional<Tensor>& tensor) {
    return tensor ? tensor->buffer : Buffer{0, 0};
}

int64_t integer_of(PyObject* object) {
    const int64_t value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred()) throw PythonError();
    return value;
}

bool boolean_of(PyObject* object) {
    fits(PyBool_Check(object));
    return object == Py_True;
}

double number_of(PyObject* object) {
    const double value = PyFloat_AsDouble(object);
    if (value == -1.0 && PyErr_Occurred()) throw PythonError();
    return value;
}

bool is_text(PyObject* object, const char* text) {
    return PyUnicode_Check(object) && PyUnicode_CompareWithASCIIString(object, text) == 0;
}

int count_threads() {
    const Object count(checked(PyObject_CallNoArgs(torch().get_num_threads)));
    return int(integer_of(count.get()));
}

bool is_float(DType dtype) { return int(dtype) <= int(DType::float16); }
bool is_index(DType dtype) { return dtype == DType::int32 || dtype == DType::int64; }
bool is_quantised(DType dtype) { return dtype == DType::int8 || dtype == DType::float8_e4m3; }

bool is_power_of_two(int64_t x) { return x > 0 && (x & (x - 1)) == 0; }

// x [..., N], not empty, as rows that one stride describes.
struct Rows {
    int64_t n_rows, n_cols, stride;
};

Rows rows_of(const Tensor& x) {
    fits(x.dims >= 1 && x.strides[x.dims - 1] == 1);
    const int64_t n_cols = x.shape[x.dims - 1];
    Rows rows = {1, n_cols, n_cols};
    for (int i = x.dims - 2; i >= 0; --i) {
        if (x.shape[i] == 1) continue;
        if (rows.n_rows == 1) {
            rows.stride = x.strides[i];
        } else {
            fits(x.strides[i] == rows.n_rows * rows.stride);
        }
        rows.n_rows *= x.shape[i];
    }
    fits(rows.n_rows > 0 && rows.n_cols > 0);
    return rows;
}

// The shape of x with another number of columns.
std::array<int64_t, MAX_DIMS> with_columns(const Tensor& x, int64_t n_cols) {
    fits(1 <= x.dims && x.dims <= MAX_DIMS);
    std::array<int64_t, MAX_DIMS> shape = {};
    std::copy(x.shape, x.shape + x.dims, shape.begin());
    shape[x.dims - 1] = n_cols;
    return shape;
}

bool same_shape(const Tensor& a, const Tensor& b) {
    bool same = a.dims == b.dims;
    for (int i = 0; same && i < a.dims; ++i) same = a.shape[i] == b.shape[i];
    return same;
}

// What is written: laid out like its K sibling, with no two equal addresses.
bool is_written_like(const Tensor& x, const Tensor& like) {
    bool good = same_shape(x, like) && x.dtype == like.dtype;
    for (int i = 0; good && i < x.dims; ++i) {
        good = x.strides[i] == like.strides[i] && (x.strides[i] != 0 || x.shape[i] <= 1);
    }
    return good;
}

// Whether two tensors of one shape, dtype and strides share a value: some sum of at most n - 1
// strides of each dimension, either way, is their distance.
bool overlap(const Tensor& a, const Tensor& b) {
    const Buffer &first = std::min(a.buffer, b.buffer), &second = std::max(a.buffer, b.buffer);
    const uint64_t distance = second.first - first.first;
    if (distance >= first.second) return false;
    struct Dim {
        int64_t stride, most;
    };
    std::array<Dim, MAX_DIMS> dims = {};
    int n_dims = 0;
    for (int i = 0; i < a.dims; ++i) {  // the largest stride first
        if (a.shape[i] < 2) continue;
        int at = n_dims++;
        for (; at > 0 && dims[at - 1].stride < a.strides[i]; --at) dims[at] = dims[at - 1];
        dims[at] = {a.strides[i], a.shape[i] - 1};
    }
    const auto reaches = [&](const auto& self, int i, int64_t left) -> bool {
        if (i == n_dims) return left == 0;
        int64_t rest = 0;
        for (int j = i + 1; j < n_dims; ++j) rest += dims[j].stride * dims[j].most;
        const auto [stride, most] = dims[i];
        const int64_t last = std::min(most, (left + rest) / stride);
        for (int64_t n = std::max(-most, (left - rest) / stride); n <= last; ++n) {
            if (self(self, i + 1, left - n * stride)) return true;
        }
        return false;
    };
    const int64_t item = size_of(a.dtype);
    return distance % item != 0 || reaches(reaches, 0, int64_t(distance) / item);
}

// Whether all of one tensor's memory lies before or behind all of the other's.
bool is_beyond(const Tensor& a, const Tensor& b) {
    const Buffer &first = std::min(a.buffer, b.buffer), &second = std::max(a.buffer, b.buffer);
    return second.first - first.first >= first.second;
}

// ---- results

// x.new_empty(shape, dtype=dtype); its own dtype by default.
Object new_empty(PyObject* x, const int64_t* shape, int dims, PyObject* dtype = nullptr) {
    static PyObject* const name = PyUnicode_InternFromString("new_empty");
    static PyObject* const keywords = Py_BuildValue("(s)", "dtype");
    fits(dims <= MAX_DIMS);
    PyObject* arguments[2 + MAX_DIMS] = {x};
    for (int i = 0; i < dims; ++i) arguments[1 + i] = PyLong_FromLongLong(shape[i]);
    arguments[1 + dims] = dtype;
    PyObject* made = PyObject_VectorcallMethod(name, arguments, std::size_t(1 + dims),
                                               dtype ? keywords : nullptr);
    for (int i = 0; i < dims; ++i) Py_DECREF(arguments[1 + i]);
    return Object(checked(made));
}

// Contiguous, with the shape and dtype of x, in the cheapest way.
Object empty_like(PyObject* x, const Tensor& tensor) {
    if (!tensor.is_contiguous()) return new_empty(x, tensor.shape, tensor.dims);
    return Object(checked(PyObject_CallOneArg(torch().empty_like, x)));
}

PyObject* tuple_of(Object a, Object b, Object c = Object()) {
    PyObject* tuple = checked(PyTuple_New(c.get() ? 3 : 2));
    PyTuple_SET_ITEM(tuple, 0, a.release());
    PyTuple_SET_ITEM(tuple, 1, b.release());
    if (c.get()) PyTuple_SET_ITEM(tuple, 2, c.release());
    return tuple;
}

class WithoutGil {
  public:
    WithoutGil() : state_(PyEval_SaveThread()) {}
    ~WithoutGil() { PyEval_RestoreThread(state_); }

  private:
    PyThreadState* state_;
};

// An op's arguments in the order of its schema; the dispatcher leaves out trailing ones that have
// their default value.
struct Given {
    PyObject* const* args;
    Py_ssize_t count;

    PyObject* operator[](int i) const { return i < count ? args[i] : Py_None; }

    PyObject* dtype(int i) const {
        fits((*this)[i] != Py_None);
        return args[i];
    }

    bool rounds_as_hf(int i) const {
        const bool hf = i >= count || is_text(args[i], "hf");
        fits(hf || is_text(args[i], "fp32"));
        return hf;
    }

    // A gradient is refused by name, in Python.
    void require_no_gradient() const {
        static PyObject* const name = PyUnicode_InternFromString("requires_grad");
        static PyObject* const level = PyUnicode_InternFromString("_current_level");
        const Object forward(checked(PyObject_GetAttr(torch().forward_ad, level)));
        fits(integer_of(forward.get()) < 0);  // no_grad leaves forward-mode AD on
        const Object enabled(checked(PyObject_CallNoArgs(torch().is_grad_enabled)));
        if (enabled.get() != Py_True) return;
        for (Py_ssize_t i = 0; i < count; ++i) {
            Tensor tensor;
            if (!read_tensor(args[i], &tensor)) continue;
            fits(Object(checked(PyObject_GetAttr(args[i], name))).get() == Py_False);
        }
    }
};

// Calls `run` with the arguments, or else `self`.
template <PyObject* (*run)(const Given&)>
PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    try {
        const Given given{args, count};
        given.require_no_gradient();
        return run(given);
    } catch (const Unfit&) {
    } catch (const std::invalid_argument&) {  // Python has better words
    } catch (const PythonError&) {
        PyErr_Clear();  // it comes again
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
    return PyObject_Vectorcall(self, args, std::size_t(count), nullptr);
}

// ---- ops

// y, or, with a dtype, q and its scale; and residual', where there is a residual.
PyObject* norm(PyObject* x_object, const std::optional<PyObject*>& residual_object,
               const std::optional<PyObject*>& post_weight_object, PyObject* weight_object,
               PyObject* eps_object, PyObject* dtype, PyObject* group_size, bool rounds_as_hf) {
    const Tensor x = tensor_of(x_object), weight = tensor_of(weight_object);
    std::optional<Tensor> residual, post_weight;
    if (residual_object) residual = tensor_of(*residual_object);
    if (post_weight_object) post_weight = tensor_of(*post_weight_object);
    const Rows rows = rows_of(x);
    constexpr int64_t MAX_COLS = 32768;
    fits(is_float(x.dtype) && rows.n_cols <= MAX_COLS);
    for (const Tensor* w : {&weight, post_weight ? &*post_weight : &weight}) {
        fits(w->has_shape(rows.n_cols) && w->strides[0] == 1 && w->dtype == x.dtype);
    }
    Rows residual_rows = {};
    if (residual) {
        fits(same_shape(*residual, x) && residual->dtype == x.dtype);
        residual_rows = rows_of(*residual);
    }

    NormArguments a = {};
    a.rounds_as_hf = rounds_as_hf;
    a.eps = number_of(eps_object);
    fits(a.eps >= 0.0);
    Object y, scale, residual_out;
    if (dtype == Py_None) {
        y = empty_like(x_object, x);
    } else {
        a.group = group_size == Py_None ? rows.n_cols : integer_of(group_size);
        fits(group_size == Py_None || a.group == 32 || a.group == 64 || a.group == 128);
        fits(rows.n_cols % a.group == 0);
        y = new_empty(x_object, x.shape, x.dims, dtype);
        scale = new_empty(x_object, with_columns(x, rows.n_cols / a.group).data(), x.dims,
                          torch().float32);
        a.scale = tensor_of(scale.get()).buffer;
    }
    const Tensor result = tensor_of(y.get());
    fits(dtype == Py_None || is_quantised(result.dtype));
    if (residual) {
        residual_out = empty_like(x_object, x);
        a.residual_out = tensor_of(residual_out.get()).buffer;
    }
    a.y = result.buffer, a.x = x.buffer, a.weight = weight.buffer;
    a.residual = buffer_of(residual), a.post_weight = buffer_of(post_weight);
    a.dtype = int(x.dtype), a.y_dtype = int(result.dtype);
    a.n_rows = rows.n_rows, a.n_cols = rows.n_cols;
    a.stride_x = rows.stride, a.stride_residual = residual_rows.stride;
    const int n_threads = count_threads();
    {
        WithoutGil without_gil;
        norm_cpu(a, n_threads, "");
    }
    if (!scale.get() && !residual) return y.release();
    if (!scale.get()) return tuple_of(std::move(y), std::move(residual_out));
    return tuple_of(std::move(y), std::move(scale), std::move(residual_out));
}

PyObject* rms_norm(const Given& given) {
    return norm(given[0], {}, {}, given[1], given[2], Py_None, Py_None, given.rounds_as_hf(3));
}

PyObject* rms_norm_quantized(const Given& given) {
    return norm(given[0], {}, {}, given[1], given[2], given.dtype(3), given[4],
                given.rounds_as_hf(5));
}

PyObject* add_rms_norm(const Given& given) {
    return norm(given[0], given[1], {}, given[2], given[3], Py_None, Py_None,
                given.rounds_as_hf(4));
}

PyObject* add_rms_norm_quantized(const Given& given) {
    return norm(given[0], given[1], {}, given[2], given[3], given.dtype(4), given[5],
                given.rounds_as_hf(6));
}

PyObject* sandwich_norm(const Given& given) {
    return norm(given[0], given[1], given[2], given[3], given[4], Py_None, Py_None,
                given.rounds_as_hf(5));
}

PyObject* sandwich_norm_quantized(const Given& given) {
    return norm(given[0], given[1], given[2], given[3], given[4], given.dtype(5), given[6],
                given.rounds_as_hf(7));
}

PyObject* swiglu(const Given& given) {
    const Tensor gate_up = tensor_of(given[0]);
    const bool rounds_as_hf = given.rounds_as_hf(1);
    const Rows rows = rows_of(gate_up);
    fits(is_float(gate_up.dtype) && rows.n_cols % 2 == 0);
    Object y = new_empty(given[0], with_columns(gate_up, rows.n_cols / 2).data(), gate_up.dims);
    const Buffer result = tensor_of(y.get()).buffer;
    const int n_threads = count_threads();
    {
        WithoutGil without_gil;
        swiglu_cpu(result, gate_up.buffer, int(gate_up.dtype), rounds_as_hf, rows.n_rows,
                   rows.n_cols / 2, rows.stride, n_threads, "");
    }
    return y.release();
}

PyObject* rope_kv_write(const Given& args) {
    const Tensor qkv = tensor_of(args[0]), positions = tensor_of(args[1]);
    const Tensor table = tensor_of(args[2]), slots = tensor_of(args[5]);
    const Tensor k = tensor_of(args[3]), v = tensor_of(args[4]);
    const int64_t n_heads = integer_of(args[6]);
    const auto bias = tensor_or_none(args[7]);
    const auto k_scale = tensor_or_none(args[8]), v_scale = tensor_or_none(args[9]);

    fits(qkv.dims == 2 && is_float(qkv.dtype) && qkv.strides[1] == 1 && k.dims == 4);
    const int64_t n_tokens = qkv.shape[0], n_kv_heads = k.shape[1], head_dim = k.shape[3];
    fits(n_heads >= 1 && n_heads < int64_t(1) << 31 && n_kv_heads >= 1);
    fits(is_power_of_two(k.shape[2]) && k.strides[3] == 1);
    fits(qkv.shape[1] == (n_heads + 2 * n_kv_heads) * head_dim);
    for (const Tensor* index : {&positions, &slots}) {
        fits(index->has_shape(n_tokens) && is_index(index->dtype) && index->is_contiguous());
    }
    fits(table.dims == 2 && table.strides[1] == 1);
    fits(table.dtype == qkv.dtype || table.dtype == DType::float32);
    if (bias) {
        fits(bias->has_shape(qkv.shape[1]) && bias->dtype == qkv.dtype && bias->is_contiguous());
    }
    fits(k.dtype == qkv.dtype || is_quantised(k.dtype));
    fits(is_written_like(k, k) && is_written_like(v, k) && !overlap(k, v));
    fits(bool(k_scale) == is_quantised(k.dtype) && bool(v_scale) == is_quantised(k.dtype));
    std::array<int64_t, 3> scale_strides = {};
    if (k_scale) {
        fits(k_scale->has_shape(k.shape[0], k.shape[1], k.shape[2]));
        fits(k_scale->dtype == DType::float32 && is_written_like(*k_scale, *k_scale));
        fits(is_written_like(*v_scale, *k_scale) && !overlap(*k_scale, *v_scale));
        for (const Tensor* cache : {&k, &v}) {
            fits(is_beyond(*k_scale, *cache) && is_beyond(*v_scale, *cache));
        }
        std::copy(k_scale->strides, k_scale->strides + 3, scale_strides.begin());
    }

    const int64_t shape[] = {n_tokens, n_heads, head_dim};
    Object q = new_empty(args[0], shape, 3);
    const Buffer result = tensor_of(q.get()).buffer;
    const int n_threads = count_threads();
    const char* wrong;
    {
        WithoutGil without_gil;
        wrong = rope_kv_write_cpu(
            result, k.buffer, v.buffer, buffer_of(k_scale), buffer_of(v_scale), qkv.buffer,
            buffer_of(bias), positions.buffer, slots.buffer, table.buffer, int(qkv.dtype),
            int(table.dtype), int(k.dtype), int(size_of(positions.dtype)),
            int(size_of(slots.dtype)), n_tokens, n_heads, qkv.strides[0], table.shape[0],
            table.shape[1], table.strides[0], {k.shape[0], k.shape[1], k.shape[2], head_dim},
            {k.strides[0], k.strides[1], k.strides[2], 1}, scale_strides, n_threads, "");
    }
    fits(!wrong);
    return q.release();
}

// The CPU needs no schedule and is always batch-invariant.
PyObject* flash_decode(const Given& args) {
    const Tensor q = tensor_of(args[0]), k = tensor_of(args[1]), v = tensor_of(args[2]);
    const Tensor block_table = tensor_of(args[3]), seq_lens = tensor_of(args[4]);
    const double scale = number_of(args[5]);
    const auto k_scale = tensor_or_none(args[6]), v_scale = tensor_or_none(args[7]);
    fits(args[8] == Py_None);

    fits((q.dims == 3 || q.dims == 4) && is_float(q.dtype) && k.dims == 4);
    const bool one_query = q.dims == 3;
    const int64_t batch = q.shape[0], n_heads = q.shape[q.dims - 2], d = q.shape[q.dims - 1];
    const int64_t n_queries = one_query ? 1 : q.shape[1];
    fits(batch > 0 && q.strides[q.dims - 1] == 1 && k.shape[3] == d);
    fits(k.dtype == q.dtype || is_quantised(k.dtype));
    fits(same_shape(v, k) && v.dtype == k.dtype && k.strides[3] == 1 && v.strides[3] == 1);
    for (const Tensor& cache : {k, v}) {
        const int64_t* strides = cache.strides;
        fits(!is_quantised(cache.dtype) ||
             (strides[0] | strides[1] | strides[2] | int64_t(cache.buffer.first)) % 2 == 0);
    }
    fits(block_table.dims == 2 && block_table.shape[0] == batch);
    fits(block_table.dtype == DType::int32 && block_table.strides[1] == 1);
    fits(seq_lens.has_shape(batch) && seq_lens.dtype == DType::int32);
    fits(seq_lens.is_contiguous() && LEAST_SCALE <= scale && scale <= LARGEST_SCALE);
    for (const auto& cache_scale : {k_scale, v_scale}) {
        fits(bool(cache_scale) == is_quantised(k.dtype));
        if (!cache_scale) continue;
        fits(cache_scale->has_shape(k.shape[0], k.shape[1], k.shape[2]));
        fits(cache_scale->dtype == DType::float32 && cache_scale->strides[2] == 1);
    }

    const int64_t zeros[2] = {};
    const int64_t* k_scales = k_scale ? k_scale->strides : zeros;
    const int64_t* v_scales = v_scale ? v_scale->strides : zeros;
    const int format = k.dtype == DType::int8          ? int(CacheFormat::int8)
                       : k.dtype == DType::float8_e4m3 ? int(CacheFormat::float8_e4m3)
                                                       : int(CacheFormat::as_q);
    Object out = empty_like(args[0], q);
    Object lse = new_empty(args[0], q.shape, q.dims - 1, torch().float32);
    const Buffer out_buffer = tensor_of(out.get()).buffer, lse_buffer = tensor_of(lse.get()).buffer;
    const int n_threads = count_threads();
    {
        WithoutGil without_gil;
        flash_decode_cpu(
            checked_flash_decode(
                out_buffer, lse_buffer, q.buffer, k.buffer, v.buffer, block_table.buffer,
                seq_lens.buffer, buffer_of(k_scale), buffer_of(v_scale), int(q.dtype), format,
                float(scale),
                {batch, n_queries, n_heads, d, k.shape[0], k.shape[1], k.shape[2],
                 block_table.shape[1]},
                {q.strides[0], one_query ? 0 : q.strides[1], q.strides[q.dims - 2], k.strides[0],
                 k.strides[1], k.strides[2], v.strides[0], v.strides[1], v.strides[2], k_scales[0],
                 k_scales[1], v_scales[0], v_scales[1], block_table.strides[0]}),
            n_threads, "");
    }
    return tuple_of(std::move(out), std::move(lse));
}

PyObject* quantized_matmul(const Given& args) {
    const Tensor x = tensor_of(args[0]), packed = tensor_of(args[1]), scale = tensor_of(args[2]);
    const auto zero_point = tensor_or_none(args[3]), bias = tensor_or_none(args[4]);
    std::optional<int64_t> group_size;
    if (args[7] != Py_None) group_size = integer_of(args[7]);
    const int64_t n = integer_of(args[5]), bits = integer_of(args[6]);
    const bool rounds = boolean_of(args[8]), swiglu = boolean_of(args[9]);
    Arguments arguments{};
    fits(arguments_of(x, packed, scale, zero_point ? &*zero_point : nullptr,
                      bias ? &*bias : nullptr, n, bits, group_size, swiglu, &arguments));

    Object y = new_empty(args[0], with_columns(x, swiglu ? n / 2 : n).data(), x.dims);
    arguments.y = tensor_of(y.get()).buffer;
    const int n_threads = count_threads();
    {
        WithoutGil without_gil;
        quantized_matmul_cpu(checked_quantized_matmul(arguments, Layout::tiles, swiglu),
                             rounds ? ACTIVATION_GROUP : 0, n_threads, "");
    }
    return y.release();
}

template <PyObject* (*run)(const Given&)>
constexpr PyMethodDef method(const char* name) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call<run>)), METH_FASTCALL,
            nullptr};
}

PyMethodDef METHODS[] = {
    method<rms_norm>("rms_norm"),
    method<rms_norm_quantized>("rms_norm_quantized"),
    method<add_rms_norm>("add_rms_norm"),
    method<add_rms_norm_quantized>("add_rms_norm_quantized"),
    method<sandwich_norm>("sandwich_norm"),
    method<sandwich_norm_quantized>("sandwich_norm_quantized"),
    method<swiglu>("swiglu"),
    method<rope_kv_write>("rope_kv_write"),
    method<flash_decode>("flash_decode"),
    method<quantized_matmul>("quantized_matmul"),
};

}  // namespace

PyObject* direct_call(const std::string& op, PyObject* otherwise) {
    for (PyMethodDef& method : METHODS) {
        if (op == method.ml_name) return PyCFunction_New(&method, otherwise);
    }
    Py_INCREF(otherwise);
    return otherwise;
}

}  // namespace glm4
