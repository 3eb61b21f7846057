"""ONNX Runtime: MatMulNBits (4 and 8 bits), and DynamicQuantizeMatMul."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import _pybind_state

from benchmarks.peers import Contender, Layer, Problem, repeated


def contenders() -> list[Contender]:
    onnxruntime.set_global_thread_pool_sizes(int(os.environ["OMP_NUM_THREADS"]), 1)
    forms = (("int4 b128", 4, 128), ("int4 b32", 4, 32), ("int8 b128", 8, 128))
    blocks = [
        Contender(
            f"onnxruntime {name}",
            bits,
            f"MatMulNBits, accuracy_level 4: weights symmetric, blocks of {block}; activations "
            "int8 per block",
            partial(matmul_n_bits, bits, block),
        )
        for name, bits, block in forms
    ]
    what = "DynamicQuantizeMatMul: weights symmetric, per channel; activations uint8 per tensor"
    return [*blocks, Contender("onnxruntime dynamic int8", 8, what, dynamic_quantize_matmul)]


def matmul_n_bits(bits: int, block: int, problem: Problem) -> Layer:
    r, k = problem.rows.shape
    n_blocks = -(-k // block)
    packed = np.zeros((r, n_blocks, block * bits // 8), np.uint8)
    scale = np.zeros(r * n_blocks, np.float32)
    zero = np.zeros((r, -(-n_blocks * bits // 8)), np.uint8)
    quantize = getattr(_pybind_state, f"quantize_matmul_{bits}bits")
    quantize(packed, np.ascontiguousarray(problem.rows.T), scale, zero, block, r, k, True)
    tensors = {
        "packed": repeated(packed, problem.repeats),
        "scale": repeated(scale.reshape(r, n_blocks), problem.repeats).ravel(),
    }
    node = helper.make_node(
        "MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft",
        K=k, N=problem.n, bits=bits, block_size=block, accuracy_level=4,
    )  # fmt: skip
    return layer(problem, node, tensors)


def dynamic_quantize_matmul(problem: Problem) -> Layer:
    scale = np.abs(problem.rows).max(1) / np.float32(127)
    q = np.rint(problem.rows / scale[:, None]).astype(np.int8)
    tensors = {
        "packed": np.ascontiguousarray(repeated(q, problem.repeats).T),
        "scale": repeated(scale, problem.repeats),
    }
    node = helper.make_node("DynamicQuantizeMatMul", ["x", *tensors], ["y"], domain="com.microsoft")
    return layer(problem, node, tensors)


def layer(problem: Problem, node: onnx.NodeProto, tensors: dict[str, np.ndarray]) -> Layer:
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", problem.k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", problem.n])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    del graph
    options = onnxruntime.SessionOptions()
    # One pool for all sessions: the threads of the last one would spin beside those of the next.
    options.use_per_session_threads = False
    options.log_severity_level = 3
    nbytes = sum(array.nbytes for array in tensors.values())

    def make() -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])

    def bind(x: np.ndarray) -> tuple[onnxruntime.OrtValue, onnxruntime.OrtValue]:
        y = np.empty((len(x), problem.n), np.float32)
        return onnxruntime.OrtValue.ortvalue_from_numpy(x), (
            onnxruntime.OrtValue.ortvalue_from_numpy(y)
        )

    return Layer(
        nbytes=nbytes,
        copies=[make() for _ in range(problem.copies(nbytes))],
        input=bind,
        run=run,
        output=lambda y: y.numpy(),
    )


def run(session: onnxruntime.InferenceSession, values: Any) -> onnxruntime.OrtValue:
    x, y = values
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", x)
    binding.bind_ortvalue_output("y", y)
    session.run_with_iobinding(binding)
    return y
