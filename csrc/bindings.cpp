// The Python module glm4_kernels._C: conversions only. Tensors cross as (address, bytes), or, where
// that would take too long, as they are (tensor.h); the checks that give good messages are in
// Python, those that memory safety needs beside each op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "cpu/ceilings.h"
#include "cpu/decode_advance.h"
#include "cpu/features.h"
#include "cpu/merge_attention.h"
#include "cpu/norm.h"
#include "cpu/rope.h"
#include "cpu/sample.h"
#include "cpu/simd.h"
#include "cpu/swiglu.h"
#include "flash_decode.h"
#include "quantized_matmul.h"
#include "tensor.h"

namespace py = pybind11;
using glm4::Buffer;

static py::dict build_info() {
    py::dict info;
    info["compiler"] = GLM4_COMPILER;
    info["sanitize"] = bool(GLM4_SANITIZE);
#ifdef GLM4_CUDA_VERSION
    info["cuda"] = GLM4_CUDA_VERSION;
#else
    info["cuda"] = py::none();
#endif
    info["cuda_architectures"] = GLM4_CUDA_ARCHITECTURES;
    info["cpu_features"] = glm4::cpu_features();
    info["cpu_variants"] = glm4::cpu_variants();
    info["simd_variants"] = glm4::simd_variants();
    info["flash_decode_variants"] = glm4::flash_decode_variants();
    return info;
}

// quantized_matmul_tensors(x, packed, scale, zero_point | None, bias | None, n, bits, group_size |
// None, activation_group, swiglu, n_threads) -> y, or None for arguments that do not fit each
// other, or not this kernel: Python then says why, or makes them fit. By hand, since this is called
// some 160 times a token and a call of pybind11 with as many arguments takes 1.2 us.
static PyObject* quantized_matmul_tensors(PyObject*, PyObject* const* args, Py_ssize_t n_args) {
    constexpr int TENSORS = 5, NUMBERS = 6, GROUP = 2;
    if (n_args != TENSORS + NUMBERS) {
        PyErr_SetString(PyExc_TypeError, "quantized_matmul_tensors takes 11 arguments");
        return nullptr;
    }
    glm4::Tensor tensors[TENSORS] = {};
    for (int i = 0; i < TENSORS; ++i) {
        if (i >= 3 && args[i] == Py_None) continue;
        if (!glm4::read_tensor(args[i], &tensors[i])) Py_RETURN_NONE;
    }
    int64_t numbers[NUMBERS] = {};
    for (int i = 0; i < NUMBERS; ++i) {
        if (i == GROUP && args[TENSORS + i] == Py_None) continue;
        numbers[i] = PyLong_AsLongLong(args[TENSORS + i]);
        if (numbers[i] == -1 && PyErr_Occurred()) return nullptr;
    }
    const auto& [x, packed, scale, zero_point, bias] = tensors;
    const auto [n, bits, group, activation_group, swiglu, n_threads] = numbers;
    std::optional<int64_t> group_size;
    if (args[TENSORS + GROUP] != Py_None) group_size = group;
    glm4::Arguments arguments{};
    if (!glm4::arguments_of(x, packed, scale, args[3] == Py_None ? nullptr : &zero_point,
                            args[4] == Py_None ? nullptr : &bias, n, bits, group_size, swiglu != 0,
                            &arguments)) {
        Py_RETURN_NONE;
    }

    const int64_t columns = swiglu ? n / 2 : n;
    PyObject* new_empty[1 + glm4::MAX_DIMS] = {args[0]};
    for (int i = 0; i < x.dims; ++i) {
        new_empty[1 + i] = PyLong_FromLongLong(i + 1 < x.dims ? x.shape[i] : columns);
    }
    static PyObject* const name = PyUnicode_InternFromString("new_empty");
    PyObject* y = PyObject_VectorcallMethod(name, new_empty, std::size_t(1 + x.dims), nullptr);
    for (int i = 0; i < x.dims; ++i) Py_DECREF(new_empty[1 + i]);
    if (!y) return nullptr;
    glm4::Tensor result{};
    if (!glm4::read_tensor(y, &result)) {
        Py_DECREF(y);
        Py_RETURN_NONE;
    }
    try {
        arguments.y = result.buffer;
        const auto problem =
            glm4::checked_quantized_matmul(arguments, glm4::Layout::tiles, swiglu != 0);
        py::gil_scoped_release release;
        glm4::quantized_matmul_cpu(problem, activation_group, int(n_threads), "");
    } catch (const std::exception& error) {
        Py_DECREF(y);
        PyErr_SetString(PyExc_ValueError, error.what());
        return nullptr;
    }
    return y;
}

PYBIND11_MODULE(_C, module) {
    module.def("build_info", build_info);

    module.def("learn_tensors",
               [](py::type tensor_class) { glm4::learn_tensors(tensor_class.ptr()); });
    static PyMethodDef fast = {
        "quantized_matmul_tensors",
        reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(quantized_matmul_tensors)),
        METH_FASTCALL, nullptr};
    module.add_object("quantized_matmul_tensors",
                      py::reinterpret_steal<py::object>(PyCFunction_New(&fast, nullptr)));

    const py::call_guard<py::gil_scoped_release> no_gil;
    module.def("decode_advance_cpu", glm4::decode_advance_cpu, no_gil);
    module.def("merge_attention_cpu", glm4::merge_attention_cpu, no_gil);
    module.def("norm_cpu", glm4::norm_cpu, no_gil);
    module.def("rope_cpu", glm4::rope_cpu, no_gil);
    module.def("rope_kv_write_cpu", glm4::rope_kv_write_cpu, no_gil);
    module.def("sample_cpu", glm4::sample_cpu, no_gil);
    module.def("swiglu_cpu", glm4::swiglu_cpu, no_gil);

    module.def("cpu_ceiling_variants", glm4::cpu_ceiling_variants);
    module.def("cpu_read_bandwidth", [](Buffer x, int n_threads, const std::string& variant) {
        py::gil_scoped_release release;
        return glm4::cpu_read_bandwidth(reinterpret_cast<const void*>(x.first), int64_t(x.second),
                                        n_threads, variant);
    });
    module.def("cpu_multiply_add_peak",
               [](double seconds, int n_threads, const std::string& variant) {
                   py::gil_scoped_release release;
                   return glm4::cpu_multiply_add_peak(seconds, n_threads, variant);
               });

    module.def("quantized_matmul_cpu",
               [](Buffer y, Buffer x, Buffer packed, Buffer scale, Buffer zero_point, Buffer bias,
                  int dtype, int scale_dtype, int zero_point_dtype, int64_t m, int64_t n, int64_t k,
                  int bits, int64_t group_size, int64_t activation_group, bool swiglu,
                  int n_threads, const std::string& variant) {
                   py::gil_scoped_release release;
                   const glm4::Arguments arguments{
                       y, x, packed, scale, zero_point, bias, dtype, scale_dtype, zero_point_dtype,
                       m, n, k,      bits,  group_size};
                   glm4::quantized_matmul_cpu(
                       glm4::checked_quantized_matmul(arguments, glm4::Layout::tiles, swiglu),
                       activation_group, n_threads, variant);
               });

    module.def("flash_decode_cpu",
               [](Buffer out, Buffer lse, Buffer q, Buffer k, Buffer v, Buffer block_table,
                  Buffer seq_lens, Buffer k_scale, Buffer v_scale, int dtype, int format,
                  float scale, const std::vector<int64_t>& sizes,
                  const std::vector<int64_t>& strides, int n_threads, const std::string& variant) {
                   py::gil_scoped_release release;
                   glm4::flash_decode_cpu(
                       glm4::checked_flash_decode(out, lse, q, k, v, block_table, seq_lens, k_scale,
                                                  v_scale, dtype, format, scale, sizes, strides),
                       n_threads, variant);
               });

#ifdef GLM4_CUDA_VERSION
    module.def("quantized_matmul_cuda",
               [](Buffer y, Buffer x, Buffer packed, Buffer scale, Buffer zero_point, Buffer bias,
                  int dtype, int scale_dtype, int zero_point_dtype, int64_t m, int64_t n, int64_t k,
                  int bits, int64_t group_size, int device, std::uintptr_t stream) {
                   py::gil_scoped_release release;
                   const glm4::Arguments arguments{
                       y, x, packed, scale, zero_point, bias, dtype, scale_dtype, zero_point_dtype,
                       m, n, k,      bits,  group_size};
                   glm4::quantized_matmul_cuda(
                       glm4::checked_quantized_matmul(arguments, glm4::Layout::rows, false), device,
                       stream);
               });
#endif
}
