"""OpenVINO with compressed weights: its defaults, and fp32 with dynamic quantisation."""

from __future__ import annotations

from functools import partial

import numpy as np
import openvino
from openvino import opset13 as ops

from benchmarks.peers import Contender, Layer, Problem, repeated

DYNAMIC = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}


def contenders() -> list[Contender]:
    int4, int8 = "weights symmetric, groups of 128", "weights symmetric, per channel"
    quantised = "activations int8, groups of 128"
    return [
        Contender(
            "openvino int4 g128",
            4,
            f"{int4}; activations as OpenVINO chooses",
            partial(int4_of, {}),
        ),
        Contender("openvino int4 g128 dq128", 4, f"{int4}; {quantised}", partial(int4_of, DYNAMIC)),
        Contender("openvino int8 dq128", 8, f"{int8}; {quantised}", partial(int8_of, DYNAMIC)),
    ]


def int4_of(settings: dict[str, str], problem: Problem) -> Layer:
    r, k = problem.rows.shape
    groups = problem.rows.reshape(r, k // 128, 128)
    furthest = np.take_along_axis(groups, np.abs(groups).argmax(2)[:, :, None], 2)
    scale = (furthest / -8).astype(np.float16)
    q = np.clip(np.rint(groups / scale.astype(np.float32)), -8, 7).astype(np.int8)
    nibbles = (q[:, :, 0::2] & 15) | (q[:, :, 1::2] & 15) << 4
    packed = repeated(nibbles.astype(np.uint8), problem.repeats)
    scale = repeated(scale, problem.repeats)
    tensor = openvino.Tensor(packed.ravel(), [problem.n, k // 128, 128], openvino.Type.i4)
    weight = ops.multiply(
        ops.convert(openvino.op.Constant(tensor, shared_memory=False), "f16"), ops.constant(scale)
    )
    weight = ops.reshape(weight, ops.constant(np.array([problem.n, k])), False)
    return layer(problem, weight, packed.nbytes + scale.nbytes, settings)


def int8_of(settings: dict[str, str], problem: Problem) -> Layer:
    scale = (np.abs(problem.rows).max(1, keepdims=True) / 127).astype(np.float16)
    q = np.clip(np.rint(problem.rows / scale.astype(np.float32)), -127, 127).astype(np.int8)
    q, scale = repeated(q, problem.repeats), repeated(scale, problem.repeats)
    weight = ops.multiply(ops.convert(ops.constant(q), "f16"), ops.constant(scale))
    return layer(problem, weight, q.nbytes + scale.nbytes, settings)


def layer(problem: Problem, weight: openvino.Node, nbytes: int, settings: dict[str, str]) -> Layer:
    x = ops.parameter([-1, problem.k], np.float32, name="x")
    product = ops.matmul(x, ops.convert(weight, "f32"), False, True)
    model = openvino.Model([product], [x], "linear")
    core = openvino.Core()
    settings = settings | {
        "INFERENCE_NUM_THREADS": str(problem.threads),
        "NUM_STREAMS": "1",
        "PERFORMANCE_HINT": "LATENCY",
    }

    def run(request: openvino.InferRequest, x: openvino.Tensor) -> openvino.InferRequest:
        request.set_input_tensor(x)
        request.infer()
        return request

    return Layer(
        nbytes=nbytes,
        copies=[
            core.compile_model(model, "CPU", settings).create_infer_request()
            for _ in range(problem.copies(nbytes))
        ],
        input=openvino.Tensor,
        run=run,
        output=lambda request: request.get_output_tensor().data.copy(),
    )
