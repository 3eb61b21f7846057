// The Python module glm4_kernels._C: conversions only. Tensors cross as (address, bytes), or, where
// that would take too long, as they are (direct.h); the checks that give good messages are in
// Python, those that memory safety needs beside each op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/ceilings.h"
#include "cpu/decode_advance.h"
#include "cpu/features.h"
#include "cpu/merge_attention.h"
#include "cpu/norm.h"
#include "cpu/rope.h"
#include "cpu/sample.h"
#include "cpu/simd.h"
#include "cpu/swiglu.h"
#include "direct.h"
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

PYBIND11_MODULE(_C, module) {
    module.def("build_info", build_info);

    module.def("learn_torch", [](py::module torch) { glm4::learn_torch(torch.ptr()); });
    module.def("direct_call", [](const std::string& op, py::function otherwise) {
        return py::reinterpret_steal<py::object>(glm4::direct_call(op, otherwise.ptr()));
    });

    const py::call_guard<py::gil_scoped_release> no_gil;
    module.def("decode_advance_cpu", glm4::decode_advance_cpu, no_gil);
    module.def("merge_attention_cpu", glm4::merge_attention_cpu, no_gil);
    module.def(
        "norm_cpu",
        [](Buffer y, Buffer scale, Buffer residual_out, Buffer x, Buffer residual,
           Buffer post_weight, Buffer weight, int dtype, int y_dtype, bool rounds_as_hf,
           int64_t n_rows, int64_t n_cols, int64_t group, int64_t stride_x, int64_t stride_residual,
           double eps, int n_threads, const std::string& variant) {
            glm4::norm_cpu(
                {y, scale, residual_out, x, residual, post_weight, weight, dtype, y_dtype,
                 rounds_as_hf, n_rows, n_cols, group, stride_x, stride_residual, eps},
                n_threads, variant);
        },
        no_gil);
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

    module.def(
        "flash_decode_cpu",
        [](Buffer out, Buffer lse, Buffer q, Buffer k, Buffer v, Buffer block_table,
           Buffer seq_lens, Buffer k_scale, Buffer v_scale, int dtype, int format, float scale,
           const std::array<int64_t, 8>& sizes, const std::array<int64_t, 14>& strides,
           int n_threads, const std::string& variant) {
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
